"""How RoIAlign lies on a mesh of devices: rows of the batch and channels are independent.

A box reads its own row and every channel is for itself, so a device computes its part of the crops
from its part of the features and nothing is exchanged.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from regionjax.ops.roi_align.sampling import Boxes

ROW_AXES = ("data", "fsdp")
CHANNEL_AXIS = "tensor"


def on_mesh(run: Callable[[jax.Array, Boxes], jax.Array], x: jax.Array, boxes: Boxes) -> jax.Array:
  """`run(x, boxes)` on every device's own rows and channels.

  For kernels, which XLA can't split by itself. Rows or channels that an axis of the mesh doesn't
  divide are computed by all of its devices alike. Without a mesh it is `run(x, boxes)`.

  Args:
    run: takes and returns arrays with rows first and channels last, of five axes.
    x: the features, or the cotangent of the crops.
  """
  mesh = _mesh(x)
  if mesh is None:
    return run(x, boxes)
  rows, channels = _axes(mesh, x.shape)
  whole, by_row = PartitionSpec(rows, None, None, None, channels), PartitionSpec(rows)
  return jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(whole, Boxes(by_row, by_row, by_row)),
    out_specs=whole,
    axis_names=set(_auto(mesh)),
    check_vma=False,
  )(x, boxes)


def local_shape(x: jax.Array) -> tuple[int, ...]:
  """The shape of what `on_mesh` gives to each device."""
  mesh = _mesh(x)
  if mesh is None:
    return x.shape
  rows, channels = _axes(mesh, x.shape)
  b, *rest, c = x.shape
  for axis in rows:
    b //= mesh.shape[axis]
  return b, *rest, c // (mesh.shape[channels] if channels else 1)


def _mesh(x: jax.Array) -> AbstractMesh | None:
  """The mesh of x, or else of the context, where the compiler splits arrays over it."""
  mesh = jax.typeof(x).sharding.mesh
  mesh = jax.sharding.get_abstract_mesh() if mesh.empty else mesh
  return mesh if _auto(mesh) else None


def _auto(mesh: AbstractMesh) -> list[str]:
  """Names of the axes that no caller's `shard_map` has taken."""
  return [n for n, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto]


def _axes(mesh: AbstractMesh, shape: tuple[int, ...]) -> tuple[tuple[str, ...], str | None]:
  """The axes of the mesh that split rows, and the one that splits channels."""
  names, chosen, b = _auto(mesh), (), shape[0]
  for name in ROW_AXES:
    if name in names and b % mesh.shape[name] == 0:
      chosen, b = (*chosen, name), b // mesh.shape[name]
  split = CHANNEL_AXIS in names and shape[-1] % mesh.shape[CHANNEL_AXIS] == 0
  return chosen, CHANNEL_AXIS if split else None

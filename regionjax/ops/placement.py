"""How an op that XLA can't split by itself lies on a mesh of devices.

For kernels whose rows are independent, and whose heads or channels are: each device runs them on
its own part and nothing is exchanged. What an axis of the mesh doesn't divide is computed by all of
its devices alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

ROW_AXES = ("data", "fsdp")
SPLIT_AXIS = "tensor"


def mesh_of(x: jax.Array) -> AbstractMesh | None:
  """The mesh of x, or else of the context, where the compiler splits arrays over it."""
  mesh = jax.typeof(x).sharding.mesh
  mesh = jax.sharding.get_abstract_mesh() if mesh.empty else mesh
  return mesh if _auto(mesh) else None


def row_axes(mesh: AbstractMesh, rows: int) -> tuple[str, ...]:
  """The axes of the mesh that split so many rows."""
  chosen: tuple[str, ...] = ()
  for name in ROW_AXES:
    if name in _auto(mesh) and rows % mesh.shape[name] == 0:
      chosen, rows = (*chosen, name), rows // mesh.shape[name]
  return chosen


def split_axis(mesh: AbstractMesh, *sizes: int) -> str | None:
  """The axis that splits heads or channels, if it divides all of `sizes`."""
  if SPLIT_AXIS not in _auto(mesh) or any(size % mesh.shape[SPLIT_AXIS] for size in sizes):
    return None
  return SPLIT_AXIS


def on_mesh(
  run: Callable[..., Any], mesh: AbstractMesh, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
  """`run` in a `shard_map` over the axes that no caller's has taken."""
  return jax.shard_map(
    run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(_auto(mesh)),
    check_vma=False,
  )  # fmt: skip


def _auto(mesh: AbstractMesh) -> list[str]:
  """Names of the axes that no caller's `shard_map` has taken."""
  return [n for n, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto]

"""How RoIAlign lies on a mesh of devices: rows of the batch and channels are independent.

A box reads its own row and every channel is for itself, so a device computes its part of the crops
from its part of the features and nothing is exchanged.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from regionjax.ops import placement
from regionjax.ops.roi_align.sampling import Boxes


def on_mesh(run: Callable[[jax.Array, Boxes], jax.Array], x: jax.Array, boxes: Boxes) -> jax.Array:
  """`run(x, boxes)` on every device's own rows and channels.

  For kernels, which XLA can't split by itself. Rows or channels that an axis of the mesh doesn't
  divide are computed by all of its devices alike. Without a mesh it is `run(x, boxes)`.

  Args:
    run: takes and returns arrays with rows first and channels last, of five axes.
    x: the features, or the cotangent of the crops.
  """
  mesh = placement.mesh_of(x)
  if mesh is None:
    return run(x, boxes)
  rows = placement.row_axes(mesh, x.shape[0])
  channels = placement.split_axis(mesh, x.shape[-1])
  whole, by_row = PartitionSpec(rows, None, None, None, channels), PartitionSpec(rows)
  specs = (whole, Boxes(by_row, by_row, by_row))
  return placement.on_mesh(run, mesh, specs, whole)(x, boxes)


def local_shape(x: jax.Array) -> tuple[int, ...]:
  """The shape of what `on_mesh` gives to each device."""
  mesh = placement.mesh_of(x)
  if mesh is None:
    return x.shape
  b, *rest, c = x.shape
  channels = placement.split_axis(mesh, c)
  for axis in placement.row_axes(mesh, b):
    b //= mesh.shape[axis]
  return b, *rest, c // (mesh.shape[channels] if channels else 1)

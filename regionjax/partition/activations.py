"""Where activations lie: one function, which does nothing without a mesh."""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, PartitionSpec

from regionjax.mesh import AXES, BATCH_AXES

Array = jax.Array


def constrain(x: Array, *axes: str | None) -> Array:
  """Says over which axes of the current mesh (`jax.set_mesh`) an activation is split.

  Args:
    x: any array, traced or not.
    axes: for each dimension 'batch' (rows: over `data` and `fsdp`), an axis of the mesh, or None
      for whole. Fewer than the dimensions: the rest is whole. A dimension that its axis doesn't
      divide (one row on eight devices, three key heads) is left to the compiler: unlike parameters,
      activations are no state that a mistake here would keep forever in eight copies.

  Returns:
    x. Without a mesh, on a mesh of one device and inside `shard_map` nothing is added to the
    program.
  """
  sizes = mesh_sizes()
  if math.prod(sizes.values()) == 1:
    return x
  dims = []
  for size, axis in zip(x.shape, axes):
    names = BATCH_AXES if axis == "batch" else () if axis is None else (axis,)
    fits = size % math.prod(sizes[name] for name in names) == 0
    dims.append((names or None) if fits else PartitionSpec.UNCONSTRAINED)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*dims))


def row_shards(rows: int) -> int:
  """Into how many parts the current mesh splits a batch of `rows`; 1 where it can't, or without."""
  sizes = mesh_sizes()
  shards = math.prod(sizes.get(name, 1) for name in BATCH_AXES)
  return shards if rows % shards == 0 else 1


def mesh_sizes() -> dict[str, int]:
  """Axes of the current mesh that the compiler may use -> their sizes; {} without our mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  auto = [name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto]
  return {name: mesh.shape[name] for name in AXES} if set(AXES) <= set(auto) else {}

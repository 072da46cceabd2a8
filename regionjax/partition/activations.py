"""Where activations lie: one function, which does nothing without a mesh."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from regionjax.mesh import AXES, BATCH_AXES

Array = jax.Array


def constrain(x: Array, *axes: str | tuple[str, int] | None) -> Array:
  """Says over which axes of the current mesh (`jax.set_mesh`) an activation is split.

  Args:
    x: any array, traced or not.
    axes: for each dimension 'batch' (rows: over `data` and `fsdp`), an axis of the mesh, an axis
      with the number of things in this dimension that must not be cut (heads), or None for whole.
      Fewer than the dimensions: the rest is whole. A dimension that its axis doesn't divide (one
      row on eight devices, three key heads) is left to the compiler: unlike parameters, activations
      are no state that a mistake here would keep forever in eight copies.

  Returns:
    x. Without a mesh, on a mesh of one device and inside `shard_map` nothing is added to the
    program.
  """
  sizes = mesh_sizes()
  if math.prod(sizes.values()) == 1:
    return x
  return jax.lax.with_sharding_constraint(x, _spec(x.shape, axes, sizes))


def _spec(
  shape: Sequence[int], axes: Sequence[str | tuple[str, int] | None], sizes: Mapping[str, int]
) -> PartitionSpec:
  dims = []
  for size, axis in zip(shape, axes):
    axis, units = axis if isinstance(axis, tuple) else (axis, size)
    names = BATCH_AXES if axis == "batch" else () if axis is None else (axis,)
    names = tuple(name for name in names if sizes[name] > 1)
    fits = units % math.prod(sizes[name] for name in names) == 0
    dims.append((names or None) if fits else PartitionSpec.UNCONSTRAINED)
  return PartitionSpec(*dims)


def whole(kernel: Array, dtype: Any, *axes: str | tuple[str, int] | None) -> Array:
  """A layer's parameter in the compute dtype, whole over `fsdp` from here on.

  Said once, so that it is gathered once: left to the compiler, each product gathers the kernel in
  the shape that it likes best, and libtpu moves the split into heads from an activation to one
  product's kernel (three gathers of q, k, v and o in a step, instead of two). The gradient goes
  back to where the parameter lies; without saying so every device would add up the whole of it.

  Args:
    kernel: one layer's.
    dtype: of the result.
    axes: how it lies, as for `constrain`.
  """
  sizes = mesh_sizes()
  if sizes.get("fsdp", 1) == 1:
    return kernel.astype(dtype)
  own = _spec(kernel.shape, axes, sizes)
  return gather(kernel, own, _spec(kernel.shape, axes, sizes | {"fsdp": 1}), dtype, kernel.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def gather(x: Array, own: PartitionSpec, whole: PartitionSpec, dtype: Any, stored: Any) -> Array:
  """x as `whole` says, in another dtype, and its gradient as `own` says, in `stored`, x's dtype."""
  return _gather_forward(x, own, whole, dtype, stored)[0]


def _gather_forward(
  x: Array, own: PartitionSpec, whole: PartitionSpec, dtype: Any, stored: Any
) -> tuple[Array, None]:
  del stored
  # Both said: what a loop keeps of x in this dtype would else be kept whole.
  y = jax.lax.with_sharding_constraint(x.astype(dtype), own)
  return jax.lax.with_sharding_constraint(y, whole), None


def _gather_backward(
  own: PartitionSpec, whole: PartitionSpec, dtype: Any, stored: Any, _: None, cotangent: Array
) -> tuple[Array]:
  del whole, dtype
  return (jax.lax.with_sharding_constraint(cotangent, own).astype(stored),)


gather.defvjp(_gather_forward, _gather_backward)


def keep_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
  """A remat policy: everything is kept for the backward pass, but no kernel that was gathered.

  All layers' together would be the whole model on every device. What `constrain` returns isn't kept
  either, but made again from what it was given, which is.
  """
  return primitive.name != "sharding_constraint"


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

"""Puts leaves on devices: each reads its own slice of the files, and no host holds the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from regionjax.weights.leaves import Leaf, as_leaf
from regionjax.weights.tensors import Tensor

Progress = Callable[[str, int, int], None]


def place(
  leaves: Mapping[str, Leaf | Tensor],
  shardings: Mapping[str, Sharding] | Sharding,
  *,
  dtype: Any = None,
  progress: Progress | None = None,
) -> dict[str, jax.Array]:
  """Reads leaves onto devices, slice by slice.

  A slice that several devices of this process want (a replicated leaf) is read once. On several
  hosts each calls this with the same leaves and reads only what its own devices hold.

  Args:
    leaves: by path, as a conversion's plan or an open release gives them.
    shardings: one for all, or one for each path.
    dtype: of the arrays; None keeps each leaf's. Cast on the host, slice by slice.
    progress: called with (path, leaves done, leaves in all).

  Returns:
    Committed arrays by path.

  Raises:
    KeyError: a leaf without a sharding.
    ValueError: a shape that its sharding cannot divide, in jax's words. As for a leaf without one,
      nothing has been read.
  """
  if isinstance(shardings, Sharding):
    shardings = dict.fromkeys(leaves, shardings)
  for path, leaf in leaves.items():
    _check(path, tuple(leaf.shape), shardings[path])
  arrays = {}
  for done, (path, values) in enumerate(leaves.items(), 1):
    leaf = as_leaf(values)
    arrays[path] = _place(leaf, shardings[path], np.dtype(leaf.dtype if dtype is None else dtype))
    if progress:
      progress(path, done, len(leaves))
  return arrays


def _check(path: str, shape: tuple[int, ...], sharding: Sharding) -> None:
  """jax's own checks, which don't know the name, before minutes of reading."""
  try:
    jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
    sharding.shard_shape(shape)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None


def _place(leaf: Leaf, sharding: Sharding, dtype: np.dtype) -> jax.Array:
  shape = tuple(leaf.shape)
  wanted: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape))
    wanted.setdefault(bounds, []).append(device)
  shards = []
  for bounds, devices in wanted.items():
    block = leaf.read(tuple(slice(*pair) for pair in bounds)).astype(dtype, copy=False)
    shards += [jax.device_put(block, device) for device in devices]
  return jax.make_array_from_single_device_arrays(shape, sharding, shards)

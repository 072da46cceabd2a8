"""The key-value cache: which slots a token may read, and how tokens are appended.

Axes: b rows, t new tokens, s cache slots, k key heads, h channels of a head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def cache_mask(length_b: Array, *, new: int, size: int) -> Array:
  """Which cache slots the `new` tokens appended after `length_b` may read: up to their own.

  Args:
    length_b: [B] int32, tokens in each row's cache before the append.
    new: T, tokens appended to every row (padding at their end included).
    size: S, slots of the cache.

  Returns:
    [B, T, S] bool.
  """
  own_bt = length_b[:, None] + jnp.arange(new)[None, :]
  return jnp.arange(size)[None, None, :] <= own_bt[:, :, None]


def append(cache_bksh: Array, new_bkth: Array, length_b: Array) -> Array:
  """Writes new keys or values behind each row's own end.

  Rows are ragged: row b gets slots length_b[b] .. length_b[b] + T - 1. What would fall past the
  cache's end is dropped, so right padding needs no room.

  Args:
    cache_bksh: [B, K, S, H].
    new_bkth: [B, K, T, H], cast to the cache's dtype.
    length_b: [B] int32.

  Returns:
    The cache, [B, K, S, H].
  """
  t = new_bkth.shape[2]

  def row(cache_ksh: Array, new_kth: Array, length: Array) -> Array:
    slots = length + jnp.arange(t)
    return cache_ksh.at[:, slots].set(new_kth, mode="drop", unique_indices=True)

  return jax.vmap(row)(cache_bksh, new_bkth.astype(cache_bksh.dtype), length_b)

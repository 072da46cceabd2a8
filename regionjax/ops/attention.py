"""Scaled dot-product attention with grouped key heads, and the key-value cache.

Axes: b rows, t queries, s keys, n query heads, k key heads, g = n / k queries per key head,
h channels of a head, e = n * h.

Heads stand before positions in every array: a batched matmul then reads contiguous matrices. With
positions first, XLA on a CPU copies the whole cache to transpose it, in every decode step (1,024
slots of 32 heads of 128 channels: 13 ms instead of 1.6), and training attention takes 1.4 x.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

Array = jax.Array

# What a logit becomes that must not count. Finite: a row without any key gives no NaN.
MASKED = -1e30

# Blocks of queries in causal attention, each reading only the keys up to its own end: 5/8 of the
# work of the full square, in time and in FLOPs. Short rows are not worth the extra calls.
QUERY_BLOCKS = 4
MIN_BLOCKED = 256


def split_heads(x_bte: Array, heads: int) -> Array:
  """[B, T, N*H] to [B, N, T, H]."""
  b, t, e = x_bte.shape
  return jnp.swapaxes(x_bte.reshape(b, t, heads, e // heads), 1, 2)


def merge_heads(x_bnth: Array) -> Array:
  """[B, N, T, H] to [B, T, N*H]."""
  b, n, t, h = x_bnth.shape
  return jnp.swapaxes(x_bnth, 1, 2).reshape(b, t, n * h)


def attend(q_bnth: Array, k_bksh: Array, v_bksh: Array, mask_bts: Array | None = None) -> Array:
  """softmax(q k / sqrt(H)) v with an f32 softmax.

  Args:
    q_bnth: [B, N, T, H].
    k_bksh: [B, K, S, H]; K divides N, query head n reads key head n // (N / K).
    v_bksh: [B, K, S, H].
    mask_bts: [B, T, S] bool, True where the query may look; None lets it look everywhere.

  Returns:
    [B, N, T, H] in q's dtype. A query that may look nowhere gets the mean of all values.
  """
  b, n, t, h = q_bnth.shape
  groups = n // k_bksh.shape[1]
  # The queries that share a key head are rows of one matrix.
  q_bkxh = (q_bnth * h**-0.5).reshape(b, n // groups, groups * t, h)
  scores = jnp.einsum("bkxh,bksh->bkxs", q_bkxh, k_bksh, preferred_element_type=jnp.float32)
  if mask_bts is not None:
    scores = jnp.where(jnp.tile(mask_bts, (1, groups, 1))[:, None], scores, MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(v_bksh.dtype)
  return jnp.einsum("bkxs,bksh->bkxh", weights, v_bksh).reshape(b, n, t, h)


# Attention weights are recomputed in the backward pass, never kept. [B, N, T, T] would be much of a
# training step's memory (a third with 384 tokens in the tiny preset, 0.5 GB per row and layer with
# 2,048 in the 7B), and writing and reading them takes as long as computing them again.
@functools.partial(jax.checkpoint, prevent_cse=False)
def attend_packed(q_bnth: Array, k_bkth: Array, v_bkth: Array, segment_ids_bt: Array) -> Array:
  """Causal attention inside each packed segment.

  Args:
    q_bnth: [B, N, T, H].
    k_bkth: [B, K, T, H].
    v_bkth: [B, K, T, H].
    segment_ids_bt: [B, T] int32. Tokens of one segment see each other; padding (id 0) sees only
      padding and no token sees it.

  Returns:
    [B, N, T, H] in q's dtype.
  """
  t = segment_ids_bt.shape[1]
  size = t if t < MIN_BLOCKED else -(-t // QUERY_BLOCKS)
  blocks = []
  for start in range(0, t, size):
    end = min(start + size, t)
    mask_bts = packed_mask(segment_ids_bt, start=start, end=end)
    blocks.append(attend(q_bnth[:, :, start:end], k_bkth[:, :, :end], v_bkth[:, :, :end], mask_bts))
  return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=2)


def packed_mask(segment_ids_bt: Array, *, start: int, end: int) -> Array:
  """Which keys 0 .. end-1 the queries start .. end-1 may look at: [B, end-start, end] bool."""
  same = segment_ids_bt[:, start:end, None] == segment_ids_bt[:, None, :end]
  return same & (jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :])[None]


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

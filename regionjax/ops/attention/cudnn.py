"""Attention on an NVIDIA GPU by cuDNN's flash kernel: causal, inside segments, grouped key heads.

`jax.nn.dot_product_attention` gives cuDNN no segments, but takes a mask, which it adds inside the
kernel as a bias [B, 1, T, T] (8 MiB for a row of 2,048 tokens; the weights of its 32 heads would be
256 MiB). On an H100 with two rows of the 7B decoder that is 2.4 x as fast as the XLA form forward,
2.2 x with the gradients, in a quarter of the memory (tests/release/h100.log). The offsets of packed
segments that cuDNN also knows are no public API.

Axes: b rows, t tokens, n query heads, k key heads, h channels of a head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from regionjax.ops.attention.by_heads import on_mesh

Array = jax.Array

MAX_HEAD = 128  # from compute capability 9.0 on 256, which no published decoder has
LEAST_CAPABILITY = 8.0


def takes(shape: tuple[int, ...], dtype: jnp.dtype) -> bool:
  """Whether the kernel takes queries of this shape, [B, N, T, H], where there is such a GPU."""
  *_, t, h = shape
  fits = t > 0 and t % 64 == 0 and h % 8 == 0 and 0 < h <= MAX_HEAD
  return fits and dtype in (jnp.bfloat16, jnp.float16)


def available() -> bool:
  """Whether jax's default device is a GPU that has the kernel: jax can't even trace it elsewhere.

  Compiled ahead of time for a GPU that isn't there, a program has the XLA form.
  """
  device = jax.local_devices()[0]
  if device.platform != "gpu":
    return False
  try:  # '9.0' of NVIDIA's, 'gfx942' of AMD's
    return float(getattr(device, "compute_capability", "")) >= LEAST_CAPABILITY
  except ValueError:
    return False


def forward(q_bnth: Array, k_bkth: Array, v_bkth: Array, segment_ids_bt: Array) -> Array:
  """The attended values, [B, N, T, H]."""
  return on_mesh(_forward, (q_bnth, k_bkth, v_bkth), segment_ids_bt)


def forward_saving(
  q_bnth: Array, k_bkth: Array, v_bkth: Array, segment_ids_bt: Array
) -> tuple[Array, Array]:
  """The attended values, and zeros [B, N, T] that `backward` doesn't read."""
  out_bnth = forward(q_bnth, k_bkth, v_bkth, segment_ids_bt)
  return out_bnth, jnp.zeros(q_bnth.shape[:3], jnp.float32)


def backward(
  q_bnth: Array,
  k_bkth: Array,
  v_bkth: Array,
  segment_ids_bt: Array,
  out_bnth: Array,
  logsumexp_bnt: Array,
  cotangent_bnth: Array,
) -> tuple[Array, Array, Array]:
  """Gradients of q, k and v. Runs the forward kernel again: jax has no name for its statistics."""
  del out_bnth, logsumexp_bnt
  return on_mesh(_backward, (q_bnth, k_bkth, v_bkth, cotangent_bnth), segment_ids_bt)


def _forward(segment_ids_bt, q_bnth, k_bkth, v_bkth):
  same_bts = segment_ids_bt[:, :, None] == segment_ids_bt[:, None, :]
  out_btnh = jax.nn.dot_product_attention(
    *(jnp.swapaxes(x, 1, 2) for x in (q_bnth, k_bkth, v_bkth)),
    mask=same_bts[:, None], is_causal=True, implementation="cudnn",
  )  # fmt: skip
  return jnp.swapaxes(out_btnh, 1, 2)


def _backward(segment_ids_bt, q_bnth, k_bkth, v_bkth, cotangent_bnth):
  _, pullback = jax.vjp(lambda *qkv: _forward(segment_ids_bt, *qkv), q_bnth, k_bkth, v_bkth)
  return pullback(cotangent_bnth)

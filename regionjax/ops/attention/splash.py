"""Attention on a TPU by jax's splash kernel: causal, inside segments, grouped key heads.

The library's kernel (`jax.experimental.pallas.ops.tpu.splash_attention`) goes over blocks of
queries and keys with a running softmax in f32, skips the blocks that causality hides, and compares
segment ids inside the others. A row of ids is a row's own, hence one kernel per row by `vmap`.

Axes: b rows, t tokens, n query heads, k key heads, h channels of a head.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from regionjax.ops.attention.by_heads import on_mesh

Array = jax.Array

LANES = 128  # of a TPU's registers; blocks of tokens are multiples
SUBLANES = 8
# The compiler takes heads of any multiple of 8 channels, padded to whole registers on the chip.
# Wider than 256 (no published decoder has them) blocks of 512 in f32 would not surely fit.
MAX_HEAD = 256
# Tokens of a block of queries and of keys, at most. A step of the kernel's grid costs about a third
# of a microsecond whatever it does, and a block's keys and values are fetched once per block of
# queries, so larger is better, up to what a causal row then wastes on its diagonal: with 2,048
# tokens, blocks of 512 compute 10 of 16, of 1,024 3 of 4. A block of scores in f32 is 1 MiB; the
# backward kernels hold four of them, and the compiler gives a kernel 16 MiB of VMEM.
MAX_BLOCK = 512


def takes(shape: tuple[int, ...], dtype: jnp.dtype) -> bool:
  """Whether the kernel takes queries of this shape, [B, N, T, H]."""
  *_, t, h = shape
  fits = t > 0 and t % LANES == 0 and h % SUBLANES == 0 and 0 < h <= MAX_HEAD
  return fits and dtype in (jnp.float32, jnp.bfloat16)


def block_size(tokens: int) -> int:
  """The largest multiple of LANES up to MAX_BLOCK that divides a row of `tokens`."""
  return max(n for n in range(LANES, MAX_BLOCK + 1, LANES) if tokens % n == 0)


def forward(
  q_bnth: Array, k_bkth: Array, v_bkth: Array, segment_ids_bt: Array, *, interpret: bool
) -> Array:
  """The attended values, [B, N, T, H]."""
  return on_mesh(
    functools.partial(_forward, save=False, interpret=interpret),
    (q_bnth, k_bkth, v_bkth), segment_ids_bt,
  )  # fmt: skip


def forward_saving(
  q_bnth: Array, k_bkth: Array, v_bkth: Array, segment_ids_bt: Array, *, interpret: bool
) -> tuple[Array, Array]:
  """The attended values, and the logarithm of each softmax's denominator, [B, N, T] f32."""
  return on_mesh(
    functools.partial(_forward, save=True, interpret=interpret),
    (q_bnth, k_bkth, v_bkth), segment_ids_bt,
  )  # fmt: skip


def backward(
  q_bnth: Array,
  k_bkth: Array,
  v_bkth: Array,
  segment_ids_bt: Array,
  out_bnth: Array,
  logsumexp_bnt: Array,
  cotangent_bnth: Array,
  *,
  interpret: bool,
) -> tuple[Array, Array, Array]:
  """Gradients of q, k and v from what `forward_saving` gave."""
  return on_mesh(
    functools.partial(_backward, interpret=interpret),
    (q_bnth, k_bkth, v_bkth, out_bnth, logsumexp_bnt, cotangent_bnth), segment_ids_bt,
  )  # fmt: skip


def _forward(segment_ids_bt, q_bnth, k_bkth, v_bkth, *, save: bool, interpret: bool):
  kernel = _kernel(q_bnth.shape, save=save, interpret=interpret)

  def row(q_nth, k_kth, v_kth, ids_t):
    return kernel(q_nth, k_kth, v_kth, segment_ids=_library().SegmentIds(ids_t, ids_t))

  with _precision(q_bnth.dtype):
    found = jax.vmap(row)(_scaled(q_bnth), k_bkth, v_bkth, segment_ids_bt)
  return (found[0], found[1][0]) if save else found


def _backward(
  segment_ids_bt, q_bnth, k_bkth, v_bkth, out_bnth, logsumexp_bnt, cotangent_bnth, *, interpret
):
  kernel = _kernel(q_bnth.shape, save=False, interpret=interpret)
  settings = {name: value for name, value in kernel.kwargs.items()}

  def row(q_nth, k_kth, v_kth, ids_t, out_nth, logsumexp_nt, g_nth):
    ids = _library().SegmentIds(ids_t, ids_t)
    saved = (
      q_nth, k_kth, v_kth, ids, None, out_nth, logsumexp_nt, kernel.dq_mask_info,
      kernel.dkv_mask_info,
    )  # fmt: skip
    # The rule itself, not `jax.vjp` of the kernel: that would run the forward kernel once more.
    found = _library()._splash_attention_bwd(**settings, res=saved, do=g_nth)
    return found[3:6]

  with _precision(q_bnth.dtype):
    dq_bnth, dk_bkth, dv_bkth = jax.vmap(row)(
      _scaled(q_bnth), k_bkth, v_bkth, segment_ids_bt, out_bnth, logsumexp_bnt, cotangent_bnth
    )
  return _scaled(dq_bnth), dk_bkth, dv_bkth


def _scaled(q_bnth: Array) -> Array:
  """As in `dense.attend`; the kernel itself doesn't scale."""
  return q_bnth * q_bnth.shape[-1] ** -0.5


def _precision(dtype: jnp.dtype):
  """The caller's precision of matrix products, as far as the kernel can have it.

  TPU kernels refuse products of bfloat16 in f32 precision, which for XLA are one exact pass.
  """
  chosen = jax.config.jax_default_matmul_precision
  return jax.default_matmul_precision("default" if dtype == jnp.bfloat16 else chosen)


def _kernel(shape: tuple[int, ...], *, save: bool, interpret: bool):
  """The kernel of a row of queries, made anew: what it holds are arrays of the current trace."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  _, n, t, _ = shape
  side = block_size(t)
  sizes = _library().BlockSizes(
    block_q=side, block_kv=side, block_q_dkv=side, block_kv_dkv=side, block_q_dq=side,
    block_kv_dq=side,
  )  # fmt: skip
  # Two backward kernels: the one that does both sums the parts of q's gradient in q's dtype, and
  # writes one per block of keys.
  return _library().make_splash_mha(
    masks.MultiHeadMask([masks.CausalMask((t, t))] * n), block_sizes=sizes, save_residuals=save,
    head_shards=1, q_seq_shards=1, interpret=interpret,
  )  # fmt: skip


def _library():
  # When it is needed: importing Pallas takes longer than many programs' attention.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

  return splash_attention_kernel

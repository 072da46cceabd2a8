"""Training attention, causal inside packed segments: the choice of implementation.

Axes: b rows, t tokens, n query heads, k key heads, h channels of a head.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from regionjax.ops.attention import cudnn, splash
from regionjax.ops.attention.dense import attend

Array = jax.Array

IMPLEMENTATIONS = ("xla", "splash", "cudnn")

# What a remat policy calls the result and, with splash, the statistics of its softmax. Who keeps
# both doesn't run the forward pass again, except with cuDNN.
CHECKPOINT_NAME = "attention"

# Blocks of queries in causal attention, each reading only the keys up to its own end: 5/8 of the
# work of the full square, in time and in FLOPs. Short rows are not worth the extra calls.
QUERY_BLOCKS = 4
MIN_BLOCKED = 256


def attend_packed(
  q_bnth: Array,
  k_bkth: Array,
  v_bkth: Array,
  segment_ids_bt: Array,
  *,
  implementation: str | None = None,
) -> Array:
  """Causal attention inside each packed segment.

  Args:
    q_bnth: [B, N, T, H].
    k_bkth: [B, K, T, H]; K divides N, query head n reads key head n // (N / K).
    v_bkth: [B, K, T, H].
    segment_ids_bt: [B, T] int32. Tokens of one segment see each other; padding (id 0) sees only
      padding and no token sees it.
    implementation: one of
      'xla': matrix products in blocks of queries. Its [B, N, T/4, T] weights go through memory and
        are computed again in the backward pass.
      'splash': jax's TPU kernel, whose weights never leave the chip; T, H and dtype as
        `splash.takes`. Elsewhere it is emulated, for tests. Reverse mode only.
      'cudnn': NVIDIA's kernel, likewise; as `cudnn.takes`, and only where there is such a GPU.
      None: 'splash' on a TPU and 'cudnn' on a GPU where they take the shapes, 'xla' otherwise.

  Returns:
    [B, N, T, H] in q's dtype. Values of other segments have a weight of exactly zero, in both
    directions; they must be finite, because 0 * NaN is NaN.

  On a mesh 'xla' is split by the compiler. The kernels are put into a `shard_map`, rows over `data`
  and `fsdp`, heads over `tensor`, see `regionjax.ops.placement`.

  Raises:
    ValueError: an unknown implementation, or one that doesn't take the shapes or isn't there.
  """
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f"attend_packed: implementation={implementation!r}, expected None or one of "
      f"{', '.join(map(repr, IMPLEMENTATIONS))}"
    )
  kernels = _kernels(q_bnth.shape, q_bnth.dtype, implementation)
  if not kernels:
    out_bnth = _attend_blocks_again(q_bnth, k_bkth, v_bkth, segment_ids_bt)
    return checkpoint_name(out_bnth, CHECKPOINT_NAME)
  return _packed(q_bnth, k_bkth, v_bkth, segment_ids_bt, kernels)


def _kernels(
  shape: tuple[int, ...], dtype: jnp.dtype, implementation: str | None
) -> tuple[str, ...]:
  """Names of the kernels that a program holds, each for its platform; none: the XLA form.

  'emulated' among them stands for splash on other platforms.

  Raises:
    ValueError: see `attend_packed`.
  """
  given = f"attend_packed: {implementation} doesn't take {dtype}{list(shape)}: it wants "
  if implementation == "splash" and not splash.takes(shape, dtype):
    raise ValueError(
      f"{given}float32 or bfloat16, tokens in multiples of {splash.LANES} and heads of "
      f"{splash.SUBLANES} to {splash.MAX_HEAD} channels in multiples of {splash.SUBLANES}"
    )
  if implementation == "cudnn" and not cudnn.takes(shape, dtype):
    raise ValueError(
      f"{given}bfloat16 or float16, tokens in multiples of 64 and heads of 8 to {cudnn.MAX_HEAD} "
      "channels in multiples of 8"
    )
  if implementation == "cudnn" and not cudnn.available():
    raise ValueError(
      "attend_packed: implementation='cudnn' needs an NVIDIA GPU of compute capability "
      f"{cudnn.LEAST_CAPABILITY} or more as jax's default device, which is "
      f"{jax.local_devices()[0].device_kind!r}; leave implementation out to have what fits"
    )
  named = {"xla": (), "splash": ("splash", "emulated"), "cudnn": ("cudnn",)}
  if implementation is not None:
    return named[implementation]
  chosen = ("splash",) if splash.takes(shape, dtype) else ()
  return (*chosen, "cudnn") if cudnn.takes(shape, dtype) and cudnn.available() else chosen


def attend_blocks(q_bnth: Array, k_bkth: Array, v_bkth: Array, segment_ids_bt: Array) -> Array:
  """The XLA form of `attend_packed`."""
  t = segment_ids_bt.shape[1]
  size = t if t < MIN_BLOCKED else -(-t // QUERY_BLOCKS)
  blocks = []
  for start in range(0, t, size):
    end = min(start + size, t)
    mask_bts = packed_mask(segment_ids_bt, start=start, end=end)
    blocks.append(attend(q_bnth[:, :, start:end], k_bkth[:, :, :end], v_bkth[:, :, :end], mask_bts))
  return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=2)


# Attention weights are recomputed in the backward pass, never kept. [B, N, T, T] would be much of a
# training step's memory (a third with 384 tokens in the tiny preset, 0.5 GB per row and layer with
# 2,048 in the 7B), and writing and reading them takes as long as computing them again.
_attend_blocks_again = jax.checkpoint(attend_blocks, prevent_cse=False)


def packed_mask(segment_ids_bt: Array, *, start: int, end: int) -> Array:
  """Which keys 0 .. end-1 the queries start .. end-1 may look at: [B, end-start, end] bool."""
  same = segment_ids_bt[:, start:end, None] == segment_ids_bt[:, None, :end]
  return same & (jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :])[None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _packed(
  q_bnth: Array, k_bkth: Array, v_bkth: Array, segment_ids_bt: Array, kernels: tuple[str, ...]
) -> Array:
  """Each kernel on its platform, and the XLA form on others."""
  args = (q_bnth, k_bkth, v_bkth, segment_ids_bt)
  return _by_platform("forward", attend_blocks, kernels, args)


def _forward_rule(q_bnth, k_bkth, v_bkth, segment_ids_bt, kernels):
  args = (q_bnth, k_bkth, v_bkth, segment_ids_bt)
  # Named here, outside of the choice by platform: a remat policy doesn't look into that one.
  out_bnth, logsumexp_bnt = checkpoint_name(
    _by_platform("forward_saving", _blocks_saving, kernels, args), CHECKPOINT_NAME
  )
  return out_bnth, (*args, out_bnth, logsumexp_bnt)


def _backward_rule(kernels, residuals, cotangent_bnth):
  args = (*residuals, cotangent_bnth)
  return *_by_platform("backward", _blocks_backward, kernels, args), None


_packed.defvjp(_forward_rule, _backward_rule)


def _blocks_saving(q_bnth, k_bkth, v_bkth, segment_ids_bt):
  out_bnth = attend_blocks(q_bnth, k_bkth, v_bkth, segment_ids_bt)
  # Zeros that the backward pass below doesn't read, so no compiled program holds them.
  return out_bnth, jnp.zeros(q_bnth.shape[:3], jnp.float32)


def _blocks_backward(q_bnth, k_bkth, v_bkth, segment_ids_bt, out, logsumexp, cotangent_bnth):
  del out, logsumexp  # computes both again
  _, pullback = jax.vjp(lambda *qkv: attend_blocks(*qkv, segment_ids_bt), q_bnth, k_bkth, v_bkth)
  return pullback(cotangent_bnth)


def _by_platform(direction: str, blocks, kernels: tuple[str, ...], args):
  """The platform is known when the program is lowered, not now: it may be compiled for another."""
  chosen = {}
  if "splash" in kernels:
    run = getattr(splash, direction)
    chosen["tpu"] = functools.partial(run, interpret=False)
    blocks = functools.partial(run, interpret=True) if "emulated" in kernels else blocks
  if "cudnn" in kernels:
    chosen["cuda"] = getattr(cudnn, direction)
  return jax.lax.platform_dependent(*args, **chosen, default=blocks)

"""Rotary position embedding in the half-split layout of the Hugging Face LLaMA.

Axes: b rows, t tokens, n heads, h channels of a head, f = h / 2 frequencies.
Channel i is rotated together with channel i + h/2 (Meta's own checkpoints pair 2i with 2i + 1; the
released Hugging Face weights are permuted to this layout).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from regionjax.config import RopeScaling

Array = jax.Array


def rope_table(
  positions_bt: Array, *, head_dim: int, base: float, scaling: RopeScaling | None = None
) -> tuple[Array, Array]:
  """Cosines and sines of every position, f32: bf16 angles are off by radians past position 256.

  Args:
    positions_bt: [B, T] int32.
    head_dim: H, even.
    base: the longest wavelength is about 2 pi times this, before scaling.
    scaling: see `RopeScaling`.

  Returns:
    (cos_btf, sin_btf), each [B, T, H/2] f32.
  """
  frequencies_f = jnp.asarray(frequencies(head_dim=head_dim, base=base, scaling=scaling))
  angles_btf = positions_bt.astype(jnp.float32)[:, :, None] * frequencies_f[None, None, :]
  return jnp.cos(angles_btf), jnp.sin(angles_btf)


def frequencies(*, head_dim: int, base: float, scaling: RopeScaling | None = None) -> np.ndarray:
  """Radians per position of each pair of channels.

  Args:
    head_dim: H, even.
    base, scaling: as for `rope_table`.

  Returns:
    [H/2] f32. Computed in f32 throughout, as transformers does: at position 100,000 another
    rounding of a frequency is another angle.
  """
  exponents_f = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
  plain_f = (1.0 / np.float32(base) ** exponents_f).astype(np.float32)
  return plain_f if scaling is None else plain_f / divisors(plain_f, scaling)


def divisors(frequencies_f: np.ndarray, scaling: RopeScaling) -> np.ndarray:
  """What a scaling divides each frequency by, [F] f32 for [F] f32.

  'llama3' agrees with transformers' `_compute_llama3_parameters`, 'linear' with its
  `_compute_linear_scaling_rope_parameters`.
  """
  factor = np.float32(scaling.factor)
  if scaling.kind == "linear":
    return np.full_like(frequencies_f, factor)
  low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
  turns_f = scaling.original_max_length * frequencies_f / np.float32(2 * np.pi)
  # 0 where a wavelength doesn't fit into the original length `low` times, 1 from `high` times on.
  kept_f = np.clip((turns_f - low) / (high - low), 0, 1)
  return (1 / ((1 - kept_f) / factor + kept_f)).astype(np.float32)


def apply_rope(x_bnth: Array, table: tuple[Array, Array]) -> Array:
  """Rotates queries or keys by their positions.

  Args:
    x_bnth: [B, N, T, H].
    table: what `rope_table` returned for the same B and T.

  Returns:
    [B, N, T, H] in x's dtype; the rotation itself is f32.
  """
  cos_b1tf, sin_b1tf = (a[:, None] for a in table)
  low, high = jnp.split(x_bnth.astype(jnp.float32), 2, axis=-1)
  rotated = (low * cos_b1tf - high * sin_b1tf, high * cos_b1tf + low * sin_b1tf)
  return jnp.concatenate(rotated, axis=-1).astype(x_bnth.dtype)

"""Rotary position embedding in the half-split layout of the Hugging Face LLaMA.

Axes: b rows, t tokens, n heads, h channels of a head, f = h / 2 frequencies.
Channel i is rotated together with channel i + h/2 (Meta's own checkpoints pair 2i with 2i + 1; the
released Hugging Face weights are permuted to this layout).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def rope_table(positions_bt: Array, *, head_dim: int, base: float) -> tuple[Array, Array]:
  """Cosines and sines of every position, f32: bf16 angles are off by radians past position 256.

  Args:
    positions_bt: [B, T] int32.
    head_dim: H, even.
    base: the longest wavelength is about 2 pi times this.

  Returns:
    (cos_btf, sin_btf), each [B, T, H/2] f32.
  """
  exponents_f = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
  frequencies_f = jnp.asarray(1.0 / np.float32(base) ** exponents_f, jnp.float32)
  angles_btf = positions_bt.astype(jnp.float32)[:, :, None] * frequencies_f[None, None, :]
  return jnp.cos(angles_btf), jnp.sin(angles_btf)


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

"""Normalisations. Statistics are f32 whatever the inputs, the result has the input's dtype.

Axes: d channels; `...` any leading axes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def rms_norm(x_d: Array, scale_d: Array, *, eps: float) -> Array:
  """Root-mean-square norm over the last axis (LLaMA): no mean is subtracted, no bias is added.

  Args:
    x_d: [..., D] of any float dtype.
    scale_d: [D].
    eps: added to the mean square.

  Returns:
    [..., D] in x's dtype.
  """
  x32 = x_d.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return (x32 * inverse * _like(scale_d, x32)).astype(x_d.dtype)


def layer_norm(x_d: Array, scale_d: Array, bias_d: Array, *, eps: float) -> Array:
  """Layer norm over the last axis.

  Args:
    x_d: [..., D] of any float dtype.
    scale_d: [D].
    bias_d: [D].
    eps: added to the variance.

  Returns:
    [..., D] in x's dtype.
  """
  x32 = x_d.astype(jnp.float32)
  centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
  inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
  return (centred * inverse * _like(scale_d, x32) + _like(bias_d, x32)).astype(x_d.dtype)


def group_norm(x_bhwc: Array, scale_c: Array, bias_c: Array, *, groups: int, eps: float) -> Array:
  """Group norm: statistics over an image's cells and the channels of a group.

  Args:
    x_bhwc: [B, H, W, C] of any float dtype.
    scale_c: [C].
    bias_c: [C].
    groups: of neighbouring channels; divides C.
    eps: added to the variance.

  Returns:
    [B, H, W, C] in x's dtype.
  """
  b, h, w, c = x_bhwc.shape
  x_bngi = x_bhwc.astype(jnp.float32).reshape(b, h * w, groups, c // groups)
  centred = x_bngi - jnp.mean(x_bngi, axis=(1, 3), keepdims=True)
  inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=(1, 3), keepdims=True) + eps)
  y_bhwc = (centred * inverse).reshape(b, h, w, c)
  return (y_bhwc * _like(scale_c, y_bhwc) + _like(bias_c, y_bhwc)).astype(x_bhwc.dtype)


def _like(v_d: Array, x_d: Array) -> Array:
  """A [D] vector as f32 with the rank of x: implicit rank promotion is an error in our tests."""
  return v_d.astype(jnp.float32).reshape((1,) * (x_d.ndim - 1) + (-1,))

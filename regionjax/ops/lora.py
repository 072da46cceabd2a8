"""Low-rank updates of linear maps (LoRA, arXiv 2106.09685): y = x W + x A B * scale.

Axes: d input channels, r the update's rank, e output channels; `...` any leading axes, l layers.
Computed as (x A) B: r is small, so both products together cost (d + e) * r / (d * e) of x W, and
A B, which is as large as W, exists only when it is merged into W (`models.lora.merge_lora`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax

Array = jax.Array


class LowRank(NamedTuple):
  """A map's update.

  Attributes:
    a_dr: [D, R].
    b_re: [R, E].
    scale: alpha / rank.
  """

  a_dr: Array
  b_re: Array
  scale: float


def lora(x_d: Array, a_dr: Array, b_re: Array, *, scale: float) -> Array:
  """x @ A @ B * scale over the last axis, in x's dtype.

  Args:
    x_d: [..., D].
    a_dr: [D, R], of any float dtype, as is B.
    b_re: [R, E].
    scale: alpha / rank.

  Returns:
    [..., E] in x's dtype.
  """
  x_xd = x_d.reshape(-1, x_d.shape[-1])  # one matrix of all rows, as in mlp.linear
  y_xr = x_xd @ a_dr.astype(x_d.dtype) * scale
  return (y_xr @ b_re.astype(x_d.dtype)).reshape(*x_d.shape[:-1], -1)

"""Convolutions over images.

Axes: b images, h w cells, s side of the window, c input and d output channels.
"""

from __future__ import annotations

import jax

Array = jax.Array


def conv2d(
  x_bhwc: Array, kernel_sscd: Array, bias_d: Array | None = None, *, stride: int = 1
) -> Array:
  """A convolution with zeros around the image, in x's dtype.

  Args:
    x_bhwc: [B, H, W, C].
    kernel_sscd: [S, S, C, D], S odd; cast to x's dtype.
    bias_d: [D] or None.
    stride: 1 keeps the size. With 2 and even sides, output cell (i, j) is centred on input cell
      (2i+1, 2j+1): zeros stand only behind the last row and column, as with TensorFlow's SAME.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), D].
  """
  y_bhwd = jax.lax.conv_general_dilated(
    x_bhwc, kernel_sscd.astype(x_bhwc.dtype), window_strides=(stride, stride), padding="SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )  # fmt: skip
  return y_bhwd if bias_d is None else y_bhwd + bias_d.astype(x_bhwc.dtype)[None, None, None]

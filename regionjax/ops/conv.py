"""Convolutions over images.

Axes: b images, h w cells of the input, y x cells of the result, s side of the window, c input and d
output channels; k the shifts of one axis' window.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from regionjax.ops import winograd

Array = jax.Array

IMPLEMENTATIONS = ("direct", "winograd")

# Where Winograd pays on a CPU: its transforms cost by channel what the products save by pairs of
# channels, and tiles have to share the kernel's. CPU time of XLA's direct convolution over that of
# Winograd (jax 0.10.2, AMD EPYC 9004): 1.06 with 256 channels, 1.4 with 1024 of 64x64 cells, a
# quarter of which is the kernel's transform, which levels with one kernel share.
WINOGRAD_WIDTH, WINOGRAD_TILES = 384, 32


def conv2d(
  x_bhwc: Array,
  kernel_sscd: Array,
  bias_d: Array | None = None,
  *,
  stride: int = 1,
  implementation: str | None = None,
) -> Array:
  """A convolution with zeros around the image, in x's dtype.

  Args:
    x_bhwc: [B, H, W, C].
    kernel_sscd: [S, S, C, D], S odd; cast to x's dtype.
    bias_d: [D] or None.
    stride: 1 keeps the size. With 2 and even sides, output cell (i, j) is centred on input cell
      (2i+1, 2j+1): zeros stand only behind the last row and column, as with TensorFlow's SAME.
    implementation: 'direct', XLA's own; 'winograd' (3x3 windows and stride 1, see
      `ops.winograd`), reverse mode only; or None for what is fastest: Winograd for wide
      convolutions on a CPU, whose direct one is slower than PyTorch's, and direct elsewhere.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), D].

  Raises:
    ValueError: an unknown implementation, or 'winograd' for another window or stride.
  """
  kernel_sscd = kernel_sscd.astype(x_bhwc.dtype)
  fits = kernel_sscd.shape[:2] == (3, 3) and stride == 1
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f"conv2d: implementation={implementation!r}, expected None or one of "
      f"{', '.join(map(repr, IMPLEMENTATIONS))}"
    )
  if implementation == "winograd" and not fits:
    raise ValueError(
      f"conv2d: a window of {kernel_sscd.shape[0]}x{kernel_sscd.shape[1]} with stride {stride}; "
      "'winograd' is for 3x3 with stride 1, leave implementation to None"
    )
  if implementation is None and fits and winograd_pays(x_bhwc.shape, kernel_sscd.shape):
    y_bhwd = _by_platform(x_bhwc, kernel_sscd, "direct")
  elif implementation == "winograd":
    y_bhwd = _by_platform(x_bhwc, kernel_sscd, "winograd")
  else:
    y_bhwd = _direct(x_bhwc, kernel_sscd, stride=stride)
  return y_bhwd if bias_d is None else y_bhwd + bias_d.astype(x_bhwc.dtype)[None, None, None]


def winograd_pays(x_shape: Sequence[int], kernel_shape: Sequence[int]) -> bool:
  """Whether Winograd is faster than the direct convolution on a CPU."""
  b, h, w, _ = x_shape
  tiles = b * -(-h // winograd.OUT) * -(-w // winograd.OUT)
  return min(kernel_shape[2:]) >= WINOGRAD_WIDTH and tiles >= WINOGRAD_TILES


def _direct(x_bhwc: Array, kernel_sscd: Array, *, stride: int = 1) -> Array:
  return jax.lax.conv_general_dilated(
    x_bhwc, kernel_sscd, window_strides=(stride, stride), padding="SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )  # fmt: skip


# The gradient is chosen by platform as well: differentiating the choice itself would save what
# either branch wants to keep.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _by_platform(x_bhwc: Array, kernel_sscd: Array, elsewhere: str) -> Array:
  """Winograd on a CPU, `elsewhere` on other platforms, which are known when lowering."""
  default = winograd.forward if elsewhere == "winograd" else _direct
  return jax.lax.platform_dependent(x_bhwc, kernel_sscd, cpu=winograd.forward, default=default)


def _forward_rule(x_bhwc: Array, kernel_sscd: Array, elsewhere: str):
  return _by_platform(x_bhwc, kernel_sscd, elsewhere), (x_bhwc, kernel_sscd)


def _backward_rule(elsewhere: str, saved: tuple[Array, Array], g_bhwd: Array):
  default = winograd.backward if elsewhere == "winograd" else _direct_backward
  return jax.lax.platform_dependent(*saved, g_bhwd, cpu=winograd.backward, default=default)


def _direct_backward(x_bhwc: Array, kernel_sscd: Array, g_bhwd: Array) -> tuple[Array, Array]:
  return jax.vjp(_direct, x_bhwc, kernel_sscd)[1](g_bhwd)


_by_platform.defvjp(_forward_rule, _backward_rule)


class Enlarged(NamedTuple):
  """A map given by a smaller one: rows @ x @ columns^T, each channel for itself.

  Attributes:
    x_bhwc: [B, H, W, C].
    rows_yh: float32 [Y, H], constant.
    columns_xw: float32 [X, W], constant.
  """

  x_bhwc: Array
  rows_yh: np.ndarray
  columns_xw: np.ndarray


def conv2d_enlarged(parts: Sequence[Enlarged], kernel_sscd: Array) -> Array:
  """The convolution (stride 1) of enlarged maps side by side, without enlarging them first.

  A convolution is a sum over the window's places of maps multiplied by a matrix of channels and
  then shifted; a linear enlargement commutes with the matrix. So the matrices are applied on the
  small maps, and rows and columns of the enlargement hold the shifts (zeros outside). Exact but
  for rounding: 11 instead of 302 GFLOP for 16x16 cells enlarged to 128x128 with 1024 channels.

  Args:
    parts: of one result size; their channels, in order, are the kernel's input channels.
    kernel_sscd: [S, S, C, D], S odd; cast to the maps' dtype.

  Returns:
    [B, Y, X, D] in the maps' dtype; the enlargement is computed in float32.
  """
  dtype = parts[0].x_bhwc.dtype
  side, _, _, d = kernel_sscd.shape
  matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  start, bands, columns = 0, [], []
  for x_bhwc, rows_yh, columns_xw in parts:
    b, h, w, c = x_bhwc.shape
    kernel = kernel_sscd[:, :, start : start + c].astype(dtype)
    start += c
    z_bshtwd = jnp.einsum(
      "bhwc,stcd->bshtwd", x_bhwc, kernel, preferred_element_type=jnp.float32,
      precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
    )  # fmt: skip
    rows_yk = jnp.broadcast_to(_shifted(rows_yh, side), (b, rows_yh.shape[0], side * h))
    bands.append(matmul(rows_yk, z_bshtwd.reshape(b, side * h, side * w * d)))
    columns.append(_shifted(columns_xw, side))
  y, x = len(parts[0].rows_yh), len(parts[0].columns_xw)
  band_bykd = jnp.concatenate([t.reshape(b, y, -1, d) for t in bands], axis=2)
  columns_xk = np.concatenate(columns, axis=1)
  columns_byxk = jnp.broadcast_to(columns_xk, (b, y, *columns_xk.shape))
  return matmul(columns_byxk, band_bykd).astype(dtype).reshape(b, y, x, d)


def enlarged_flops(
  sources: Sequence[tuple[int, int, int]], size_hw: tuple[int, int], features: int, *, side: int = 3
) -> tuple[float, float]:
  """FLOPs of `conv2d_enlarged` for one image: products with weights, and the enlargement.

  Args:
    sources: (height, width, channels) of the parts' maps.
    size_hw: of the result.
    features: D.
    side: S.
  """
  y, x = size_hw
  products = sum(2.0 * h * w * c * side**2 * features for h, w, c in sources)
  rows = sum(2.0 * y * (side * h) * (side * w) * features for h, w, _ in sources)
  columns = sum(2.0 * y * x * (side * w) * features for _, w, _ in sources)
  return products, rows + columns


def enlarged_pays(
  sources: Sequence[tuple[int, int, int]], size_hw: tuple[int, int], features: int, *, side: int = 3
) -> bool:
  """Whether `conv2d_enlarged` is the cheaper way, by a factor of 2 in FLOPs.

  Its enlargement is float32, several passes of a TPU's matrix unit, and Winograd halves the time of
  the other way on a CPU.
  """
  y, x = size_hw
  whole = 2.0 * y * x * side**2 * features * sum(c for _, _, c in sources)
  return 2 * sum(enlarged_flops(sources, size_hw, features, side=side)) <= whole


def _shifted(matrix_yh: np.ndarray, side: int) -> np.ndarray:
  """[Y, H] to [Y, S * H]: row y + s - S // 2 of the matrix for every place s, zeros outside."""
  reach = side // 2
  padded = np.pad(matrix_yh, ((reach, reach), (0, 0)))
  shifts = [padded[s : s + len(matrix_yh)] for s in range(side)]
  return np.concatenate(shifts, axis=1)

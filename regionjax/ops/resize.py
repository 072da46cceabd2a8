"""Bilinear resizing with aligned corners.

`jax.image.resize` samples at half-pixel centres; GPT4RoI's pyramid was trained with corner-aligned
grids, in which the first and last cell of both grids coincide.

Axes: B images, H and W cells, C channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def align_corners_matrix(source: int, target: int) -> np.ndarray:
  """Linear interpolation from `source` to `target` cells as a float32 [target, source] matrix.

  Cell i of the target reads position i * (source - 1) / (target - 1); a target of one cell reads
  position 0. Rows sum to 1.
  """
  if source < 1 or target < 1:
    raise ValueError(f"cannot resize {source} cells to {target}: both must be at least 1")
  step = (source - 1) / (target - 1) if target > 1 else 0.0
  position_t = np.arange(target, dtype=np.float64) * step
  distance_ts = np.abs(position_t[:, None] - np.arange(source, dtype=np.float64)[None, :])
  return np.maximum(0.0, 1.0 - distance_ts).astype(np.float32)


def resize_align_corners(x_bhwc: jax.Array, size_hw: tuple[int, int]) -> jax.Array:
  """Bilinear resize with aligned corners and no antialiasing, up or down.

  Equals `torch.nn.functional.interpolate(mode='bilinear', align_corners=True)`. The arithmetic is
  float32 whatever the input; the result has the input's dtype.

  Args:
    x_bhwc: [B, H, W, C].
    size_hw: (height, width) of the result.

  Returns:
    [B, height, width, C]; the input itself when the size is already right.

  Raises:
    ValueError: the input is not 4-dimensional or a size is not positive.
  """
  if x_bhwc.ndim != 4:
    raise ValueError(f"resize_align_corners takes [B, H, W, C], got shape {x_bhwc.shape}")
  matrices = (align_corners_matrix(s, t) for s, t in zip(x_bhwc.shape[1:3], size_hw))
  return interpolate(x_bhwc, *matrices)


def interpolate(x_bhwc: jax.Array, rows_yh: np.ndarray, columns_xw: np.ndarray) -> jax.Array:
  """rows @ x @ columns^T for every channel, in float32; the result has the input's dtype.

  Args:
    x_bhwc: [B, H, W, C].
    rows_yh: [Y, H], constant.
    columns_xw: [X, W], constant.

  Returns:
    [B, Y, X, C]; the input itself when both matrices are the identity.
  """
  matrices, formulas = (rows_yh, columns_xw), ("th,bhwc->btwc", "tw,bhwc->bhtc")
  y_bhwc = x_bhwc
  # Shrink before growing: the intermediate is then as small as it can be.
  for axis in sorted((0, 1), key=lambda a: matrices[a].shape[0] / matrices[a].shape[1]):
    matrix_ts = matrices[axis]
    if np.array_equal(matrix_ts, np.eye(len(matrix_ts))):
      continue
    y_bhwc = jnp.einsum(
      formulas[axis], jnp.asarray(matrix_ts), y_bhwc.astype(jnp.float32),
      precision=jax.lax.Precision.HIGHEST,
    )  # fmt: skip
  return y_bhwc.astype(x_bhwc.dtype)

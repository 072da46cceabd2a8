"""Where RoIAlign samples, and the interpolation weights along one axis.

The rule (torchvision and mmcv with `aligned=True` and a fixed `sampling_ratio` S) for one axis of
n cells, a box from lo to hi in [0, 1] and P bins:

  start = lo*n - 1/2, bin = (hi*n - 1/2 - start) / P
  pos[p, s] = start + p*bin + (s + 1/2)*bin/S
  a sample counts only when -1 <= pos <= n, and is then read at clip(pos, 0, n-1) by linear
  interpolation; a bin is the mean of its samples.

Both the clipping and the test are per axis and the mean over the S*S samples of a bin factors, so
the whole of RoIAlign is separable.

Axes: B rows, R boxes, P bins, S samples of a bin along the axis, N cells along the axis.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Boxes(NamedTuple):
  """Boxes as the implementations take them: finite everywhere, in known images."""

  xyxy_br4: jax.Array  # float32, normalised
  image_br: jax.Array  # int32 in [0, K)
  valid_br: jax.Array  # bool; the others give zeros


def sample_positions(
  lo_br: jax.Array, hi_br: jax.Array, *, cells: int, bins: int, ratio: int
) -> tuple[jax.Array, jax.Array]:
  """Sample positions in cells, clipped to the map, and whether each of them counts.

  Args:
    lo_br, hi_br: float32, the box's ends along the axis, normalised.
    cells, bins, ratio: n, P and S above.

  Returns:
    (pos_brps float32 in [0, n-1], inside_brps bool).
  """
  start_br = lo_br * cells - 0.5
  bin_br = ((hi_br * cells - 0.5) - start_br) / bins
  bin_br11, start_br11 = bin_br[..., None, None], start_br[..., None, None]
  p_11p1 = jnp.arange(bins, dtype=jnp.float32)[None, None, :, None]
  s_111s = jnp.arange(ratio, dtype=jnp.float32)[None, None, None, :] + 0.5
  # torchvision's order of operations, so that both agree on which side of an edge a sample lies.
  pos_brps = start_br11 + p_11p1 * bin_br11 + s_111s * bin_br11 / ratio
  inside_brps = (pos_brps >= -1.0) & (pos_brps <= cells)  # false for NaN and for overflow
  pos_brps = jnp.where(inside_brps, pos_brps, 0.0)
  return jnp.clip(pos_brps, 0.0, cells - 1.0), inside_brps


def axis_weights(
  lo_br: jax.Array, hi_br: jax.Array, *, cells: int, bins: int, ratio: int
) -> jax.Array:
  """The bins of one axis as rows of weights over its cells: [B, R, P, N] float32."""
  pos_brps, inside_brps = sample_positions(lo_br, hi_br, cells=cells, bins=bins, ratio=ratio)
  cell_n = jnp.arange(cells, dtype=jnp.float32)[None, None, None, None, :]
  w_brpsn = jnp.maximum(0.0, 1.0 - jnp.abs(pos_brps[..., None] - cell_n))
  return jnp.mean(jnp.where(inside_brps[..., None], w_brpsn, 0.0), axis=3)

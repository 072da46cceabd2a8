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


def locate(
  lo: jax.Array,
  hi: jax.Array,
  index: jax.Array,
  sample: jax.Array | int,
  *,
  cells: int,
  bins: int,
  ratio: int,
) -> tuple[jax.Array, jax.Array]:
  """Where sample `sample` of bin `index` lies, clipped to the map, and whether it counts.

  The rule above for scalars or for arrays that broadcast; float32, in torchvision's order of
  operations, so that both agree on which side of an edge a sample lies.
  """  # fmt: skip
  start = lo * cells - 0.5
  bin_size = ((hi * cells - 0.5) - start) / bins
  pos = start + index * bin_size + (sample + 0.5) * bin_size / ratio
  inside = (pos >= -1.0) & (pos <= cells)  # false for NaN and for overflow
  return jnp.clip(jnp.where(inside, pos, 0.0), 0.0, cells - 1.0), inside


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
  p_11p1 = jnp.arange(bins, dtype=jnp.float32)[None, None, :, None]
  s_111s = jnp.arange(ratio, dtype=jnp.float32)[None, None, None, :]
  lo_br11, hi_br11 = lo_br[..., None, None], hi_br[..., None, None]
  return locate(lo_br11, hi_br11, p_11p1, s_111s, cells=cells, bins=bins, ratio=ratio)


def axis_weights(
  lo_br: jax.Array, hi_br: jax.Array, *, cells: int, bins: int, ratio: int
) -> jax.Array:
  """The bins of one axis as rows of weights over its cells: [B, R, P, N] float32."""
  pos_brps, inside_brps = sample_positions(lo_br, hi_br, cells=cells, bins=bins, ratio=ratio)
  cell_n = jnp.arange(cells, dtype=jnp.float32)[None, None, None, None, :]
  w_brpsn = jnp.maximum(0.0, 1.0 - jnp.abs(pos_brps[..., None] - cell_n))
  return jnp.mean(jnp.where(inside_brps[..., None], w_brpsn, 0.0), axis=3)

"""Rasters of shapes, and the share of each patch that they cover.

A `window` (x1, y1, x2, y2) in normalised coordinates is the part of the image that a raster shows.
A pixel belongs to a shape when its centre does (PIL's polygon fill paints every pixel that an edge
touches, half a pixel too many on each side: at 4 samples per patch that is an eighth of a patch).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from regionjax.regions.checks import Path
from regionjax.regions.masks import Mask

Window = tuple[float, float, float, float]
UNIT: Window = (0.0, 0.0, 1.0, 1.0)


def fill_rings(rings: Sequence[Path], height: int, width: int, window: Window = UNIT) -> np.ndarray:
  """Union of closed rings (even-odd inside each) -> bool [height, width].

  A ring so thin that it holds no pixel centre gives the pixels its outline runs through, so the
  result has a True pixel wherever a ring meets the window.
  """
  out = np.zeros((height, width), bool)
  for ring in rings:
    xy = _to_raster(ring, height, width, window)
    rows, cols = _extent(xy, height, width)
    inside = _fill_ring(xy - (cols.start, rows.start), *out[rows, cols].shape)
    if inside.any():
      out[rows, cols] |= inside
    else:
      out |= _stamp(_walk(np.concatenate([xy, xy[:1]])), height, width)
  return out


def _fill_ring(xy: np.ndarray, height: int, width: int) -> np.ndarray:
  """Even-odd scan conversion: each edge toggles the pixels right of it on the rows it crosses."""
  x1, y1 = xy[:, 0], xy[:, 1]
  x2, y2 = np.concatenate([x1[1:], x1[:1]]), np.concatenate([y1[1:], y1[:1]])
  above = y1[:, None] <= np.arange(height) + 0.5
  edge, row = np.nonzero(above != np.concatenate([above[1:], above[:1]]))
  # Only edges that cross a row are divided, and those have y1 != y2.
  x = x1[edge] + (row + 0.5 - y1[edge]) * ((x2 - x1)[edge] / (y2 - y1)[edge])
  col = np.minimum(np.maximum(np.ceil(x - 0.5), 0), width).astype(np.intp)
  toggles = np.bincount(row * (width + 1) + col, minlength=height * (width + 1))
  toggles = toggles.astype(np.uint8).reshape(height, width + 1)[:, :width]
  return (np.cumsum(toggles, axis=1, dtype=np.uint8) & 1).view(bool)


def stroke_paths(
  paths: Sequence[Path],
  brush: tuple[float, float],
  height: int,
  width: int,
  *,
  window: Window = UNIT,
) -> np.ndarray:
  """Paths drawn with an elliptic brush of `brush` = (x, y) diameters, normalised -> bool [H, W].

  The pixels under the path itself are always set, however thin the brush.
  """
  steps = np.concatenate([_walk(_to_raster(path, height, width, window)) for path in paths])
  out = _stamp(steps, height, width)
  rx = brush[0] / 2 * width / (window[2] - window[0])
  ry = brush[1] / 2 * height / (window[3] - window[1])
  rows, cols = _extent(steps, height, width, reach=(rx, ry))
  steps -= (cols.start, rows.start)
  out[rows, cols] |= _sweep(steps, (rx, max(ry, 1e-9)), *out[rows, cols].shape)
  return out


def _sweep(xy: np.ndarray, radii: tuple[float, float], height: int, width: int) -> np.ndarray:
  """Union of ellipses around points [M, 2]: each adds 1 where its chord of a row begins and takes
  it off where the chord ends."""
  rx, ry = radii
  x, y = xy[:, 0] - 0.5, xy[:, 1:]
  rows = np.floor(y) + np.arange(-math.ceil(ry), math.ceil(ry) + 1)
  chord = 1 - ((rows + 0.5 - y) / ry) ** 2
  which, reach = np.nonzero((chord > 0) & (rows >= 0) & (rows < height))
  x, half = x[which], rx * np.sqrt(chord[which, reach])
  start = np.minimum(np.maximum(np.ceil(x - half), 0), width)
  end = np.minimum(np.maximum(np.ceil(x + half), start), width)
  base = rows[which, reach] * (width + 1)
  n = height * (width + 1)
  ends = np.bincount((base + end).astype(np.intp), minlength=n)
  diff = np.bincount((base + start).astype(np.intp), minlength=n) - ends
  return np.cumsum(diff.reshape(height, width + 1)[:, :width], axis=1) > 0


def _extent(
  xy: np.ndarray, height: int, width: int, *, reach: tuple[float, float] = (0.0, 0.0)
) -> tuple[slice, slice]:
  """Rows and columns of the raster that a shape can touch (at least one of each)."""
  x, y = xy[:, 0], xy[:, 1]
  left = min(max(int(x.min() - reach[0]), 0), width - 1)
  top = min(max(int(y.min() - reach[1]), 0), height - 1)
  right = min(max(int(x.max() + reach[0]) + 1, left + 1), width)
  bottom = min(max(int(y.max() + reach[1]) + 1, top + 1), height)
  return slice(top, bottom), slice(left, right)


def _to_raster(path: Path, height: int, width: int, window: Window) -> np.ndarray:
  x1, y1, x2, y2 = window
  return (np.array(path) - (x1, y1)) * (width / (x2 - x1), height / (y2 - y1))


def _walk(xy: np.ndarray) -> np.ndarray:
  """Points along a path, in raster units, at most a pixel apart on each axis: [N, 2] -> [M, 2]."""
  step = xy[1:] - xy[:-1]
  counts = np.ceil(np.maximum(np.abs(step[:, 0]), np.abs(step[:, 1]))).astype(np.intp) + 1
  which = np.repeat(np.arange(len(step)), counts)
  first = np.cumsum(counts) - counts
  t = (np.arange(counts.sum()) - first[which]) / np.maximum(counts - 1, 1)[which]
  return xy[which] + t[:, None] * step[which]


def _stamp(xy: np.ndarray, height: int, width: int) -> np.ndarray:
  """The pixels that hold the points; a point on the far border belongs to the last pixel."""
  out = np.zeros((height, width), bool)
  x, y = xy[:, 0], xy[:, 1]
  use = (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
  col = np.minimum(x[use].astype(np.intp), width - 1)
  out[np.minimum(y[use].astype(np.intp), height - 1), col] = True
  return out


def box_pixels(low: float, high: float, n: int) -> slice:
  """The pixels of one axis whose centres lie in [low, high), at least the one around the middle."""
  start, stop = math.ceil(low * n - 0.5), math.ceil(high * n - 0.5)
  if stop <= start:
    start = min(int((low + high) / 2 * n), n - 1)
    stop = start + 1
  return slice(start, stop)


def resample_mask(
  mask: Mask,
  height: int,
  width: int,
  *,
  scale: tuple[float, float] = (1.0, 1.0),
  offset: tuple[float, float] = (0.0, 0.0),
) -> np.ndarray:
  """The mask after xy_new = xy * scale + offset on another raster: bool [height, width].

  Each new pixel takes the value at its centre. If all of a small mask falls between centres, the
  pixels that hold its own pixels' centres are set; all False only if none of it is inside.
  """
  rows = np.floor(((np.arange(height) + 0.5) / height - offset[1]) / scale[1] * mask.height)
  cols = np.floor(((np.arange(width) + 0.5) / width - offset[0]) / scale[0] * mask.width)
  rows, cols = rows.astype(np.intp) - mask.top, cols.astype(np.intp) - mask.left
  row_in = (rows >= 0) & (rows < mask.rows)
  col_in = (cols >= 0) & (cols < mask.cols)
  out = np.zeros((height, width), bool)
  out[np.ix_(row_in, col_in)] = mask.crop[np.ix_(rows[row_in], cols[col_in])]
  if not out.any():
    r, c = np.nonzero(mask.crop)
    y = ((r + mask.top + 0.5) / mask.height * scale[1] + offset[1]) * height
    x = ((c + mask.left + 0.5) / mask.width * scale[0] + offset[0]) * width
    out = _stamp(np.stack([x, y], axis=1), height, width)
  return out


# Share of each patch covered. All return float32 [gh * gw], row-major, never all zero.


@functools.lru_cache(maxsize=64)
def _edges(n: int) -> np.ndarray:
  return np.arange(n + 1) / n


def _share(low: float, high: float, n: int) -> np.ndarray:
  """Share of each of n cells of [0, 1] that [low, high] covers."""
  cut = np.minimum(np.maximum(_edges(n), low), high)
  return (cut[1:] - cut[:-1]) * n


def cover_box(box: Window, grid_hw: tuple[int, int]) -> np.ndarray:
  """Exact area shares; a box without area counts as the point at its middle."""
  x1, y1, x2, y2 = box
  if x2 <= x1 or y2 <= y1:
    return cover_point((x1 + x2) / 2, (y1 + y2) / 2, grid_hw)
  rows, cols = _share(y1, y2, grid_hw[0]), _share(x1, x2, grid_hw[1])
  return np.multiply.outer(rows, cols).astype(np.float32).ravel()


def cover_point(x: float, y: float, grid_hw: tuple[int, int]) -> np.ndarray:
  """Bilinear weights on patch centres, sum 1; beyond the outer centres the border patch has all."""
  gh, gw = grid_hw
  u = min(max(x * gw - 0.5, 0.0), gw - 1.0)
  v = min(max(y * gh - 0.5, 0.0), gh - 1.0)
  c, r = min(int(u), max(gw - 2, 0)), min(int(v), max(gh - 2, 0))
  fu, fv = u - c, v - r
  out = np.zeros(gh * gw, np.float32)
  for row, wy in ((r, 1 - fv), (r + 1, fv)):
    for col, wx in ((c, 1 - fu), (c + 1, fu)):
      if wx * wy > 0:
        out[row * gw + col] = wx * wy
  return out


def cover_shape(
  paths: Sequence[Path],
  box: Window,
  grid_hw: tuple[int, int],
  *,
  brush: tuple[float, float] | None = None,
) -> np.ndarray:
  """Rings (brush None) or strokes, from 4 to 16 samples per patch side.

  Only the patches that the enclosing box touches are sampled, with about 64 samples along the
  longer side of that window whatever its size: small shapes get fine samples at the same cost.
  """
  gh, gw = grid_hw
  r0, r1 = _patches(box[1], box[3], gh)
  c0, c1 = _patches(box[0], box[2], gw)
  rows, cols = r1 - r0, c1 - c0
  s = min(max(64 // max(rows, cols), 4), 16)
  window = (c0 / gw, r0 / gh, c1 / gw, r1 / gh)
  if brush is None:
    raster = fill_rings(paths, rows * s, cols * s, window)
  else:
    raster = stroke_paths(paths, brush, rows * s, cols * s, window=window)
  out = np.zeros((gh, gw), np.float32)
  # Two small-integer sums: 8 us where one over both axes takes 20.
  hits = np.add.reduce(raster.view(np.uint8).reshape(rows, s, cols * s), axis=1, dtype=np.uint8)
  hits = np.add.reduce(hits.reshape(rows, cols, s), axis=2, dtype=np.uint16)
  out[r0:r1, c0:c1] = hits * np.float32(1 / (s * s))
  return out.ravel()


def _patches(low: float, high: float, n: int) -> tuple[int, int]:
  start = min(int(low * n), n - 1)
  return start, min(max(math.ceil(high * n), start + 1), n)


def cover_mask(mask: Mask, grid_hw: tuple[int, int]) -> np.ndarray:
  """Area shares of the mask's own raster; exact up to 256 x 256 stored pixels.

  Of larger ones every k-th row or column is read, with 8 or more left per patch: 12 ms become
  0.06 at 2880 x 3840 pixels on a 16 x 16 grid, and no share of an ellipse is off by more than 0.03.
  """
  gh, gw = grid_hw
  strides = [(max(mask.height // (8 * gh), 1), max(mask.width // (8 * gw), 1)), (1, 1)]
  for ky, kx in strides if mask.rows * mask.cols > 65_536 else strides[1:]:
    rows, wy = _blocks(mask.top, mask.rows, mask.height, cells=gh, stride=ky)
    cols, wx = _blocks(mask.left, mask.cols, mask.width, cells=gw, stride=kx)
    part = mask.crop if ky == kx == 1 else mask.read(rows)[:, cols]
    cover = wy @ part.astype(np.float32) @ wx.T
    if cover.any():  # a mask of thin lines may lie between the rows that were read
      break
  return np.minimum(cover, 1, out=cover).ravel()


@functools.lru_cache(maxsize=1024)
def _blocks(
  first: int, count: int, total: int, *, cells: int, stride: int
) -> tuple[np.ndarray, np.ndarray]:
  """Pixels first..first+count of `total` in blocks of `stride`: the index of each block's sample,
  and the share of each cell that each block covers, float32 [cells, blocks]."""
  low = np.arange(first, first + count, stride, dtype=np.float64)
  high = np.minimum(low + stride, first + count)
  edges = _edges(cells)[:, None] * total
  overlap = np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1])
  share = np.maximum(overlap, 0) * (cells / total)
  return ((low + high) / 2).astype(np.intp) - first, share.astype(np.float32)

"""Regions of every kind drawn by hypothesis, and point-by-point oracles of what they cover."""

import functools
import itertools
import math

import numpy as np
from hypothesis import strategies as st

from regionjax.regions import Region

unit = st.floats(0, 1)
pair = st.tuples(unit, unit)


@st.composite
def masks(draw):
  h, w = draw(st.integers(1, 24)), draw(st.integers(1, 24))
  array = np.random.default_rng(draw(st.integers(0, 10_000))).random((h, w)) < draw(
    st.floats(0.1, 1)
  )
  array[draw(st.integers(0, h - 1)), draw(st.integers(0, w - 1))] = True
  return Region.from_mask(array)


points = st.builds(Region.point, unit, unit)
boxes = st.builds(
  lambda a, b, c, d: Region.box(min(a, c), min(b, d), max(a, c), max(b, d), empty="keep"),
  unit, unit, unit, unit,
)  # fmt: skip
polygons = st.builds(
  lambda rings: Region.polygon(*rings, empty="keep"),
  st.lists(st.lists(pair, min_size=3, max_size=12), min_size=1, max_size=2),
)
scribbles = st.builds(
  lambda paths, width: Region.scribble(*paths, width=width),
  st.lists(st.lists(pair, min_size=2, max_size=12), min_size=1, max_size=2),
  st.floats(0.001, 0.3),
)
regions = st.one_of(points, boxes, polygons, masks(), scribbles)


def circle(x, y, rx, ry, n=40):
  t = np.linspace(0, 2 * np.pi, n, endpoint=False)
  return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in t]


@functools.lru_cache(maxsize=4)
def mask_array(mask):
  return mask.array


def brute_inside(region, x, y):
  """Scalar oracle: is the point in the region?"""
  if region.kind == "box":
    x1, y1, x2, y2 = region.box_xyxy
    return x1 <= x < x2 and y1 <= y < y2
  if region.kind == "mask":
    array = mask_array(region.mask)
    return array[int(y * array.shape[0]), int(x * array.shape[1])]
  if region.kind == "polygon":
    for ring in (region.points, *region.rings):
      odd = False
      for (ax, ay), (bx, by) in zip(ring, ring[1:] + ring[:1]):
        if (ay <= y) != (by <= y) and ax + (y - ay) / (by - ay) * (bx - ax) <= x:
          odd = not odd
      if odd:
        return True
    return False
  wx, wy = region.brush
  for path in (region.points, *region.rings):
    for (ax, ay), (bx, by) in itertools.pairwise(path):
      px, py = (x - ax) / wx, (y - ay) / wy
      qx, qy = (bx - ax) / wx, (by - ay) / wy
      t = min(max((px * qx + py * qy) / max(qx * qx + qy * qy, 1e-12), 0), 1)
      if math.hypot(px - t * qx, py - t * qy) <= 0.5:
        return True
  return False


def brute_raster(region, h, w):
  return np.array(
    [[brute_inside(region, (c + 0.5) / w, (r + 0.5) / h) for c in range(w)] for r in range(h)]
  )

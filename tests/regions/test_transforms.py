"""Regions move with their images through letterbox, squash and crop."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from region_cases import brute_inside, circle, pair

from regionjax.images import ImageTransform
from regionjax.regions import (
  Region,
  RegionError,
)


@st.composite
def fat_regions(draw):
  """Regions many pixels thick, so that a raster shows them faithfully."""
  # The odd shift keeps edges off pixel centres, where rounding would decide.
  x, y = draw(st.floats(0.22, 0.78)) + 0.0011317, draw(st.floats(0.22, 0.78)) - 0.0007123
  rx, ry = draw(st.floats(0.08, 0.2)), draw(st.floats(0.08, 0.2))
  kind = draw(st.sampled_from(["box", "polygon", "scribble", "mask"]))
  if kind == "box":
    return Region.box(x - rx, y - ry, x + rx, y + ry)
  if kind == "polygon":
    return Region.polygon(circle(x, y, rx, ry, draw(st.integers(3, 12))))
  if kind == "scribble":
    return Region.scribble(circle(x, y, rx, ry, 5)[:3], width=0.1)
  yy, xx = (np.mgrid[:450, :600] + 0.5) / np.array([450, 600])[:, None, None]
  return Region.from_mask(np.hypot((xx - x) / rx, (yy - y) / ry) < 1)


@settings(max_examples=80, deadline=None)
@given(region=fat_regions(), scale=st.tuples(st.floats(0.4, 2.5), st.floats(0.4, 2.5)), shift=pair)
def test_transform_moves_pixels_and_regions_alike(region, scale, shift):
  """Letterbox (scale < 1) and crop (scale > 1) in any mixture: each pixel of the result shows
  what the original region has at the place that it came from."""
  n = 40
  offset = tuple(s * (1 - k) for s, k in zip(shift, scale))
  y = ((np.arange(n) + 0.5) / n - offset[1]) / scale[1]
  x = ((np.arange(n) + 0.5) / n - offset[0]) / scale[0]
  want = np.array(
    [[0 <= u < 1 and 0 <= v < 1 and brute_inside(region, u, v) for u in x] for v in y]
  )
  judged = np.ones((n, n), bool)
  if region.kind == "scribble":  # clipped by its path: near a border half a brush may differ
    judged &= np.minimum(x, 1 - x) > 0.06
    judged &= (np.minimum(y, 1 - y) > 0.06)[:, None]
    rx, ry = (math.ceil(0.05 * s * n) + 1 for s in scale)
    judged[:ry], judged[n - ry :], judged[:, :rx], judged[:, n - rx :] = False, False, False, False
    want &= judged
  try:
    moved = region.transform(ImageTransform(scale, offset, (n, n)))
  except RegionError as error:
    assert error.reason == "empty"
    assert want.sum() == 0
    return
  assert moved.kind == region.kind
  got = moved.rasterize(n, n) & judged
  if not want.any():  # what is left is thinner than a pixel, and drawn one pixel wide
    assert got.sum() <= n
    return
  # They may differ only along the edge of the region, by a pixel of this raster or of the mask,
  # and not all to one side.
  around = np.lib.stride_tricks.sliding_window_view(np.pad(want, 2, mode="edge"), (5, 5))
  edge = around.any(axis=(2, 3)) != around.all(axis=(2, 3))
  assert not np.any((want != got) & ~edge)
  if want.sum() > 30:
    for axis in (0, 1):
      centres = [np.mean(np.nonzero(raster)[axis]) for raster in (want, got)]
      # A mask is moved by whole pixels of its own, here at most a quarter of a pixel: that can flip
      # the pixels of two opposite edges at once.
      assert abs(centres[0] - centres[1]) < (1.01 if region.kind == "mask" else 0.6)


def test_squash_is_identity():
  region = Region.from_mask(np.eye(5, dtype=bool))
  assert region.transform(ImageTransform((1.0, 1.0), (0.0, 0.0), (9, 9))) is region


def test_exact_letterbox_and_crop():
  letterbox = ImageTransform((1.0, 0.5), (0.0, 0.25), (64, 64))
  assert Region.box(0, 0, 1, 1).transform(letterbox) == Region.box(0, 0.25, 1, 0.75)
  assert Region.point(0.5, 1).transform(letterbox) == Region.point(0.5, 0.75)
  mask = Region.from_mask(np.ones((32, 64), bool)).transform(letterbox)
  assert mask.mask.array.shape == (64, 64) and mask.box_xyxy == (0, 0.25, 1, 0.75)
  scribble = Region.scribble([(0, 0), (1, 1)], width=0.1).transform(letterbox)
  assert scribble.brush == (0.1, 0.05)
  crop = ImageTransform((2.0, 1.0), (-0.5, 0.0), (64, 64))
  assert Region.box(0, 0, 0.5, 1).transform(crop) == Region.box(0, 0, 0.5, 1)
  mask = Region.from_mask(np.ones((32, 64), bool)).transform(crop)
  assert mask.mask.array.shape == (32, 32) and mask.mask.array.all()


@pytest.mark.parametrize(
  "region",
  [
    Region.point(0.1, 0.5),
    Region.box(0.0, 0.0, 0.2, 1.0),
    Region.polygon(circle(0.1, 0.5, 0.1, 0.1)),
    Region.scribble([(0.1, 0.1), (0.2, 0.9)], width=0.01),
  ],
  ids=lambda r: r.kind,
)
def test_nothing_left_after_a_crop(region):
  crop = ImageTransform((2.0, 1.0), (-0.5, 0.0), (64, 64))
  with pytest.raises(RegionError, match="letterbox") as error:
    region.transform(crop)
  assert error.value.reason == "empty"
  kept = region.transform(crop, empty="keep")
  assert kept.kind == region.kind and kept.box_xyxy[0] == 0 and kept.cover((8, 8)).sum() > 0


def test_a_mask_cropped_away_always_raises():
  array = np.zeros((10, 10), bool)
  array[:, 0] = True
  with pytest.raises(RegionError, match="mask: lies wholly outside"):
    Region.from_mask(array).transform(ImageTransform((2.0, 1.0), (-0.5, 0.0), (8, 8)), empty="keep")

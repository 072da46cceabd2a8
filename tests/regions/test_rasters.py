"""Rasters, cover of patches and enclosing boxes of regions, and how quick they are."""

import time
import timeit

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from region_cases import boxes, brute_raster, circle, masks, polygons, scribbles, unit

from regionjax.regions import (
  Region,
)


@settings(max_examples=60, deadline=None)
@given(region=st.one_of(boxes, polygons, masks()), h=st.integers(1, 20), w=st.integers(1, 20))
def test_raster_is_the_pixel_centres_inside(region, h, w):
  want = brute_raster(region, h, w)
  if want.any() and len(region.rings) == 0:
    # Centres that lie on an edge to the last bit may fall on either side.
    assert np.mean(region.rasterize(h, w) != want) <= 1 / (h * w)
  else:
    assert region.rasterize(h, w).any()


def test_scribble_raster():
  path = [(0.2, 0.3), (0.7, 0.35), (0.5, 0.8), (0.95, 0.9)]
  for width in (0.04, 0.1, 0.25):
    region = Region.scribble(path, [(0.1, 0.9), (0.2, 0.95)], width=width)
    want, got = brute_raster(region, 64, 96), region.rasterize(64, 96)
    assert np.mean(want != got) < 0.01
    assert not (want & ~got).sum() > 0.03 * want.sum()


@settings(max_examples=100, deadline=None)
@given(x=unit, y=unit, h=st.integers(1, 9), w=st.integers(1, 9))
def test_point_raster_and_cover(x, y, h, w):
  region = Region.point(x, y)
  (r,), (c,) = np.nonzero(region.rasterize(h, w))
  assert r <= y * h <= r + 1 and c <= x * w <= c + 1
  cover = region.cover((h, w)).reshape(h, w)
  assert cover.dtype == np.float32 and cover.sum() == pytest.approx(1, abs=1e-6)
  # Its centre of mass is the point, kept between the outer patch centres.
  rows, cols = (np.arange(h) + 0.5) / h, (np.arange(w) + 0.5) / w
  assert cover.sum(1) @ rows == pytest.approx(min(max(y, rows[0]), rows[-1]), abs=1e-5)
  assert cover.sum(0) @ cols == pytest.approx(min(max(x, cols[0]), cols[-1]), abs=1e-5)


@settings(max_examples=100, deadline=None)
@given(region=st.one_of(boxes, masks()), h=st.integers(1, 20), w=st.integers(1, 20))
def test_box_and_mask_cover_sum_to_the_area(region, h, w):
  cover = region.cover((h, w))
  assert cover.shape == (h * w,) and cover.dtype == np.float32
  assert cover.min() >= 0 and cover.max() <= 1 + 1e-6
  if region.kind == "mask":
    area = region.mask.array.mean()
  else:
    x1, y1, x2, y2 = region.box_xyxy
    area = (x2 - x1) * (y2 - y1)
  if area > 1e-9:
    assert cover.sum() / (h * w) == pytest.approx(area, rel=1e-4, abs=1e-6)
  assert cover.sum() > 0 or area < 1e-9


@pytest.mark.parametrize("grid", [(8, 8), (16, 16), (6, 20), (1, 1)])
@pytest.mark.parametrize(
  "region",
  [
    Region.box(0.13, 0.22, 0.61, 0.9),
    Region.polygon(circle(0.5, 0.45, 0.33, 0.2)),
    Region.polygon(circle(0.52, 0.47, 0.03, 0.04)),
    Region.polygon([(0.1, 0.1), (0.9, 0.15), (0.2, 0.3)], [(0.5, 0.6), (0.9, 0.9), (0.6, 0.95)]),
    Region.scribble([(0.1, 0.2), (0.6, 0.3), (0.9, 0.9)], width=0.08),
    Region.from_mask(np.hypot(*(np.mgrid[:50, :70] - [[[25]], [[30]]])) < 19),
  ],
  ids=["box", "circle", "small circle", "two rings", "scribble", "mask"],
)
def test_cover_agrees_with_a_fine_raster(region, grid):
  gh, gw = grid
  s = 640 // max(grid)
  fine = region.rasterize(gh * s, gw * s).reshape(gh, s, gw, s).mean(axis=(1, 3)).ravel()
  cover = region.cover(grid)
  assert np.abs(cover - fine).max() < 0.12
  assert abs(cover.sum() - fine.sum()) < 0.03 * fine.sum() + 0.02


@settings(max_examples=100, deadline=None)
@given(region=st.one_of(polygons, scribbles), h=st.integers(1, 20), w=st.integers(1, 20))
def test_shapes_are_never_lost(region, h, w):
  cover = region.cover((h, w))
  assert cover.shape == (h * w,) and cover.dtype == np.float32
  assert cover.sum() > 0 and cover.min() >= 0 and cover.max() <= 1
  assert region.rasterize(h, w).any()


def test_large_and_thin_masks():
  array = np.zeros((2000, 3000), bool)
  array[200:1800, 300:2700] = True
  cover = Region.from_mask(array).cover((16, 16))
  assert np.abs(cover - Region.box(0.1, 0.1, 0.9, 0.9).cover((16, 16))).max() < 0.07
  thin = np.zeros((2000, 3000), bool)
  thin[77, 5:2900:7] = True
  region = Region.from_mask(thin)
  assert region.cover((16, 16)).sum() == pytest.approx(thin.mean() * 256, rel=1e-4)
  assert region.rasterize(20, 20).any()


def test_rings_are_united():
  square = [(0.2, 0.2), (0.8, 0.2), (0.8, 0.8), (0.2, 0.8)]
  inner = [(0.4, 0.4), (0.6, 0.4), (0.6, 0.6), (0.4, 0.6)]
  both = Region.polygon(square, inner)
  assert np.array_equal(both.rasterize(50, 50), Region.polygon(square).rasterize(50, 50))


@pytest.mark.parametrize(
  "region, box",
  [
    (Region.polygon([(0.25, 0.5), (0.5, 0.25), (0.5, 0.75)]), (0.25, 0.25, 0.5, 0.75)),
    # Another part, and a ring inside the first: all rings count.
    (
      Region.polygon(
        [(0.25, 0.25), (0.75, 0.25), (0.75, 0.75)],
        [(0.5, 0.375), (0.625, 0.375), (0.625, 0.5)],
        [(0.0, 0.875), (0.125, 0.875), (0.125, 1.0)],
      ),
      (0.0, 0.25, 0.75, 1.0),
    ),
    (Region.scribble([(0.25, 0.5), (0.5, 0.75)], width=0.125), (0.1875, 0.4375, 0.5625, 0.8125)),
    # Pixels of an oblong image: the brush is twice as wide in x as in y. The second path counts.
    (
      Region.scribble([(16, 32), (24, 32)], [(32, 48), (40, 40)], width=8, size=(64, 128)),
      (0.1875, 0.21875, 0.6875, 0.40625),
    ),
    # The brush reaches over two borders.
    (Region.scribble([(0.0625, 0.5), (0.5, 1.0)], width=0.25), (0.0, 0.375, 0.625, 1.0)),
    (Region.scribble([(0.9375, 0.0), (0.5, 0.25)], width=0.25), (0.375, 0.0, 1.0, 0.375)),
  ],
  ids=["triangle", "parts", "scribble", "oblong scribble", "right and low", "high and left"],
)
def test_enclosing_boxes_are_exact(region, box):
  assert region.box_xyxy == box


def test_the_enclosing_box_of_a_mask_with_a_hole_and_parts():
  array = np.zeros((8, 16), bool)
  array[1:5, 2:6] = True
  array[2:4, 3:5] = False
  array[6, 11] = True
  assert Region.from_mask(array).box_xyxy == (2 / 16, 1 / 8, 12 / 16, 7 / 8)


# A training pipeline covers every region it packs, thousands a second on one core.
@pytest.mark.parametrize(
  "region, microseconds",
  [
    (Region.point(0.3, 0.4), 30),
    (Region.box(0.1, 0.2, 0.5, 0.77), 30),
    (Region.polygon(circle(0.5, 0.5, 0.3, 0.2, 20)), 150),
    (Region.scribble(circle(0.5, 0.5, 0.3, 0.2, 20)), 150),
    (Region.from_mask(np.hypot(*(np.mgrid[:128, :128] - 64)) < 50), 150),
  ],
  ids=["point", "box", "polygon", "scribble", "mask"],
)
def test_cover_is_quick(region, microseconds):
  region.cover((8, 8))
  times = timeit.repeat(lambda: region.cover((8, 8)), number=20, repeat=30, timer=time.process_time)
  best = min(times) / 20
  assert best < 3 * microseconds * 1e-6  # three times the budget: CI machines are shared

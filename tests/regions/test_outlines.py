"""Outlines: contours of masks, and rings simplified to a number of vertices."""

import numpy as np
from hypothesis import given, settings
from region_cases import circle, masks

from regionjax.regions import (
  Mask,
  Region,
)
from regionjax.regions.outlines import mask_contours, ring_area, simplify


def test_contours_of_parts_and_holes():
  array = np.zeros((9, 12), bool)
  array[1:8, 1:8] = True
  array[3:5, 3:6] = False
  array[8, 8] = True  # touches the big part at a corner only
  array[1, 10] = True
  loops = mask_contours(Mask.from_array(array))
  assert sorted(ring_area(loop) for loop in loops) == [-6, 1, 1, 49]
  assert all(len(loop) == 4 for loop in loops)


@settings(max_examples=60, deadline=None)
@given(region=masks())
def test_contours_enclose_exactly_the_mask(region):
  mask = region.mask
  toggled = np.zeros((mask.height, mask.width), int)
  for loop in mask_contours(mask):
    ring = Region.polygon((loop / (mask.width, mask.height)).tolist())
    toggled += ring.rasterize(mask.height, mask.width)
  assert np.array_equal(toggled % 2 == 1, mask.array)


def test_mask_outline_is_the_largest_part():
  yy, xx = np.mgrid[:96, :128]
  array = np.hypot((yy - 40) / 30, (xx - 60) / 45) < 1
  array |= np.hypot(yy - 85, xx - 115) < 8
  region = Region.from_mask(array)
  largest = np.hypot((yy - 40) / 30, (xx - 60) / 45) < 1
  for vertices, least in ((6, 0.75), (8, 0.85), (16, 0.94), (None, 0.95)):
    outline = region.outline(vertices)
    assert len(outline) <= (vertices or 96)
    got = Region.polygon(outline).rasterize(96, 128)
    assert (got & largest).sum() / (got | largest).sum() > least


def test_outline_of_a_rectangular_mask_is_its_corners():
  array = np.zeros((50, 50), bool)
  array[10:20, 5:45] = True
  assert sorted(Region.from_mask(array).outline()) == [
    (0.1, 0.2),
    (0.1, 0.4),
    (0.9, 0.2),
    (0.9, 0.4),
  ]


def test_outlines_of_the_other_kinds():
  assert Region.point(0.1, 0.2).outline() == [(0.1, 0.2)]
  assert Region.box(0.1, 0.2, 0.3, 0.4).outline() == [(0.1, 0.2), (0.3, 0.4)]
  small, large = circle(0.1, 0.1, 0.05, 0.05, 5), circle(0.5, 0.5, 0.3, 0.3, 30)
  assert Region.polygon(small, large).outline() == [tuple(p) for p in large]
  assert len(Region.polygon(large).outline(8)) == 8
  assert len(Region.scribble([(0, 0), (1, 1)]).outline()) == 3
  long = Region.scribble([(i / 50, 0.5) for i in range(51)])
  assert len(long.outline(8)) == 8 and long.outline(8)[-1] == (1.0, 0.5)


def test_simplify_keeps_order_and_budget():
  ring = np.array(circle(0, 0, 1, 1, 100))
  for n in (3, 4, 8, 50):
    few = simplify(ring, n, tolerance=0.0)
    assert len(few) == n
    assert ring_area(few) > {3: 0.9, 4: 1.7, 8: 2.7, 50: 3.1}[n]
  assert len(simplify(ring, None, tolerance=0.05)) < 20

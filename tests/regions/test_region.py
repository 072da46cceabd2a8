"""Region: construction from pixels, policies for bad input, clipping, hashing and JSON."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from region_cases import brute_raster, regions

from regionjax.regions import (
  Mask,
  Region,
  RegionError,
)

SIZE, RESIZED = (640, 480), (224, 336)


def test_pixels_become_shares():
  assert Region.point(320, 120, size=SIZE) == Region.point(0.5, 0.25)
  assert Region.box(64, 48, 320, 480, size=SIZE) == Region.box(0.1, 0.1, 0.5, 1.0)
  ring = [(0, 0), (640, 0), (640, 480)]
  assert Region.polygon(ring, size=SIZE) == Region.polygon([(0, 0), (1, 0), (1, 1)])
  assert Region.scribble([(0, 0), (64, 48)], width=16, size=SIZE).brush == (16 / 640, 16 / 480)


def test_rounding_noise_is_the_border():
  assert Region.box(-1e-9, 0, 1 + 1e-7, 1) == Region.box(0, 0, 1, 1)
  assert str(Region.point(-0.0, -1e-9).points) == "((0.0, 0.0),)"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_is_an_error(bad):
  makers = [
    lambda: Region.point(0.5, bad),
    lambda: Region.box(0, 0, bad, 1),
    lambda: Region.polygon([(0, 0), (1, bad), (1, 1), (0, 1)]),
    lambda: Region.scribble([(0, 0), (bad, 1)]),
  ]
  for make in makers:
    with pytest.raises(RegionError) as error:
      make()
    assert error.value.reason == "nan"
  dropped = Region.polygon([(0, 0), (1, bad), (1, 1), (0, 1)], nan="drop")
  assert dropped == Region.polygon([(0, 0), (1, 1), (0, 1)])
  assert len(Region.scribble([(0, 0), (bad, 1), (1, 1)], nan="drop").points) == 2


def test_inverted_box():
  with pytest.raises(RegionError, match=r"box \[0.8, 0.1, 0.2, 0.9\].*inverted='swap'") as error:
    Region.box(0.8, 0.1, 0.2, 0.9)
  assert error.value.reason == "inverted"
  assert Region.box(0.8, 0.9, 0.2, 0.1, inverted="swap") == Region.box(0.2, 0.1, 0.8, 0.9)


def test_outside():
  makers = [
    lambda o: Region.point(1.1, 0.5, outside=o),
    lambda o: Region.box(0.5, 0.5, 1.5, 0.7, outside=o),
    lambda o: Region.polygon([(0.5, 0.5), (1.5, 0.5), (1, 0.9)], outside=o),
    lambda o: Region.scribble([(0.5, 0.5), (1.5, 0.5)], outside=o),
  ]
  for make in makers:
    with pytest.raises(RegionError, match="outside='clip'") as error:
      make("error")
    assert error.value.reason == "outside"
    assert make("clip").box_xyxy[2] == 1.0
  with pytest.raises(RegionError, match="640 x 480 pixel image"):
    Region.box(10, 10, 700, 20, size=SIZE)
  with pytest.raises(RegionError, match=r"give size=\(width, height\)"):
    Region.box(10, 10, 20, 20)


def test_empty():
  makers = [
    lambda e: Region.box(0.5, 0.5, 0.5, 0.7, empty=e),
    lambda e: Region.box(1.2, 0.5, 1.5, 0.7, outside="clip", empty=e),
    lambda e: Region.polygon([(0.1, 0.1), (0.2, 0.2), (0.3, 0.3)], empty=e),
    lambda e: Region.polygon([(1.1, 0.1), (1.2, 0.2), (1.3, 0.1)], outside="clip", empty=e),
    lambda e: Region.scribble([(1.1, 0.1), (1.2, 0.2)], outside="clip", empty=e),
  ]
  for make in makers:
    with pytest.raises(RegionError) as error:
      make("error")
    assert error.value.reason == "empty"
    kept = make("keep")
    assert kept.cover((4, 4)).sum() > 0 and kept.rasterize(8, 8).any()
  with pytest.raises(RegionError) as error:
    Region.from_mask(np.zeros((4, 4), bool))
  assert error.value.reason == "empty"


def stroke(brush):
  """A scribble's JSON."""
  return {"kind": "scribble", "points": [[0, 0], [1, 1]], "brush": brush}


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: Region.box(0, 0, 1, 1, outside="Clip"), "'error' or 'clip'"),
    (lambda: Region.polygon([(0, 0), (1, 1)]), "2 vertices; expected at least 3"),
    (lambda: Region.polygon([0, 1, 2]), "sequence of .x, y. pairs"),
    (lambda: Region.scribble([(0, 0)]), "1 points; expected at least 2"),
    (lambda: Region.scribble([(0, 0), (1, 1)], width=0), "width=0"),
    (lambda: Region.point(1, 1, size=(0, 5)), "both must be positive"),
    (lambda: Region.from_mask(np.zeros((4, 4, 3), bool)), r"\(4, 4, 3\)"),
    (lambda: Region.from_mask(np.ones((4, 4))), "threshold"),
    (lambda: Region.from_json({"kind": "star", "points": []}), "star"),
    (lambda: Region.from_json({"kind": "box", "points": [[0, 0]]}), "to_json"),
    (lambda: Region.from_rle({"size": [2, 2], "counts": [1, 1]}), "cover 2 pixels"),
    (lambda: Region.from_rle({"counts": [1, 1]}), "size"),
    (lambda: Region.from_rle({"size": [-2, -2], "counts": [4]}), "size"),
    (lambda: Region.from_rle({"size": [math.inf, 1], "counts": [4]}), "size"),
    (lambda: Region.from_json([]), "to_json"),
    (lambda: Region.from_json({"kind": ["box"], "points": []}), "to_json|expected one of"),
    (lambda: Region.from_json({"kind": "point", "points": [[0, "a"]]}), "pairs"),
    (lambda: Region.from_json({"kind": "point", "points": [[0, 10**400]]}), "pairs"),
    (lambda: Region.from_json(stroke([0.1])), "to_json"),
    (lambda: Region.from_json(stroke(["a", "b"])), "to_json"),
    (lambda: Region.from_json(stroke([10**400, 1])), "to_json"),
    (lambda: Region.from_json(stroke([math.nan, -1])), "two positive, finite diameters"),
    (lambda: Region.from_json(stroke([0, 0])), "two positive, finite diameters"),
    (lambda: Region.from_json(stroke([math.inf, 1])), "two positive, finite diameters"),
    (lambda: Region("star", ((0, 0),)), "expected one of"),
    (lambda: Region("box", ((0, 0),)), "two corners"),
    (lambda: Region("polygon", (0, 1)), "pairs"),
    (lambda: Region("scribble", ((0, 0), (1, 1))), "two positive, finite diameters"),
  ],
)
def test_errors_say_what_to_do(make, message):
  with pytest.raises(RegionError, match=message) as error:
    make()
  assert error.value.reason == "shape"
  assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
  "kind, points, reason",
  [
    ("box", ((0.8, 0.9), (0.2, math.nan)), "nan"),
    ("box", ((-math.inf, 0), (1, 1)), "nan"),
    ("box", ((0.8, 0.1), (0.2, 0.9)), "inverted"),
    ("box", ((0.2, 0.9), (0.8, 0.1)), "inverted"),
    ("point", ((0.5, math.inf),), "nan"),
    ("polygon", ((0, 0), (math.nan, 0), (1, 1)), "nan"),
  ],
)
def test_the_bare_constructor_checks_too(kind, points, reason):
  with pytest.raises(RegionError) as error:
    Region(kind, points)
  assert error.value.reason == reason
  if reason == "nan":
    with pytest.raises(RegionError, match="not finite"):
      Region("polygon", ((0, 0), (1, 0), (1, 1)), rings=(points,))


@settings(max_examples=100, deadline=None)
@given(ring=st.lists(st.tuples(*[st.integers(-97, 193)] * 2), min_size=3, max_size=7))
def test_clipping_a_polygon_is_intersection(ring):
  """What is left is the part of the unclipped ring inside the image, by a point-by-point oracle."""
  ring = [((i + 0.31) / 97, (j + 0.17) / 97) for i, j in ring]  # no edge through a pixel centre
  want = brute_raster(Region("polygon", tuple(ring)), 32, 32)
  try:
    clipped = Region.polygon(ring, outside="clip")
  except RegionError as error:
    assert error.reason == "empty"
    assert want.sum() == 0
    return
  if want.any():  # else what is left is thinner than this raster, which then shows its outline
    assert np.sum(clipped.rasterize(32, 32) != want) <= 2


def test_a_bow_tie_encloses_area():
  bow_tie = Region.polygon([(0, 0), (1, 1), (1, 0), (0, 1)])
  assert bow_tie.rasterize(20, 20).mean() == pytest.approx(0.5, abs=0.03)


def test_a_ring_around_a_corner_leaves_nothing():
  ring = [(0.5, -0.2), (1.2, -0.2), (1.2, 0.5), (1.1, 0.5), (1.1, -0.1), (0.5, -0.1)]
  with pytest.raises(RegionError) as error:
    Region.polygon(ring, outside="clip")
  assert error.value.reason == "empty"


def test_parts_beyond_the_border_are_cut_and_degenerate_ones_reported():
  inside, beyond = [(0.1, 0.1), (0.5, 0.1), (0.3, 0.6)], [(1.1, 0.1), (1.5, 0.1), (1.3, 0.6)]
  for empty in ("error", "keep"):
    assert Region.polygon(inside, beyond, outside="clip", empty=empty) == Region.polygon(inside)
    cut = Region.scribble(inside, beyond, outside="clip", empty=empty)
    assert cut == Region.scribble(inside)
  with pytest.raises(RegionError) as error:
    Region.polygon(inside, [(0.1, 0.1), (0.2, 0.2), (0.3, 0.3)])
  assert error.value.reason == "empty"


def test_clipping_a_scribble_cuts_it_in_pieces():
  zigzag = [(0.2, 0.2), (1.4, 0.2), (1.4, 0.6), (0.2, 0.6)]
  cut = Region.scribble(zigzag, outside="clip")
  pieces = [[(0.2, 0.2), (1.0, 0.2)], [(1.0, 0.6), (0.2, 0.6)]]
  assert np.allclose([cut.points, *cut.rings], pieces, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(region=regions)
def test_json_round_trip(region):
  again = Region.from_json(json.loads(json.dumps(region.to_json())))
  assert again == region and hash(again) == hash(region)
  assert {1: "point", 2: "box"}.get(region.kind_id, region.kind) == region.kind


def test_masks_are_compact_and_canonical():
  array = np.zeros((480, 640), bool)
  array[100:150, 200:280] = True
  region = Region.from_mask(array)
  assert len(region.mask.bits) == 50 * 10
  assert np.array_equal(region.mask.array, array)
  assert region == Region.from_mask(array.astype(np.uint8) * 255)
  assert region.box_xyxy == (200 / 640, 100 / 480, 280 / 640, 150 / 480)


def test_coco_run_lengths():
  """Runs go column by column and start with zeros; the string is pycocotools' for the same mask."""
  array = np.array([[0, 1, 1], [0, 1, 0], [1, 1, 0]], bool)
  assert Mask.from_array(array).to_rle() == {"size": [3, 3], "counts": [2, 5, 2]}
  assert np.array_equal(
    Mask.from_rle({"size": [3, 3], "counts": [0, 1, 2, 1, 2, 1, 2]}).array,
    np.array([[1, 1, 1], [0, 0, 0], [0, 0, 0]], bool),
  )
  # Hand-coded: runs 5, 40, 3, 52 -> digits 5 | 8+32, 1 | 3 | (52 - 40 =) 12.
  text = "".join(chr(48 + d) for d in (5, 8 + 32, 1, 3, 12))
  for counts in (text, text.encode()):
    runs = Mask.from_rle({"size": [10, 10], "counts": counts}).to_rle()["counts"]
    assert runs == [5, 40, 3, 52]
  with pytest.raises(RegionError):
    Mask.from_rle({"size": [10, 10], "counts": text[:-1] + "é"})

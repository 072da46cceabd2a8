"""Region: construction policies, rasters and cover, transforms, text formats, JSON."""

import functools
import itertools
import json
import math
import time
import timeit

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regionjax.images import ImageTransform
from regionjax.regions import (
  FORMATS,
  Mask,
  Region,
  RegionError,
  get_format,
  parse_regions,
  scan_regions,
)
from regionjax.regions.outlines import mask_contours, ring_area, simplify

SIZE, RESIZED = (640, 480), (224, 336)
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


# Text.


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("max_vertices", [None, 8])
@settings(max_examples=60, deadline=None)
@given(region=regions)
def test_text_round_trip(name, max_vertices, region):
  form = FORMATS[name]
  sizes = {"size": SIZE, "resized": RESIZED}
  text = form.print(region, **sizes, max_vertices=max_vertices)
  parsed = form.parse(text, **sizes)
  assert form.print(parsed, **sizes, max_vertices=max_vertices) == text
  want, got = np.array(region.outline(max_vertices)), np.array(parsed.outline(max_vertices))
  assert want.shape == got.shape
  assert np.all(np.abs(want - got) <= np.array(form.step(**sizes)) / 2 + 1e-9)
  expected_kind = region.kind if region.kind in ("point", "box") else "polygon"
  assert parsed.kind == expected_kind
  if max_vertices:
    assert len(got) <= max_vertices


@pytest.mark.parametrize(
  "name, text",
  [
    ("unit3", "[0.125, 0.500, 0.750, 1.000]"),
    ("unit2", "[0.12, 0.50, 0.75, 1.00]"),
    ("int999", "[125, 500, 750, 999]"),
    ("int1000", "[125, 500, 750, 1000]"),
    ("percent1", "[12.5, 50.0, 75.0, 100.0]"),
    ("loc1024", "<loc0512><loc0128><loc1023><loc0767>"),
    ("pixels", "[80, 240, 480, 480]"),
    ("pixels_resized", "[28, 168, 168, 336]"),
  ],
)
def test_text_as_printed(name, text):
  box = Region.box(0.125, 0.5, 0.75, 1.0)
  assert FORMATS[name].print(box, SIZE, resized=RESIZED) == text


def test_merlin_example():
  """int999 prints what the closest released code prints, int(1000 * v): the box of its paper."""
  box = Region.box(0.1934, 0.6401, 0.2799, 0.9435)
  assert FORMATS["int999"].print(box) == "[193, 640, 279, 943]"


@pytest.mark.parametrize("name", FORMATS)
def test_quantum(name):
  form = FORMATS[name]
  sides = {"unit": (1, 1), "original": SIZE, "resized": RESIZED}[form.frame]
  assert form.step(SIZE, RESIZED) == pytest.approx([form.quantum / s for s in sides])


def test_missing_size_names_it():
  with pytest.raises(RegionError, match="size=\\(width, height\\)"):
    FORMATS["pixels"].print(Region.point(0.5, 0.5))
  with pytest.raises(RegionError, match="resized=\\(width, height\\)"):
    parse_regions("[1, 2]", "pixels_resized", size=SIZE)


@pytest.mark.parametrize(
  "text",
  ["", "[]", "[0.1]", "[0.1, 0.2, 0.3]", "0.1, 0.2", "[nan, 0.2]", "[0.1, 0.2] x", "[1e9, 0]"],
)
def test_unparseable_text(text):
  with pytest.raises(RegionError) as error:
    FORMATS["unit3"].parse(text)
  assert error.value.reason == "text"


def test_parse_policies():
  form = FORMATS["unit3"]
  with pytest.raises(RegionError, match="inverted='swap'"):
    form.parse("[0.8, 0.1, 0.2, 0.9]")
  assert form.parse("[0.8, 0.1, 0.2, 0.9]", inverted="swap") == Region.box(0.2, 0.1, 0.8, 0.9)
  with pytest.raises(RegionError, match="outside='clip'"):
    form.parse("[0.8, 0.1, 1.2, 0.9]")
  assert form.parse("[0.8, 0.1, 1.2, 0.9]", outside="clip") == Region.box(0.8, 0.1, 1, 0.9)


def test_unknown_format():
  with pytest.raises(RegionError, match="unit3"):
    get_format("unit4")


def test_parse_regions_in_an_answer():
  text = "It is <box>[0.10, 0.20]</box>, not [a list] or [0.1, 0.2, 0.3]: see [0.1,0.2,0.3,0.4]."
  found = parse_regions(text, "unit3")
  assert [text[a:b] for a, b, _ in found] == ["[0.10, 0.20]", "[0.1,0.2,0.3,0.4]"]
  assert [r for _, _, r in found] == [Region.point(0.1, 0.2), Region.box(0.1, 0.2, 0.3, 0.4)]
  text = "<loc0000><loc0000><loc1023><loc1023> cat ; <loc0001> ; <loc0512><loc0128> dog"
  assert [r.kind for _, _, r in parse_regions(text, "loc1024")] == ["box", "point"]
  assert parse_regions("[0.5, 0.5, 1.5, 1.5]", "unit3") == []
  assert len(parse_regions("[0.5, 0.5, 1.5, 1.5]", "unit3", outside="clip")) == 1


def test_what_is_refused_in_an_answer_is_told():
  text = "[0.8, 0.1, 0.2, 0.9] [a list] [1.5, 0.2] [nan, 0.1, 0.2, 0.3] [0.1, 0.2, 0.3] [0.1,0.2]"
  found, refused = scan_regions(text, "unit3")
  assert found == parse_regions(text, "unit3") == [(78, 87, Region.point(0.1, 0.2))]
  assert [(text[r.start : r.end], r.reason) for r in refused] == [
    ("[0.8, 0.1, 0.2, 0.9]", "inverted"),
    ("[1.5, 0.2]", "outside"),
    ("[nan, 0.1, 0.2, 0.3]", "text"),
    ("[0.1, 0.2, 0.3]", "text"),
  ]
  assert "x1 <= x2" in refused[0].message and "3 numbers" in refused[3].message
  found, refused = scan_regions(text, "unit3", inverted="swap", outside="clip")
  assert [r.kind for _, _, r in found] == ["box", "point", "point"]
  assert [r.reason for r in refused] == ["text", "text"]
  _, refused = scan_regions("<loc0512><loc0900><loc0001><loc0001> cat <loc0001>", "loc1024")
  assert [(r.start, r.reason) for r in refused] == [(0, "inverted"), (41, "text")]


@pytest.mark.parametrize("name", ["unit3", "int1000"])
def test_of_several_parts_the_text_keeps_the_largest(name):
  """As the table of formats says: the largest ring or part without its holes, the first path."""
  form = FORMATS[name]
  small = [(0.7, 0.7), (0.9, 0.7), (0.9, 0.9)]
  large = [(0.1, 0.1), (0.6, 0.1), (0.6, 0.6), (0.1, 0.6)]
  assert form.print(Region.polygon(small, large)) == form.print(Region.polygon(large))
  array = np.zeros((10, 10), bool)
  array[7:9, 7:9] = array[1:6, 1:6] = True
  array[2:4, 2:4] = False
  got = form.parse(form.print(Region.from_mask(array)))
  assert got.box_xyxy == (0.1, 0.1, 0.6, 0.6) and got.rasterize(10, 10)[1:6, 1:6].all()
  assert form.print(Region.scribble(small, large)) == form.print(Region.scribble(small))


# Construction and policies.


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


# Hashing, JSON, run lengths.


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


# Rasters and cover.


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


# Outlines.


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


# Transforms.


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


# Speed: a training pipeline covers every region it packs, thousands a second on one core.


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

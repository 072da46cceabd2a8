"""Regions as text: every format printed and parsed, and regions found in an answer."""

import numpy as np
import pytest
from hypothesis import given, settings
from region_cases import regions

from regionjax.regions import (
  FORMATS,
  Region,
  RegionError,
  get_format,
  parse_regions,
  scan_regions,
)

SIZE, RESIZED = (640, 480), (224, 336)


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

"""Annotated images and dialogue cards: colours, contrast, nothing lost, nothing outside."""

import numpy as np
import pytest

from regionjax import draw
from regionjax.regions import Region

GREY = np.full((128, 128, 3), 120, np.uint8)
MASK = np.hypot(*(np.mgrid[:128, :128] - 60)) < 25
EVERY_KIND = [
  Region.box(0.1, 0.1, 0.5, 0.4),
  Region.point(0.8, 0.2),
  Region.polygon([(0.1, 0.9), (0.4, 0.6), (0.5, 0.95)]),
  Region.from_mask(MASK),
  Region.scribble([(0.6, 0.8), (0.8, 0.7), (0.9, 0.95)], width=0.04),
]


def share(image, ink, box=(0, 0, 1, 1)):
  """Share of the pixels in a normalised box that have nearly this colour."""
  pixels = np.asarray(image).astype(int)
  h, w = pixels.shape[:2]
  x1, y1, x2, y2 = np.multiply(box, (w, h, w, h)).astype(int)
  return np.mean(np.abs(pixels[y1:y2, x1:x2] - ink).max(axis=2) < 30)


def test_palette_is_distinct_and_badges_are_legible():
  for k, ink in enumerate(draw.PALETTE):
    for other in draw.PALETTE[k + 1 :]:
      assert np.abs(np.subtract(ink, other)).sum() > 90
    text = draw.contrast(ink)
    low, high = sorted(luminance(c) for c in (ink, text))
    assert (high + 0.05) / (low + 0.05) >= 3.0
  assert draw.colour(0) == draw.colour(len(draw.PALETTE)) == draw.PALETTE[0]


def luminance(ink):
  linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in ink]
  return np.dot(linear, (0.2126, 0.7152, 0.0722))


@pytest.mark.parametrize("k", range(len(EVERY_KIND)))
def test_each_kind_is_drawn_where_it_is(k):
  image = draw.annotate(GREY, EVERY_KIND)
  assert image.size == (640, 640) and image.mode == "RGB"
  x1, y1, x2, y2 = EVERY_KIND[k].box_xyxy
  around = (max(x1 - 0.03, 0), max(y1 - 0.03, 0), min(x2 + 0.03, 1), min(y2 + 0.03, 1))
  assert share(image, draw.colour(k), around) > 0.02
  assert share(draw.annotate(GREY, []), draw.colour(k)) == 0


def test_shapes_are_translucent_with_an_outline():
  image = np.asarray(draw.annotate(GREY, [Region.from_mask(MASK)])).astype(int)
  middle = image[300, 300]
  assert middle[0] > 130 and middle[1] < 112  # red over grey, and grey enough to judge its colour
  assert np.abs(middle - 120).max() < 30
  assert np.array_equal(image[600, 600], [120, 120, 120])


def test_a_mask_of_one_pixel_is_seen():
  array = np.zeros((128, 128), bool)
  array[70, 40] = True
  image = draw.annotate(GREY, [Region.from_mask(array)])
  assert share(image, draw.colour(0), (0.29, 0.53, 0.34, 0.58)) > 0.05


def test_badges_stay_inside_and_apart():
  crowd = [Region.box(0, 0, 1, 1), Region.box(0, 0, 0.99, 0.99)]
  crowd += [Region.point(1, 0), Region.point(0, 1), Region.point(0.01, 0.98)]
  taken = []
  for region in crowd * 2:
    x, y = draw._place(region, (300, 200), (30, 20), unit=1.0, taken=taken)
    assert x >= 0 and x + 30 <= 300 and y >= 0 and y + 20 <= 200
    taken.append((x, y, x + 30, y + 20))
  first = taken[:5]
  for i, a in enumerate(first):
    for b in first[i + 1 :]:
      wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
      assert max(wide, 0) * max(high, 0) < 0.1 * 30 * 20


@pytest.mark.parametrize("shape", [(1, 1), (3, 400), (400, 3), (1500, 900)])
def test_odd_shapes(shape):
  image = np.zeros((*shape, 3), np.uint8)
  assert draw.annotate(image, EVERY_KIND).mode == "RGB"
  card = draw.dialogue_card(image, EVERY_KIND, [("user", "What is <region1>?")])
  assert card.height <= 700


def test_the_image_is_not_changed():
  before = GREY.copy()
  draw.annotate(before, EVERY_KIND, side=0)
  assert np.array_equal(before, GREY)


def test_labels():
  plain = draw.annotate(GREY, EVERY_KIND[:1])
  named = draw.annotate(GREY, EVERY_KIND[:1], ["red mug"])
  assert share(named, draw.colour(0)) > share(plain, draw.colour(0)) + 0.002
  with pytest.raises(ValueError, match="2 labels for 1 regions"):
    draw.annotate(GREY, EVERY_KIND[:1], ["a", "b"])


def test_dialogue_card_colours_mentions():
  turns = [("user", "Compare <region1>, region2 and {region:3}."), ("assistant", "Fine.")]
  card = draw.dialogue_card(GREY, EVERY_KIND, turns)
  right = (600 / card.width, 0, 1, 1)
  for k, mentioned in enumerate((True, True, False, True, False)):
    assert (share(card, draw.colour(k), right) > 0.001) == mentioned


def test_mentions_without_a_region_stay_text():
  card = draw.dialogue_card(GREY, EVERY_KIND[:1], [("user", "<region2> region0 {region:9}")])
  assert share(card, draw.colour(1), (600 / card.width, 0, 1, 1)) == 0


@pytest.mark.parametrize("text", ["word " * 80, "x" * 500, "a\n\nb\n", "<region1>" * 30, ""])
def test_text_is_wrapped_and_complete(text):
  bubble = draw._Bubble("user", text, 460, regions=1)
  for line in bubble.lines:
    for piece, index, x in line:
      assert x + bubble._measure(piece.rstrip(), index) <= 460 - 2 * bubble.PAD + 1
  shown = "".join(piece for line in bubble.lines for piece, _, _ in line)
  want = text.replace("<region1>", "region 1")
  assert shown.replace(" ", "") == want.replace(" ", "").replace("\n", "")


def test_the_card_grows_with_the_dialogue():
  few = draw.dialogue_card(GREY, [], [("user", "Hello.")])
  many = draw.dialogue_card(GREY, [], [("user", "Hello. " * 40)] * 12)
  assert few.width == many.width and many.height > 2 * few.height
  assert draw.dialogue_card(GREY, [], []).size == few.size


def test_the_picture_is_the_same_every_time():
  turns = [("user", "What is <region1>?"), ("assistant", "a cup")]
  a, b = (draw.dialogue_card(GREY, EVERY_KIND, turns) for _ in range(2))
  assert np.array_equal(np.asarray(a), np.asarray(b))

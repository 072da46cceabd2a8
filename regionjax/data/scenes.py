"""The scenes world: what stands where in scene (split, seed, index), and how to point at it.

Layout is cheap and complete without pixels: every object's visible mask is exact, so questions can
be asked by box, point, polygon or mask before anything is painted (scenes_render paints).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np

from regionjax.data.errors import DataError
from regionjax.data.scenes_shapes import (
  DIGIT_HALF,
  card_distance,
  digit_ink,
  digits,
  shape_distance,
  word_ink,
)
from regionjax.data.scenes_world import (
  COLOURS,
  HELD_OUT,
  LETTER_HEIGHT,
  READABLE,
  SHAPES,
  SIZES,
  SPLITS,
  TEXTURES,
  TRAIN_DIGITS,
  WORDS,
  Draw,
)

SIDES = (96, 256)  # least and greatest image side, pixels; letters are illegible below
LEAST, MOST = 3, 8  # objects in a scene
KEEP = 0.55  # least share of an object's area that stays visible
KEEP_READABLE = 0.92  # the same of a card, so that its text can be read
TRIES = 14  # places tried for an object before it is left out


class Thing(NamedTuple):
  """One object. Lengths in pixels.

  Attributes:
    text: what is to be read on it: a digit, a word, or ''.
    ink: float32 [h, w] in [0, 1], centred on the card; None for shapes.
    x, y: centre, on a pixel corner.
    angle: radians, clockwise on the screen.
    distance: float32 [2*half_h, 2*half_w] signed distance to the silhouette around the centre.
  """

  category: str
  colour: str
  size: str
  texture: str
  text: str
  ink: np.ndarray | None
  x: int
  y: int
  radius: float
  angle: float
  distance: np.ndarray

  @property
  def window(self) -> tuple[slice, slice]:
    """Rows and columns of the image that `distance` lies on."""
    half_h, half_w = self.distance.shape[0] // 2, self.distance.shape[1] // 2
    return slice(self.y - half_h, self.y + half_h), slice(self.x - half_w, self.x + half_w)


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
  """A laid-out scene.

  Attributes:
    side: pixels of the square image.
    things: objects, lowest first.
    owner: int8 [side, side], index of the uppermost object of each pixel, -1 where there is none.
    windows: for each object the rows and columns (y1, y2, x1, x2) that enclose its visible part.
    overlapped: for each object whether its silhouette meets another's.
    asked: objects that questions may be about: all, or those of held-out pairs in that split.
  """

  split: str
  seed: int
  index: int
  side: int
  things: tuple[Thing, ...]
  owner: np.ndarray
  windows: tuple[tuple[int, int, int, int], ...]
  overlapped: tuple[bool, ...]
  asked: tuple[int, ...]

  def visible(self, k: int) -> np.ndarray:
    """bool [side, side]: pixels where object k is the uppermost."""
    return self.owner == k

  def covered(self, k: int) -> bool:
    """Whether another object hides part of object k."""
    return bool((self.owner[self.things[k].window][self.things[k].distance < 0] != k).any())

  def depth(self, k: int) -> np.ndarray:
    """float32 over the window of object k: pixels to the nearest edge of what is visible of it.

    Negative outside. Border of the image not counted.
    """
    rows, columns = self.things[k].window
    depth = -self.things[k].distance
    for above in self.things[k + 1 :]:
      r, c = above.window
      top, bottom = max(rows.start, r.start), min(rows.stop, r.stop)
      left, right = max(columns.start, c.start), min(columns.stop, c.stop)
      if top < bottom and left < right:
        mine = depth[
          top - rows.start : bottom - rows.start, left - columns.start : right - columns.start
        ]
        its = above.distance[top - r.start : bottom - r.start, left - c.start : right - c.start]
        np.minimum(mine, its, out=mine)
    return depth

  def box(self, k: int) -> tuple[float, float, float, float]:
    """Normalised xyxy around the visible part of object k."""
    y1, y2, x1, x2 = self.windows[k]
    return x1 / self.side, y1 / self.side, x2 / self.side, y2 / self.side

  def centre(self, k: int) -> tuple[float, float]:
    """Normalised centre of that box."""
    x1, y1, x2, y2 = self.box(k)
    return (x1 + x2) / 2, (y1 + y2) / 2


@functools.lru_cache(maxsize=64)
def make_scene(split: str, seed: int, index: int, side: int = 128) -> Scene:
  """Lays out a scene; the same arguments give the same scene on every machine.

  Checked with Pillow 10.4, 11.3 and 13.0, whose font sets the widths of words.

  Args:
    split: 'train', 'test' or 'heldout_pairs'.
    side: image side in pixels, 96 to 256. Another side is another scene.

  Raises:
    DataError: an unknown split, or a side outside that range.
  """
  if split not in SPLITS:
    raise DataError(f"scenes split {split!r}: expected one of {', '.join(SPLITS)}")
  if not SIDES[0] <= side <= SIDES[1]:
    raise DataError(f"scenes image_size {side}: expected {SIDES[0]} to {SIDES[1]} pixels")
  attempt = 0
  while True:
    draw = Draw("scene", split, seed, index, side, attempt)
    scene = _lay_out(draw, split, seed, index, side)
    if scene is not None:
      return scene
    attempt += 1


def _lay_out(draw: Draw, split: str, seed: int, index: int, side: int) -> Scene | None:
  """One attempt; None if too few objects found a place."""
  wanted: list[str] = [""] * (LEAST + draw.below(MOST - LEAST + 1))
  if draw.flip(0.6):  # two things to read, so that reading asks which
    wanted[:2] = [draw.choose(READABLE), draw.choose(READABLE)]
  owner = np.full((side, side), -1, np.int8)
  things: list[Thing] = []
  whole: list[int] = []  # area of each silhouette
  seen: list[int] = []  # visible area of each
  meets: list[bool] = []
  for category in draw.shuffled(wanted):
    look = _draw_look(draw, split, category, things)
    thing, mask = _form(draw, look, split, side)
    placed = _place(draw, thing, mask, things, owner, whole, seen)
    if placed is None:
      continue
    thing, taken = placed
    for k, count in enumerate(taken):
      seen[k] -= count
      meets[k] = meets[k] or count > 0
    owner[thing.window][mask] = len(things)
    things.append(thing)
    whole.append(int(mask.sum()))
    seen.append(whole[-1])
    meets.append(any(taken))
  asked = tuple(
    k
    for k, t in enumerate(things)
    if split != "heldout_pairs" or (t.category, t.colour) in HELD_OUT
  )
  if len(things) < LEAST or not asked:
    return None
  windows = tuple(_window(owner, t, k) for k, t in enumerate(things))
  return Scene(split, seed, index, side, tuple(things), owner, windows, tuple(meets), asked)


def _draw_look(
  draw: Draw, split: str, category: str, others: list[Thing]
) -> tuple[str, str, str, str]:
  """Category, colour, size and texture; repeats what is there often enough for comparisons."""
  rare = split == "heldout_pairs" and draw.flip(0.55)
  fixed = category
  while True:
    category = fixed
    if not category:
      category = draw.choose(SHAPES) if draw.flip(0.8) else draw.choose(READABLE)
      if others and draw.flip(0.22):
        category = draw.choose(others).category
    colour = draw.choose(tuple(COLOURS))
    if others and draw.flip(0.25):
      colour = draw.choose(others).colour
    if rare:
      colour = next(pair[1] for pair in HELD_OUT if pair[0] == category)
    if rare or (category, colour) not in HELD_OUT:
      break
  texture = "plain" if category in READABLE else draw.weighted(TEXTURES, (1.5, 1, 1, 1))
  return category, colour, draw.choose(tuple(SIZES)), texture


def _form(
  draw: Draw, look: tuple[str, str, str, str], split: str, side: int
) -> tuple[Thing, np.ndarray]:
  """The object at the origin, and its mask over its window."""
  category, colour, size, texture = look
  radius = side * draw.uniform(*SIZES[size])
  angle, text, ink = 0.0, "", None
  if category == "digit":
    value = draw.below(10)
    sample = draw.choose(_samples(value, split == "train"))
    half = radius * DIGIT_HALF
    text, ink = str(value), digit_ink(sample, 2 * int(half * 0.92))
    distance = card_distance(half, half, radius * 0.2)
  elif category == "word":
    text = draw.choose(WORDS)
    height = max(9, round(side * LETTER_HEIGHT[size] * draw.uniform(0.95, 1.05)))
    ink = word_ink(text, height)
    half_w, half_h = ink.shape[1] / 2 + height * 0.26, ink.shape[0] / 2 + height * 0.1
    distance = card_distance(half_w, half_h, height * 0.2)
  else:
    angle = math.radians(draw.uniform(-18, 18))
    if category in ("arrow", "moon"):
      angle += math.pi / 2 * draw.below(4)
    elif category == "fish":
      angle += math.pi * draw.below(2)
    distance = shape_distance(category, angle, radius)
  thing = Thing(category, colour, size, texture, text, ink, 0, 0, radius, angle, distance)
  return thing, distance < 0


@functools.cache
def _samples(value: int, train: bool) -> tuple[int, ...]:
  """Numbers of the handwritten samples of a value on one side of the hold-out."""
  found = np.flatnonzero(digits()[1] == value)
  return tuple(int(k) for k in found if (k < TRAIN_DIGITS) == train)


def _place(
  draw: Draw,
  thing: Thing,
  mask: np.ndarray,
  others: list[Thing],
  owner: np.ndarray,
  whole: list[int],
  seen: list[int],
) -> tuple[Thing, list[int]] | None:
  """Finds a place; returns the object there and what it covers of each other object."""
  side = len(owner)
  half_h, half_w = mask.shape[0] // 2, mask.shape[1] // 2
  over = bool(others) and draw.flip(0.32)
  for attempt in range(TRIES):
    if over and attempt < TRIES // 2:
      x, y = _beside(draw, draw.choose(others), half_w, half_h)
    else:
      x = half_w + draw.below(max(1, side - 2 * half_w + 1))
      y = half_h + draw.below(max(1, side - 2 * half_h + 1))
    if not (half_w <= x <= side - half_w and half_h <= y <= side - half_h):
      continue
    below = owner[y - half_h : y + half_h, x - half_w : x + half_w][mask]
    taken = [0] * len(others)
    if below.max() >= 0:
      if not over and attempt < TRIES - 3:
        continue
      taken = np.bincount(below + 1, minlength=len(others) + 1)[1:].tolist()
      if any(
        seen[k] - count < (KEEP_READABLE if other.text else KEEP) * whole[k]
        for k, (other, count) in enumerate(zip(others, taken))
      ):
        continue
    return thing._replace(x=x, y=y), taken
  return None


def _beside(draw: Draw, other: Thing, half_w: int, half_h: int) -> tuple[int, int]:
  """A centre at which the object's box reaches into the other's."""
  angle = draw.uniform(-math.pi, math.pi)
  reach_w = half_w + other.distance.shape[1] / 2
  reach_h = half_h + other.distance.shape[0] / 2
  touch = 1 / max(abs(math.cos(angle)) / reach_w, abs(math.sin(angle)) / reach_h)
  far = touch * draw.uniform(0.5, 0.85)
  return round(other.x + far * math.cos(angle)), round(other.y + far * math.sin(angle))


def _window(owner: np.ndarray, thing: Thing, k: int) -> tuple[int, int, int, int]:
  rows, columns = thing.window
  mine = owner[rows, columns] == k
  tall, wide = mine.any(1), mine.any(0)
  return (
    rows.start + int(tall.argmax()), rows.stop - int(tall[::-1].argmax()),
    columns.start + int(wide.argmax()), columns.stop - int(wide[::-1].argmax()),
  )  # fmt: skip

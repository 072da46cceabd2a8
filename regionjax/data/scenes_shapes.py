"""Silhouettes of the scenes world as signed distances, and the inks of its digits and words.

A silhouette is a patch of signed distances in pixels, negative inside, so that one array gives both
the exact mask (`sdf < 0` at pixel centres) and an antialiased edge.
"""

from __future__ import annotations

import functools
import importlib.resources
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from regionjax.data.scenes_world import SHAPES

# Half the side of a silhouette table in radii: holds the corner of a turned patch of the smallest
# object, (1.2 * 7 + 2) / 7 * sqrt(2) = 2.1.
REACH = 2.1
CELLS = 384  # table resolution: a large object (radius 23 pixels at 128) is off by 0.13 pixels
DIGIT_HALF = 0.86  # half the side of a digit's card, in radii

Points = tuple[tuple[float, float], ...]


def _star() -> Points:
  radii = (1.15, 0.48)
  angles = [math.pi * (k / 5 - 0.5) for k in range(10)]
  return tuple(
    (radii[k % 2] * math.cos(a), radii[k % 2] * math.sin(a)) for k, a in enumerate(angles)
  )


def _heart() -> Points:
  out = []
  for k in range(40):
    t = 2 * math.pi * k / 40
    y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    out.append((math.sin(t) ** 3, -(y + 2.5) / 15.5))
  return tuple(out)


# Corner lists, y down, about inside the unit circle.
POLYGONS: dict[str, Points] = {
  "square": ((-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)),
  "triangle": ((0, -1.05), (1.02, 0.75), (-1.02, 0.75)),
  "star": _star(),
  "heart": _heart(),
  "cross": (
    (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
    (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3),
  ),
  "diamond": ((0, -1.15), (0.68, 0), (0, 1.15), (-0.68, 0)),
  "arrow": (
    (-1.05, -0.3), (0.1, -0.3), (0.1, -0.85), (1.1, 0), (0.1, 0.85), (0.1, 0.3), (-1.05, 0.3),
  ),
  "house": (
    (0, -1.05), (1.02, -0.15), (0.75, -0.15), (0.75, 0.9), (0.24, 0.9), (0.24, 0.25),
    (-0.24, 0.25), (-0.24, 0.9), (-0.75, 0.9), (-0.75, -0.15), (-1.02, -0.15),
  ),
  "fish": (
    (1.06, 0), (0.86, 0.33), (0.3, 0.52), (-0.3, 0.41), (-0.57, 0.18), (-1.1, 0.62), (-0.9, 0),
    (-1.1, -0.62), (-0.57, -0.18), (-0.3, -0.41), (0.3, -0.52), (0.86, -0.33),
  ),
}  # fmt: skip


def polygon_distance(x: np.ndarray, y: np.ndarray, corners: Points) -> np.ndarray:
  """Signed distance of points to a closed polygon, negative inside (even-odd rule).

  Args:
    x, y: float arrays of one shape.
    corners: xy of the corners in order.
  """
  nearest = np.full(x.shape, np.inf, np.float32)
  inside = np.zeros(x.shape, bool)
  for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
    ex, ey = bx - ax, by - ay
    t = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
    nearest = np.minimum(nearest, (x - ax - t * ex) ** 2 + (y - ay - t * ey) ** 2)
    if ay != by:
      inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * ex / ey)
  distance = np.sqrt(nearest)
  return np.where(inside, -distance, distance)


CIRCLE = 0.92  # radius
RING = (0.73, 0.27)  # radius of the middle line, half the thickness
CHORD = 1.03  # chords cut curves short; corners this much further out make up for the area
MOON = (1.02, 0.82, 0.48)  # a disc of the first radius less one of the second, this far right of it


def _arc(radius: float, x: float, first: float, last: float, n: int) -> Points:
  """n points on a circle around (x, 0), from the first angle to the last, both included."""
  steps = [first + (last - first) * k / (n - 1) for k in range(n)]
  return tuple((x + radius * math.cos(t), radius * math.sin(t)) for t in steps)


def _moon() -> Points:
  outer, inner, x = MOON
  tip = (outer**2 - inner**2 + x**2) / (2 * x)  # where the two circles meet
  a, b = math.acos(tip / outer), math.acos((tip - x) / inner)
  back = _arc(outer * CHORD, 0, a, 2 * math.pi - a, 8)
  return back + _arc(inner * CHORD, x, 2 * math.pi - b, b, 6)[1:-1]


@functools.cache
def outline(category: str) -> Points:
  """At most 12 corners around a shape, in radii; holes are not left out."""
  if category in ("circle", "ring"):
    radius = CIRCLE if category == "circle" else sum(RING)
    return _arc(radius * CHORD, 0, 0, 2 * math.pi * 11 / 12, 12)
  if category == "moon":
    return _moon()
  if category == "heart":
    return tuple((x * CHORD, y * CHORD) for x, y in POLYGONS["heart"][::4])
  return POLYGONS[category]


def _distance(category: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  if category == "circle":
    return np.hypot(x, y) - CIRCLE
  if category == "ring":
    return np.abs(np.hypot(x, y) - RING[0]) - RING[1]
  if category == "moon":
    return np.maximum(np.hypot(x, y) - MOON[0], MOON[1] - np.hypot(x - MOON[2], y))
  return polygon_distance(x, y, POLYGONS[category])


@functools.cache
def table(category: str) -> np.ndarray:
  """float32 [CELLS, CELLS]: signed distance, in radii, at cell centres of [-REACH, REACH]^2."""
  if category not in SHAPES:
    raise ValueError(f"no silhouette called {category!r}; known: {', '.join(SHAPES)}")
  axis = ((np.arange(CELLS, dtype=np.float32) + 0.5) / CELLS * 2 - 1) * REACH
  return _distance(category, axis[None, :].repeat(CELLS, 0), axis[:, None].repeat(CELLS, 1)).astype(
    np.float32
  )


def object_axes(
  half_wh: tuple[int, int], angle: float, radius: float
) -> tuple[np.ndarray, np.ndarray]:
  """An object's own coordinates over its patch.

  Args:
    half_wh: the patch is 2*half_w by 2*half_h pixels around the object's centre.
    angle: radians, clockwise on the screen.
    radius: pixels.

  Returns:
    u, v: float32 [2*half_h, 2*half_w], in radii.
  """
  x = (np.arange(-half_wh[0], half_wh[0], dtype=np.float32) + 0.5) / radius
  y = (np.arange(-half_wh[1], half_wh[1], dtype=np.float32) + 0.5) / radius
  cos, sin = math.cos(angle), math.sin(angle)
  return (cos * x)[None, :] + (sin * y)[:, None], (cos * y)[:, None] - (sin * x)[None, :]


def shape_distance(category: str, angle: float, radius: float) -> np.ndarray:
  """Signed distances in pixels over a patch of 2*ceil(radius*1.2)+2 pixels a side, float32."""
  half = math.ceil(radius * 1.2) + 1
  scale = CELLS / (2 * REACH)
  line = (np.arange(-half, half, dtype=np.float32) + 0.5) * (scale / radius)
  cos, sin = math.cos(angle) * line, math.sin(angle) * line
  column = (cos + CELLS / 2)[None, :] + sin[:, None]
  row = (cos + CELLS / 2)[:, None] - sin[None, :]
  cell = row.astype(np.int32) * CELLS + column.astype(np.int32)
  return table(category).ravel().take(cell) * np.float32(radius)


def card_distance(half_w: float, half_h: float, corner: float) -> np.ndarray:
  """Signed distances in pixels to an upright card with rounded corners, over a patch around it."""
  patch_w, patch_h = math.ceil(half_w) + 1, math.ceil(half_h) + 1
  dx = np.abs(np.arange(-patch_w, patch_w, dtype=np.float32) + 0.5) - (half_w - corner)
  dy = np.abs(np.arange(-patch_h, patch_h, dtype=np.float32) + 0.5) - (half_h - corner)
  outer = np.hypot(np.maximum(dx, 0)[None, :], np.maximum(dy, 0)[:, None])
  return outer + np.minimum(np.maximum(dx[None, :], dy[:, None]), 0) - corner


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
  """The handwritten digits: uint8 [1797, 8, 8] with values 0-16, and their labels uint8 [1797]."""
  path = importlib.resources.files("regionjax") / "assets" / "digits.npz"
  with path.open("rb") as file, np.load(file) as data:
    return data["images"].reshape(-1, 8, 8), data["labels"]


def digit_ink(sample: int, side: int) -> np.ndarray:
  """Ink of a handwritten digit enlarged to `side` pixels, float32 [side, side] in [0, 1]."""
  grey = Image.fromarray(digits()[0][sample] * 15)
  large = grey.resize((side, side), Image.Resampling.BICUBIC)
  return np.minimum(np.asarray(large, np.float32) * (1.25 / 240), 1)


@functools.cache
def _font(pixels: int) -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, int, int]:
  """Pillow's own font, with the top and bottom of its tallest and deepest letters."""
  font = ImageFont.load_default(size=pixels)
  _, top, _, bottom = font.getbbox("bdfhklpgyqj")
  return font, math.floor(top), math.ceil(bottom)


@functools.lru_cache(maxsize=4096)
def word_ink(word: str, pixels: int) -> np.ndarray:
  """Ink of a word in Pillow's own font, float32 [h, w] in [0, 1].

  The height is that of the font's tallest and deepest letters, so that it doesn't depend on the
  word. The font is thin, and grey at 12 pixels: ink is strengthened by 1.4.
  """
  font, top, bottom = _font(pixels)
  left, _, right, _ = font.getbbox(word)
  image = Image.new("L", (math.ceil(right - left), bottom - top))
  ImageDraw.Draw(image).text((-left, -top), word, fill=255, font=font)
  return np.minimum(np.asarray(image, np.float32) * (1.4 / 255), 1)

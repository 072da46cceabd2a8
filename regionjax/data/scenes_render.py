"""Painting a laid-out scene: background, clutter, objects with texture and ink, light.

The canvas is planar, float32 [3, side, side] in 0-255: with colours last, NumPy's inner loops would
be three elements long and a scene would take twice as long to paint.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from PIL import Image, ImageDraw

from regionjax.data.scenes import Scene, Thing
from regionjax.data.scenes_shapes import object_axes
from regionjax.data.scenes_world import COLOURS, DARK_COLOURS, Draw

BACKGROUNDS = ("plain", "gradient", "noise", "stripes")
# Muted grounds (light and dark), so that the eight object colours stay the vivid ones.
GROUNDS = (
  (226, 222, 214), (204, 208, 214), (182, 178, 168), (168, 176, 170), (150, 150, 158),
  (128, 122, 114), (104, 110, 118), (84, 82, 80), (62, 66, 72), (240, 240, 240),
)  # fmt: skip
SHADE = 0.42  # brightness of a texture's dark parts, of the full colour
RIM = 0.6  # brightness of the last pixel inside an edge: parts objects of one colour
_TILE = 320  # side of the noise tile, more than the greatest image side


def render(scene: Scene) -> np.ndarray:
  """The scene's image: uint8 [side, side, 3]; the same scene gives the same bytes."""
  draw = Draw("paint", scene.split, scene.seed, scene.index, scene.side)
  canvas = _background(draw, scene.side)
  _clutter(draw, canvas)
  for thing in scene.things:
    _paint(canvas, thing)
  _light(draw, canvas)
  out = np.empty((scene.side, scene.side, 3), np.uint8)
  for channel in range(3):
    out[..., channel] = canvas[channel]
  return out


def _background(draw: Draw, side: int) -> np.ndarray:
  """The ground without clutter, float32 [3, side, side]."""
  ground = draw.choose(GROUNDS)
  colour = [c + draw.uniform(-8, 8) for c in ground]
  step = draw.choose((-1, 1)) * draw.uniform(12, 34)  # to the second tone, alike in all channels
  kind = draw.choose(BACKGROUNDS)
  if kind == "gradient":
    plane = _ramp(draw, side) * step
  elif kind == "noise":
    plane = _noise(draw, side) * draw.uniform(7, 15)
  elif kind == "stripes":
    angle, period = draw.uniform(0, math.pi), side * draw.uniform(0.07, 0.2)
    axis = np.arange(side, dtype=np.float32) * (2 * math.pi / period)
    wave = np.sin((math.cos(angle) * axis)[None, :] + (math.sin(angle) * axis)[:, None])
    plane = (0.5 + 0.5 * wave) * step
  else:
    plane = np.zeros((side, side), np.float32)
  canvas = np.empty((3, side, side), np.float32)
  for channel in range(3):
    np.add(plane, colour[channel], out=canvas[channel])
  return canvas


def _clutter(draw: Draw, canvas: np.ndarray) -> None:
  """Short strokes and specks of grey, too thin to be taken for objects; in place."""
  side = canvas.shape[1]
  layer = Image.new("L", (side, side))
  pen = ImageDraw.Draw(layer)
  for _ in range(draw.below(9)):
    x, y, grey = draw.uniform(0, side), draw.uniform(0, side), int(draw.uniform(20, 235))
    if draw.flip(0.55):
      angle, length = draw.uniform(0, math.pi), side * draw.uniform(0.04, 0.16)
      end = (x + length * math.cos(angle), y + length * math.sin(angle))
      pen.line(((x, y), end), fill=grey, width=1 if side < 160 else 2)
    else:
      r = side * draw.uniform(0.004, 0.014)
      pen.ellipse((x - r, y - r, x + r, y + r), fill=grey)
  greys = np.asarray(layer).ravel()
  hit = np.flatnonzero(greys)
  canvas.reshape(3, -1)[:, hit] = greys[hit]


def _paint(canvas: np.ndarray, thing: Thing) -> None:
  """Blends one object into the canvas, in place."""
  tone = _texture(thing)
  tone[thing.distance > -1.1] = RIM
  cover = np.clip(0.5 - thing.distance, 0, 1)
  ink, level = None, 0.0
  if thing.ink is not None:
    ink = np.zeros(thing.distance.shape, np.float32)
    h, w = thing.ink.shape
    top, left = (ink.shape[0] - h) // 2, (ink.shape[1] - w) // 2
    ink[top : top + h, left : left + w] = thing.ink
    level = 245.0 if thing.colour in DARK_COLOURS else 18.0
  rows, columns = thing.window
  for channel, value in enumerate(COLOURS[thing.colour]):
    patch = canvas[channel, rows, columns]
    paint = tone * value
    if ink is not None:
      paint += ink * (level - paint)
    paint -= patch
    paint *= cover
    patch += paint


def _texture(thing: Thing) -> np.ndarray:
  """float32 [h, w]: brightness of the object's paint, from SHADE to 1."""
  h, w = thing.distance.shape
  if thing.texture == "plain":
    return np.ones((h, w), np.float32)
  u, v = object_axes((w // 2, h // 2), thing.angle, thing.radius)
  period = max(0.46, 5.2 / thing.radius)  # radii; under five pixels a pattern turns to grey
  if thing.texture == "striped":
    wave = 2 * np.sin((u + v) * (2 * math.pi * 0.7071 / period))
  elif thing.texture == "dotted":
    step = 2 * math.pi / period
    wave = 2 * (np.cos(u * step) + np.cos(v * step)) - 0.7
  else:
    wave = 4 * np.sin(u * (math.pi / period)) * np.sin(v * (math.pi / period))
  return 1 - (1 - SHADE) * np.clip(wave + 0.5, 0, 1)


def _light(draw: Draw, canvas: np.ndarray) -> None:
  """Gain, a gradient, a colour cast of at most 6 % and sensor noise, in place; stays in 0-255."""
  side = canvas.shape[1]
  gain = draw.uniform(0.8, 1.1)
  slope = draw.uniform(0, 0.24)
  field = 1 + slope * (_ramp(draw, side) - 0.5)
  grain = _noise(draw, side) * draw.uniform(0, 3.5) + 0.5
  for plane in canvas:
    plane *= field * (gain * draw.uniform(0.94, 1.06))
    plane += grain
    np.clip(plane, 0, 255, out=plane)


def _ramp(draw: Draw, side: int) -> np.ndarray:
  """float32 [side, side] from 0 to 1 along a drawn direction."""
  angle = draw.uniform(-math.pi, math.pi)
  cos, sin = math.cos(angle), math.sin(angle)
  reach = abs(cos) + abs(sin)
  axis = np.linspace(-0.5, 0.5, side, dtype=np.float32)
  return (cos / reach * axis + 0.5)[None, :] + (sin / reach * axis)[:, None]


@functools.cache
def _noise_tile() -> np.ndarray:
  """float32 [_TILE, _TILE], mean 0 and deviation 1; RandomState's stream never changes."""
  return np.random.RandomState(7).standard_normal((_TILE, _TILE)).astype(np.float32)


def _noise(draw: Draw, side: int) -> np.ndarray:
  """A window of the tile, turned or mirrored: drawing fresh noise would cost half the render."""
  y, x = draw.below(_TILE - side), draw.below(_TILE - side)
  tile = _noise_tile()[y : y + side, x : x + side]
  return tile[:: draw.choose((1, -1)), :: draw.choose((1, -1))]

"""Four ways to point at what is visible of an object: box, point, polygon, mask."""

from __future__ import annotations

import math

import numpy as np

from regionjax.data.errors import DataError
from regionjax.data.scenes import Scene
from regionjax.data.scenes_shapes import outline
from regionjax.data.scenes_world import READABLE, Draw
from regionjax.regions import Region

REFERENCES = ("box", "point", "polygon", "mask")
VERTICES = 12  # most corners of a polygon reference


def refer(scene: Scene, k: int, kind: str, draw: Draw) -> Region:
  """Object `k` of the scene as a Region of the kind named.

  Args:
    kind: one of REFERENCES.
    draw: picks the point among those well inside, and where a polygon begins.

  Raises:
    DataError: an unknown kind.
  """
  if kind == "box":
    return Region.box(*scene.box(k))
  if kind == "mask":
    return Region.from_mask(scene.visible(k))
  if kind == "point":
    return Region.point(*_point_inside(scene, k, draw))
  if kind == "polygon":
    ring = _outline(scene, k)
    start = draw.below(len(ring))  # people begin anywhere
    return Region.polygon(ring[start:] + ring[:start])
  raise DataError(f"reference kind {kind!r}: expected one of {', '.join(REFERENCES)}")


def _outline(scene: Scene, k: int) -> list[tuple[float, float]]:
  """At most VERTICES corners around what is visible of object k, normalised xy.

  An object in full view has the outline of its shape; that of a partly covered one (every fourth)
  is traced along its pixels, which takes ten times as long.
  """
  thing, side = scene.things[k], scene.side
  y1, y2, x1, x2 = scene.windows[k]
  if scene.covered(k):
    traced = Region.from_mask(scene.owner[y1:y2, x1:x2] == k).outline(VERTICES)
    return [((x1 + x * (x2 - x1)) / side, (y1 + y * (y2 - y1)) / side) for x, y in traced]
  if thing.category in READABLE:
    return [(x / side, y / side) for x, y in ((x1, y1), (x2, y1), (x2, y2), (x1, y2))]
  cos, sin = math.cos(thing.angle) * thing.radius, math.sin(thing.angle) * thing.radius
  return [
    ((thing.x + cos * u - sin * v) / side, (thing.y + sin * u + cos * v) / side)
    for u, v in outline(thing.category)
  ]


def _point_inside(scene: Scene, k: int, draw: Draw) -> tuple[float, float]:
  """The centre of a pixel well inside what is visible of object k, normalised xy.

  Drawn among the pixels at least 60 % as deep as the deepest: neither always the same spot nor
  near an edge.
  """
  depth = scene.depth(k)
  rows, columns = scene.things[k].window
  deep = np.flatnonzero(depth >= 0.6 * depth.max())
  row, column = divmod(int(deep[draw.below(len(deep))]), depth.shape[1])
  return (columns.start + column + 0.5) / scene.side, (rows.start + row + 0.5) / scene.side

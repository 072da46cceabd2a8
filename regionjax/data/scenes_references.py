"""Four ways to point at an object of a scene: box, point, polygon, mask. All follow what is visible."""

from __future__ import annotations

import numpy as np

from regionjax.data.errors import DataError
from regionjax.data.scenes import Scene
from regionjax.data.scenes_world import Draw
from regionjax.regions import Region

REFERENCES = ("box", "point", "polygon", "mask")
VERTICES = 12  # most corners of a polygon reference


def refer(scene: Scene, k: int, kind: str, draw: Draw) -> Region:
  """Object `k` of the scene as a Region of the kind named.

  Args:
    kind: one of REFERENCES.
    draw: picks the point among those well inside; unused by the other kinds.

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
    y1, y2, x1, x2 = scene.windows[k]
    outline = Region.from_mask(scene.owner[y1:y2, x1:x2] == k).outline(VERTICES)
    w, h, side = x2 - x1, y2 - y1, scene.side
    return Region.polygon([((x1 + x * w) / side, (y1 + y * h) / side) for x, y in outline])
  raise DataError(f"reference kind {kind!r}: expected one of {', '.join(REFERENCES)}")


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

"""The edge where outside numbers become a region: each defect has a name and a policy.

Defects and the policies a caller may name (the first is the default everywhere):

  nan       'error' | 'drop'   a coordinate isn't finite; 'drop' leaves out such vertices
  inverted  'error' | 'swap'   a box with x2 < x1 or y2 < y1
  outside   'error' | 'clip'   something lies beyond the image; 'clip' cuts it at the border
  empty     'error' | 'keep'   no area (box, polygon), or nothing left after clipping
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

Point = tuple[float, float]
Path = tuple[Point, ...]

KINDS = ("point", "box", "polygon", "mask", "scribble")
POLICIES = {
  "nan": ("error", "drop"),
  "inverted": ("error", "swap"),
  "outside": ("error", "clip"),
  "empty": ("error", "keep"),
}

# Coordinates this near the border count as on it: x + width in floating point, divided by the image
# width, misses 1 by up to 1e-7 in float32. At 10,000 pixels this is a hundredth of a pixel.
SNAP = 1e-6


class RegionError(ValueError):
  """A region that cannot be used. `reason` is nan, inverted, outside, empty, shape or text."""

  def __init__(self, reason: str, message: str) -> None:
    super().__init__(message)
    self.reason = reason


def check_policies(**chosen: str) -> None:
  """Raises RegionError('shape') if a policy is not one of those that POLICIES lists."""
  for name, value in chosen.items():
    if value not in POLICIES[name]:
      raise RegionError(
        "shape", f"{name}={value!r}: expected {' or '.join(map(repr, POLICIES[name]))}"
      )


def unknown_kind(kind: object) -> RegionError:
  return RegionError("shape", f"region: kind {kind!r:.40}; expected one of {', '.join(KINDS)}")


def unsound(
  kind: str, points: Path, rings: Iterable[Path], brush: tuple[float, float]
) -> RegionError:
  """Why `Region.__post_init__` refuses such a region."""
  if kind not in KINDS:
    return unknown_kind(kind)
  what = f"{kind} {points!r:.80}"
  try:
    numbers = [number for path in (points, *rings) for point in path for number in point]
    if not all(map(math.isfinite, numbers)):
      return RegionError("nan", f"{what}: a coordinate is not finite")
    if kind == "box" and len(numbers) == 4:
      return RegionError("inverted", f"{what}: expected (x1, y1), (x2, y2), x1 <= x2 and y1 <= y2")
    if kind == "scribble":
      return RegionError(
        "shape", f"scribble: brush {brush!r:.80}; expected two positive, finite diameters"
      )
  except (TypeError, ValueError):
    pass
  return RegionError("shape", f"{what}: expected (x, y) pairs, of a box its two corners")


def normalise(
  points: Iterable[Iterable[float]], size: tuple[float, float] | None, what: str
) -> list[Point]:
  """Any sequence of xy pairs -> list of float pairs in shares of the image; nothing is judged."""
  width, height = (1.0, 1.0) if size is None else size
  if not (width > 0 and height > 0):
    raise RegionError(
      "shape", f"{what}: image size (width, height) = {size}; both must be positive"
    )
  try:
    return [(float(x) / width, float(y) / height) for x, y in points]
  except (TypeError, ValueError, OverflowError) as error:
    raise RegionError(
      "shape", f"{what}: expected a sequence of (x, y) pairs, got {points!r:.120}"
    ) from error


def finite(points: list[Point], what: str, nan: str) -> list[Point]:
  """Applies the `nan` policy."""
  kept = [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]
  if len(kept) < len(points) and nan == "error":
    bad = next(p for p in points if not (math.isfinite(p[0]) and math.isfinite(p[1])))
    raise RegionError(
      "nan",
      f"{what}: coordinate {bad} is not finite; correct it, or pass nan='drop' to leave such "
      "vertices of a polygon or scribble out",
    )
  return kept


def outside_error(point: Point, what: str, size: tuple[float, float] | None) -> RegionError:
  if size is None:
    given, frame = point, "[0, 1] x [0, 1]; give size=(width, height) if these are pixels"
  else:
    given = (point[0] * size[0], point[1] * size[1])
    frame = f"the {size[0]:g} x {size[1]:g} pixel image"
  return RegionError(
    "outside",
    f"{what}: ({given[0]:.6g}, {given[1]:.6g}) lies outside {frame}. Correct it, or pass "
    "outside='clip' to cut the region at the border",
  )


def is_inside(point: Point) -> bool:
  return -SNAP <= point[0] <= 1 + SNAP and -SNAP <= point[1] <= 1 + SNAP


def clamp(point: Point) -> Point:
  """The nearest point of the unit square; never -0.0, which would print as '-0.000'."""
  x, y = point
  return (x if 0 < x < 1 else float(x >= 1), y if 0 < y < 1 else float(y >= 1))


def clip_ring(ring: list[Point]) -> list[Point]:
  """Sutherland-Hodgman: the part of a closed ring inside the unit square.

  Pieces of a concave ring stay joined along the border, by edges that enclose no area.
  """
  for axis, limit, sign in ((0, 0.0, 1.0), (0, 1.0, -1.0), (1, 0.0, 1.0), (1, 1.0, -1.0)):
    kept: list[Point] = []
    for a, b in zip(ring[-1:] + ring[:-1], ring):
      depth_a, depth_b = sign * (a[axis] - limit), sign * (b[axis] - limit)
      if (depth_a < 0) != (depth_b < 0):
        kept.append(_between(a, b, depth_a / (depth_a - depth_b)))
      if depth_b >= 0:
        kept.append(b)
    ring = kept
    if not ring:
      break
  return [clamp(p) for p in ring]


def clip_path(path: list[Point]) -> list[list[Point]]:
  """Liang-Barsky: the pieces of an open path inside the unit square."""
  pieces: list[list[Point]] = []
  for a, b in itertools.pairwise(path):
    enter, leave = 0.0, 1.0
    for axis in (0, 1):
      step = b[axis] - a[axis]
      if step == 0:
        if not 0 <= a[axis] <= 1:
          leave = -1.0
        continue
      t0, t1 = sorted(((0.0 - a[axis]) / step, (1.0 - a[axis]) / step))
      enter, leave = max(enter, t0), min(leave, t1)
    if enter > leave:
      continue
    start, end = clamp(_between(a, b, enter)), clamp(_between(a, b, leave))
    if pieces and enter == 0 and pieces[-1][-1] == start:
      pieces[-1].append(end)
    elif start != end:
      pieces.append([start, end])
  return pieces


def _between(a: Point, b: Point, t: float) -> Point:
  return (a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1]))

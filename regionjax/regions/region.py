"""Region: a point, box, polygon, mask or scribble on an image."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np

from regionjax.regions import checks, geometry, outlines
from regionjax.regions.checks import KINDS, Path, Point, RegionError
from regionjax.regions.masks import Mask

if TYPE_CHECKING:
  from regionjax.images import ImageTransform

Size = tuple[float, float]
XY = Iterable[float]


@dataclasses.dataclass(frozen=True)
class Region:
  """Part of an image, in shares of its width and height: x right, y down, (0, 0) top left.

  Make one with `point`, `box`, `polygon`, `scribble`, `from_mask` or `from_rle`; they check what
  they are given. Each of the first four takes normalised numbers, or pixels together with
  `size=(width, height)`. Pixel coordinates are continuous: pixel number i spans i..i+1, so the
  click on it is at i + 0.5. Defects raise RegionError unless a policy is named (see
  `regionjax.regions.checks`).

  Attributes:
    kind: one of KINDS.
    points: the point; a box's corners (x1, y1), (x2, y2); a polygon's ring; a scribble's path; for
      a mask the corners of its enclosing box.
    rings: further rings of a polygon (parts, united with the first as in COCO; holes need a
      mask), or further paths of a scribble.
    mask: the pixels of a mask.
    brush: a scribble's diameter in x and in y.
  """

  kind: str
  points: Path
  rings: tuple[Path, ...] = ()
  mask: Mask | None = None
  brush: tuple[float, float] = (0.0, 0.0)

  def __post_init__(self) -> None:
    """What every region holds to: finite, a box in order, a brush with a width.

    The constructors below judge before, and in better words. It takes 0.2 us for a box, and 2 of
    the 18 us in which a polygon of 20 vertices is made.
    """
    try:
      if self.kind == "box":
        (x1, y1), (x2, y2) = self.points
        sound = -inf < x1 <= x2 < inf and -inf < y1 <= y2 < inf
      else:
        total = sum(map(sum, self.points))
        for ring in self.rings:
          total += sum(map(sum, ring))
        sound = -inf < total < inf and self.kind in KINDS
        if self.kind == "scribble":
          rx, ry = self.brush
          sound = sound and 0 < rx < inf and 0 < ry < inf
    except (TypeError, ValueError):
      sound = False
    if not sound:
      raise checks.unsound(self.kind, self.points, self.rings, self.brush)

  @classmethod
  def point(cls, x: float, y: float, *, size: Size | None = None, outside: str = "error") -> Region:
    """One place, such as a click."""
    checks.check_policies(outside=outside)
    points = checks.finite(checks.normalise([(x, y)], size, "point"), "point", "error")
    return cls("point", _inside(points, "point", size, outside))

  @classmethod
  def box(
    cls, x1: float, y1: float, x2: float, y2: float, *, size: Size | None = None,
    inverted: str = "error", outside: str = "error", empty: str = "error",
  ) -> Region:  # fmt: skip
    """A rectangle by its corners: left, top, right, bottom."""
    checks.check_policies(inverted=inverted, outside=outside, empty=empty)
    what = f"box [{x1}, {y1}, {x2}, {y2}]"
    (x1, y1), (x2, y2) = checks.finite(
      checks.normalise([(x1, y1), (x2, y2)], size, what), what, "error"
    )
    if x2 < x1 or y2 < y1:
      if inverted == "error":
        raise RegionError(
          "inverted",
          f"{what}: expected x1 <= x2 and y1 <= y2 (corners, not x, y, width, height). Correct "
          "it, or pass inverted='swap' to put the corners in order",
        )
      x1, x2, y1, y2 = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
    points = _inside([(x1, y1), (x2, y2)], what, size, outside)
    (x1, y1), (x2, y2) = points
    if (x1 == x2 or y1 == y2) and empty == "error":
      raise _no_area(what)
    return cls("box", points)

  @classmethod
  def polygon(
    cls, points: Iterable[XY], *more_rings: Iterable[XY], size: Size | None = None,
    nan: str = "error", outside: str = "error", empty: str = "error",
  ) -> Region:  # fmt: skip
    """An outline of at least three vertices, or several, united; it closes by itself.

    `outside='clip'` cuts the outlines at the border (it doesn't move single vertices) and leaves
    out those wholly beyond it.
    """
    checks.check_policies(nan=nan, outside=outside, empty=empty)
    rings: list[Path] = []
    gone: list[Path] = []
    for ring in (points, *more_rings):
      vertices = checks.finite(checks.normalise(ring, size, "polygon"), "polygon", nan)
      if len(vertices) < 3:
        raise RegionError(
          "shape",
          f"polygon: {len(vertices)} vertices; expected at least 3. Use Region.point for one pair "
          "and Region.box for two",
        )
      beyond = next((p for p in vertices if not checks.is_inside(p)), None)
      if beyond is not None:
        if outside == "error":
          raise checks.outside_error(beyond, "polygon", size)
        cut = checks.clip_ring(vertices)
        # What lies beyond the border is clipped to edges along it, which enclose no area.
        has_area = len(cut) >= 3 and outlines.ring_area(np.array(cut)) != 0
        vertices = cut if has_area else vertices
      else:
        has_area = outlines.spans_area(vertices)
      if not has_area and beyond is None and empty == "error":
        raise _no_area("polygon")
      into = rings if has_area or beyond is None else gone
      into.append(tuple(map(checks.clamp, vertices)))
    if not rings and empty == "error":
      raise _no_area("polygon")
    rings = rings or gone
    return cls("polygon", rings[0], tuple(rings[1:]))

  @classmethod
  def scribble(
    cls, points: Iterable[XY], *more_paths: Iterable[XY], width: float = 0.02,
    size: Size | None = None, nan: str = "error", outside: str = "error", empty: str = "error",
  ) -> Region:  # fmt: skip
    """A path of at least two points drawn with a round brush of diameter `width`, or several.

    `width` is in the unit of the points: pixels with `size`, else shares of both sides.
    """
    checks.check_policies(nan=nan, outside=outside, empty=empty)
    if not 0 < width < float("inf"):
      raise RegionError("shape", f"scribble: width={width}; expected a positive number")
    brush = (float(width), float(width)) if size is None else (width / size[0], width / size[1])
    paths: list[Path] = []
    gone: list[Path] = []
    for path in (points, *more_paths):
      vertices = checks.finite(checks.normalise(path, size, "scribble"), "scribble", nan)
      if len(vertices) < 2:
        raise RegionError(
          "shape",
          f"scribble: {len(vertices)} points; expected at least 2. Use Region.point for one",
        )
      pieces = [vertices]
      beyond = next((p for p in vertices if not checks.is_inside(p)), None)
      if beyond is not None:
        if outside == "error":
          raise checks.outside_error(beyond, "scribble", size)
        pieces = checks.clip_path(vertices)
      paths += [tuple(map(checks.clamp, piece)) for piece in pieces]
      if not pieces:
        gone.append(tuple(map(checks.clamp, vertices)))
    if not paths and empty == "error":
      raise _nothing_left("scribble")
    paths = paths or gone
    return cls("scribble", paths[0], tuple(paths[1:]), brush=brush)

  @classmethod
  def from_mask(cls, mask: np.ndarray | Mask) -> Region:
    """A mask [height, width] of bool or integers over the whole image; not 0 is inside.

    A mask without a pixel always raises: there is nothing to keep.
    """
    if not isinstance(mask, Mask):
      mask = Mask.from_array(mask)
    x1, y1, x2, y2 = mask.box
    return cls("mask", ((x1, y1), (x2, y2)), mask=mask)

  @classmethod
  def from_rle(cls, rle: Mapping[str, Any]) -> Region:
    """A mask in COCO's run-length form, {'size': [h, w], 'counts': list or compressed string}."""
    return cls.from_mask(Mask.from_rle(rle))

  @property
  def box_xyxy(self) -> tuple[float, float, float, float]:
    """The enclosing box; (x, y, x, y) of a point; a scribble's brush included."""
    if len(self.points) == 2 and self.kind in ("box", "mask"):
      return (*self.points[0], *self.points[1])
    xs, ys = zip(*self.points, *(p for ring in self.rings for p in ring))
    rx, ry = self.brush[0] / 2, self.brush[1] / 2
    low = (max(min(xs) - rx, 0.0), max(min(ys) - ry, 0.0))
    return (*low, min(max(xs) + rx, 1.0), min(max(ys) + ry, 1.0))

  @property
  def kind_id(self) -> int:
    """What the model is told: 1 point, 2 box, 3 everything with a shape."""
    return {"point": 1, "box": 2}.get(self.kind, 3)

  def rasterize(self, height: int, width: int) -> np.ndarray:
    """The pixels whose centres lie in the region, bool [height, width]; always at least one.

    A point gives the pixel that holds it, what is thinner than a pixel the pixels it runs through.
    """
    if self.kind == "mask":
      assert self.mask is not None
      return geometry.resample_mask(self.mask, height, width)
    if self.kind == "polygon":
      return geometry.fill_rings((self.points, *self.rings), height, width)
    if self.kind == "scribble":
      return geometry.stroke_paths((self.points, *self.rings), self.brush, height, width)
    out = np.zeros((height, width), bool)
    x1, y1, x2, y2 = self.box_xyxy
    out[geometry.box_pixels(y1, y2, height), geometry.box_pixels(x1, x2, width)] = True
    return out

  def cover(self, grid_hw: tuple[int, int]) -> np.ndarray:
    """Share of each patch that the region covers, float32 [gh * gw], row-major; never all zero.

    Boxes and masks are exact; polygons and scribbles are sampled at 4 to 16 points per patch
    side; a point spreads its weight 1 over the nearest patch centres (bilinear).
    """
    if self.kind == "point":
      return geometry.cover_point(*self.points[0], grid_hw)
    if self.kind == "box":
      return geometry.cover_box(self.box_xyxy, grid_hw)
    if self.kind == "mask":
      assert self.mask is not None
      return geometry.cover_mask(self.mask, grid_hw)
    brush = self.brush if self.kind == "scribble" else None
    return geometry.cover_shape((self.points, *self.rings), self.box_xyxy, grid_hw, brush=brush)

  def transform(self, t: ImageTransform, *, empty: str = "error") -> Region:
    """The same region on the resized image; what a crop cuts away is clipped.

    A scribble is clipped by its path: of a stroke along the far side of the border, the half brush
    that would reach in is lost.

    Args:
      t: what `images.preprocess` returned with the image.
      empty: when nothing is left inside the new image: 'error', or 'keep' for the place on the
        border nearest to it.

    Raises:
      RegionError: nothing is left ('empty'), unless kept; always so for a mask.
    """
    checks.check_policies(empty=empty)
    if t.scale == (1.0, 1.0) and t.offset == (0.0, 0.0):
      return self
    if self.kind == "mask":
      return self._transform_mask(t)
    paths = [
      [(x * t.scale[0] + t.offset[0], y * t.scale[1] + t.offset[1]) for x, y in path]
      for path in (self.points, *self.rings)
    ]
    try:
      if self.kind == "polygon":
        return Region.polygon(*paths, outside="clip", empty=empty)
      if self.kind == "scribble":
        clipped = Region.scribble(*paths, outside="clip", empty=empty)
        brush = (self.brush[0] * t.scale[0], self.brush[1] * t.scale[1])
        return dataclasses.replace(clipped, brush=brush)
      beyond = not _touches(paths[0])
      if beyond and empty == "error":
        raise _nothing_left(self.kind)
      if self.kind == "point":
        return Region.point(*paths[0][0], outside="clip")
      was_empty = self.points[0][0] == self.points[1][0] or self.points[0][1] == self.points[1][1]
      keep = "keep" if was_empty else empty
      return Region.box(*paths[0][0], *paths[0][1], outside="clip", empty=keep)
    except RegionError as error:
      raise _nothing_left(self.kind) from error

  def _transform_mask(self, t: ImageTransform) -> Region:
    """At the mask's own pixel density, so that a crop or a pad loses nothing."""
    assert self.mask is not None
    height = max(round(self.mask.height / t.scale[1]), 1)
    width = max(round(self.mask.width / t.scale[0]), 1)
    pixels = geometry.resample_mask(self.mask, height, width, scale=t.scale, offset=t.offset)
    if not pixels.any():
      raise _nothing_left("mask")
    return Region.from_mask(pixels)

  def outline(self, max_vertices: int | None = None) -> list[Point]:
    """The region as one list of points, the form in which it is written as text.

    A point is itself, a box its two corners; a polygon (the largest of several rings) and the
    outer contour of a mask's largest part are simplified to `max_vertices` (at least 3; None: a
    polygon as it is, a contour to three quarters of a pixel); a scribble gives its first path,
    with at least 3 points so that the text can't be taken for a box.
    """
    if self.kind in ("point", "box"):
      return list(self.points)
    if self.kind == "scribble":
      return _thin(self.points, max_vertices)
    if self.kind == "mask":
      assert self.mask is not None
      ring = max(outlines.mask_contours(self.mask), key=outlines.ring_area)
      ring = outlines.simplify(ring, max_vertices, tolerance=0.75)
      return [(x / self.mask.width, y / self.mask.height) for x, y in ring.tolist()]
    rings = (self.points, *self.rings)
    if len(rings) > 1:
      rings = (max(rings, key=lambda r: abs(outlines.ring_area(np.array(r)))),)
    if max_vertices is None or len(rings[0]) <= max(max_vertices, 3):
      return list(rings[0])
    ring = outlines.simplify(np.array(rings[0]), max_vertices, tolerance=0.0)
    return [(x, y) for x, y in ring.tolist()]

  def to_json(self) -> dict[str, Any]:
    """Plain dict of lists and numbers; a mask as COCO's run lengths."""
    out: dict[str, Any] = {"kind": self.kind}
    if self.mask is not None:
      return out | {"mask": self.mask.to_rle()}
    out["points"] = [list(p) for p in self.points]
    if self.rings:
      out["rings"] = [[list(p) for p in ring] for ring in self.rings]
    if self.kind == "scribble":
      out["brush"] = list(self.brush)
    return out

  @classmethod
  def from_json(cls, values: Mapping[str, Any]) -> Region:
    """Reads what `to_json` wrote, checked like every other input.

    Raises:
      RegionError: not such a dict, or a region that the constructors refuse.
    """
    try:
      kind = values["kind"]
      if kind == "mask":
        return cls.from_rle(values["mask"])
      points, rings = values["points"], values.get("rings", ())
      if kind == "point":
        return cls.point(*points[0])
      if kind == "box":
        return cls.box(*points[0], *points[1], empty="keep")
      if kind == "polygon":
        return cls.polygon(points, *rings, empty="keep")
      if kind == "scribble":
        x, y = values["brush"]
        return dataclasses.replace(cls.scribble(points, *rings), brush=(float(x), float(y)))
    except RegionError:
      raise
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
      raise RegionError(
        "shape", f"region: not what Region.to_json writes: {values!r:.120}"
      ) from error
    raise checks.unknown_kind(kind)


def _inside(points: list[Point], what: str, size: Size | None, outside: str) -> Path:
  """Points inside the image, by policy; clip moves each to the nearest point of the image."""
  if outside == "error":
    for p in points:
      if not checks.is_inside(p):
        raise checks.outside_error(p, what, size)
  return tuple(map(checks.clamp, points))


def _no_area(what: str) -> RegionError:
  return RegionError(
    "empty",
    f"{what}: encloses no area inside the image. Correct it, use Region.point for a place, or "
    "pass empty='keep' to keep it as it is",
  )


def _nothing_left(kind: str) -> RegionError:
  return RegionError(
    "empty",
    f"{kind}: lies wholly outside the image or the crop. Use a resize rule that keeps the whole "
    "image (chatspot, gpt4roi, letterbox), or empty='keep' for the nearest place on the border",
  )


def _touches(points: list[Point]) -> bool:
  """Whether the box around the points meets the unit square."""
  xs, ys = zip(*points)
  snap = checks.SNAP
  return max(xs) >= -snap and min(xs) <= 1 + snap and max(ys) >= -snap and min(ys) <= 1 + snap


def _thin(path: Path, max_vertices: int | None) -> list[Point]:
  """At most max_vertices points of an open path, its ends among them; at least 3."""
  points = list(path)
  if len(points) == 2:
    (x1, y1), (x2, y2) = points
    return [points[0], ((x1 + x2) / 2, (y1 + y2) / 2), points[1]]
  if max_vertices is None or len(points) <= max(max_vertices, 3):
    return points
  keep = np.linspace(0, len(points) - 1, max(max_vertices, 3)).round().astype(int)
  return [points[i] for i in keep]

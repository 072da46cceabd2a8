"""Any COCO-format annotation file with its image folder, as conversations: one turn per box."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regionjax.data import phrases
from regionjax.data.errors import DataError
from regionjax.data.scenes_world import Draw
from regionjax.data.schema import Example, Turn
from regionjax.data.sources.coco_reader import Box, Photo, Report, read_coco
from regionjax.mentions import escape
from regionjax.regions import Region, RegionError

REFERENCES = ("box", "point", "polygon", "mask")
TEXTS = ("auto", "category", "caption")
_RASTER = 64  # cells a side in which a point inside a shape is looked for

log = logging.getLogger(__name__)


class CocoSource:
  """Boxes of a COCO-format file: each turn asks what a box holds, in the words of `scenes`.

  An image with more than `max_regions` boxes gives several examples, so that every box is used.

  Args:
    annotations: the JSON file.
    images: the folder that its file names are relative to, as it is or as `regionjax pack` made it.
    text: what the answer is: the box's 'category', its 'caption', or 'auto': the caption where the
      annotation has one, else the category.
    max_regions: most boxes in one example.
    strict: whether a defect (missing image, unknown category, empty or outside box, ...) is an
      error instead of being skipped and counted in `report`.
    seed: sets the order of the boxes and the forms of the questions.
    references: kinds of reference, used in turn. All but 'box' follow the segmentation; where there
      is none the box serves, and its centre for a point.

  Attributes:
    report: what was used and what was skipped, a printable table. `regionjax train` and `regionjax
      evaluate` show it; the former keeps it in `summary.json`.

  Raises:
    DataError: an unusable file, nothing usable in it, or a defect under `strict`.
  """

  name = "coco"

  def __init__(
    self, annotations: str | Path, images: str | Path, text: str = "auto", max_regions: int = 8,
    strict: bool = False, seed: int = 0, references: Sequence[str] = ("box",),
  ):  # fmt: skip
    if text not in TEXTS:
      raise DataError(f"coco text {text!r}: expected one of {', '.join(TEXTS)}")
    if max_regions < 1:
      raise DataError(f"coco max_regions {max_regions}: expected at least 1")
    self._references = tuple(references)
    if not self._references or not set(self._references) <= set(REFERENCES):
      raise DataError(
        f"coco references {list(references)}: expected some of {', '.join(REFERENCES)}"
      )
    photos, self.report = read_coco(annotations, images, text)
    _judge(self.report, strict=strict)
    self._seed = seed
    self._items: list[tuple[Photo, list[int]]] = []  # image and the numbers of its boxes
    for photo in photos:
      order = Draw("coco", seed, photo.id).shuffled(range(len(photo.boxes)))
      for start in range(0, len(order), max_regions):
        self._items.append((photo, order[start : start + max_regions]))

  def __len__(self) -> int:
    return len(self._items)

  def __getitem__(self, index: int) -> Example:
    photo, chosen = self._items[index]
    draw = Draw("coco", self._seed, photo.id, chosen[0])
    regions, turns, notes = [], [], []
    for at, k in enumerate(chosen):
      box = photo.boxes[k]
      region = refer(box, photo.size, self._references[(index + at) % len(self._references)])
      forms = phrases.NAME if box.task == "name" else phrases.CAPTION
      question = draw.choose(forms).format(r=f"{{region:{len(regions)}}}")
      answer = escape(box.answer)
      turns += [
        Turn("user", question), Turn("assistant", answer, supervise=True, task=box.task)
      ]  # fmt: skip
      regions.append(region)
      notes.append(_note(photo, k, region.kind))
    return Example(
      images=(photo.ref,),
      regions=tuple(regions),
      region_images=(0,) * len(regions),
      turns=tuple(turns),
      references=(turns[-1].text,),
      meta={
        "source": self.name,
        "id": f"{photo.id}/{photo.boxes[chosen[0]].id}",
        "task": notes[-1]["task"],
        "turns": notes,
      },
    )


def _judge(report: Report, *, strict: bool) -> None:
  """Raises if nothing is usable, or if `strict` and something is faulty; else warns of faults."""
  if strict and report.defects:
    raise DataError(
      f"{report.defects} defects and strict=True; correct the file, or leave strict out to skip "
      f"them.\n{report}"
    )
  if not report.used["boxes"]:
    raise DataError(
      "no box of this file can be used; see why below, and whether the images' folder is the right "
      f"one.\n{report}"
    )
  if report.defects:
    _warn_once(f"{report.title} {report.defects} faulty records skipped or clipped; see `report`")


@functools.cache
def _warn_once(message: str) -> None:
  """Warns; a run opens its sources again for evaluation, and once is enough."""
  log.warning("%s", message)


def _note(photo: Photo, k: int, kind: str) -> dict[str, Any]:
  """What an evaluator needs of the turn about box k; the form of `scenes`."""
  mine = photo.boxes[k]
  others = [box.answer for j, box in enumerate(photo.boxes) if j != k and box.task == mine.task]
  return {
    "task": mine.task,
    "about": "category" if mine.task == "name" else "caption",
    "ref": kind,
    "region_dependent": any(other != mine.answer for other in others),
    "scene_answers": others,
    "chance": (1 + others.count(mine.answer)) / (1 + len(others)),
  }


def refer(box: Box, size: tuple[int, int], kind: str) -> Region:
  """The annotation as a Region of the kind named; a box where its segmentation can't serve.

  Args:
    size: (width, height) of the annotated image in pixels.
    kind: 'box', 'point', 'polygon' or 'mask'.
  """
  whole = Region.box(*box.xyxy, size=size)
  if kind == "box":
    return whole
  shape = _shape(box.segmentation, size)
  if kind == "point":
    return _point_inside(shape or whole)
  if shape is None:
    return whole
  if kind == "polygon":
    return shape if shape.kind == "polygon" else Region.polygon(shape.outline(12))
  return shape if shape.kind == "mask" else Region.from_mask(shape.rasterize(size[1], size[0]))


def _shape(segmentation: Any, size: tuple[int, int]) -> Region | None:
  """COCO's segmentation: flat polygons (in pixels) or run lengths; None if unsound."""
  try:
    if isinstance(segmentation, dict):
      return Region.from_rle(segmentation)
    rings = [list(zip(ring[::2], ring[1::2])) for ring in segmentation or () if len(ring) >= 6]
    return Region.polygon(*rings, size=size, outside="clip") if rings else None
  except (RegionError, TypeError, ValueError):
    return None


def _point_inside(shape: Region) -> Region:
  """The place in a shape nearest to its centre of mass."""
  ys, xs = np.nonzero(shape.rasterize(_RASTER, _RASTER))
  best = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)
  return Region.point((float(xs[best]) + 0.5) / _RASTER, (float(ys[best]) + 0.5) / _RASTER)

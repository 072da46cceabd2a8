"""Reading COCO-format files as they are found: what can't be used is skipped and counted.

Met in the wild: crowds, ids as strings or beyond 32 bits, `info` null, no `licenses`, sizes as
strings or missing, file names of another split, exact duplicates, boxes past the border, categories
and images that nothing defines (see the data sets' own forums).
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from regionjax.data.errors import DataError
from regionjax.data.image_records import ImageRecords, is_packed
from regionjax.data.schema import ImageRef
from regionjax.images import size_in_header

# Kept apart from defects: a good file may hold these, so they don't fail `strict`.
HARMLESS = ("crowd", "duplicate", "image without boxes")
TOLERANCE = 1.0  # pixels past the border that are rounding, not a defect


@dataclasses.dataclass(frozen=True)
class Box:
  """An annotation that can be asked about.

  Attributes:
    xyxy: pixels of the annotated image, clipped to it.
    answer: a category's name or a caption, white space tidied.
    task: 'name' or 'caption'.
    segmentation: as in the file: a list of flat polygons, a run-length dict, or None.
  """

  id: str
  xyxy: tuple[float, float, float, float]
  answer: str
  task: str
  segmentation: Any = None


@dataclasses.dataclass
class Photo:
  """An image with its usable boxes. `ref` has its size."""

  id: str
  ref: ImageRef
  boxes: list[Box] = dataclasses.field(default_factory=list)

  @property
  def size(self) -> tuple[int, int]:
    """(width, height) of the annotated image in pixels."""
    assert self.ref.size is not None
    return self.ref.size


class Report:
  """Counts of what was used and what was not, by reason."""

  def __init__(self, title: str):
    self.title = title
    self.used: dict[str, int] = {"images": 0, "boxes": 0}
    self.counts: collections.Counter[str] = collections.Counter()
    self._first: dict[str, str] = {}

  def note(self, reason: str, what: str) -> None:
    self.counts[reason] += 1
    self._first.setdefault(reason, what)

  @property
  def defects(self) -> int:
    """How many records are faulty, as opposed to legitimately left out."""
    return sum(n for reason, n in self.counts.items() if reason not in HARMLESS)

  def __str__(self) -> str:
    rows = [(f"{name} used", n, "") for name, n in self.used.items()]
    rows += [(r, n, f"first: {self._first[r]}") for r, n in self.counts.most_common()]
    width = max(len(row[0]) for row in rows)
    return "\n".join([self.title, *(f"  {r:<{width}} {n:>8}  {w}".rstrip() for r, n, w in rows)])


def read_coco(annotations: str | Path, images: str | Path, text: str) -> tuple[list[Photo], Report]:
  """All images with usable boxes, in the order of the file, and the report.

  Args:
    annotations: the JSON file.
    images: the folder that its `file_name`s are relative to, of pictures or packed
      (`image_records`).
    text: 'category', 'caption', or 'auto': the annotation's caption if it has one.

  Raises:
    DataError: no such file or folder, or not a COCO-format file.
  """
  data = _load(Path(annotations))
  if not Path(images).is_dir():
    raise DataError(f"coco images {str(images)!r}: no such folder; give the one with the pictures")
  report = Report(f"{annotations}:")
  records = ImageRecords(images) if is_packed(images) else None
  photos = _photos(_records(data, "images"), Path(images), records, report)
  categories = {
    str(c.get("id")): _tidy(c.get("name", "")) for c in _records(data, "categories", needed=False)
  }
  known = {str(i.get("id")) for i in _records(data, "images")}
  seen: set[tuple[Any, ...]] = set()
  for record in _records(data, "annotations"):
    what = f"annotation {record.get('id', '?')}"
    image_id = str(record.get("image_id"))
    photo = photos.get(image_id)
    if photo is None:
      lost = "box of a missing image" if image_id in known else "unknown image id"
      report.note(lost, f"{what}, image {image_id}")
      continue
    box = _box(record, photo, categories, text, report, what)
    if box is None:
      continue
    key = (image_id, box.xyxy, box.answer)
    if key in seen:
      report.note("duplicate", what)
      continue
    seen.add(key)
    photo.boxes.append(box)
  for photo in photos.values():
    if not photo.boxes:
      report.note("image without boxes", photo.ref.key)
  usable = [photo for photo in photos.values() if photo.boxes]
  report.used = {"images": len(usable), "boxes": sum(len(p.boxes) for p in usable)}
  return usable, report


def _load(path: Path) -> Mapping[str, Any]:
  try:
    data = json.loads(path.read_text(encoding="utf-8-sig"))
  except OSError as error:
    raise DataError(f"coco annotations {str(path)!r}: {error.strerror}; check the path") from error
  except ValueError as error:
    raise DataError(
      f"coco annotations {str(path)!r}: not a JSON file ({error}); copy or download it again"
    ) from error
  if not isinstance(data, dict):
    raise DataError(
      f"coco annotations {str(path)!r}: expected an object with 'images', 'annotations' and "
      f"'categories', got a JSON {type(data).__name__}"
    )
  for key in ("images", "annotations"):
    if not isinstance(data.get(key), list):
      raise DataError(
        f"coco annotations {str(path)!r}: no list {key!r}; its keys are "
        f"{', '.join(map(str, data)) or 'none'}. Is it a COCO-format file?"
      )
  return data


def _records(data: Mapping[str, Any], key: str, *, needed: bool = True) -> Iterable[dict[str, Any]]:
  values = data[key] if needed else data.get(key) or []
  return (value for value in values if isinstance(value, dict))


def _photos(
  listed: Iterable[dict[str, Any]], folder: Path, records: ImageRecords | None, report: Report
) -> dict[str, Photo]:
  photos: dict[str, Photo] = {}
  for record in listed:
    image_id = str(record.get("id"))
    if image_id in photos:
      report.note("image id used twice", f"image {image_id}")
      continue
    given = str(record.get("file_name") or record.get("coco_url") or "")
    size = _size(record.get("width"), record.get("height"))
    ref = _find_file(folder, given, size) if records is None else _find_record(records, given, size)
    if ref is None:
      report.note("missing image", str(folder / given))
    elif ref.size is None:
      report.note("unreadable image", ref.key)
    else:
      photos[image_id] = Photo(image_id, ref)
  return photos


def _find_file(folder: Path, given: str, size: tuple[int, int] | None) -> ImageRef | None:
  for name in _names(given):
    if os.path.isfile(path := os.path.join(folder, name)):
      return ImageRef("file", path, size or size_in_header(path))
  return None


def _find_record(
  records: ImageRecords, given: str, size: tuple[int, int] | None
) -> ImageRef | None:
  for name in _names(given):
    if name in records:
      return ImageRef("record", records.key(name), size or records.sizes[name])
  return None


def _names(given: str) -> Iterator[str]:
  """That name; without its folders; and COCO 2017's for a 2014 one."""
  last = given.rsplit("/", 1)[-1]
  return (name for name in dict.fromkeys((given, last, last.rsplit("_", 1)[-1])) if name)


def _size(width: Any, height: Any) -> tuple[int, int] | None:
  try:
    size = int(width), int(height)
  except (TypeError, ValueError):
    return None
  return size if min(size) > 0 else None


def _box(
  record: dict[str, Any], photo: Photo, categories: Mapping[str, str], text: str, report: Report,
  what: str,
) -> Box | None:  # fmt: skip
  """The annotation as a Box, or None with the reason noted."""
  if record.get("iscrowd") in (1, "1", True):
    report.note("crowd", what)
    return None
  xyxy = _corners(record.get("bbox"))
  if xyxy is None:
    report.note("malformed box", f"{what}, bbox {record.get('bbox')!r:.60}")
    return None
  x1, y1, x2, y2 = xyxy
  width, height = photo.size
  if x2 <= x1 or y2 <= y1:
    report.note("zero-area box", f"{what}, bbox {record['bbox']}")
    return None
  if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
    report.note("box outside the image", f"{what}, bbox {record['bbox']} in {width}x{height}")
    return None
  caption = _tidy(record.get("caption"))
  if text == "caption" or (text == "auto" and caption):
    answer, task, reason = caption, "caption", "box without caption"
  else:
    answer, task = categories.get(str(record.get("category_id")), ""), "name"
    reason = "unknown category id"
  if not answer:
    report.note(reason, f"{what}, category {record.get('category_id')!r}")
    return None
  if min(x1, y1) < -TOLERANCE or x2 > width + TOLERANCE or y2 > height + TOLERANCE:
    report.note("box clipped at the border (used)", f"{what}, bbox {record['bbox']}")
  clipped = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
  return Box(str(record.get("id", "")), clipped, answer, task, record.get("segmentation"))


def _corners(bbox: Any) -> tuple[float, float, float, float] | None:
  """xywh to xyxy; None unless it is four finite numbers."""
  try:
    x, y, w, h = (float(v) for v in bbox)
  except (TypeError, ValueError):
    return None
  corners = (x, y, x + w, y + h)
  return corners if all(map(math.isfinite, corners)) else None


def _tidy(text: Any) -> str:
  return " ".join(str(text).split()) if text is not None else ""

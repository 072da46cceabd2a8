"""Where examples come from: a table of sources, and the pixels behind an ImageRef.

A source has `name`, `__len__` and `__getitem__(i) -> Example`; an Example is text and references
only, cheap and a pure function of i. Pixels are read later, by `load_image`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from typing import Any, Protocol

import numpy as np

from regionjax.config import SourceConfig
from regionjax.data.errors import DataError
from regionjax.data.image_records import read_record
from regionjax.data.schema import Example, ImageRef
from regionjax.images import ImageError, decode

# name -> module and class; imported when first used.
SOURCES: dict[str, tuple[str, str]] = {
  "scenes": ("regionjax.data.sources.scenes", "ScenesSource"),
  "coco": ("regionjax.data.sources.coco", "CocoSource"),
}


class Source(Protocol):
  """What the pipeline and the evaluation ask of a data set."""

  name: str

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example: ...


def make_source(config: SourceConfig) -> Source:
  """Opens the source that a config names.

  Raises:
    DataError: an unknown name or argument (near matches are named), or the source's own complaint
      about its files.
  """
  if config.name not in SOURCES:
    raise DataError(_unknown("data source", config.name, list(SOURCES)))
  module, cls_name = SOURCES[config.name]
  cls = getattr(importlib.import_module(module), cls_name)
  known = list(inspect.signature(cls).parameters)
  args: dict[str, Any] = dict(config.args)
  for key in args:
    if key not in known:
      raise DataError(_unknown(f"argument of source {config.name!r}:", key, known))
  missing = [
    p.name
    for p in inspect.signature(cls).parameters.values()
    if p.default is p.empty and p.name not in args
  ]
  if missing:
    raise DataError(f"source {config.name!r} needs {', '.join(missing)}")
  return cls(**args)


def load_image(ref: ImageRef) -> np.ndarray:
  """The pixels of an image, uint8 [height, width, 3] RGB.

  Raises:
    regionjax.images.ImageError: a file that is missing or cannot be decoded.
    DataError: an unknown kind of reference, a malformed scene key, a record that cannot be read, or
      an image whose shape is not the one that its annotations were made for.
  """
  if ref.kind == "scene":
    from regionjax.data.sources.scenes import load_scene

    return load_scene(ref)
  if ref.kind == "file":
    image = decode(ref.key)
  elif ref.kind == "record":
    try:
      image = decode(read_record(ref.key))
    except ImageError as error:
      raise ImageError(f"record {ref.key}: {error}") from error
  else:
    raise DataError(f"image reference of kind {ref.kind!r}: expected 'file', 'record' or 'scene'")
  if ref.size is not None:
    _check_shape(ref, image)
  return image


def _check_shape(ref: ImageRef, image: np.ndarray) -> None:
  """Regions are shares of the sides: another size is fine, another shape displaces them."""
  assert ref.size is not None
  height, width = image.shape[:2]
  w, h = ref.size
  # A resized copy may be off by one pixel in each side, plus a per cent for careless tools.
  if abs(width * h - height * w) > max(width + w, height + h) + 0.01 * height * w:
    raise DataError(
      f"{ref.key} is {width}x{height} pixels, but its annotations are for {w}x{h}: the boxes would "
      "lie elsewhere. Use the images that the annotations were made for"
    )


def _unknown(what: str, given: str, known: list[str]) -> str:
  near = difflib.get_close_matches(given, known, n=3, cutoff=0.5)
  hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
  return f"unknown {what} {given!r}; {hint}"

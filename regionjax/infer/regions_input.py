"""Regions as people type them: `box 10,20,90,80`, `point 40,40`, `mask cat.png`.

Shared by the options of `regionjax chat` and by its prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from regionjax.images import ImageError, open_picture, to_rgb
from regionjax.regions import Region, RegionError

Size = tuple[int, int]
KINDS = {
  "box": "x1,y1,x2,y2",
  "point": "x,y",
  "polygon": "x1,y1,x2,y2,x3,y3,...",
  "scribble": "x1,y1,x2,y2,...",
  "mask": "FILE.png",
}


def parse_region(
  kind: str,
  text: str,
  *,
  size: Size,
  normalized: bool = False,
  outside: str = "error",
  inverted: str = "error",
) -> Region:
  """One typed region.

  Args:
    kind: a key of KINDS.
    text: numbers separated by commas or blanks, or a mask's file.
    size: (width, height) of the image.
    normalized: numbers are shares of the sides in [0, 1] instead of pixels.
    outside, inverted: policies of `Region.box`; a mask has neither defect.

  Raises:
    RegionError: not the right number of numbers, or a region that isn't one (NaN, inverted,
      empty, outside).
  """
  if kind == "mask":
    return read_mask(Path(text), size=size)
  numbers = _numbers(kind, text)
  frame = None if normalized else size
  pairs = list(zip(numbers[0::2], numbers[1::2]))
  make: dict[str, Callable[[], Region]] = {
    "box": lambda: Region.box(*numbers, size=frame, outside=outside, inverted=inverted),
    "point": lambda: Region.point(*numbers, size=frame, outside=outside),
    "polygon": lambda: Region.polygon(pairs, size=frame, outside=outside),
    "scribble": lambda: Region.scribble(
      pairs, width=0.02 * max(frame or (1, 1)), size=frame, outside=outside
    ),
  }
  try:
    return make[kind]()
  except RegionError as error:
    hint = ""
    if normalized and any(abs(n) > 1 for n in numbers):
      hint = " (with --normalized, numbers are shares of the sides between 0 and 1)"
    raise RegionError(error.reason, f"{kind} {text}: {error}{hint}") from None


def read_mask(path: Path, *, size: Size) -> Region:
  """A mask from a picture of the image's size.

  Read like any image (`images.open_picture`: the same formats, upright by its EXIF orientation).
  Inside is what is opaque, if the file has transparency; else what is bright (at least half of the
  brightest value), or in a palette picture every index but 0.

  Raises:
    RegionError: no such file, no picture, another size than the image's, or no pixel inside.
  """
  name = f"mask {path}"
  try:
    picture = open_picture(path, name)
    if picture.size != tuple(size):
      raise RegionError(
        "shape",
        f"{name}: it is {picture.size[0]}x{picture.size[1]} pixels, the image "
        f"{size[0]}x{size[1]}; draw the mask over the whole image",
      )
    inside = _inside(picture, name)
  except ImageError as error:
    raise RegionError("shape", str(error)) from error
  if not inside.any():
    raise RegionError("empty", f"{name}: no pixel is inside; paint the region white")
  return Region.from_mask(inside)


def _inside(picture: Image.Image, name: str) -> np.ndarray:
  if picture.mode.startswith("I"):  # 16 bits as they are: scaled to 8, a mask of 0 and 1 would go
    values = np.asarray(picture)
    return values >= max(int(values.max()), 1) / 2
  if picture.has_transparency_data:
    alpha = np.asarray(picture.convert("RGBA").getchannel("A"))
    if alpha.min() < 255:
      return alpha > 127
  if picture.mode in ("P", "1"):
    return np.asarray(picture) > 0
  values = np.asarray(Image.fromarray(to_rgb(picture, name)).convert("L"))
  return values >= max(int(values.max()), 1) / 2


def _numbers(kind: str, text: str) -> list[float]:
  words = [word for word in re.split(r"[,\s]+", text.strip()) if word]
  try:
    numbers = [float(word) for word in words]
  except ValueError:
    raise RegionError("shape", f"{kind} {text!r}: expected numbers, {KINDS[kind]}") from None
  right = {"box": len(numbers) == 4, "point": len(numbers) == 2}
  even = len(numbers) % 2 == 0 and len(numbers) >= (6 if kind == "polygon" else 4)
  if not right.get(kind, even):
    raise RegionError("shape", f"{kind} {text!r}: {len(numbers)} numbers; expected {KINDS[kind]}")
  return numbers

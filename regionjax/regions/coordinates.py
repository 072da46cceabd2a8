"""Regions as text: the coordinate conventions of the field, printed and parsed exactly.

One list of numbers per region, x before y unless said otherwise: 2 numbers are a point, 4 a box
(left, top, right, bottom), 6 or more a polygon. Masks and scribbles are written as an outline, so
they come back as polygons. Only one list is written, so of a polygon, mask or scribble of several
parts the text keeps one: of a polygon the ring of largest area, of a mask the outer outline of its
largest part (holes are lost), of a scribble the first path without its width (`Region.outline`).

| name | example | numbers |
|---|---|---|
| unit3 | `[0.123, 0.500]` | shares of the side, three decimals (ChatSpot) |
| unit2 | `[0.12, 0.50]` | the same with two decimals |
| int999 | `[123, 500]` | 1,000 bins 000-999, zero-padded; parsed as the middle of the bin |
| int1000 | `[123, 500]` | thousandths of the side, 0-1000 |
| percent1 | `[12.3, 50.0]` | per cent of the side |
| loc1024 | `<loc0512><loc0126>` | 1,023rds of the side, y before x (PaliGemma) |
| pixels | `[79, 240]` | pixels of the original image |
| pixels_resized | `[28, 112]` | pixels of the resized image |
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from regionjax.regions.checks import RegionError
from regionjax.regions.region import Region, Size

_LIST = re.compile(r"\[([^\[\]]*)\]")
_LOC = re.compile(r"(?:<loc\d{4}>)+")
_NUMBER = re.compile(r"\s*-?\d{1,9}(?:\.\d{1,9})?\s*")


@dataclasses.dataclass(frozen=True)
class Refusal:
  """A list of numbers in a text that is no region.

  Attributes:
    start, end: where it stands in the text.
    reason: as of RegionError: 'inverted', 'outside', or 'text' where the numbers are not of the
      format (their count, NaN).
    message: what is wrong, in words.
  """

  start: int
  end: int
  reason: str
  message: str


@dataclasses.dataclass(frozen=True)
class CoordinateFormat:
  """One convention. `print` and `parse` are inverse up to half a quantum.

  Attributes:
    name: its key in FORMATS.
    per_side: numbers per side of the image; None for pixels.
    decimals: digits after the point.
    digits: zero-padded width of whole numbers.
    binned: numbers name bins (floor) instead of the nearest multiple (round).
    tokens: whether it is written as `<loc....>`, y first, instead of a list.
    frame: which size pixels need: 'original' or 'resized'; 'unit' needs none.
  """

  name: str
  per_side: int | None = None
  decimals: int = 0
  digits: int = 0
  binned: bool = False
  tokens: bool = False
  frame: str = "unit"

  @property
  def quantum(self) -> float:
    """Distance between neighbouring values: a share of the side, or 1 (pixel)."""
    return 10.0**-self.decimals / (self.per_side or 1)

  def step(self, size: Size | None = None, resized: Size | None = None) -> tuple[float, float]:
    """The quantum in x and in y as shares of the sides."""
    scale_x, scale_y = self._scale(size, resized)
    return 10.0**-self.decimals / scale_x, 10.0**-self.decimals / scale_y

  def print(
    self,
    region: Region,
    size: Size | None = None,
    *,
    resized: Size | None = None,
    max_vertices: int | None = None,
  ) -> str:
    """Writes a region.

    Args:
      region: in the frame of the original image; for 'pixels_resized' after a letterbox or a crop
        in that of the resized one (`region.transform(t)`; prompts refuse these two together, see
        `prompt_checks.check_resize`).
      size: (width, height) of the original image; needed by 'pixels'.
      resized: (width, height) of the resized image; needed by 'pixels_resized'.
      max_vertices: outlines are simplified to this many vertices (None: see Region.outline).

    Raises:
      RegionError: the size that the format needs is missing.
    """
    scale_x, scale_y = self._scale(size, resized)
    pairs = [
      (self._write(x, scale_x), self._write(y, scale_y)) for x, y in region.outline(max_vertices)
    ]
    if self.tokens:
      return "".join(f"<loc{y}><loc{x}>" for x, y in pairs)
    return "[" + ", ".join(f"{x}, {y}" for x, y in pairs) + "]"

  def parse(
    self,
    text: str,
    size: Size | None = None,
    *,
    resized: Size | None = None,
    inverted: str = "error",
    outside: str = "error",
    empty: str = "keep",
  ) -> Region:
    """Reads one region; `text` is its list and nothing else but surrounding blanks.

    `empty` is 'keep' because a small box may print with equal corners; `inverted` and `outside`
    are the policies of Region.box and Region.polygon.

    Raises:
      RegionError: not a list of this format, or a region that the policies refuse.
    """
    scale_x, scale_y = self._scale(size, resized)
    numbers = self._numbers(text)
    if len(numbers) < 2 or len(numbers) % 2:
      raise RegionError(
        "text", f"{self.name}: {text!r:.80} has {len(numbers)} numbers; expected pairs"
      )
    first, second = numbers[0::2], numbers[1::2]
    xs, ys = (second, first) if self.tokens else (first, second)
    points = [(self._read(x, scale_x), self._read(y, scale_y)) for x, y in zip(xs, ys)]
    if len(points) == 1:
      return Region.point(*points[0], outside=outside)
    if len(points) == 2:
      return Region.box(*points[0], *points[1], inverted=inverted, outside=outside, empty=empty)
    return Region.polygon(points, outside=outside, empty=empty)

  def _scale(self, size: Size | None, resized: Size | None) -> tuple[float, float]:
    if self.per_side is not None:
      return float(self.per_side), float(self.per_side)
    given = size if self.frame == "original" else resized
    if given is None:
      name = "size" if self.frame == "original" else "resized"
      raise RegionError(
        "text", f"{self.name}: needs {name}=(width, height) of the {self.frame} image in pixels"
      )
    return float(given[0]), float(given[1])

  def _write(self, value: float, scale: float) -> str:
    if self.binned:
      return f"{min(int(value * scale), int(scale) - 1):0{self.digits}d}"
    if self.digits:
      return f"{round(value * scale):0{self.digits}d}"
    return f"{value * scale:.{self.decimals}f}"

  def _read(self, number: float, scale: float) -> float:
    return (number + 0.5) / scale if self.binned else number / scale

  def _numbers(self, text: str) -> list[float]:
    text = text.strip()
    if self.tokens:
      if _LOC.fullmatch(text):
        return [float(n) for n in re.findall(r"\d{4}", text)]
    elif match := _LIST.fullmatch(text):
      parts = match[1].split(",")
      if all(map(_NUMBER.fullmatch, parts)):
        return [float(n) for n in parts]
    example = "<loc0512><loc0126>" if self.tokens else "[1, 2, 3, 4]"
    raise RegionError("text", f"{self.name}: {text!r:.80} is not of the form {example}")


FORMATS: dict[str, CoordinateFormat] = {
  f.name: f
  for f in (
    CoordinateFormat("unit3", 1, decimals=3),
    CoordinateFormat("unit2", 1, decimals=2),
    CoordinateFormat("int999", 1000, digits=3, binned=True),
    CoordinateFormat("int1000", 1000),
    CoordinateFormat("percent1", 100, decimals=1),
    CoordinateFormat("loc1024", 1023, digits=4, tokens=True),
    CoordinateFormat("pixels", frame="original"),
    CoordinateFormat("pixels_resized", frame="resized"),
  )
}


def get_format(name: str) -> CoordinateFormat:
  """FORMATS[name], with the known names in the error."""
  if name not in FORMATS:
    raise RegionError("text", f"coordinate format {name!r}: expected one of {', '.join(FORMATS)}")
  return FORMATS[name]


def parse_regions(
  text: str, fmt: str | CoordinateFormat, **options: Any
) -> list[tuple[int, int, Region]]:
  """Every region written in a text (such as an answer), as (start, end, region) in order.

  Lists that don't parse, or that the policies refuse, are left out; `scan_regions` tells of them,
  and takes the same options.
  """
  return scan_regions(text, fmt, **options)[0]


def scan_regions(
  text: str,
  fmt: str | CoordinateFormat,
  *,
  size: Size | None = None,
  resized: Size | None = None,
  inverted: str = "error",
  outside: str = "error",
) -> tuple[list[tuple[int, int, Region]], list[Refusal]]:
  """`parse_regions`, and beside it the lists of numbers that are no region, in order.

  Words in brackets are prose and belong to neither.
  """
  form = get_format(fmt) if isinstance(fmt, str) else fmt
  form.step(size, resized)  # a missing size is the caller's mistake, not the text's
  found, refused = [], []
  for match in (_LOC if form.tokens else _LIST).finditer(text):
    try:
      region = form.parse(match[0], size, resized=resized, inverted=inverted, outside=outside)
    except RegionError as error:
      if form.tokens or all(map(_is_number, match[1].split(","))):
        refused.append(Refusal(match.start(), match.end(), error.reason, str(error)))
      continue
    found.append((match.start(), match.end(), region))
  return found, refused


def _is_number(text: str) -> bool:
  """Whether it reads as a number of any kind, NaN and infinity among them."""
  try:
    float(text)
  except ValueError:
    return False
  return True

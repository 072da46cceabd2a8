"""A binary mask, packed to bits and cropped to what it contains; COCO's run-length code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from regionjax.regions.checks import RegionError


@dataclasses.dataclass(frozen=True)
class Mask:
  """A mask over an image of height x width pixels; only the box that encloses it is stored.

  Attributes:
    height, width: the raster of the whole image.
    top, left, rows, cols: the tight box around the True pixels.
    bits: that box, each row padded to whole bytes (numpy.packbits order).
  """

  height: int
  width: int
  top: int
  left: int
  rows: int
  cols: int
  bits: bytes

  @classmethod
  def from_array(cls, array: np.ndarray) -> Mask:
    """Packs an array [height, width]; every value but 0 is inside.

    Raises:
      RegionError: not two-dimensional, not bool or integer, or without a True pixel.
    """
    array = np.asarray(array)
    if array.ndim != 2:
      raise RegionError("shape", f"mask: expected an array [height, width], got {array.shape}")
    if array.dtype.kind not in "bui":
      raise RegionError(
        "shape",
        f"mask: expected bool or integer values, got {array.dtype}; compare with a threshold",
      )
    inside = array != 0
    rows = np.flatnonzero(inside.any(axis=1))
    cols = np.flatnonzero(inside.any(axis=0))
    if not rows.size:
      raise RegionError(
        "empty", f"mask: none of the {array.shape[0]} x {array.shape[1]} pixels is set"
      )
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(cols[0]), int(cols[-1]) + 1
    bits = np.packbits(inside[top:bottom, left:right], axis=1).tobytes()
    height, width = array.shape
    return cls(height, width, top, left, bottom - top, right - left, bits)

  @property
  def crop(self) -> np.ndarray:
    """The stored box as bool [rows, cols]."""
    return self.read(slice(None))

  def read(self, rows: np.ndarray | slice) -> np.ndarray:
    """Some rows of the stored box: bool [len(rows), cols]."""
    packed = np.frombuffer(self.bits, np.uint8).reshape(self.rows, -1)
    return np.unpackbits(packed[rows], axis=1, count=self.cols).view(bool)

  @property
  def array(self) -> np.ndarray:
    """The whole mask as bool [height, width]."""
    whole = np.zeros((self.height, self.width), bool)
    whole[self.top : self.top + self.rows, self.left : self.left + self.cols] = self.crop
    return whole

  @property
  def box(self) -> tuple[float, float, float, float]:
    """The enclosing box, xyxy in shares of the image."""
    return (
      self.left / self.width,
      self.top / self.height,
      (self.left + self.cols) / self.width,
      (self.top + self.rows) / self.height,
    )

  def to_rle(self) -> dict[str, list[int]]:
    """COCO's uncompressed form: runs of 0 and 1 in turn, column by column, the first of 0."""
    flat = self.array.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return {"size": [self.height, self.width], "counts": ([0] if flat[0] else []) + counts}

  @classmethod
  def from_rle(cls, rle: Mapping[str, Any]) -> Mask:
    """Reads {'size': [height, width], 'counts': list of runs, or COCO's compressed string}."""
    try:
      height, width = (int(n) for n in rle["size"])
      counts = rle["counts"]
      runs = _decompress(counts) if isinstance(counts, (str, bytes)) else [int(n) for n in counts]
      if height <= 0 or width <= 0:
        raise ValueError("no pixels")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
      raise RegionError(
        "shape", f"mask: expected {{'size': [height, width], 'counts': ...}}, got {rle!r:.80}"
      ) from error
    if sum(runs) != height * width or min(runs, default=0) < 0:
      raise RegionError(
        "shape",
        f"mask: the runs cover {sum(runs)} pixels, the {height} x {width} image has "
        f"{height * width}; the annotation is damaged or belongs to another image",
      )
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return cls.from_array(flat.reshape(width, height).T)


def _decompress(text: str | bytes) -> list[int]:
  """COCO's string: base-48 digits of 5 bits and a continuation bit, runs from the 4th on as
  differences to the run two before."""
  data: Sequence[int] = text.encode("ascii") if isinstance(text, str) else text
  runs: list[int] = []
  value = shift = 0
  for byte in data:
    digit = byte - 48
    if not 0 <= digit < 64:
      raise ValueError("not a run-length string")
    value |= (digit & 31) << shift
    shift += 5
    if digit & 32:
      continue
    if digit & 16:
      value -= 1 << shift
    if len(runs) > 2:
      value += runs[-2]
    runs.append(value)
    value = shift = 0
  if shift:
    raise ValueError("a run-length string that ends inside a number")
  return runs

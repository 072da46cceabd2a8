"""The header of a GGUF file: what llama.cpp's format says about a model and its tensors.

Read here rather than by the `gguf` package, whose reader makes two numpy objects of every string:
SmolLM2's 49,152 tokens and their merges took it 2.9 s and take 0.07 s here. Nor can it say how much
of a truncated file is missing. The format is described in ggml's docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from regionjax.weights.tensors import MappedFile, WeightsError, look_at

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 1 counted in 32 bits and was in use for some weeks; 3 added big-endian files
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {
  0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "?", 10: "<u8",
  11: "<i8", 12: "<f8",
}  # fmt: skip
_DIMS = 4  # GGML_MAX_DIMS
_REQUIRED: Any = object()


class Fields(Mapping[str, Any]):
  """A file's metadata: numbers, truth values, strings and lists of these.

  Attributes:
    where: the file, for messages.
  """

  def __init__(self, values: Mapping[str, Any], *, where: str):
    self.where = where
    self._values = dict(values)

  def __getitem__(self, key: str) -> Any:
    return self._values[key]

  def __iter__(self) -> Iterator[str]:
    return iter(self._values)

  def __len__(self) -> int:
    return len(self._values)

  def take(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
    """The value of a key.

    Args:
      key: e.g. 'llama.block_count'.
      kind: int, float, str, bool or list. A float may be written as an integer, and is rounded to
        the shortest decimal that is the same f32 (a file's 9.99999974e-06 is 1e-05).
      default: instead of a missing value; without one a missing value is an error.

    Raises:
      WeightsError: the key is missing, or of another kind.
    """
    if key not in self._values:
      if default is _REQUIRED:
        raise WeightsError(
          f"{self.where}: its metadata has no {key!r}, which this model needs; convert the model "
          "to GGUF again with a current llama.cpp"
        )
      return default
    value = self._values[key]
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
      return float(str(np.float32(value)))
    if type(value) is not kind:
      raise WeightsError(f"{self.where}: {key} is {value!r:.60}; expected {kind.__name__}")
    return value


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of the header.

  Attributes:
    shape: as numpy counts, slowest axis first.
    kind: ggml's number of its type (2 is Q4_0, ...).
    offset: bytes from the start of the file.
  """

  name: str
  shape: tuple[int, ...]
  kind: int
  offset: int


def read_header(file: MappedFile) -> tuple[Fields, list[Entry]]:
  """Metadata and table of tensors.

  Raises:
    WeightsError: not GGUF, of a version or byte order that isn't read, truncated within the
      header, or damaged; the message says which.
  """
  head = file.read(0, 8)
  if head[:4] != MAGIC:
    what = look_at(file.read(0, 64)) or f"no GGUF file (it begins with {head[:4]!r})"
    raise WeightsError(f"{file.where}: it is {what}; expected a file that begins with b'GGUF'")
  cursor = _Cursor(file)
  version = cursor.number("<u4")
  if version not in VERSIONS:
    swapped = version & 0xFFFF == 0
    raise WeightsError(
      f"{file.where}: "
      + ("a big-endian file" if swapped else f"GGUF version {version}")
      + f"; read are versions {' and '.join(map(str, VERSIONS))} in little-endian order: convert "
      "the model to GGUF again with a current llama.cpp"
    )
  tensors, pairs = cursor.number("<u8"), cursor.number("<u8")
  values: dict[str, Any] = {}
  for _ in range(pairs):
    key = cursor.string()
    values[key] = cursor.value(cursor.number("<u4"), key)
  fields = Fields(values, where=file.where)
  entries = [cursor.entry() for _ in range(tensors)]
  return fields, _placed(entries, cursor.at, fields)


def _placed(entries: list[Entry], end: int, fields: Fields) -> list[Entry]:
  """The entries with offsets from the start of the file; the header ends at `end`."""
  align = fields.take("general.alignment", int, 32)
  if align < 1 or align & (align - 1):
    raise WeightsError(f"{fields.where}: general.alignment is {align}; expected a power of two")
  start = -(-end // align) * align
  names = [entry.name for entry in entries]
  if len(set(names)) < len(names):
    twice = sorted({name for name in names if names.count(name) > 1})
    raise WeightsError(f"{fields.where}: damaged: tensors that are listed twice: {twice}")
  return [dataclasses.replace(entry, offset=start + entry.offset) for entry in entries]


class _Cursor:
  """Walks through the header behind its magic; a step past the file's end is named."""

  def __init__(self, file: MappedFile):
    self.where, self.at = file.where, len(MAGIC)
    self._bytes = memoryview(file.array((file.size,), np.dtype(np.uint8), 0))

  def _take(self, count: int) -> memoryview:
    """The next `count` bytes."""
    if count > len(self._bytes) - self.at:
      raise WeightsError(
        f"{self.where}: truncated or damaged: its header wants {count} bytes at byte {self.at}, "
        f"but the file has {len(self._bytes)}; copy or download it again"
      )
    self.at += count
    return self._bytes[self.at - count : self.at]

  def number(self, code: str) -> Any:
    return np.frombuffer(self._take(np.dtype(code).itemsize), code)[0].item()

  def string(self) -> str:
    (length,) = struct.unpack("<Q", self._take(8))
    at = self.at
    try:
      return str(self._take(length), "utf-8")
    except UnicodeDecodeError as error:
      raise WeightsError(
        f"{self.where}: damaged: no UTF-8 text at byte {at} ({error.reason}); download it again"
      ) from None

  def value(self, kind: int, key: str) -> Any:
    if kind == _STRING:
      return self.string()
    if kind in _NUMBERS:
      return self.number(_NUMBERS[kind])
    if kind != _ARRAY:
      raise WeightsError(f"{self.where}: damaged: {key!r} is of the unknown type {kind}")
    kind, length = self.number("<u4"), self.number("<u8")
    if kind in _NUMBERS:
      size = np.dtype(_NUMBERS[kind]).itemsize
      return np.frombuffer(self._take(length * size), _NUMBERS[kind]).tolist()
    if kind != _STRING:
      raise WeightsError(
        f"{self.where}: damaged: {key!r} is a list of type {kind}; expected numbers or strings"
      )
    return [self.string() for _ in range(length)]

  def entry(self) -> Entry:
    name = self.string()
    dims = self.number("<u4")
    if not 1 <= dims <= _DIMS:
      raise WeightsError(f"{self.where}: damaged: tensor {name!r} has {dims} axes; expected 1 to 4")
    shape = struct.unpack(f"<{dims}Q", self._take(8 * dims))[::-1]
    if not math.prod(shape):
      raise WeightsError(f"{self.where}: damaged: tensor {name!r} of shape {list(shape)} is empty")
    kind, offset = struct.unpack("<IQ", self._take(12))
    return Entry(name, shape, kind, offset)

"""Reads the tensors of a GGUF file, llama.cpp's format, dequantised one by one.

Names, axes and the order of rows are the file's; `families.gguf` brings a LLaMA-family model to
Hugging Face's. The arithmetic of the quantised types is that of the `gguf` package.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from regionjax.weights.gguf_header import Entry, Fields, read_header
from regionjax.weights.tensors import MappedFile, Tensor, TensorSource, WeightsError, byte_count


class GgufSource(TensorSource):
  """The tensors of a GGUF file, in float32 whatever they are stored in.

  Attributes:
    fields: the metadata with its types; `metadata` has its numbers and strings as text.
  """

  def __init__(self, tensors: Sequence[Tensor], *, fields: Fields, file: MappedFile):
    text = {k: str(v) for k, v in fields.items() if not isinstance(v, list)}
    super().__init__(tensors, where=file.where, metadata=text, files=[file])
    self.fields = fields


class _Quantised(Tensor):
  """A tensor that is dequantised anew by each `array()`."""

  def __init__(self, entry: Entry, *, file: MappedFile, nbytes: int, dequantise: Callable):
    super().__init__(entry.name, entry.shape, np.float32)
    self._file, self._offset, self._nbytes = file, entry.offset, nbytes
    self._dequantise = dequantise

  def array(self) -> np.ndarray:
    rows = (*self.shape[:-1], self._nbytes // math.prod(self.shape[:-1]))
    return self._dequantise(self._file.array(rows, np.dtype(np.uint8), self._offset))

  def release(self) -> None:
    self._file.release(self._offset, self._offset + self._nbytes)


def open_gguf(path: str | os.PathLike) -> GgufSource:
  """Opens a GGUF file, or the only one in a folder.

  Args:
    path: a .gguf file or a folder.

  Returns:
    Its tensors under llama.cpp's names ('blk.0.attn_q.weight'), slowest axis first: a linear
    layer's weight is [out, in], as in PyTorch. `array()` is float32.

  Raises:
    WeightsError: the `gguf` package is absent; no such file; not a GGUF file, a truncated or
      damaged one, one part of several, or one with tensors of a type that can't be dequantised.
  """
  file = MappedFile(_find(pathlib.Path(path)))
  try:
    fields, entries = read_header(file)
    parts = fields.take("split.count", int, 1)
    if parts > 1:
      raise WeightsError(
        f"{file.where}: one of {parts} parts of a model; make one file of them with llama.cpp's "
        "`llama-gguf-split --merge`"
      )
    return GgufSource(_tensors(file, entries), fields=fields, file=file)
  except WeightsError:
    file.close()
    raise


def _find(path: pathlib.Path) -> pathlib.Path:
  if not path.is_dir():
    return path
  found = sorted(path.glob("*.gguf"))
  if len(found) != 1:
    names = ", ".join(p.name for p in found) or "none"
    raise WeightsError(f"{path}: expected one *.gguf file there, found {names}; name the file")
  return found[0]


def _tensors(file: MappedFile, entries: Sequence[Entry]) -> list[Tensor]:
  """Every entry as a Tensor; what can't be read is named completely."""
  gguf = import_gguf()
  readers: dict[int, tuple[str, int, int, Callable | None]] = {}
  tensors: list[Tensor] = []
  unread: dict[str, list[str]] = {}
  end = 0
  for entry in entries:
    if entry.kind not in readers:
      readers[entry.kind] = _reader(gguf, entry.kind)
    name, block, size, dequantise = readers[entry.kind]
    nbytes = byte_count(entry.shape, 1)
    if nbytes is None or entry.shape[-1] % block:
      raise WeightsError(
        f"{file.where}: damaged: tensor {entry.name!r} of type {name} has shape "
        f"{list(entry.shape)}; expected rows of whole blocks of {block}"
      )
    nbytes = nbytes // block * size
    end = max(end, entry.offset + nbytes)
    if dequantise is None:
      unread.setdefault(name, []).append(entry.name)
      continue
    tensors.append(_Quantised(entry, file=file, nbytes=nbytes, dequantise=dequantise))
  if unread:
    kinds = "; ".join(f"{kind}: {', '.join(names[:3])}, ..." for kind, names in unread.items())
    raise WeightsError(
      f"{file.where}: tensors of types that the installed gguf can't dequantise ({kinds}); "
      "`pip install --upgrade gguf`, or take a file in F16, Q8_0, Q4_K or the like"
    )
  if end > file.size:
    raise WeightsError(
      f"{file.where}: truncated: {end - file.size} bytes are missing (its header announces {end}, "
      f"the file has {file.size}); copy or download it again"
    )
  return tensors


def _reader(gguf: Any, kind: int) -> tuple[str, int, int, Callable | None]:
  """(name, values per block, bytes per block, rows of bytes -> rows of f32) of a ggml type."""
  try:
    code = gguf.GGMLQuantizationType(kind)
    block, size = gguf.GGML_QUANT_SIZES[code]
  except (ValueError, KeyError):
    return f"number {kind}", 1, 1, None

  def dequantise(rows: np.ndarray) -> np.ndarray:
    return gguf.quants.dequantize(rows, code)

  try:
    dequantise(np.zeros((1, size), np.uint8))
  except NotImplementedError:
    return code.name, block, size, None
  return code.name, block, size, dequantise


def import_gguf() -> Any:
  """The `gguf` package.

  Raises:
    WeightsError: it isn't installed.
  """
  try:
    import gguf
  except ImportError:
    raise WeightsError(
      "reading GGUF files needs the package gguf: `pip install gguf` (or "
      "`pip install 'regionjax[gguf]'`)"
    ) from None
  return gguf

"""Stored tensors that are named and shaped but not read: what every reader of weights gives.

A file is mapped into memory once and a tensor is a numpy view of the mapping. A transform is
therefore a view too, and whoever copies a slice of it reads the pages of that slice and no others.
`release` gives those pages back: without it a 13 GB model would be resident as a whole once it has
been walked through.

A mapping stays until the last view of it is dropped, so `close` never pulls memory from under an
array. What a mapping cannot survive is its file being cut short by another program (SIGBUS): files
are replaced by renaming, as everything here writes them, and never overwritten in place.
"""

from __future__ import annotations

import abc
import math
import mmap
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

# numpy 1 stops there; nothing published has more than 5. A bound keeps hostile shapes short.
MAX_DIMS = 32

_HEADS = (  # how files begin that stand where weights were expected
  (
    b"version https://git-lfs",
    "a Git LFS pointer, not the weights: run `git lfs pull` in its clone",
  ),
  (b"<!doctype", "a web page, not the weights: download the file itself ('raw' or 'resolve')"),
  (b"<html", "a web page, not the weights: download the file itself ('raw' or 'resolve')"),
  (b"gguf", "a GGUF file: convert it with `--from gguf`"),
  (b"pk\x03\x04", "a zip archive, as PyTorch's .bin, .pt and .pth files are"),
  (b"\x80\x02", "a pickle without the zip around it"),
)


class WeightsError(ValueError):
  """A file or a set of tensors that cannot be used; the message names it and the remedy."""


class Tensor(abc.ABC):
  """One stored tensor, not yet read.

  Attributes:
    name: its key in the file.
    shape: of `array()`.
    dtype: of `array()`; bfloat16 and the 8-bit floats are those of ml_dtypes.
  """

  def __init__(self, name: str, shape: Iterable[int], dtype: np.dtype | type):
    self.name = name
    self.shape: tuple[int, ...] = tuple(shape)
    self.dtype = np.dtype(dtype)

  @property
  def nbytes(self) -> int:
    """Bytes of `array()` when it is copied."""
    return math.prod(self.shape) * self.dtype.itemsize

  @abc.abstractmethod
  def array(self) -> np.ndarray:
    """The values: a read-only view of a mapped file, or computed anew by each call.

    Raises:
      WeightsError: the source was closed.
    """

  def release(self) -> None:
    """Gives back the memory that reading `array()` has filled; views of it stay valid.

    Nothing to do for computed tensors.
    """
    return

  def __repr__(self) -> str:
    return f"{type(self).__name__}({self.name!r}, {list(self.shape)}, {self.dtype.name})"


class TensorSource(Mapping[str, Tensor]):
  """The tensors of a file or of a set of shards by name, in the order in which they are stored.

  Attributes:
    where: the path, for messages.
    metadata: what the file says about itself, as text.
  """

  def __init__(
    self,
    tensors: Iterable[Tensor],
    *,
    where: str,
    metadata: Mapping[str, str] | None = None,
    files: Iterable[MappedFile | TensorSource] = (),
  ):
    """`files` are closed with the source."""
    self.where = where
    self.metadata = dict(metadata or {})
    self._tensors = {tensor.name: tensor for tensor in tensors}
    self._files = tuple(files)

  def __getitem__(self, name: str) -> Tensor:
    return self._tensors[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._tensors)

  def __len__(self) -> int:
    return len(self._tensors)

  def __repr__(self) -> str:
    return f"TensorSource({self.where!r}, {len(self)} tensors)"

  def close(self) -> None:
    """Ends `array()`; arrays that were taken before stay valid, and keep their file mapped."""
    for file in self._files:
      file.close()

  def __enter__(self) -> TensorSource:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


class MappedFile:
  """A file mapped read-only, as a whole and once.

  Attributes:
    where: its path, for messages.
    size: in bytes.
  """

  def __init__(self, path: str | os.PathLike):
    """Maps it.

    Raises:
      WeightsError: missing, unreadable, a folder, or empty.
    """
    self.where = str(path)
    try:
      with open(path, "rb") as file:
        self.size = os.fstat(file.fileno()).st_size
        if not self.size:
          raise WeightsError(f"{path}: the file is empty (0 bytes); copy or download it again")
        self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
      raise WeightsError(
        f"{path}: no such file (looked in {pathlib.Path.cwd()}); check the path"
      ) from None
    except OSError as error:
      raise WeightsError(f"{path}: cannot be read ({error}); expected a file of weights") from None
    self._bytes: np.ndarray | None = np.frombuffer(self._map, np.uint8)

  def read(self, start: int, count: int) -> bytes:
    """A copy of up to `count` bytes."""
    return self._view()[start : start + count].tobytes()

  def array(
    self,
    shape: tuple[int, ...],
    dtype: np.dtype,
    offset: int,
    *,
    strides: tuple[int, ...] | None = None,
  ) -> np.ndarray:
    """A read-only view. `offset` and `strides` are in bytes; numpy checks that they stay inside."""
    view = self._view()
    if 0 in shape:  # its offset may be the end of the file
      view, offset, strides = view[:0], 0, None
    return np.ndarray(shape, dtype, buffer=view, offset=offset, strides=strides)

  def release(self, start: int, stop: int) -> None:
    """Drops the resident pages of [start, stop), which are read again when they are wanted.

    Where the system has no such call, and after `close`, this does nothing.
    """
    if self._map is None or start >= stop or not hasattr(mmap, "MADV_DONTNEED"):
      return
    # Outwards to whole pages: a page that is shared with a neighbour only comes back for it.
    start -= start % mmap.PAGESIZE
    self._map.madvise(mmap.MADV_DONTNEED, start, min(stop, self.size) - start)

  def close(self) -> None:
    """Lets go of the mapping, which ends now, or with the last view where there still are any.

    `mmap.close` is not called: it raises BufferError while views exist.
    """
    self._bytes = self._map = None

  def _view(self) -> np.ndarray:
    if self._bytes is None:
      raise WeightsError(f"{self.where}: was closed; read its tensors before closing it")
    return self._bytes


class MappedTensor(Tensor):
  """A tensor whose values lie in a file as they are."""

  def __init__(
    self,
    name: str,
    shape: Iterable[int],
    dtype: np.dtype | type,
    *,
    file: MappedFile,
    offset: int,
    strides: tuple[int, ...] | None = None,
  ):
    """`offset` and `strides` are in bytes; None for C order. The caller has checked them."""
    super().__init__(name, shape, dtype)
    self._file, self._offset, self._strides = file, offset, strides

  def array(self) -> np.ndarray:
    return self._file.array(self.shape, self.dtype, self._offset, strides=self._strides)

  def release(self) -> None:
    extent = self.nbytes
    if extent and self._strides is not None:
      extent = sum((n - 1) * s for n, s in zip(self.shape, self._strides)) + self.dtype.itemsize
    self._file.release(self._offset, self._offset + extent)


def byte_count(shape: object, itemsize: int) -> int | None:
  """Bytes of an array of `shape`, or None where that is no shape that an array can have."""
  if not isinstance(shape, (list, tuple)) or len(shape) > MAX_DIMS:
    return None
  if any(type(n) is not int or not 0 <= n < 2**63 for n in shape):
    return None
  # numpy multiplies what is left beside a zero, too, and refuses what overflows
  if math.prod(n for n in shape if n) * itemsize >= 2**63:
    return None
  return math.prod(shape) * itemsize


def look_at(head: bytes) -> str:
  """What a file is that begins with `head`, as the end of a sentence 'it is ...', or ''."""
  start = head.lstrip()[:32].lower()
  return next((what for prefix, what in _HEADS if start.startswith(prefix)), "")

"""Writes .safetensors as a stream: the header first, then the values piece by piece.

Shapes and dtypes are known before any value is, so the header and the division into shards are
too. What is in memory at a time is one piece of one tensor, or less: a piece that is a transposed
view of a mapped file is copied, checked and written 32 MB at a time.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

import numpy as np

from regionjax.weights.leaves import Leaf
from regionjax.weights.safetensors_file import DTYPES
from regionjax.weights.tensors import WeightsError, byte_count

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_FLOATS = ("F", "BF", "C")  # how the codes of dtypes begin that can hold NaN
_BLOCK = 32 * 2**20  # bytes that are made contiguous, checked and written at once

Progress = Callable[[str, int, int], None]  # (name, bytes written, bytes in all)


def write_safetensors(
  folder: str | os.PathLike,
  leaves: Mapping[str, Leaf],
  *,
  shard_bytes: float = 5e9,
  metadata: Mapping[str, str] | None = None,
  progress: Progress | None = None,
  prefix: str = "model",
) -> list[pathlib.Path]:
  """Writes leaves to `prefix`.safetensors, or to shards with an index if they exceed one.

  The files are synced to disk. That the folder appears only when it is complete is the caller's to
  see to, by a rename; when this raises, the files that it had begun are gone.

  Args:
    folder: an existing folder without files of these names.
    leaves: by name, in the order in which shards are filled.
    shard_bytes: a shard is closed before its values exceed this; one leaf may.
    metadata: text for the header of each file.
    progress: called with (name, bytes written, bytes in all) after every block; for a bar.
    prefix: how the files' names begin.

  Returns:
    The files: `prefix`.safetensors, or `prefix`-00001-of-0000N.safetensors, ..., and the index.

  Raises:
    WeightsError: NaN or infinity (tensor, layer and position are named), a dtype that the format
      lacks, pieces that do not cover their leaf, a full disk, or files that exist.
  """
  folder = pathlib.Path(folder)
  sizes = {name: _size(name, leaf) for name, leaf in leaves.items()}
  total = sum(sizes.values())
  shards = _divide(sizes, shard_bytes)
  names = [f"{prefix}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
  if len(shards) == 1:
    names = [f"{prefix}.safetensors"]
  meter = _Meter(total, progress)
  written: list[pathlib.Path] = []
  try:
    _check_room(folder, total)
    for name, shard in zip(names, shards):
      with _create(folder / name, written) as file:
        _write_file(file, {key: leaves[key] for key in shard}, metadata or {}, meter)
    if len(shards) > 1:
      weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
      index = {"metadata": {"total_size": total}, "weight_map": weight_map}
      with _create(folder / f"{prefix}.safetensors.index.json", written) as file:
        file.write((json.dumps(index, indent=2) + "\n").encode())
        _sync(file)
    _sync_folder(folder)
  except BaseException as error:
    for path in written:
      path.unlink(missing_ok=True)
    if isinstance(error, OSError):
      raise WeightsError(
        f"{folder}: cannot be written ({error}); {total} bytes are needed"
      ) from None
    raise
  return written


class _Meter:
  """Counts what has been written."""

  def __init__(self, total: int, progress: Progress | None):
    self._done, self._total, self._progress = 0, total, progress

  def add(self, name: str, count: int) -> None:
    self._done += count
    if self._progress:
      self._progress(name, self._done, self._total)


def _size(name: str, leaf: Leaf) -> int:
  """Bytes of a leaf, which the format can hold."""
  dtype = np.dtype(leaf.dtype)
  if dtype not in _CODES:
    raise WeightsError(
      f"{name} is {dtype.name}; safetensors files hold {', '.join(d.name for d in _CODES)}"
    )
  size = byte_count(tuple(leaf.shape), dtype.itemsize)
  if size is None:
    raise WeightsError(f"{name} has shape {leaf.shape}, which no array can have")
  return size


def _divide(sizes: Mapping[str, int], limit: float) -> list[list[str]]:
  """Names by shard, in order; at least one shard, and none without a name unless there are none."""
  shards: list[list[str]] = [[]]
  room = limit
  for name, size in sizes.items():
    if size > room and shards[-1]:
      shards.append([])
      room = limit
    shards[-1].append(name)
    room -= size
  return shards


def _check_room(folder: pathlib.Path, total: int) -> None:
  free = shutil.disk_usage(folder).free
  if total > free:
    raise WeightsError(
      f"{folder}: {total / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free on its disk; "
      "make room or choose another folder"
    )


def _create(path: pathlib.Path, written: list[pathlib.Path]) -> BinaryIO:
  """A new file. An old one is not overwritten: it may be mapped, even as the source of a leaf."""
  try:
    file = open(path, "xb")  # noqa: SIM115 - the caller's `with` closes it
  except FileExistsError:
    raise WeightsError(f"{path} exists; write to a new folder, or remove it first") from None
  written.append(path)
  return file


def _write_file(
  file: BinaryIO, leaves: Mapping[str, Leaf], metadata: Mapping[str, str], meter: _Meter
) -> None:
  # Wide elements first, as the reference library has it: every tensor is then aligned to its own.
  names = sorted(leaves, key=lambda name: -np.dtype(leaves[name].dtype).itemsize)
  header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
  at = 0
  for name in names:
    leaf = leaves[name]
    end = at + _size(name, leaf)
    header[name] = {
      "dtype": _CODES[np.dtype(leaf.dtype)],
      "shape": list(leaf.shape),
      "data_offsets": [at, end],
    }
    at = end
  text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  file.write(len(text).to_bytes(8, "little") + text)
  for name in names:
    _write_leaf(file, name, leaves[name], meter)
  _sync(file)


def _write_leaf(file: BinaryIO, name: str, leaf: Leaf, meter: _Meter) -> None:
  shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
  at = 0
  for start, block in leaf.pieces():
    wanted = (block.shape[0] if block.ndim else 0, *shape[1:]) if shape else ()
    if start != at or block.shape != wanted or block.dtype != dtype:
      raise WeightsError(
        f"{name} {list(shape)} {dtype.name}: got a piece {list(block.shape)} {block.dtype.name} "
        f"for {start}, expected {list(wanted)} {dtype.name} for {at}"
      )
    _write_block(file, name, start, block, meter)
    at += block.shape[0] if shape else 1
    del block  # or the next piece would be made beside this one
  if at != (shape[0] if shape else 1):
    raise WeightsError(f"{name} {list(shape)}: its pieces end at {at} of axis 0")


def _write_block(file: BinaryIO, name: str, start: int, block: np.ndarray, meter: _Meter) -> None:
  check = _CODES[block.dtype].startswith(_FLOATS)
  for outer, first, part in _parts(block, (), start):
    if check and not (finite := np.isfinite(part)).all():
      at = [int(i) for i in np.argwhere(~finite)[0]]
      index = [*outer, *(at and [first + at[0], *at[1:]])]
      layer = f", layer {index[0]}" if "/layers/" in name else ""
      raise WeightsError(
        f"{name}{layer} holds NaN or infinity, first at {index}; the weights come from a diverged "
        "run or a damaged file and aren't worth keeping"
      )
    # As bytes: ml_dtypes arrays have no buffer of their own type. reshape gives 0-d arrays an axis.
    file.write(part.reshape(-1).view(np.uint8).data)
    meter.add(name, part.nbytes)
    del part  # likewise


def _parts(
  block: np.ndarray, outer: tuple[int, ...], first: int
) -> Iterator[tuple[tuple[int, ...], int, np.ndarray]]:
  """Contiguous parts of a block of at most _BLOCK bytes, in C order.

  Yields (index on the outer axes, first index on the part's own axis 0, part).
  """
  if block.nbytes <= _BLOCK:
    yield outer, first, np.asarray(block, order="C")
    return
  row = block.nbytes // len(block)
  if row > _BLOCK:
    for i in range(len(block)):
      yield from _parts(block[i], (*outer, first + i), 0)
    return
  step = _BLOCK // row
  for i in range(0, len(block), step):
    yield outer, first + i, np.asarray(block[i : i + step], order="C")


def _sync(file: BinaryIO) -> None:
  file.flush()
  os.fsync(file.fileno())


def _sync_folder(folder: pathlib.Path) -> None:
  """Makes the names last, too."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)

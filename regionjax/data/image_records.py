"""Pictures packed into a few large ArrayRecord files, for disks that are slow with many small ones.

A packed folder holds `images-00000-of-00004.array_record`, ... and `image_index.json`. A record is
a picture's file as it was, byte for byte; the index lists each file's pictures in the order of
their records, as [name, width, height]. Annotations stay beside it, in their own file.

No jax here: decode processes import this.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regionjax.data.errors import DataError
from regionjax.images import size_in_header

INDEX = "image_index.json"
FORMAT = "regionjax images 1"
# One picture a chunk: a read brings no neighbours along. They are compressed already.
_WRITE = "group_size:1,uncompressed"
_READ = "readahead_buffer_size:0,max_parallelism:0"


@dataclasses.dataclass(frozen=True)
class Packed:
  """What `pack_images` did: pictures written, and the names of files that are no picture."""

  images: int
  left_out: tuple[str, ...]


def pack_images(folder: str | Path, out: str | Path, *, files: int = 16) -> Packed:
  """Writes all pictures below a folder into a packed folder.

  Args:
    folder: searched with its subfolders; a picture is named by its path from here.
    out: the folder to make; must be new or empty.
    files: over how many the pictures are spread, in turn.

  Raises:
    DataError: no such folder, no picture in it, an `out` that holds something, or a file that
      cannot be written (a full disk).
  """
  folder, out = Path(folder), Path(out)
  if files < 1:
    raise DataError(f"files={files}: expected at least 1")
  if not folder.is_dir():
    raise DataError(f"images {str(folder)!r}: no such folder; give the one with the pictures")
  found = sorted(path for path in folder.rglob("*") if path.is_file())
  sized = [(path, size_in_header(path)) for path in found]
  pictures = [(path, size) for path, size in sized if size is not None]
  if not pictures:
    raise DataError(f"images {str(folder)!r}: none of its {len(found)} files is a picture")
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise DataError(f"{str(out)!r} is not empty; give a new folder")
  out.mkdir(parents=True, exist_ok=True)
  files = min(files, len(pictures))
  index: dict[str, list[list[Any]]] = {}
  for number in range(files):
    name = f"images-{number:05d}-of-{files:05d}.array_record"
    mine = pictures[number::files]
    _write(out / name, [path for path, _ in mine])
    index[name] = [[path.relative_to(folder).as_posix(), *size] for path, size in mine]
  # Last, and in one step: a folder with an index is complete.
  part = out / (INDEX + ".part")
  part.write_text(json.dumps(dict(format=FORMAT, files=index)), encoding="utf-8")
  part.replace(out / INDEX)
  left_out = tuple(p.relative_to(folder).as_posix() for p, size in sized if size is None)
  return Packed(len(pictures), left_out)


def _write(path: Path, pictures: Sequence[Path]) -> None:
  try:
    writer = _library().ArrayRecordWriter(str(path), _WRITE)
    for picture in pictures:
      writer.write(picture.read_bytes())
    writer.close()
  except RuntimeError as error:  # what the library raises, whatever went wrong
    raise DataError(
      f"{path}: cannot be written ({error}); make room, delete the folder and pack again"
    ) from error


def _library() -> Any:
  try:
    from array_record.python import array_record_module
  except ImportError as error:
    raise DataError(
      f"packed pictures need the package array-record ({error}), which Windows has no build of; "
      "give the folder of pictures instead"
    ) from error
  return array_record_module


def is_packed(folder: str | Path) -> bool:
  """Whether a folder holds packed pictures."""
  return os.path.isfile(os.path.join(folder, INDEX))


class ImageRecords:
  """The pictures of a packed folder, by name.

  Attributes:
    sizes: name -> upright (width, height).

  Raises:
    DataError: an index that cannot be read, or a file of it that is missing.
  """

  def __init__(self, folder: str | Path):
    path = Path(folder) / INDEX
    try:
      index = json.loads(path.read_text(encoding="utf-8"))
      if index["format"] != FORMAT:
        raise DataError(f"{path}: format {index['format']!r}, expected {FORMAT!r}; pack it again")
      entries = [
        (str(name), str(file), number, (int(width), int(height)))
        for file, rows in index["files"].items()
        for number, (name, width, height) in enumerate(rows)
      ]
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
      if isinstance(error, DataError):
        raise
      raise DataError(f"{path}: not an index of packed pictures ({error}); pack again") from error
    missing = [file for file in index["files"] if not (path.parent / file).is_file()]
    if missing:
      raise DataError(
        f"{path} lists {len(missing)} files that are not there, the first {missing[0]}; copy the "
        "whole folder again"
      )
    self.sizes = {name: size for name, _, _, size in entries}
    self._keys = {name: f"{path.parent / file}#{number}" for name, file, number, _ in entries}

  def __contains__(self, name: str) -> bool:
    return name in self._keys

  def key(self, name: str) -> str:
    """What `read_record` reads this picture by: 'FILE#NUMBER'."""
    return self._keys[name]


def read_record(key: str) -> bytes:
  """The record that 'FILE#NUMBER' names.

  Raises:
    DataError: another form of key, a file that is missing or damaged, or without that record.
  """
  path, _, number = key.rpartition("#")
  if not path or not number.isdecimal():
    raise DataError(f"record key {key!r}: expected FILE#NUMBER, as in images.array_record#17")
  reader = _reader(path)
  count = reader.num_records()
  if int(number) >= count:
    raise DataError(
      f"{path} has {count} records, record {number} is asked for: it is not the file that its "
      "index was written with. Copy or pack the whole folder again"
    )
  try:
    return reader.read([int(number)])[0]
  except RuntimeError as error:
    raise DataError(f"{key}: damaged ({error}); copy the file again") from error


@functools.lru_cache(maxsize=256)
def _reader(path: str) -> Any:
  """An open file, one per process; a failure is not kept."""
  if not os.path.isfile(path):
    raise DataError(f"{path}: no such file; check that its folder is complete")
  reader = _library().ArrayRecordReader(path, _READ)
  if not reader.ok():
    try:
      reader.close()  # tells what is wrong
    except RuntimeError as error:
      raise DataError(f"{path}: not a whole ArrayRecord file ({error}); copy it again") from error
  return reader

"""Our reader of PyTorch's .bin, .pt and .pth: no torch, and nothing that the file asks for is run.

  root/data.pkl   a pickle: names, and for each a tensor's storage, offset, shape and strides
  root/data/KEY   the bytes of one storage, uncompressed; several tensors may share it

The pickle is read by `state_pickle`, its notes are checked against the archive, and the storages
are mapped from where they lie in the file.
"""

from __future__ import annotations

import os
import struct
import zipfile
from reprlib import repr as short
from typing import Any

from regionjax.weights.shards import open_file_or_set
from regionjax.weights.state_pickle import Note, Storage, load_notes
from regionjax.weights.tensors import (
  MappedFile,
  MappedTensor,
  TensorSource,
  WeightsError,
  byte_count,
  look_at,
)

# Keys under which training programs put the state dict that is wanted, in the order of preference.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_MAX_DEPTH = 4  # of wrappers in wrappers; a pickle can make a dict that holds itself

# The pickle of 10,000 tensors takes 2 MB; what is far larger holds something else.
_MAX_PICKLE = 32 * 2**20


def open_torch(path: str | os.PathLike) -> TensorSource:
  """Opens a checkpoint that `torch.save` wrote, or a sharded set by its .bin.index.json.

  A state dict inside a training checkpoint is found under one of WRAPPERS; `metadata["entered"]`
  has the keys that led to it, `metadata["ignored"]` the keys in it that hold no tensor.

  Args:
    path: the file or the index.

  Returns:
    The tensors in the order of the state dict. Their `array()` are read-only views of the mapped
    file with the strides that they were saved with; tied tensors share their bytes.

  Raises:
    WeightsError: missing, truncated, or from PyTorch before 1.6; compressed, encrypted or
      big-endian; a pickle that names anything but the parts of a state dict (nothing of it is
      run); a tensor that reaches out of its storage; of a sharded set every fault in one message.
  """
  return open_file_or_set(path, _open_one)


def _open_one(path: str | os.PathLike) -> TensorSource:
  file = MappedFile(path)
  try:
    archive = _Archive(file)
    root = load_notes(archive.read("data.pkl"), where=file.where)
    state, metadata = _find_state(root, file.where)
    tensors = [
      _tensor(name, note, archive) for name, note in state.items() if isinstance(note, Note)
    ]
  except BaseException:
    file.close()
    raise
  return TensorSource(tensors, where=file.where, metadata=metadata, files=[file])


class _Archive:
  """The zip around the pickle: where in the file each of its members lies."""

  def __init__(self, file: MappedFile):
    self.file = file
    head = file.read(0, 64)
    if not head.startswith(b"PK\x03\x04"):
      raise WeightsError(f"{file.where} {_no_zip(head)}")
    try:
      with zipfile.ZipFile(file.where) as archive:
        infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as error:
      raise WeightsError(
        f"{file.where}: truncated or damaged: the zip's table of contents, which stands at the "
        f"end, cannot be read ({error}; {file.size} bytes); download it again"
      ) from None
    self._members = {info.filename: info for info in infos}
    if len(self._members) != len(infos):
      raise WeightsError(f"{file.where}: two members of the zip have the same name; not opened")
    roots = [name[: -len("data.pkl")] for name in self._members if name.endswith("/data.pkl")]
    roots = [root for root in roots if root.count("/") == 1]
    if len(roots) != 1:
      raise WeightsError(
        f"{file.where} is a zip archive, but no PyTorch checkpoint: expected one folder with a "
        f"data.pkl in it, found {len(roots)}; check that it is the right file"
      )
    self._root = roots[0]
    if f"{self._root}constants.pkl" in self._members:
      raise WeightsError(
        f"{file.where} is a TorchScript program, not a state dict; load it with torch.jit.load and "
        "save its state_dict() with safetensors"
      )
    if f"{self._root}byteorder" in self._members and self.read("byteorder") != b"little":
      raise WeightsError(
        f"{file.where} was written with big-endian numbers; load it with torch and save it with "
        "safetensors, which has one byte order"
      )

  def read(self, member: str) -> bytes:
    """A copy of a small member."""
    start, size = self.place(member)
    if size > _MAX_PICKLE:
      raise WeightsError(
        f"{self.file.where}: its {member} has {size} bytes, expected at most {_MAX_PICKLE}; it "
        "holds more than a state dict. Save `model.state_dict()` alone"
      )
    return self.file.read(start, size)

  def place(self, member: str) -> tuple[int, int]:
    """(first byte in the file, bytes) of a member that is stored as it is.

    Checksums are not compared: that would read the whole file, and torch doesn't either.
    """
    info, where = self._members.get(self._root + member), self.file.where
    if info is None:
      raise WeightsError(f"{where}: the zip has no member {member}; download it again")
    if info.flag_bits & 1 or info.compress_type != zipfile.ZIP_STORED:
      raise WeightsError(
        f"{where}: its member {member} is compressed or encrypted, and only bytes stored as they "
        "are can be mapped; load it with torch and save it again"
      )
    head = self.file.read(info.header_offset, 30)
    if info.header_offset < 0 or len(head) < 30 or not head.startswith(b"PK\x03\x04"):
      raise WeightsError(f"{where}: no member begins where {member} should; download it again")
    lengths = struct.unpack("<HH", head[26:30])  # of the name and of the extra field
    start = info.header_offset + 30 + sum(lengths)
    if info.compress_size != info.file_size or start + info.file_size > self.file.size:
      raise WeightsError(
        f"{where}: its member {member} claims {info.file_size} bytes from byte {start} on, and the "
        f"file has {self.file.size}; it is truncated or damaged, download it again"
      )
    return start, info.file_size


def _no_zip(head: bytes) -> str:
  """What to say of a file that does not begin as a zip."""
  if head.startswith(b"\x80"):
    return (
      "is a pickle without a zip around it, as PyTorch before 1.6 wrote them (today with "
      "_use_new_zipfile_serialization=False): not opened, nothing of it was run. Where you trust "
      "it, load it with torch and save it again"
    )
  what = look_at(head)
  what = f": it is {what}" if what else ", which is a zip archive; check that it is the right file"
  return f"is no PyTorch checkpoint{what}"


def _find_state(root: Any, where: str) -> tuple[dict[str, Any], dict[str, str]]:
  """(the state dict, metadata) in what a pickle holds."""
  found = _search(root, _MAX_DEPTH)
  if found is None:
    keys = f" with the keys {short(list(root))}" if isinstance(root, dict) else ""
    kind = "single tensor" if isinstance(root, Note) else type(root).__name__
    kind = "dict" if keys else kind
    raise WeightsError(
      f"{where} holds a {kind}{keys}; expected tensors by name, or a dict of them under one of "
      f"{', '.join(WRAPPERS)}. Save `model.state_dict()`"
    )
  path, state = found
  for key, value in state.items():
    if isinstance(value, Note) and not isinstance(key, str):
      raise WeightsError(f"{where}: a tensor has the key {short(key)}; expected names of tensors")
  others = (key for key, value in state.items() if not isinstance(value, Note))
  ignored = [key if isinstance(key, str) else short(key) for key in others]
  metadata = {"entered": "/".join(path), "ignored": ", ".join(ignored)}
  return state, {key: text for key, text in metadata.items() if text}


def _search(node: Any, depth: int) -> tuple[tuple[str, ...], dict[str, Any]] | None:
  """(keys that lead to it, the dict): the first with tensors, those in wrappers before others."""
  if not isinstance(node, dict) or not depth:
    return None
  for key in WRAPPERS:
    found = _search(node.get(key), depth - 1)
    if found:
      return (key, *found[0]), found[1]
  return ((), node) if any(isinstance(value, Note) for value in node.values()) else None


def _tensor(name: str, note: Note, archive: _Archive) -> MappedTensor:
  """A tensor whose elements all lie inside its storage, and the storage inside the file."""
  where, storage = archive.file.where, note.storage
  if not isinstance(storage, Storage):
    raise WeightsError(f"{where}: {name} has no storage; the file is damaged, download it again")
  dtype = storage.dtype if note.dtype is None else note.dtype
  if dtype is None or byte_count(note.shape, dtype.itemsize) is None:
    raise WeightsError(
      f"{where}: {name} has shape {short(note.shape)}, which no array can have; the file is damaged"
    )
  numbers = (note.offset, *note.stride) if isinstance(note.stride, tuple) else ()
  if len(numbers) != 1 + len(note.shape) or any(type(n) is not int or n < 0 for n in numbers):
    raise WeightsError(
      f"{where}: {name} {list(note.shape)} has offset {short(note.offset)} and strides "
      f"{short(note.stride)}; expected a number and one for each axis, not negative"
    )
  start, size = archive.place(f"data/{storage.key}")
  room = storage.count * (1 if storage.dtype is None else storage.dtype.itemsize)
  if room > size:
    raise WeightsError(
      f"{where}: {name} lies in a storage of {room} bytes, but data/{storage.key} has {size}; the "
      "file is damaged, download it again"
    )
  last = note.offset + sum((n - 1) * s for n, s in zip(note.shape, note.stride))
  if 0 not in note.shape and (last + 1) * dtype.itemsize > room:
    raise WeightsError(
      f"{where}: {name} {list(note.shape)} with offset {note.offset} and strides "
      f"{list(note.stride)} reaches element {last}, its storage has {room // dtype.itemsize}; the "
      "file is damaged or was made to mislead"
    )
  # The stride of an axis of length 1 is never walked, and may be any number.
  strides = (s if n > 1 else 1 for n, s in zip(note.shape, note.stride))
  return MappedTensor(
    name,
    note.shape,
    dtype,
    file=archive.file,
    offset=start + note.offset * dtype.itemsize,
    strides=tuple(s * dtype.itemsize for s in strides),
  )

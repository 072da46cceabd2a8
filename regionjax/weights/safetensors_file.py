"""Our reader of .safetensors: the header is checked completely, the values stay in the file.

  8 bytes   length n of the header, little-endian
  n bytes   JSON: {"__metadata__": {text: text}, name: {"dtype", "shape", "data_offsets": [a, b]}}
  the rest  values, C order, little-endian; offsets count from its first byte, without gaps

The `safetensors` library gives numpy arrays that are copies; views of a mapping are what lets a
7 billion parameter model pass through 3 GiB.
"""

from __future__ import annotations

import json
import os
from reprlib import repr as short
from typing import Any

import ml_dtypes
import numpy as np

from regionjax.weights.shards import open_file_or_set, unique_pairs
from regionjax.weights.tensors import (
  MappedFile,
  MappedTensor,
  TensorSource,
  WeightsError,
  byte_count,
  look_at,
)

# The limit of the reference implementation; LLaMA 7B has a header of 35 KB.
MAX_HEADER = 100_000_000

# Names as the format has them. Left out are F4, F6_E2M3 and F6_E3M2, whose values share bytes.
DTYPES: dict[str, np.dtype] = {
  "BOOL": np.dtype(np.bool_),
  "U8": np.dtype(np.uint8),
  "I8": np.dtype(np.int8),
  "U16": np.dtype(np.uint16),
  "I16": np.dtype(np.int16),
  "U32": np.dtype(np.uint32),
  "I32": np.dtype(np.int32),
  "U64": np.dtype(np.uint64),
  "I64": np.dtype(np.int64),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F32": np.dtype(np.float32),
  "F64": np.dtype(np.float64),
  "C64": np.dtype(np.complex64),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


def open_safetensors(path: str | os.PathLike) -> TensorSource:
  """Opens a .safetensors file, or a sharded set by its .safetensors.index.json.

  Only headers are read. The tensors' `array()` are read-only views of the mapped file.

  Args:
    path: the file or the index.

  Returns:
    The tensors in the order of their values in the file; `metadata` is the header's own.

  Raises:
    WeightsError: missing, truncated (with the number of bytes that lack), or with a header that
      is not what the format demands; of a sharded set every fault in one message.
  """
  return open_file_or_set(path, _open_one)


def _open_one(path: str | os.PathLike) -> TensorSource:
  file = MappedFile(path)
  try:
    header, start = _read_header(file)
    metadata = _metadata(header.pop("__metadata__", None), file.where)
    entries = [_entry(name, value, file.where) for name, value in header.items()]
    entries.sort(key=lambda entry: entry[3:])
    _check_cover(entries, file.size - start, file.where)
  except BaseException:
    file.close()
    raise
  tensors = (
    MappedTensor(name, shape, dtype, file=file, offset=start + begin)
    for name, shape, dtype, begin, _ in entries
  )
  return TensorSource(tensors, where=file.where, metadata=metadata, files=[file])


def _read_header(file: MappedFile) -> tuple[dict[str, Any], int]:
  """(the header, where the values begin)."""
  length = int.from_bytes(file.read(0, 8), "little")
  if file.size < 8 or length > MAX_HEADER or 8 + length > file.size:
    raise WeightsError(_no_header(file, length))
  try:
    header = json.loads(file.read(8, length).decode("utf-8"), object_pairs_hook=unique_pairs)
  except (ValueError, RecursionError) as error:
    raise WeightsError(
      f"{file.where}: the header is no readable JSON ({error}); the file is damaged or of another "
      "kind, download it again"
    ) from None
  if not isinstance(header, dict):
    raise WeightsError(
      f"{file.where}: the header is a JSON {type(header).__name__}, expected an object of tensors"
    )
  return header, 8 + length


def _no_header(file: MappedFile, length: int) -> str:
  """Why the first bytes of a file lead to no header."""
  what = look_at(file.read(0, 64))
  if what:
    return f"{file.where} is no safetensors file: it is {what}"
  if file.size < 8:
    return (
      f"{file.where}: truncated inside the header's length: {file.size} bytes, at least "
      f"{8 - file.size} more expected; download it again"
    )
  if length > MAX_HEADER:
    return (
      f"{file.where} is no safetensors file: its first 8 bytes announce a header of {length} "
      f"bytes, the format allows {MAX_HEADER}; check that it is the right file"
    )
  return (
    f"{file.where}: truncated inside its header: {file.size} bytes, {8 + length - file.size} "
    "more expected for the header alone; download it again"
  )


def _metadata(value: Any, where: str) -> dict[str, str]:
  if value is None:
    return {}
  if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
    raise WeightsError(f"{where}: __metadata__ of the header: expected text for each of its keys")
  return value


def _entry(name: str, value: Any, where: str) -> tuple[str, tuple[int, ...], np.dtype, int, int]:
  """(name, shape, dtype, begin, end) of one tensor of the header, consistent in itself."""
  given = value if isinstance(value, dict) else {}
  dtype = given.get("dtype")
  if not isinstance(dtype, str) or dtype not in DTYPES:
    raise WeightsError(
      f"{where}: {name} has dtype {short(dtype)}; readable are {', '.join(DTYPES)}. Convert it "
      "with the program that wrote it"
    )
  shape, offsets = given.get("shape"), given.get("data_offsets")
  size = byte_count(shape, DTYPES[dtype].itemsize)
  if size is None or not isinstance(shape, list):
    raise WeightsError(
      f"{where}: {name} has shape {short(shape)}, which no array can have; the header is damaged"
    )
  if not isinstance(offsets, list) or [type(n) for n in offsets] != [int, int] or offsets[0] < 0:
    raise WeightsError(
      f"{where}: {name} has data_offsets {short(offsets)}; expected [begin, end], not negative"
    )
  begin, end = offsets
  if end - begin != size:
    raise WeightsError(
      f"{where}: {name} is {dtype} {shape}, which takes {size} bytes, but its data_offsets "
      f"{short(offsets)} span {end - begin}; the header is damaged"
    )
  return name, tuple(shape), DTYPES[dtype], begin, end


def _check_cover(entries: list[tuple], size: int, where: str) -> None:
  """Raises unless the tensors, sorted by offset, lie side by side from 0 to `size`."""
  at, before = 0, "the header"
  for name, _, _, begin, end in entries:
    if begin != at:
      fault = f"overlaps {before}" if begin < at else f"leaves a gap after {before}"
      raise WeightsError(
        f"{where}: {name} begins at byte {begin} and {fault}, which ends at {at}; expected the "
        "tensors side by side. The file is damaged or was made to mislead"
      )
    at, before = end, name
  if at > size:
    first = next(name for name, _, _, _, end in entries if end > size)
    raise WeightsError(
      f"{where}: truncated: {at - size} of {at} bytes of values are missing, from {first} on; "
      "download it again"
    )
  if at < size:
    raise WeightsError(
      f"{where}: {size - at} bytes stand after the last tensor ({before}); expected the file to "
      "end there. It is damaged, or another file was joined to it"
    )

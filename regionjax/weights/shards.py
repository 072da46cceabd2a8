"""A set of shards by its index: {"metadata": {...}, "weight_map": {tensor: file}}.

The same file serves both kinds, `model.safetensors.index.json` and `pytorch_model.bin.index.json`.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable

from regionjax.weights.tensors import TensorSource, WeightsError


def open_file_or_set(
  path: str | os.PathLike, open_file: Callable[[str | os.PathLike], TensorSource]
) -> TensorSource:
  """Opens a file of weights, or where the path is an `.index.json` the set that it joins.

  Args:
    path: the file or the index.
    open_file: opens one file.

  Raises:
    WeightsError: as `open_file` does; of a set every fault in one message, see `open_sharded`.
  """
  return open_sharded(path, open_file) if str(path).endswith(".json") else open_file(path)


def open_sharded(
  path: str | os.PathLike, open_file: Callable[[str | os.PathLike], TensorSource]
) -> TensorSource:
  """Opens every shard that an index names, and holds the index against what they hold.

  A tensor that a shard holds beyond the index belongs to the source all the same: it is for the
  conversion tables to say that it is unexpected.

  Args:
    path: the `.index.json`.
    open_file: opens one shard.

  Raises:
    WeightsError: no such index, or every fault of the set in one message: shards that are missing
      or damaged, tensors that are not in their shard, tensors in two shards.
  """
  path = pathlib.Path(path)
  weight_map, metadata = _read_index(path)
  shards: dict[str, TensorSource] = {}
  problems: list[str] = []
  for name in sorted(set(weight_map.values())):
    if not (path.parent / name).is_file():
      count = sum(file == name for file in weight_map.values())
      problems.append(f"{name} is missing, with {count} tensors; download it to the same folder")
      continue
    try:
      shards[name] = open_file(path.parent / name)
    except WeightsError as error:
      problems.append(str(error))
  problems += _compare(weight_map, shards)
  source = TensorSource(
    (tensor for shard in shards.values() for tensor in shard.values()),
    where=str(path),
    metadata={key: text for shard in shards.values() for key, text in shard.metadata.items()}
    | metadata,
    files=shards.values(),
  )
  if problems:
    source.close()
    raise WeightsError(f"{path}: the shards do not fit the index:\n  " + "\n  ".join(problems))
  return source


def unique_pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
  """`object_pairs_hook` for JSON in which a key that stands twice is an error, not an overwrite."""
  found: dict[str, object] = {}
  for key, value in pairs:
    if key in found:
      raise ValueError(f"key {key!r} stands there twice")
    found[key] = value
  return found


def _compare(weight_map: dict[str, str], shards: dict[str, TensorSource]) -> list[str]:
  """Where index and shards differ, one line each."""
  homes: dict[str, list[str]] = {}
  for name, shard in shards.items():
    for key in shard:
      homes.setdefault(key, []).append(name)
  problems = []
  for key, name in weight_map.items():
    if name in shards and key not in shards[name]:
      where = f"; it is in {homes[key][0]}" if key in homes else ""
      problems.append(f"{key} is not in {name}, where the index has it{where}")
  problems += [
    f"{key} is in {len(names)} shards: {', '.join(names)}"
    for key, names in homes.items()
    if len(names) > 1
  ]
  return problems


def _read_index(path: pathlib.Path) -> tuple[dict[str, str], dict[str, str]]:
  """(weight_map, metadata) of an index file, checked."""
  expected = "expected {'metadata': {...}, 'weight_map': {tensor: file}}; download it again"
  try:
    index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_pairs)
  except FileNotFoundError:
    raise WeightsError(
      f"{path}: no such file (looked in {pathlib.Path.cwd()}); check the path"
    ) from None
  except (OSError, ValueError, RecursionError) as error:
    raise WeightsError(f"{path} is no readable index of shards ({error}); {expected}") from None
  weight_map = index.get("weight_map") if isinstance(index, dict) else None
  if not isinstance(weight_map, dict) or not weight_map:
    raise WeightsError(f"{path} has no 'weight_map'; {expected}")
  for key, name in weight_map.items():
    # A name that leads out of the folder would let an index read any file of this machine.
    plain = isinstance(name, str) and pathlib.PurePath(name).name == name
    if not plain or name == ".." or "\\" in name:
      raise WeightsError(
        f"{path}: {key} is said to be in {name!r}; expected the plain name of a file that lies "
        "beside the index"
      )
  metadata = index.get("metadata")
  items = metadata.items() if isinstance(metadata, dict) else ()
  return weight_map, {key: str(value) for key, value in items}

"""A release: the folder that `regionjax.load(path)` opens.

  config.json        the whole `Config`, so that prompts and resizing are those of training
  model.safetensors  parameters under their tree paths joined by '/', layers stacked; above 5 GB
                     shards with model.safetensors.index.json
  tokenizer.json     the tokenizer; tokenizer_config.json beside it names its special tokens
  README.md          the model card: what it was trained on, by which command, how well it does
  spare.safetensors  of a converted checkpoint, tensors that this model never reads, by their
                     published names: they are needed on the way back

A release may hold some parts of a model only, a decoder or a vision tower to start from:
config.json then names them ("parts"), and a vision tower has no tokenizer. It may also be an
adapter, which holds only what was trained on top of another release: see `weights.adapter`.
Weights are mapped, not read, when a release is opened.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from regionjax.config import Config, ModelConfig, from_dict, to_dict
from regionjax.weights import leaves as lazy
from regionjax.weights.folder import new_folder
from regionjax.weights.leaves import Leaf
from regionjax.weights.safetensors_file import open_safetensors
from regionjax.weights.tensors import Tensor, TensorSource, WeightsError
from regionjax.weights.writer import Progress, write_safetensors

FORMAT = 1
CONFIG, WEIGHTS, TOKENIZER, CARD = "config.json", "model.safetensors", "tokenizer.json", "README.md"
INDEX, SPARE = "model.safetensors.index.json", "spare.safetensors"
ADAPTER = "adapter.safetensors"  # in the place of WEIGHTS
PARTS = ("vision", "connector", "regions", "decoder")
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
SHIPPED = pathlib.Path(__file__).resolve().parent.parent / "assets"


class ReleaseError(WeightsError):
  """A release folder that cannot be read or written; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Opened:
  """A release whose weights are mapped and not yet read.

  Attributes:
    folder: where it is.
    config: of the whole model.
    parts: that it holds, of PARTS.
    leaves: stored parameters by path.
    tokenizer: None for a vision tower alone.
    spare: published tensors that the model does not read, by published name.
  """

  folder: pathlib.Path
  config: Config
  parts: tuple[str, ...]
  leaves: Mapping[str, Tensor]
  tokenizer: Any
  spare: Mapping[str, Tensor]

  def of(self, *parts: str) -> dict[str, Tensor]:
    """The parameters of some parts."""
    return {path: tensor for path, tensor in self.leaves.items() if path.split("/")[0] in parts}


def save(
  folder: str | os.PathLike,
  config: Config,
  params: Mapping[str, Any],
  tokenizer: Any,
  card: str,
  *,
  dtype: str = "bfloat16",
) -> pathlib.Path:
  """Writes a release folder atomically; an older release at the same place is replaced.

  Args:
    folder: destination. It must not exist, be empty, or hold a release.
    config: what the model was trained with.
    params: nested dict of arrays (the tree of `RegionLM`, layers stacked as in training).
    tokenizer: a `regionjax.tokenizer.Tokenizer`; written by its own `save(folder)`.
    card: Markdown text of the model card.
    dtype: floating arrays are stored in it; one of DTYPES.

  Returns:
    The folder.

  Raises:
    ReleaseError: an unknown dtype, an array with NaN or infinity, or a folder that holds
      something else.
  """
  return write_leaves(
    folder, to_leaves(params, dtype), make_payload(config), tokenizer=tokenizer, card=card
  )


def to_leaves(params: Mapping[str, Any], dtype: str) -> dict[str, Leaf]:
  """Nested arrays as leaves by path, the floating ones in `dtype` (a key of DTYPES)."""
  wanted = as_dtype(dtype)
  flat = {path: lazy.as_leaf(array) for path, array in flatten(params).items()}
  floats = (np.floating, ml_dtypes.bfloat16)
  return {
    path: leaf if not issubclass(leaf.dtype.type, floats) else lazy.cast({"": leaf}, wanted)[""]
    for path, leaf in flat.items()
  }


def write_leaves(
  folder: str | os.PathLike,
  leaves: Mapping[str, Leaf],
  payload: Mapping[str, Any],
  *,
  tokenizer: Any,
  card: str,
  prefix: str = "model",
  spare: Mapping[str, Leaf] | None = None,
  progress: Progress | None = None,
) -> pathlib.Path:
  """Writes a release whose weights pass through memory piece by piece.

  Args:
    folder: destination, as for `save`.
    leaves: parameters by path.
    payload: of config.json, from `make_payload`.
    tokenizer: None for a vision tower alone.
    card: Markdown text.
    prefix: how the weights' file names begin.
    spare: published tensors that the model does not read.
    progress: see `write_safetensors`.

  Raises:
    ReleaseError: as for `save`, or a full disk; nothing is left behind.
  """
  folder = pathlib.Path(folder)
  check_destination(folder)
  try:
    with new_folder(folder) as temporary:
      text = json.dumps(payload, indent=2) + "\n"
      (temporary / CONFIG).write_text(text, encoding="utf-8")
      told = {"format": "regionjax"}
      write_safetensors(temporary, leaves, metadata=told, progress=progress, prefix=prefix)
      if spare:
        write_safetensors(
          temporary, spare, metadata=told, prefix=SPARE.split(".")[0], shard_bytes=float("inf")
        )
      if tokenizer is not None:
        tokenizer.save(temporary)
      (temporary / CARD).write_text(card, encoding="utf-8")
  except ReleaseError:
    raise
  except WeightsError as error:
    raise ReleaseError(str(error)) from None
  return folder


def check_destination(folder: pathlib.Path) -> None:
  """Raises ReleaseError unless a release may be written there."""
  if folder.is_file():
    raise ReleaseError(f"{folder} is a file; name a folder for the release")
  if folder.exists() and not (folder / CONFIG).is_file() and any(folder.iterdir()):
    raise ReleaseError(
      f"{folder} holds files that are no release; choose an empty or new folder for this one"
    )


def make_payload(config: Config, *, parts: Sequence[str] = PARTS, **more: Any) -> dict[str, Any]:
  """The JSON of config.json; parts are named where they aren't all that the model has."""
  whole = {path.split("/")[0] for path in part_shapes(config.model)}
  held = {} if whole <= set(parts) else {"parts": [part for part in PARTS if part in parts]}
  return {"format": FORMAT, **held, **more, "config": to_dict(config)}


def as_dtype(name: str) -> Any:
  """A key of DTYPES as a dtype; ReleaseError for another one."""
  if name not in DTYPES:
    raise ReleaseError(f"dtype {name!r}: expected one of {', '.join(DTYPES)}")
  return DTYPES[name]


def load(
  folder: str | os.PathLike, *, base: str | os.PathLike | None = None
) -> tuple[Config, dict[str, Any], Any]:
  """Opens a release, or an adapter together with its base.

  Args:
    folder: a release folder, or the name of one that is shipped in the package ('tiny').
    base: of an adapter, where the release lies that it was trained from; None looks for it (see
      `adapter.find_base`).

  Returns:
    (config, params, tokenizer); params is a nested dict of read-only numpy arrays in the stored
    dtype, mapped from the files. The tokenizer of a vision tower alone is None.

  Raises:
    ReleaseError: a file is missing, truncated, or its arrays are not those of the configuration;
      arrays that are missing, unknown or misshapen are all named. Of an adapter: its base is
      missing or another one.
    regionjax.config.ConfigError: config.json has an unknown key or a value of the wrong type.
  """
  folder = find(folder)
  if (folder / ADAPTER).is_file():
    from regionjax.weights.adapter import load_adapter

    return load_adapter(folder, base=base)
  if base is not None:
    raise ReleaseError(f"{folder} is a whole release and needs no base (given: {base})")
  opened = open_release(folder)
  return opened.config, unflatten(arrays_of(opened.leaves)), opened.tokenizer


def open_release(folder: str | os.PathLike) -> Opened:
  """Opens a release without reading its weights; for an adapter see `load`.

  Raises:
    ReleaseError, ConfigError: as for `load`.
  """
  from regionjax.tokenizer import load_tokenizer

  folder = find(folder)
  if (folder / ADAPTER).is_file():
    raise ReleaseError(
      f"{folder} is an adapter, which holds only what was trained; make a whole release of it "
      "first: regionjax export WORKDIR OUT --merge"
    )
  config = load_config(folder)
  parts = read_parts(folder)
  leaves = read_file(folder / (INDEX if (folder / INDEX).is_file() else WEIGHTS))
  tokenizer = load_tokenizer(str(folder)) if "decoder" in parts else None
  check(leaves, config, tokenizer, where=leaves.where, parts=parts)
  spare = read_file(folder / SPARE) if (folder / SPARE).is_file() else {}
  return Opened(folder, config, parts, leaves, tokenizer, spare)


def read_file(file: pathlib.Path) -> TensorSource:
  """The tensors of a weights file; ReleaseError when it is truncated or damaged."""
  try:
    return open_safetensors(file)
  except WeightsError as error:
    raise ReleaseError(
      f"{error}\nThe release is truncated or damaged: copy its folder again, or export it again"
    ) from None


def read_arrays(file: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of a weights file by path, mapped; ReleaseError when it is truncated or damaged."""
  return arrays_of(read_file(file))


def arrays_of(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
  """Stored tensors as arrays, mapped."""
  return {path: tensor.array() for path, tensor in tensors.items()}


def find(folder: str | os.PathLike) -> pathlib.Path:
  """Release folder for a path or the name of a shipped one, with all its files present.

  Raises:
    ReleaseError: there is no such folder or a file is missing in it.
  """
  path = pathlib.Path(folder)
  if not path.exists() and path.name == str(folder) and (SHIPPED / path.name / CONFIG).exists():
    path = SHIPPED / path.name
  if not path.is_dir():
    shipped = sorted(p.parent.name for p in SHIPPED.glob(f"*/{CONFIG}"))
    raise ReleaseError(
      f"no release at {str(folder)!r}: expected a folder with {CONFIG}, {WEIGHTS} and {TOKENIZER}"
      + (f", or one of the shipped names: {', '.join(shipped)}" if shipped else "")
    )
  weights = next((n for n in (ADAPTER, INDEX) if (path / n).is_file()), WEIGHTS)
  needed = [CONFIG, weights, TOKENIZER]
  if (path / CONFIG).is_file() and "decoder" not in read_parts(path):
    needed.remove(TOKENIZER)
  missing = [name for name in needed if not (path / name).is_file()]
  if missing:
    raise ReleaseError(
      f"{path} is no complete release: {', '.join(missing)} missing. A training workdir becomes "
      "one with `regionjax export WORKDIR OUT`, published weights with `regionjax convert`"
    )
  return path


def load_config(folder: pathlib.Path) -> Config:
  """The configuration in a release folder."""
  return from_dict(Config, read_payload(folder)["config"])


def read_parts(folder: pathlib.Path) -> tuple[str, ...]:
  """The parts of the model that a release holds."""
  parts = read_payload(folder).get("parts", PARTS)
  if not isinstance(parts, (list, tuple)) or not parts or not set(parts) <= set(PARTS):
    raise ReleaseError(
      f"{folder / CONFIG}: 'parts' is {parts!r}; expected some of {', '.join(PARTS)}"
    )
  return tuple(parts)


def read_payload(folder: pathlib.Path) -> dict[str, Any]:
  """config.json of a release folder: 'format', 'config', and what its kind adds."""
  try:
    payload = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise ReleaseError(f"{folder / CONFIG} is not readable JSON: {error}") from None
  if isinstance(payload, dict) and "model_type" in payload:
    raise ReleaseError(
      f"{folder} holds a model of transformers ({payload['model_type']}), not a release; make one "
      "of it with `regionjax convert --from ... --to DIR`"
    )
  if not isinstance(payload, dict) or "config" not in payload:
    raise ReleaseError(f"{folder / CONFIG}: expected an object with 'format' and 'config'")
  if payload.get("format") != FORMAT:
    raise ReleaseError(
      f"{folder / CONFIG}: release format {payload.get('format')!r}, this program reads {FORMAT}; "
      "use the regionjax version that wrote it"
    )
  return payload


def part_shapes(model: ModelConfig, parts: Sequence[str] = PARTS) -> dict[str, tuple[int, ...]]:
  """Shapes by path of the parameters of some parts of a model."""
  from regionjax.models.params import param_shapes

  flat = flatten(param_shapes(model))
  return {path: tuple(s.shape) for path, s in flat.items() if path.split("/")[0] in parts}


def check(
  arrays: Mapping[str, Any],
  config: Config,
  tokenizer: Any,
  *,
  where: str,
  parts: Sequence[str] = PARTS,
) -> None:
  """Raises ReleaseError unless `arrays` (flat) have exactly the model's names and shapes."""
  expected = part_shapes(config.model, parts)
  problems = [f"missing {n} {expected[n]}" for n in sorted(expected.keys() - arrays.keys())]
  problems += [f"unknown {n} {arrays[n].shape}" for n in sorted(arrays.keys() - expected.keys())]
  problems += [
    f"{n} is {tuple(arrays[n].shape)}, expected {expected[n]}"
    for n in sorted(expected.keys() & arrays.keys())
    if tuple(arrays[n].shape) != expected[n]
  ]
  if tokenizer is not None and tokenizer.vocab_size > config.model.decoder.vocab_size:
    problems.append(
      f"the tokenizer has {tokenizer.vocab_size} entries, the decoder "
      f"{config.model.decoder.vocab_size}"
    )
  if problems:
    raise ReleaseError(f"{where} does not fit its configuration:\n  " + "\n  ".join(problems))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested dict -> {'a/b/c': leaf}."""
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat.update(flatten(value, f"{prefix}{key}/"))
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """{'a/b/c': leaf} -> nested dict."""
  tree: dict[str, Any] = {}
  for name, value in flat.items():
    *path, last = name.split("/")
    node = tree
    for key in path:
      node = node.setdefault(key, {})
    node[last] = value
  return tree

"""A release: the folder that `regionjax.load(path)` opens.

  config.json        the whole `Config`, so that prompts and resizing are those of training
  model.safetensors  parameters under their tree paths joined by '/', usually in bfloat16
  tokenizer.json     the tokenizer; tokenizer_config.json beside it names its special tokens
  README.md          the model card: what it was trained on, by which command, how well it does

The folder is written beside its destination and renamed into place, so an interrupted save leaves
either the old release or none, never half of one.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from regionjax.config import Config, from_dict, to_dict

FORMAT = 1
CONFIG, WEIGHTS, TOKENIZER, CARD = "config.json", "model.safetensors", "tokenizer.json", "README.md"
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
SHIPPED = pathlib.Path(__file__).resolve().parent.parent / "assets"


class ReleaseError(ValueError):
  """A release folder that cannot be read or written; the message says why and what to do."""


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
  folder = pathlib.Path(folder)
  if dtype not in DTYPES:
    raise ReleaseError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
  if folder.is_file():
    raise ReleaseError(f"{folder} is a file; name a folder for the release")
  if folder.exists() and not (folder / CONFIG).is_file() and any(folder.iterdir()):
    raise ReleaseError(
      f"{folder} holds files that are no release; choose an empty or new folder for this one"
    )
  arrays = {name: _cast(name, value, dtype) for name, value in flatten(params).items()}
  folder.parent.mkdir(parents=True, exist_ok=True)
  temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
  try:
    payload = {"format": FORMAT, "config": to_dict(config)}
    (temporary / CONFIG).write_text(json.dumps(payload, indent=2) + "\n", encoding="utf-8")
    safetensors.numpy.save_file(arrays, temporary / WEIGHTS, metadata={"format": "regionjax"})
    tokenizer.save(temporary)
    (temporary / CARD).write_text(card, encoding="utf-8")
    for file in temporary.iterdir():
      file.chmod(0o644)
    temporary.chmod(0o755)  # mkdtemp makes it private
    _swap(temporary, folder)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise
  return folder


def load(folder: str | os.PathLike) -> tuple[Config, dict[str, Any], Any]:
  """Opens a release.

  Args:
    folder: a release folder, or the name of one that is shipped in the package ('tiny').

  Returns:
    (config, params, tokenizer); params is a nested dict of numpy arrays in the stored dtype.

  Raises:
    ReleaseError: a file is missing, truncated, or its arrays are not those of the configuration;
      arrays that are missing, unknown or misshapen are all named.
    regionjax.config.ConfigError: config.json has an unknown key or a value of the wrong type.
  """
  from regionjax.tokenizer import load_tokenizer

  folder = find(folder)
  config = load_config(folder)
  try:
    arrays = safetensors.numpy.load_file(folder / WEIGHTS)
  except (safetensors.SafetensorError, OSError) as error:
    size = (folder / WEIGHTS).stat().st_size
    raise ReleaseError(
      f"{folder / WEIGHTS} cannot be read ({error}; {size} bytes): it is truncated or damaged; "
      "copy the folder again or export it again from its checkpoint"
    ) from None
  tokenizer = load_tokenizer(str(folder))
  check(arrays, config, tokenizer, where=str(folder / WEIGHTS))
  return config, unflatten(arrays), tokenizer


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
  missing = [n for n in (CONFIG, WEIGHTS, TOKENIZER) if not (path / n).is_file()]
  if missing:
    raise ReleaseError(
      f"{path} is no complete release: {', '.join(missing)} missing. A training workdir becomes "
      "one with `regionjax export WORKDIR OUT`"
    )
  return path


def load_config(folder: pathlib.Path) -> Config:
  """The configuration in a release folder."""
  try:
    payload = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise ReleaseError(f"{folder / CONFIG} is not readable JSON: {error}") from None
  if not isinstance(payload, dict) or "config" not in payload:
    raise ReleaseError(f"{folder / CONFIG}: expected an object with 'format' and 'config'")
  if payload.get("format") != FORMAT:
    raise ReleaseError(
      f"{folder / CONFIG}: release format {payload.get('format')!r}, this program reads {FORMAT}; "
      "use the regionjax version that wrote it"
    )
  return from_dict(Config, payload["config"])


def check(arrays: Mapping[str, Any], config: Config, tokenizer: Any, *, where: str) -> None:
  """Raises ReleaseError unless `arrays` (flat) have exactly the model's names and shapes."""
  from regionjax.models.params import param_shapes

  expected = {name: tuple(a.shape) for name, a in flatten(param_shapes(config.model)).items()}
  problems = [f"missing {n} {expected[n]}" for n in sorted(expected.keys() - arrays.keys())]
  problems += [f"unknown {n} {arrays[n].shape}" for n in sorted(arrays.keys() - expected.keys())]
  problems += [
    f"{n} is {tuple(arrays[n].shape)}, expected {expected[n]}"
    for n in sorted(expected.keys() & arrays.keys())
    if tuple(arrays[n].shape) != expected[n]
  ]
  if tokenizer.vocab_size > config.model.decoder.vocab_size:
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


def _cast(name: str, value: Any, dtype: str) -> np.ndarray:
  array = np.asarray(value)
  if not np.issubdtype(array.dtype, np.floating) and array.dtype != ml_dtypes.bfloat16:
    return np.ascontiguousarray(array)
  if not np.isfinite(array.astype(np.float32)).all():
    raise ReleaseError(f"{name} holds NaN or infinity; a diverged run is not worth releasing")
  return np.ascontiguousarray(array.astype(DTYPES[dtype]))


def _swap(temporary: pathlib.Path, folder: pathlib.Path) -> None:
  """Puts `temporary` in the place of `folder`; each step is one rename."""
  if not folder.exists():
    temporary.rename(folder)
    return
  old = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
  folder.rename(old / "release")
  try:
    temporary.rename(folder)
  except OSError:
    (old / "release").rename(folder)
    raise
  shutil.rmtree(old, ignore_errors=True)

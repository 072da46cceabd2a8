"""Opens whatever a user has of a model: a file or a folder, of either kind."""

from __future__ import annotations

import os
import pathlib

from regionjax.weights.safetensors_file import open_safetensors
from regionjax.weights.tensors import TensorSource, WeightsError
from regionjax.weights.torch_file import open_torch

# In a folder the first of these is taken: safetensors before pickles, whole before sharded.
_FIRST = (
  "model.safetensors",
  "model.safetensors.index.json",
  "*.safetensors.index.json",
  "pytorch_model.bin",
  "pytorch_model.bin.index.json",
  "*.bin.index.json",
  "*.safetensors",
  "*.bin",
  "*.pt",
  "*.pth",
)
# What training programs leave beside weights; none of it is weights, and all of it is pickled.
_BESIDE = ("training_args.bin", "optimizer.*", "scheduler.*", "rng_state*", "scaler.*")
_TORCH = (".bin", ".pt", ".pth", ".ckpt")
_GGUF = "is a GGUF file: convert it with `--from gguf`"


def open_weights(path: str | os.PathLike) -> TensorSource:
  """Opens the weights at a path, without reading them.

  Args:
    path: a .safetensors, .bin, .pt, .pth or .ckpt file, a shards' .index.json, or a folder with
      one of them, as Hugging Face's `save_pretrained` and downloads lay it out.

  Raises:
    WeightsError: there is nothing to open (what was looked for and what was found are listed),
      there are several files and none that is preferred, or the file cannot be used.
  """
  path = pathlib.Path(path)
  file = _choose(path) if path.is_dir() else path
  if not file.exists():
    raise WeightsError(
      f"{path}: no such file or folder (looked in {pathlib.Path.cwd()}); check the path. A model "
      "of a hub has to be downloaded first"
    )
  kinds = [suffix.lower() for suffix in file.suffixes]
  if kinds[-2:] == [".index", ".json"]:
    kinds = kinds[:-2]
  kind = kinds[-1] if kinds else ""
  if kind == ".safetensors":
    return open_safetensors(file)
  if kind in _TORCH:
    return open_torch(file)
  if kind == ".gguf":
    raise WeightsError(f"{file} {_GGUF}")
  raise WeightsError(
    f"{file}: weights are recognised by the name of their file; expected .safetensors, "
    f"{', '.join(_TORCH)}, the .index.json of one of them, or a folder with one"
  )


def _choose(folder: pathlib.Path) -> pathlib.Path:
  """The file of a folder that stands for the whole."""
  beside = {file for pattern in _BESIDE for file in folder.glob(pattern)}
  for pattern in _FIRST:
    files = sorted(file for file in folder.glob(pattern) if file not in beside)
    if len(files) == 1:
      return files[0]
    if files:
      names = ", ".join(file.name for file in files)
      raise WeightsError(
        f"{folder} holds {len(files)} files {pattern} ({names}) and no index that joins them; give "
        "the path of one, or download the .index.json of the shards as well"
      )
  found = sorted(file.name + "/" * file.is_dir() for file in folder.iterdir())
  gguf = [name for name in found if name.endswith(".gguf")]
  if gguf:
    raise WeightsError(f"{folder / gguf[0]} {_GGUF}")
  listed = ", ".join(found[:20]) + (f" and {len(found) - 20} more" if len(found) > 20 else "")
  raise WeightsError(
    f"{folder} holds no weights: looked for {', '.join(_FIRST)}; found {listed or 'nothing'}"
  )

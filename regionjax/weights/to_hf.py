"""The way back: a release, or a part of one, as a folder that transformers loads.

Names and layouts are the published ones; rows that only pad the vocabulary are left out. Tensors
that the published files have and this model never reads come from the release's spare file, and
where there is none (the model was trained here) are written as blocks that change nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from regionjax.config import Config, ModelConfig, VisionConfig
from regionjax.images import RESIZE_RULES
from regionjax.models.region_lm import vision_depth
from regionjax.weights import leaves as lazy
from regionjax.weights import release
from regionjax.weights.families import clip, gpt4roi, llama, llava
from regionjax.weights.folder import new_folder
from regionjax.weights.leaves import Leaf
from regionjax.weights.table import Table
from regionjax.weights.tensors import WeightsError
from regionjax.weights.writer import Progress

PARTS = ("vision", "decoder")  # that are models of their own elsewhere
TOWER = "clip"  # folder for the tower of a GPT4RoI, whose own files have none


@dataclasses.dataclass(frozen=True)
class Published:
  """One folder for transformers, not yet written.

  Attributes:
    family: as `convert.FAMILIES` names it.
    config: of config.json.
    leaves: in the published layout.
    preprocessor: of preprocessor_config.json; None for a decoder.
    tokenizer: None for a vision tower.
    filled: names that were made up because nothing reads them.
  """

  family: str
  config: dict[str, Any]
  leaves: dict[str, Leaf]
  preprocessor: dict[str, Any] | None = None
  tokenizer: Any = None
  filled: tuple[str, ...] = ()


def publish(opened: release.Opened, part: str = "") -> dict[str, Published]:
  """Arranges a release for transformers.

  Args:
    opened: the release.
    part: one of PARTS alone; '' is the whole.

  Returns:
    By folder ('' is the destination itself): a LLaVA, a LLaMA, a CLIP, or a GPT4RoI and its CLIP.

  Raises:
    WeightsError: the whole is no model that transformers has, or the release lacks that part.
  """
  model = opened.config.model
  if part and part not in PARTS:
    raise WeightsError(f"part {part!r}: expected one of {', '.join(PARTS)}")
  if part and part not in opened.parts:
    raise WeightsError(f"{opened.folder} has no {part}: it holds {', '.join(opened.parts)}")
  if not part and len(opened.parts) == 1:
    part = opened.parts[0]
  if part == "vision":
    return {"": _clip(opened)}
  if part == "decoder":
    return {"": _llama(opened)}
  if model.connector.kind == "mlp" and model.region.features is None:
    return {"": _llava(opened)}
  if model.connector.kind == "linear" and model.region.features == "pyramid":
    return {"": _gpt4roi(opened), TOWER: _clip(opened)}
  raise WeightsError(
    f"{opened.folder}: transformers has no model with connector.kind={model.connector.kind!r} and "
    f"region.kind={model.region.kind!r}; write its parts one by one, with --part vision and --part "
    "decoder"
  )


def write(
  published: Mapping[str, Published],
  folder: str | os.PathLike,
  *,
  dtype: str = "keep",
  progress: Progress | None = None,
) -> pathlib.Path:
  """Writes what `publish` arranged; the folder appears when it is complete.

  Args:
    published: by sub-folder.
    folder: destination, which must not exist or be empty.
    dtype: 'keep' the release's, or a key of `release.DTYPES`.
    progress: see `write_safetensors`.

  Raises:
    ReleaseError: the destination holds something, or the dtype is unknown.
    WeightsError: NaN or infinity in a tensor, or a full disk; nothing is left behind.
  """
  from regionjax.weights.writer import write_safetensors

  folder = pathlib.Path(folder)
  if folder.exists() and (folder.is_file() or any(folder.iterdir())):
    raise release.ReleaseError(f"{folder} exists; choose a new or empty folder")
  with new_folder(folder) as temporary:
    for name, one in published.items():
      inside = temporary / name
      inside.mkdir(exist_ok=True)
      leaves = one.leaves if dtype == "keep" else lazy.cast(one.leaves, release.as_dtype(dtype))
      names = sorted({leaf.dtype.name for leaf in leaves.values()})
      _write_json(inside / "config.json", one.config | {"dtype": names[0]})
      write_safetensors(inside, leaves, metadata={"format": "pt"}, progress=progress)
      if one.preprocessor is not None:
        _write_json(inside / "preprocessor_config.json", one.preprocessor)
      if one.tokenizer is not None:
        one.tokenizer.publish(inside)
  return folder


def _clip(opened: release.Opened) -> Published:
  model = opened.config.model
  depth = vision_depth(model)
  vision = dataclasses.replace(model.vision, select_layer=-1)
  leaves, filled = _whole_tower(
    clip.table(vision, depth=depth), opened.of("vision"), vision, opened.spare, depth
  )
  config = clip.config_to_hf(vision)
  return Published("hf-clip", config, leaves, _preprocessor(opened.config), filled=filled)


def _llama(opened: release.Opened) -> Published:
  decoder = opened.config.model.decoder
  leaves = llama.table(decoder).back(opened.of("decoder"))
  return Published("hf-llama", llama.config_to_hf(decoder), leaves, tokenizer=opened.tokenizer)


def _llava(opened: release.Opened) -> Published:
  model = opened.config.model
  config = llava.config_to_hf(model, image_token=opened.tokenizer.image_slot_id)
  leaves, filled = _whole_tower(
    llava.table(model), opened.leaves, model.vision, opened.spare, vision_depth(model), llava.TOWER
  )
  return Published(
    "hf-llava", config, leaves, _preprocessor(opened.config), opened.tokenizer, filled
  )


def _gpt4roi(opened: release.Opened) -> Published:
  model: ModelConfig = opened.config.model
  leaves = gpt4roi.table(model).back(opened.of(*gpt4roi.PARTS))
  return Published("gpt4roi", gpt4roi.config_to_hf(model), leaves, tokenizer=opened.tokenizer)


def _whole_tower(
  table: Table,
  params: Mapping[str, Any],
  vision: VisionConfig,
  spare: Mapping[str, Any],
  depth: int,
  tower: str = "",
) -> tuple[dict[str, Leaf], tuple[str, ...]]:
  """The published tensors, with blocks past the depth and the last norm; names that were filled."""
  spare = {_rooted(key, tower): tensor for key, tensor in spare.items()}
  filled: dict[str, Leaf] = {}
  for rule in clip.rules(vision, depth=vision.layers, tower=tower):
    if rule.layered:
      like = params[rule.path]
      shape = rule.transform.stored_shape(tuple(like.shape[1:]))
      for name in (rule.at(i) for i in range(depth, vision.layers)):
        if name not in spare:
          filled[name] = _nothing(name, shape, like.dtype)
  norm = f"{tower}vision_model.post_layernorm"
  dtype = params["vision/positions"].dtype
  for key in (f"{norm}.weight", f"{norm}.bias"):
    if key not in spare:
      filled[key] = _nothing(key, (vision.width,), dtype)
  kept = {key: tensor for key, tensor in spare.items() if table.is_spare(key)}
  return table.back(params, spare=kept | filled), tuple(filled)


def _rooted(key: str, tower: str) -> str:
  """A spare tensor's name under another tower: the file may come from another family."""
  at = key.find("vision_model.")
  return key if at < 0 else tower + key[at:]


def _nothing(key: str, shape: tuple[int, ...], dtype: Any) -> Leaf:
  """Norms that only normalise, maps that add nothing."""
  ones = key.endswith(("norm.weight", "norm1.weight", "norm2.weight"))
  return lazy.ArrayLeaf(np.full(shape, 1 if ones else 0, dtype))


def _preprocessor(config: Config) -> dict[str, Any]:
  """What CLIP's image processor needs to give the pixels that the model was trained on."""
  height, width = config.model.vision.image_hw
  values: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(config.model.vision.mean),
    "image_std": list(config.model.vision.std),
    "do_resize": True,
    "resample": 3,
    "crop_size": {"height": height, "width": width},
  }
  assert config.data.resize in RESIZE_RULES
  if config.data.resize == "hf":
    return values | {"size": {"shortest_edge": min(height, width)}, "do_center_crop": True}
  return values | {"size": {"height": height, "width": width}, "do_center_crop": False}


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

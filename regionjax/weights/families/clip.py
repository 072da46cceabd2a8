"""CLIP's vision tower as Hugging Face publishes it: alone, or inside a whole CLIP.

The published files have 'vision_model.' in front, a text tower beside it, and store position ids;
transformers 5 saves the tower alone as `encoder.layers...`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from regionjax.config import VisionConfig
from regionjax.weights.families.hf_config import Fields
from regionjax.weights.table import Rule, Table
from regionjax.weights.tensors import WeightsError
from regionjax.weights.transforms import linear, patch

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "relu": "relu"}


def config_from_hf(
  hf: Mapping[str, Any], *, preprocessor: Mapping[str, Any] | None = None
) -> VisionConfig:
  """The vision tower of a CLIP config.json, all its blocks kept (`select_layer=-1`).

  Args:
    hf: the parsed config.json of a whole CLIP or of its vision tower.
    preprocessor: the parsed preprocessor_config.json, for the normalisation; without it, CLIP's.

  Raises:
    WeightsError: fields that describe another computation, all of them named.
  """
  if newer := hf.get("vision_config_dict"):  # a second version of the group, which wins
    hf = {**hf, "vision_config": {**(hf.get("vision_config") or {}), **newer}}
  fields = Fields(hf, "CLIP's vision tower")
  why = "only CLIP's vision transformer is computed"
  fields.must_be("model_type", "clip_vision_model", "clip", why=why)
  tower = fields
  if hf.get("model_type") == "clip" or "vision_config" in fields:
    tower = fields.group("vision_config")
    tower.must_be("model_type", "clip_vision_model", why=why)
  values = vision_values(tower)
  fields.check()
  return VisionConfig(**values, **normalisation(preprocessor), select_layer=-1)


def vision_values(fields: Fields) -> dict[str, Any]:
  """VisionConfig's values from CLIP's fields, without `select_layer` and the normalisation.

  An absent field has the value that transformers gives it (that of CLIP ViT-B/32). Problems are
  left in `fields`; the values are good only if there are none.
  """
  fields.must_be_plain()
  fields.must_be("num_channels", 3, None, why="images have three channels here")
  width = fields.positive("hidden_size", 768)
  heads = fields.positive("num_attention_heads", 12)
  if width % heads:
    fields.refuse("hidden_size", f"expected a multiple of num_attention_heads={heads}")
  size, side = fields.positive("image_size", 224), fields.positive("patch_size", 32)
  if size % side:
    fields.refuse("image_size", f"expected a multiple of patch_size={side}")
  return dict(
    image_size=size,
    patch_size=side,
    width=width,
    layers=fields.positive("num_hidden_layers", 12),
    heads=heads,
    mlp_width=fields.positive("intermediate_size", 3072),
    activation=fields.one_of("hidden_act", "quick_gelu", ACTIVATIONS),
    eps=fields.read("layer_norm_eps", 1e-5),
  )


def normalisation(preprocessor: Mapping[str, Any] | None) -> dict[str, Any]:
  """VisionConfig's `mean` and `std` from preprocessor_config.json; {} where it is silent.

  Raises:
    WeightsError: a value that is not three numbers.
  """
  out = {}
  for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
    value = (preprocessor or {}).get(theirs)
    if value is None:
      continue
    if not isinstance(value, Sequence) or [type(v) in (int, float) for v in value] != [True] * 3:
      raise WeightsError(
        f"preprocessor_config.json: {theirs}={value!r}: expected three numbers, one per channel"
      )
    out[ours] = tuple(float(v) for v in value)
  return out


def config_to_hf(config: VisionConfig) -> dict[str, Any]:
  """The config.json that transformers builds the same vision tower from.

  Raises:
    WeightsError: what CLIP does not have: images that are not square, a convolutional stem.
  """
  _check_is_clip(config)
  height, width = config.image_hw
  if height != width:
    raise WeightsError(
      f"vision.image_size={config.image_size}: CLIP's config.json has square images only; resize "
      "the model with models.params.resize_images before writing it"
    )
  return {
    "architectures": ["CLIPVisionModel"],
    "model_type": "clip_vision_model",
    "image_size": height,
    "patch_size": config.patch_size,
    "num_channels": 3,
    "hidden_size": config.width,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "intermediate_size": config.mlp_width,
    "hidden_act": config.activation,
    "layer_norm_eps": config.eps,
  }


def table(config: VisionConfig, *, depth: int | None = None) -> Table:
  """`CLIPVisionModel`, or the vision half of a `CLIPModel`.

  Args:
    config: the tower.
    depth: blocks that the model runs (`region_lm.vision_depth`), the first ones; None is
      `config.blocks_used`. The rest, and the post-layernorm, are spare.
  """
  return Table(
    "CLIP's vision tower",
    rules(config, depth=depth),
    aliases=(
      (r"^(?=(?:embeddings|encoder|pre_layrnorm|post_layernorm)\.)", "vision_model."),
      (r"^clip\.(?=vision_model\.|text_model\.)", ""),
    ),
    ignored=(
      *ignored(),
      r"^text_model\.",
      r"^(?:text|visual)_projection\.weight$",
      r"^logit_scale$",
    ),
    spare=spare(config, depth=depth),
  )


def rules(config: VisionConfig, *, depth: int | None = None, tower: str = "") -> tuple[Rule, ...]:
  """The tower's tensors; `tower` stands before 'vision_model.'."""
  _check_is_clip(config)
  key, path = f"{tower}vision_model.", "vision/"
  embeddings = f"{key}embeddings."
  listed = [
    Rule(f"{embeddings}class_embedding", f"{path}class_token"),
    Rule(f"{embeddings}patch_embedding.weight", f"{path}patch/kernel", patch(config.patch_size)),
    Rule(f"{embeddings}position_embedding.weight", f"{path}positions"),
    *_norm(f"{key}pre_layrnorm", f"{path}pre_norm"),
  ]
  if _depth(config, depth):
    layer, path = f"{key}encoder.layers.{{layer}}.", f"{path}layers/"
    listed += _norm(f"{layer}layer_norm1", f"{path}norm1")
    for name in "qkv":
      listed += _linear(f"{layer}self_attn.{name}_proj", path + name)
    listed += _linear(f"{layer}self_attn.out_proj", f"{path}o")
    listed += _norm(f"{layer}layer_norm2", f"{path}norm2")
    listed += _linear(f"{layer}mlp.fc1", f"{path}up") + _linear(f"{layer}mlp.fc2", f"{path}down")
  return tuple(listed)


def ignored(tower: str = "") -> tuple[str, ...]:
  """Position numbers, which older files store."""
  return (rf"^{re.escape(tower)}(?:vision|text)_model\.embeddings\.position_ids$",)


def spare(config: VisionConfig, *, depth: int | None = None, tower: str = "") -> tuple[str, ...]:
  """What no region model reads: blocks past the depth and the last norm."""
  key = rf"^{re.escape(tower)}vision_model\."
  unused = "|".join(str(i) for i in range(_depth(config, depth), config.layers))
  blocks = (rf"{key}encoder\.layers\.(?:{unused})\.",) if unused else ()
  return (rf"{key}post_layernorm\.(?:weight|bias)$", *blocks)


def _depth(config: VisionConfig, depth: int | None) -> int:
  return config.blocks_used if depth is None else depth


def _norm(key: str, path: str) -> list[Rule]:
  return [Rule(f"{key}.weight", f"{path}/scale"), Rule(f"{key}.bias", f"{path}/bias")]


def _linear(key: str, path: str) -> list[Rule]:
  return [Rule(f"{key}.weight", f"{path}/kernel", linear), Rule(f"{key}.bias", f"{path}/bias")]


def _check_is_clip(config: VisionConfig) -> None:
  if config.stem:
    raise WeightsError(
      f"vision.stem={config.stem}: CLIP has no convolutional stem, so its files cannot hold this "
      "vision encoder"
    )

"""GPT4RoI's checkpoint: LLaMA, a linear projector and the region module, without the vision tower.

The published delta has 368 names, 32 of which are rotary frequencies that carry nothing. The vision
tower is stock CLIP and comes from its own files (`families.clip`). Weights are named after the
original's modules (`spi_module`); its sizes are not in config.json, so they are read from the
tensors' shapes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from regionjax.config import ConnectorConfig, DecoderConfig, ModelConfig, RegionConfig, VisionConfig
from regionjax.weights.families import llama
from regionjax.weights.families.hf_config import Fields
from regionjax.weights.table import Rule, Table
from regionjax.weights.tensors import Tensor, WeightsError
from regionjax.weights.transforms import Transform, conv, flatten, linear, same

PROJECTOR = "model.mm_projector."
MODULE = "model.spi_module."
FUSE, ROI = f"{MODULE}mlvl_fuse.", f"{MODULE}roi_align."
PARTS = ("connector", "regions", "decoder")  # of our tree: what the checkpoint holds

# Positions in the original's `pos_embedd`: linear, ReLU, norm, linear, ReLU, norm.
POSITIONS = (
  (0, "position_0", "kernel", linear),
  (2, "position_norm_0", "scale", same),
  (3, "position_1", "kernel", linear),
  (5, "position_norm_1", "scale", same),
)


def config_from_hf(
  hf: Mapping[str, Any],
  *,
  vision: VisionConfig | None = None,
  tensors: Mapping[str, Tensor] | None = None,
  vocab_multiple: int = 1,
) -> ModelConfig:
  """The model of a GPT4RoI config.json.

  Args:
    hf: the parsed config.json of the delta or of the merged checkpoint.
    vision: the stock CLIP tower that goes with it; None: CLIP ViT-L/14 at 224 pixels.
    tensors: the checkpoint, for the region module's widths; None: the published ones.
    vocab_multiple: as in `DecoderConfig`.

  Raises:
    WeightsError: fields that describe another computation, all of them named, or a vision tower
      that they do not fit.
  """
  vision = VisionConfig.clip_vit_l14() if vision is None else vision
  fields = Fields(hf, "GPT4RoI")
  fields.must_be("model_type", "llava", "llama", why="GPT4RoI's own config.json says llava")
  fields.must_be("use_mm_proj", True, why="image tokens pass through a projector")
  fields.must_be("mm_use_im_start_end", True, why="images stand between two tokens")
  decoder = llama.decoder_values(fields)
  if fields.read("mm_hidden_size", vision.width) != vision.width:
    fields.refuse(
      "mm_hidden_size", f"the CLIP given is {vision.width} wide; give the one it was trained with"
    )
  select = fields.read("mm_vision_select_layer", -2)
  used = dataclasses.replace(vision, select_layer=select).blocks_used
  # Every third hidden state before the one that becomes the image tokens.
  layers = tuple(used - 3 * i for i in (3, 2, 1, 0))
  if not 0 <= layers[0] <= used <= vision.layers:
    fields.refuse(
      "mm_vision_select_layer",
      f"regions are read from hidden states {', '.join(map(str, layers))} of the CLIP given, which "
      f"has 0 to {vision.layers}",
    )
  fields.check()
  region = RegionConfig() if tensors is None else region_of(tensors)
  return ModelConfig(
    name="gpt4roi",
    vision=dataclasses.replace(vision, select_layer=select),
    connector=ConnectorConfig("linear"),
    region=dataclasses.replace(region, layers=layers),
    decoder=DecoderConfig(**decoder, vocab_multiple=vocab_multiple),
  )


def region_of(tensors: Mapping[str, Tensor]) -> RegionConfig:
  """The region module's widths from its tensors' shapes; all else as published.

  Raises:
    WeightsError: the tensors that say them are missing or have shapes that no region module has.
  """
  names = {
    "flatten": f"{ROI}flatten_linear.weight",
    "position": f"{ROI}pos_embedd.0.weight",
    "width": f"{FUSE}input_conv.0.weight",
  }
  where = getattr(tensors, "where", "the checkpoint")
  missing = [name for name in names.values() if name not in tensors]
  if missing:
    raise WeightsError(
      f"{where}: no GPT4RoI checkpoint, as it lacks {', '.join(missing)}. GPT4RoI's weights are "
      "published as shilongz/GPT4RoI-7B-delta-V0"
    )
  shapes = {k: tensors[name].shape for k, name in names.items()}
  dims = {"flatten": 2, "position": 2, "width": 4}
  width = shapes["width"][0] if shapes["width"] else 0
  bins = shapes["flatten"][-1] / width if width and shapes["flatten"] else 0
  size = math.isqrt(int(bins))
  if any(len(shapes[k]) != n or 0 in shapes[k] for k, n in dims.items()) or size**2 != bins:
    raise WeightsError(
      f"{where}: no region module has "
      + ", ".join(f"{names[k]} {list(shape)}" for k, shape in shapes.items())
      + "; expected (token width, width * bins^2), (position width, 4) and (width, C + 2, 1, 1)"
    )
  return RegionConfig(
    width=width,
    output_size=size,
    token_width=shapes["flatten"][0],
    position_width=shapes["position"][0],
  )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
  """The config.json of a merged GPT4RoI checkpoint.

  Raises:
    WeightsError: a connector or region encoder that GPT4RoI does not have.
  """
  _check_is_gpt4roi(config)
  return llama.config_to_hf(config.decoder) | {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "mm_hidden_size": config.vision.width,
    "mm_use_im_start_end": True,
    "mm_vision_select_layer": config.vision.select_layer,
    "use_mm_proj": True,
  }


def table(config: ModelConfig) -> Table:
  """The merged checkpoint, or the delta over its base (`weights.delta`): PARTS of our tree.

  Raises:
    WeightsError: a connector or region encoder that GPT4RoI does not have.
  """
  _check_is_gpt4roi(config)
  return Table(
    "GPT4RoI",
    (
      *llama.rules(config.decoder),
      *_affine(PROJECTOR, "connector/linear", linear),
      *_region_rules(config.region),
    ),
    ignored=llama.ignored(),
    twins=llama.twins(config.decoder),
  )


def _region_rules(region: RegionConfig) -> list[Rule]:
  levels, ours = range(len(region.layers)), "regions/"
  listed = []
  for l in levels:
    listed += _affine(f"{FUSE}input_conv.{l}.", f"{ours}input_conv_{l}", conv)
  for r in range(region.rounds):
    key, path = f"{FUSE}fuse_convs.{r}.", f"{ours}round_{r}/"
    listed.append(Rule(f"{key}conv.weight", f"{path}conv/kernel", conv))
    listed += _affine(f"{key}gn.", f"{path}norm", same, name="scale")
  for l in levels:
    listed += _affine(f"{ROI}pconvs.{l}.", f"{ours}crop_conv_{l}", conv)
  for i, path, name, transform in POSITIONS:
    listed += _affine(f"{ROI}pos_embedd.{i}.", ours + path, transform, name=name)
  flat = flatten(region.output_size, region.width)
  listed += _affine(f"{ROI}flatten_linear.", f"{ours}flatten", flat)
  return listed + _affine(f"{ROI}updims.", f"{ours}output", linear)


def _affine(key: str, path: str, transform: Transform, *, name: str = "kernel") -> list[Rule]:
  """A weight and its bias; `name` is ours of the weight."""
  return [Rule(f"{key}weight", f"{path}/{name}", transform), Rule(f"{key}bias", f"{path}/bias")]


def _check_is_gpt4roi(config: ModelConfig) -> None:
  if config.connector != ConnectorConfig("linear") or config.region.features != "pyramid":
    raise WeightsError(
      f"connector.kind={config.connector.kind!r}, connector.merge={config.connector.merge}, "
      f"region.kind={config.region.kind!r}: GPT4RoI has a linear connector, one token per patch "
      "and region features from a pyramid"
    )

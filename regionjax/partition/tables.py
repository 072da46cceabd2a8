"""How every parameter is split: ordered regexes on paths, one table for each part of a model.

`fsdp` splits a dimension that is whole again when the parameter is used (the layer gathers it).
`tensor` splits the computation: the maps into heads, hidden channels and logits by their columns,
those back into the residual stream by their rows, so that each pair costs one reduction.

A path is matched with its layers stacked ('decoder/layers/q/kernel'); the leading axis of layers is
never split and not written down here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from regionjax.config import DecoderConfig, ModelConfig, RegionConfig, VisionConfig


@dataclasses.dataclass(frozen=True)
class Split:
  """A dimension that is split over an axis of the mesh.

  Attributes:
    axis: 'fsdp' or 'tensor'.
    units: of how many things it consists that must not be cut (heads); 0: of its own length.
    what: their name in the config, for messages.
    or_whole: where the axis doesn't divide them the dimension stays whole; otherwise that is an
      error.
  """

  axis: str
  units: int = 0
  what: str = ""
  or_whole: bool = False

  def __str__(self) -> str:
    return self.axis + (f"/{self.units}" if self.units else "") + ("?" if self.or_whole else "")


FSDP, TENSOR = Split("fsdp"), Split("tensor")
Dim = Split | tuple[Split, ...] | None


class Rule(NamedTuple):
  """Parameters whose whole path matches are split like this.

  Attributes:
    pattern: regex.
    dims: for each dimension a Split, several (the first is the outermost), or None for whole; ()
      is whole in every dimension.
  """

  pattern: str
  dims: tuple[Dim, ...]


def rules(config: ModelConfig) -> tuple[Rule, ...]:
  """The table of a model, in the order in which it is tried."""
  decoder = config.decoder
  return (
    *_vision(config.vision, blocks=_vision_blocks(config)),
    *_connector(config.connector.kind),
    *_regions(config.region),
    *_decoder(decoder),
  )


def match(table: Iterable[Rule], paths: Iterable[str]) -> dict[str, Rule]:
  """The first rule that matches each path.

  Raises:
    ValueError: paths without a rule or rules without a path; all of them are listed.
  """
  table = list(table)
  found: dict[str, Rule] = {}
  for path in paths:
    rule = next((rule for rule in table if re.fullmatch(rule.pattern, path)), None)
    if rule is not None:
      found[path] = rule
  missing = [f"no rule for {path}" for path in paths if path not in found]
  unused = [f"no parameter for {rule.pattern!r}" for rule in table if rule not in found.values()]
  if missing or unused:
    raise ValueError(
      "the partition table and the parameters differ:\n  " + "\n  ".join(missing + unused)
    )
  return found


def _vision_blocks(config: ModelConfig) -> bool:
  from regionjax.models.region_lm import vision_depth  # the models import this package

  return vision_depth(config) > 0


def _vision(config: VisionConfig, *, blocks: bool) -> list[Rule]:
  heads = Split("tensor", config.heads, "model.vision.heads")
  table = [
    Rule(r"vision/(class_token|positions)", ()),
    Rule(r"vision/patch/kernel", (None, FSDP)),
    Rule(r"vision/pre_norm/(scale|bias)", ()),
  ]
  if config.stem:  # a few thousand numbers
    table.append(Rule(r"vision/stem_\d+/(kernel|bias)", ()))
  if blocks:
    table += [
      Rule(r"vision/layers/norm[12]/(scale|bias)", ()),
      Rule(r"vision/layers/[qkv]/kernel", (FSDP, heads)),
      Rule(r"vision/layers/[qkv]/bias", (heads,)),
      Rule(r"vision/layers/o/kernel", (heads, FSDP)),
      Rule(r"vision/layers/up/kernel", (FSDP, TENSOR)),
      Rule(r"vision/layers/up/bias", (TENSOR,)),
      Rule(r"vision/layers/down/kernel", (TENSOR, FSDP)),
      Rule(r"vision/layers/(o|down)/bias", ()),
    ]
  return table


def _connector(kind: str) -> list[Rule]:
  first, second = ("linear1", "linear2") if kind == "mlp" else ("linear", "")
  table = [
    Rule(rf"connector/{first}/kernel", (FSDP, TENSOR)),
    Rule(rf"connector/{first}/bias", (TENSOR,)),
  ]
  if second:
    table += [
      Rule(rf"connector/{second}/kernel", (TENSOR, FSDP)),
      Rule(rf"connector/{second}/bias", ()),
    ]
  return table


def _regions(config: RegionConfig) -> list[Rule]:
  if config.features == "pool":
    return [
      Rule(r"regions/norm_\d+/(scale|bias)", ()),
      Rule(r"regions/hidden/kernel", (FSDP, TENSOR)),
      Rule(r"regions/position_hidden/kernel", (None, TENSOR)),
      Rule(r"regions/(position_)?hidden/bias", (TENSOR,)),
      Rule(r"regions/(position_)?output/kernel", (TENSOR, FSDP)),
      Rule(r"regions/(position_)?output/bias", ()),
    ]
  if config.features == "pyramid":
    # Maps are split by channel, and a channel's statistics are those of its GroupNorm group. The
    # crops' convolutions contract the split channels, so that four levels cost one reduction.
    channels = Split("tensor", config.groups, "model.region.groups")
    return [
      # 1026 input channels (two are coordinates) divide by nothing: the outputs take both axes.
      Rule(r"regions/input_conv_\d+/kernel", (None, None, None, (channels, FSDP))),
      Rule(r"regions/input_conv_\d+/bias", (channels,)),
      Rule(r"regions/round_\d+/conv/kernel", (None, None, FSDP, channels)),
      Rule(r"regions/round_\d+/norm/(scale|bias)", (channels,)),
      Rule(r"regions/crop_conv_\d+/kernel", (None, None, channels, FSDP)),
      Rule(r"regions/crop_conv_\d+/bias", ()),
      Rule(r"regions/flatten/kernel", (FSDP, TENSOR)),
      Rule(r"regions/flatten/bias", (TENSOR,)),
      Rule(r"regions/position_0/(kernel|bias)", ()),
      Rule(r"regions/position_norm_[01]/(scale|bias)", ()),
      Rule(r"regions/position_1/kernel", (None, (TENSOR, FSDP))),
      Rule(r"regions/position_1/bias", (TENSOR,)),
      Rule(r"regions/output/kernel", (TENSOR, FSDP)),
      Rule(r"regions/output/bias", ()),
    ]
  return []


def _decoder(config: DecoderConfig) -> list[Rule]:
  heads = Split("tensor", config.heads, "model.decoder.heads")
  # Grouped queries: where there are fewer key heads than devices, each device holds all of them.
  key_heads = Split("tensor", config.kv_heads, "model.decoder.kv_heads", or_whole=True)
  vocabulary = Split(
    "tensor", what="rows of the vocabulary, padded to a multiple of model.decoder.vocab_multiple"
  )
  maps: dict[str, tuple[Any, Any]] = {
    "q": (FSDP, heads), "k": (FSDP, key_heads), "v": (FSDP, key_heads), "o": (heads, FSDP),
    "gate": (FSDP, TENSOR), "up": (FSDP, TENSOR), "down": (TENSOR, FSDP),
  }  # fmt: skip
  table = [
    Rule(r"decoder/embed/embedding", (vocabulary, FSDP)),
    Rule(r"decoder/layers/norm[12]/scale", ()),
    Rule(r"decoder/norm/scale", ()),
  ]
  for name, (rows, columns) in maps.items():
    table.append(Rule(rf"decoder/layers/{name}/kernel", (rows, columns)))
    if config.lora.adapts(name):
      table.append(Rule(rf"decoder/layers/{name}/lora_a", (rows, None)))
      table.append(Rule(rf"decoder/layers/{name}/lora_b", (None, columns)))
  if not config.tie_embeddings:
    table.append(Rule(r"decoder/head/kernel", (FSDP, vocabulary)))
  return table

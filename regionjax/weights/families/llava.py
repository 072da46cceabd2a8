"""LLaVA-1.5 as llava-hf publishes it: CLIP, a two-layer projector, a LLaMA.

transformers 5 drops 'vision_model.' from the names when it saves one, and has
`model.language_model...` in memory; both are read, the published layout is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regionjax.config import ConnectorConfig, DecoderConfig, ModelConfig, RegionConfig, VisionConfig
from regionjax.models.region_lm import vision_depth
from regionjax.weights.families import clip, llama
from regionjax.weights.families.hf_config import Fields
from regionjax.weights.table import Rule, Table
from regionjax.weights.tensors import WeightsError
from regionjax.weights.transforms import linear, same

TOWER, MODEL, HEAD = "vision_tower.", "language_model.model.", "language_model."
PROJECTOR = "multi_modal_projector."

# What an absent field of `vision_config` means inside a LLaVA: CLIP ViT-L/14 at 336 pixels.
VISION_DEFAULTS = dict(
  hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
  image_size=336, patch_size=14,
)  # fmt: skip


def config_from_hf(
  hf: Mapping[str, Any],
  *,
  region: RegionConfig | None = None,
  preprocessor: Mapping[str, Any] | None = None,
  vocab_multiple: int = 1,
) -> ModelConfig:
  """The model of a LLaVA config.json.

  Args:
    hf: the parsed config.json.
    region: how regions are to enter it; None: as coordinates in the text, which needs no
      parameters that a LLaVA lacks.
    preprocessor: the parsed preprocessor_config.json, for the normalisation; without it, CLIP's.
    vocab_multiple: as in `DecoderConfig`.

  Raises:
    WeightsError: fields that describe another computation, all of them named.
  """
  fields = Fields(hf, "LLaVA")
  fields.must_be("model_type", "llava", why="only LLaVA-1.5 as llava-hf publishes it is computed")
  fields.must_be_plain()
  fields.must_be("projector_hidden_act", "gelu", None)
  fields.must_be("multimodal_projector_bias", True, None)
  why = "the class token is always dropped"
  fields.must_be("vision_feature_select_strategy", "default", None, why=why)
  tower = fields.group("vision_config", VISION_DEFAULTS)
  tower.must_be("model_type", "clip_vision_model", why="only CLIP's vision transformer is computed")
  vision = clip.vision_values(tower)
  text = fields.group("text_config")
  text.must_be("model_type", "llama", why="only the LLaMA architecture is computed")
  decoder = llama.decoder_values(text)
  # transformers ties the output layer where either place says so.
  decoder["tie_embeddings"] |= fields.read("tie_word_embeddings", False)
  select = _select_layer(fields, vision["layers"])
  _image_token(fields, decoder["vocab_size"])
  fields.check()
  return ModelConfig(
    name="llava",
    vision=VisionConfig(**vision, **clip.normalisation(preprocessor), select_layer=select),
    connector=ConnectorConfig("mlp"),
    region=RegionConfig(kind="text") if region is None else region,
    decoder=DecoderConfig(**decoder, vocab_multiple=vocab_multiple),
  )


def image_token(hf: Mapping[str, Any]) -> int:
  """The id that stands for an image in the prompt, repeated once per patch.

  Raises:
    WeightsError: an id outside the vocabulary.
  """
  fields = Fields(hf, "LLaVA")
  token = _image_token(fields, fields.group("text_config").positive("vocab_size", 32000))
  fields.check()
  return token


def _image_token(fields: Fields, vocab_size: int) -> int:
  # transformers 5 writes either name.
  name = "image_token_id" if "image_token_id" in fields else "image_token_index"
  token = fields.read(name, 32000)
  if name in fields and not 0 <= token < vocab_size:
    fields.refuse(name, f"expected an id below text_config.vocab_size={vocab_size}")
  return token


def _select_layer(fields: Fields, layers: int) -> int:
  """`vision_feature_layer`, which counts hidden states as `VisionConfig.select_layer` does."""
  layer = fields.read("vision_feature_layer", -2)  # a list of layers is refused here
  if not -layers - 1 <= layer <= layers:
    fields.refuse("vision_feature_layer", f"expected one of the {layers + 1} hidden states")
    return -2
  return layer


def config_to_hf(config: ModelConfig, *, image_token: int) -> dict[str, Any]:
  """The config.json that transformers builds the same LLaVA from.

  Args:
    config: the model; its region encoder, if any, is not part of a LLaVA.
    image_token: the tokenizer's `image_slot_id`.

  Raises:
    WeightsError: what LLaVA-1.5 does not have: another connector, images that are not square.
  """
  _check_is_llava(config)
  return {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "vision_config": clip.config_to_hf(config.vision),
    "text_config": llama.config_to_hf(config.decoder),
    "image_token_index": image_token,
    "image_seq_length": config.image_tokens,
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_layer": config.vision.select_layer,
    "vision_feature_select_strategy": "default",
    "tie_word_embeddings": config.decoder.tie_embeddings,
  }


def table(config: ModelConfig) -> Table:
  """`LlavaForConditionalGeneration`.

  The blocks past those that the model runs (see `region_lm.vision_depth`) and the tower's last norm
  are spare.

  Raises:
    WeightsError: a model whose vision encoder or connector LLaVA-1.5 does not have.
  """
  _check_is_llava(config)
  depth, decoder = vision_depth(config), config.decoder
  projector = [
    Rule(f"{PROJECTOR}linear_{i}.{theirs}", f"connector/linear{i}/{ours}", transform)
    for i in (1, 2)
    for theirs, ours, transform in (("weight", "kernel", linear), ("bias", "bias", same))
  ]
  return Table(
    "LLaVA",
    (
      *clip.rules(config.vision, depth=depth, tower=TOWER),
      *projector,
      *llama.rules(decoder, model=MODEL, head=HEAD),
    ),
    aliases=(
      (r"^model\.(?=(?:vision_tower|multi_modal_projector)\.)", ""),
      (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
      (r"^model\.language_model\.", MODEL),
      (r"^lm_head\.", f"{HEAD}lm_head."),
    ),
    ignored=(*clip.ignored(TOWER), *llama.ignored(MODEL)),
    spare=clip.spare(config.vision, depth=depth, tower=TOWER),
    twins=llama.twins(decoder, model=MODEL, head=HEAD),
  )


def _check_is_llava(config: ModelConfig) -> None:
  connector = config.connector
  if connector.kind != "mlp" or connector.merge != 1:
    raise WeightsError(
      f"connector.kind={connector.kind!r} with connector.merge={connector.merge}: LLaVA-1.5 has "
      "two layers ('mlp') and one token per patch (1)"
    )

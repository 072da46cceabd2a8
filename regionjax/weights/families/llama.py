"""The LLaMA family as Hugging Face publishes it: LLaMA 1 to 3, Vicuna, TinyLlama, SmolLM2.

Query and key rows of these files are in the half-split rotary layout that `ops.rope` uses, so no
permutation is needed (Meta's own and GGUF files need one).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from regionjax.config import DecoderConfig, RopeScaling
from regionjax.weights.families.hf_config import Fields
from regionjax.weights.table import Rule, Table
from regionjax.weights.transforms import linear, linear_rows, rows

# Those that the decoder computes exactly as transformers does.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"}
FACTORS = ("factor", "low_freq_factor", "high_freq_factor")  # of RoPE scaling


def config_from_hf(hf: Mapping[str, Any], *, vocab_multiple: int = 1) -> DecoderConfig:
  """The decoder of a LLaMA config.json, in transformers' old layout or that of its version 5.

  Args:
    hf: the parsed config.json.
    vocab_multiple: as in `DecoderConfig`; our choice, no published file says it.

  Raises:
    WeightsError: fields that describe another computation, all of them named.
  """
  fields = Fields(hf, "LLaMA")
  fields.must_be("model_type", "llama", why="only the LLaMA architecture is computed")
  values = decoder_values(fields)
  fields.check()
  return DecoderConfig(**values, vocab_multiple=vocab_multiple)


def decoder_values(fields: Fields) -> dict[str, Any]:
  """DecoderConfig's values from LLaMA's fields; an absent one has the value transformers gives it.

  Problems are left in `fields`; the values are good only if there are none.
  """
  fields.must_be_plain()
  fields.must_be("attention_bias", False, None, why="attention has no biases here")
  fields.must_be("mlp_bias", False, None, why="the MLP has no biases here")
  width = fields.positive("hidden_size", 4096)
  heads = fields.positive("num_attention_heads", 32)
  kv_heads = fields.positive("num_key_value_heads", heads)
  if heads % kv_heads:
    fields.refuse("num_key_value_heads", f"expected a divisor of num_attention_heads={heads}")
  if "head_dim" not in fields and width % heads:
    fields.refuse("hidden_size", f"expected a multiple of num_attention_heads={heads}")
  head_dim = fields.positive("head_dim", max(width // heads, 1))
  if head_dim % 2:
    fields.refuse("head_dim", f"{head_dim} channels of a head are not even, RoPE turns pairs")
  max_length = fields.positive("max_position_embeddings", 2048)
  base, scaling = _rope(fields, max_length)
  return dict(
    vocab_size=fields.positive("vocab_size", 32000),
    width=width,
    layers=fields.positive("num_hidden_layers", 32),
    heads=heads,
    kv_heads=kv_heads,
    head_dim=head_dim,
    mlp_width=fields.positive("intermediate_size", 11008),
    activation=fields.one_of("hidden_act", "silu", ACTIVATIONS),
    rope_base=base,
    rope_scaling=scaling,
    eps=fields.read("rms_norm_eps", 1e-6),
    tie_embeddings=fields.read("tie_word_embeddings", False),
    max_length=max_length,
  )


def _rope(fields: Fields, max_length: int) -> tuple[float, RopeScaling | None]:
  """(base, scaling) from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling`."""
  old = fields.group("rope_scaling")
  rope = fields.group("rope_parameters") if "rope_scaling" not in fields else old
  base = rope.read("rope_theta", fields.read("rope_theta", 10000.0))
  for group in (fields, rope):
    group.must_be("partial_rotary_factor", 1.0, None, why="whole heads are rotated here")
  name = "rope_type" if "rope_type" in rope else "type"
  kind = rope.read(name, "default")
  if kind == "default":
    return base, None
  if kind not in ("linear", "llama3"):
    rope.refuse(name, "expected default or linear or llama3")
    return base, None
  factor, low, high = (_factor(rope, name, kind) for name in FACTORS)
  if kind == "linear":
    return base, RopeScaling(kind, factor)
  if low >= high:
    rope.refuse("low_freq_factor", f"expected less than high_freq_factor={high}")
    return base, None
  length = rope.positive("original_max_position_embeddings", max_length)
  return base, RopeScaling(kind, factor, low, high, length)


def _factor(rope: Fields, name: str, kind: str) -> float:
  value = rope.read(name, 0.0)
  if value <= 0 and (kind == "llama3" or name == "factor"):
    rope.refuse(name, f"the {kind} scaling needs a positive number")
    return float(FACTORS.index(name) + 1)  # something valid, until the problem is raised
  return value


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
  """The config.json that transformers builds the same decoder from; token ids are not in it."""
  scaling = None
  if (rope := config.rope_scaling) is not None:
    scaling = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
      scaling |= {
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_length,
      }
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "intermediate_size": config.mlp_width,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "num_key_value_heads": config.kv_heads,
    "head_dim": config.head_dim,
    "hidden_act": config.activation,
    "rms_norm_eps": config.eps,
    "rope_theta": config.rope_base,
    "rope_scaling": scaling,
    "max_position_embeddings": config.max_length,
    "tie_word_embeddings": config.tie_embeddings,
    "attention_bias": False,
    "mlp_bias": False,
  }


def table(config: DecoderConfig) -> Table:
  """`LlamaForCausalLM`; also the layout of a bare `LlamaModel`, without 'model.' in front."""
  return Table(
    "LLaMA",
    rules(config),
    aliases=((r"^(?=(?:embed_tokens|layers|norm)\.)", "model."),),
    ignored=ignored(),
    twins=twins(config),
  )


def rules(config: DecoderConfig, *, model: str = "model.", head: str = "") -> tuple[Rule, ...]:
  """The decoder's tensors under the names' prefixes of a larger model.

  Args:
    config: the decoder.
    model: before 'embed_tokens'.
    head: before 'lm_head'.
  """
  vocab = (config.vocab_size, config.padded_vocab)
  layer, path = f"{model}layers.{{layer}}.", "decoder/layers/"
  listed = [Rule(f"{model}embed_tokens.weight", "decoder/embed/embedding", rows(*vocab))]
  listed += [Rule(f"{layer}self_attn.{n}_proj.weight", f"{path}{n}/kernel", linear) for n in "qkvo"]
  listed += [
    Rule(f"{layer}mlp.{n}_proj.weight", f"{path}{n}/kernel", linear) for n in ("gate", "up", "down")
  ]
  listed += [
    Rule(f"{layer}input_layernorm.weight", f"{path}norm1/scale"),
    Rule(f"{layer}post_attention_layernorm.weight", f"{path}norm2/scale"),
    Rule(f"{model}norm.weight", "decoder/norm/scale"),
  ]
  if not config.tie_embeddings:
    listed.append(Rule(f"{head}lm_head.weight", "decoder/head/kernel", linear_rows(*vocab)))
  return tuple(listed)


def ignored(model: str = "model.") -> tuple[str, ...]:
  """Rotary frequencies, which files from before 2024 store in every layer."""
  return (rf"^{re.escape(model)}(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq$",)


def twins(
  config: DecoderConfig, *, model: str = "model.", head: str = ""
) -> tuple[tuple[str, str], ...]:
  """A tied output layer, which PyTorch's own files store beside the embeddings."""
  if not config.tie_embeddings:
    return ()
  return ((f"{head}lm_head.weight", f"{model}embed_tokens.weight"),)

"""Stretched rotary frequencies: the whole decoder against transformers, and the configuration."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regionjax.config import ConfigError, DecoderConfig, RopeScaling, from_dict, to_dict
from regionjax.models.decoder import Decoder

# 48 tokens of a model that was first trained for 16: of its 8 frequencies 'llama3' keeps one,
# divides five and blends two.
SCALINGS = {
  "llama3": RopeScaling("llama3", factor=8.0, original_max_length=16),
  "linear": RopeScaling("linear", factor=4.0),
}
CONFIG = DecoderConfig(
  vocab_size=61, width=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp_width=48, max_length=64,
  rope_base=100.0,
)  # fmt: skip


def hf_model(config: DecoderConfig, scaling: RopeScaling) -> LlamaForCausalLM:
  torch.manual_seed(0)
  model = LlamaForCausalLM(
    LlamaConfig(
      vocab_size=config.vocab_size,
      hidden_size=config.width,
      intermediate_size=config.mlp_width,
      num_hidden_layers=config.layers,
      num_attention_heads=config.heads,
      num_key_value_heads=config.kv_heads,
      head_dim=config.head_dim,
      rms_norm_eps=config.eps,
      max_position_embeddings=config.max_length,
      rope_parameters={
        "rope_type": scaling.kind,
        "rope_theta": config.rope_base,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_length,
      },
      attn_implementation="eager",
    )
  ).eval()
  with torch.no_grad():  # HF's own initialisation is so small that attention is nearly uniform
    for p in model.parameters():
      p.copy_(torch.randn_like(p) * 0.25 + (p if p.ndim == 1 else 0))
  return model


def tree_of(model: LlamaForCausalLM) -> dict:
  """The decoder's parameters, layers apart."""
  state = {k.removeprefix("model."): v.numpy() for k, v in model.state_dict().items()}
  tree = {
    "embed": {"embedding": state["embed_tokens.weight"]},
    "norm": {"scale": state["norm.weight"]},
    "head": {"kernel": state["lm_head.weight"].T},
  }
  kernels = {n: f"self_attn.{n}_proj" for n in "qkvo"}
  kernels |= {n: f"mlp.{n}_proj" for n in ("gate", "up", "down")}
  norms = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
  for i in range(model.config.num_hidden_layers):
    tree[f"layers_{i}"] = {
      **{n: {"kernel": state[f"layers.{i}.{key}.weight"].T} for n, key in kernels.items()},
      **{n: {"scale": state[f"layers.{i}.{key}.weight"]} for n, key in norms.items()},
    }
  return tree


def logits_of(config: DecoderConfig, params: dict, tokens: np.ndarray) -> jax.Array:
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)

  def run(m):
    x, _ = m(
      m.embed(jnp.asarray(tokens)), positions_bt=positions, segment_ids_bt=jnp.ones_like(positions)
    )
    return m.logits(x)

  return Decoder(config, scan_layers=False).apply({"params": params}, method=run)


def relative(a, b) -> float:
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))


@pytest.mark.parametrize("kind", SCALINGS)
def test_agrees_with_transformers(kind):
  scaling = SCALINGS[kind]
  model = hf_model(CONFIG, scaling)
  tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 48))
  with torch.no_grad():
    theirs = model(torch.tensor(tokens)).logits.numpy()
  params = tree_of(model)
  ours = logits_of(dataclasses.replace(CONFIG, rope_scaling=scaling), params, tokens)
  assert relative(ours, theirs) < 1e-4
  assert relative(logits_of(CONFIG, params, tokens), theirs) > 1e-2  # it is not the plain one


@pytest.mark.parametrize("scaling", [None, *SCALINGS.values()])
def test_a_scaling_survives_json(scaling):
  config = dataclasses.replace(CONFIG, rope_scaling=scaling)
  assert from_dict(DecoderConfig, json.loads(json.dumps(to_dict(config)))) == config
  assert hash(config) == hash(dataclasses.replace(config))


def test_releases_from_before_it_was_there_have_none():
  values = to_dict(CONFIG)
  del values["rope_scaling"]
  assert from_dict(DecoderConfig, values) == CONFIG


@pytest.mark.parametrize(
  ("value", "match"),
  [
    ({"factr": 2.0}, r"'rope_scaling.factr'; did you mean .*factor"),
    ({"factor": "big"}, r"rope_scaling.factor: expected float, got 'big'"),
    ({"kind": "yarn"}, r"rope_scaling.kind='yarn': expected llama3 or linear"),
    ({"factor": 0.0}, r"rope_scaling.factor=0.0: expected a positive"),
    ({"low_freq_factor": 4.0}, r"low_freq_factor=4.0 must be positive and below"),
    ({"original_max_length": 0}, r"rope_scaling.original_max_length=0: expected at least 1"),
    (8.0, r"rope_scaling: expected .*RopeScaling.*None.*got 8.0"),
    ("llama3", r"rope_scaling: expected .*RopeScaling.*None.*got 'llama3'"),
  ],
)
def test_what_is_no_scaling_is_named(value, match):
  with pytest.raises(ConfigError, match=match):
    from_dict(DecoderConfig, {"rope_scaling": value})

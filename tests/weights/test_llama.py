"""The LLaMA family through its table: logits of transformers, every config layout, and back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regionjax.config import DecoderConfig, ModelConfig, RopeScaling
from regionjax.models.decoder import Decoder
from regionjax.models.params import param_shapes
from regionjax.weights.families import llama
from regionjax.weights.leaves import from_arrays, read_all
from regionjax.weights.release import flatten, unflatten
from regionjax.weights.sources import open_weights
from regionjax.weights.tensors import WeightsError

SIZES = dict(
  vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
  rms_norm_eps=1e-5, max_position_embeddings=64,
)  # fmt: skip
LLAMA3 = {
  "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}  # fmt: skip
VARIANTS = {
  "plain": {},
  "grouped and tied": dict(num_key_value_heads=2, tie_word_embeddings=True),
  "wide heads": dict(head_dim=12, num_key_value_heads=1),
  "llama3": dict(rope_parameters=LLAMA3 | {"rope_theta": 500.0}),
  "linear": dict(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
}


def relative(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.max(np.abs(a - b)) / np.max(np.abs(b))


def make(**kw) -> LlamaForCausalLM:
  torch.manual_seed(0)
  model = LlamaForCausalLM(LlamaConfig(**(SIZES | kw), attn_implementation="eager")).eval()
  with torch.no_grad():  # HF's own initialisation is so small that attention is nearly uniform
    for p in model.parameters():
      p.copy_(torch.randn_like(p) * 0.25 + (p if p.ndim == 1 else 0))
  return model


def wanted(decoder: DecoderConfig) -> dict:
  config = dataclasses.replace(ModelConfig.tiny("none"), decoder=decoder)
  tree = flatten(param_shapes(config))
  return {path: leaf.shape for path, leaf in tree.items() if path.startswith("decoder/")}


def saved(model, folder):
  model.save_pretrained(folder)
  return open_weights(folder), json.loads((folder / "config.json").read_text())


def convert(source, hf, **kw):
  decoder = llama.config_from_hf(hf, **kw)
  plan = llama.table(decoder).plan(source, wanted(decoder))
  return decoder, {path: read_all(leaf) for path, leaf in plan.leaves.items()}, plan


def logits(decoder, params, tokens):
  module = Decoder(decoder)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)

  def run(m):
    x, _ = m(m.embed(tokens), positions_bt=positions, segment_ids_bt=jnp.ones_like(tokens))
    return m.logits(x)

  tree = unflatten(params)["decoder"]
  return jax.jit(lambda p: module.apply({"params": p}, method=run))(tree)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_agree_with_transformers(variant, tmp_path):
  model = make(**VARIANTS[variant])
  source, hf = saved(model, tmp_path)
  decoder, params, _ = convert(source, hf, vocab_multiple=16)
  assert decoder.padded_vocab == 64 and decoder.vocab_size == 61
  tokens = np.random.default_rng(0).integers(0, 61, (2, 40)).astype(np.int32)
  with torch.no_grad():
    theirs = model(torch.tensor(tokens).long()).logits
  ours = logits(decoder, params, jnp.asarray(tokens))
  assert relative(ours[..., :61], theirs) < 1e-4
  assert not np.asarray(jax.nn.softmax(ours))[..., 61:].any()


@pytest.mark.parametrize("variant", ["plain", "grouped and tied", "llama3"])
def test_there_and_back_is_bit_exact_and_transformers_loads_it(variant, tmp_path):
  model = make(**VARIANTS[variant])
  source, hf = saved(model, tmp_path / "theirs")
  decoder, params, _ = convert(source, hf, vocab_multiple=16)
  back = llama.table(decoder).back(params)
  arrays = {name: read_all(leaf) for name, leaf in back.items()}
  assert arrays.keys() == set(source)
  for name, tensor in source.items():
    np.testing.assert_array_equal(arrays[name], tensor.array())

  out = tmp_path / "ours"
  out.mkdir()
  safetensors.numpy.save_file(arrays, out / "model.safetensors", metadata={"format": "pt"})
  (out / "config.json").write_text(json.dumps(llama.config_to_hf(decoder)))
  loaded, info = LlamaForCausalLM.from_pretrained(
    out, output_loading_info=True, attn_implementation="eager"
  )
  assert not info["missing_keys"] and not info["unexpected_keys"]
  tokens = torch.arange(30)[None]
  with torch.no_grad():
    assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)


def state(model):
  """Its tensors as PyTorch holds them: a tied output layer twice."""
  return {name: value.numpy() for name, value in model.state_dict().items()}


def test_old_files_and_bare_models_are_read():
  model = make()
  arrays = state(model)
  hf = model.config.to_dict()
  _, params, _ = convert(from_arrays(arrays), hf)
  old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4) for i in range(3)}
  _, same, plan = convert(from_arrays(arrays | old), hf)
  assert sorted(plan.ignored) == sorted(old)
  bare = {name.removeprefix("model."): value for name, value in arrays.items()}
  _, again, _ = convert(from_arrays(bare), hf)
  for path, value in params.items():
    np.testing.assert_array_equal(value, same[path])
    np.testing.assert_array_equal(value, again[path])


def test_a_tied_output_layer_may_be_stored_too_but_not_differ():
  model = make(tie_word_embeddings=True)
  arrays, hf = state(model), model.config.to_dict()
  assert "lm_head.weight" in arrays
  _, params, plan = convert(from_arrays(arrays), hf)
  assert plan.ignored == ["lm_head.weight"] and "decoder/head/kernel" not in params
  arrays["lm_head.weight"] = arrays["lm_head.weight"] * 2
  with pytest.raises(WeightsError, match=r"lm_head.weight differs.*set it to false"):
    convert(from_arrays(arrays), hf)
  _, params, _ = convert(from_arrays(arrays), hf | {"tie_word_embeddings": False})
  np.testing.assert_array_equal(params["decoder/head/kernel"].T, arrays["lm_head.weight"])


def test_another_models_config_is_answered_with_both_shapes():
  model = make()
  hf = model.config.to_dict() | {"vocab_size": 64, "num_hidden_layers": 4}
  with pytest.raises(WeightsError) as error:
    convert(from_arrays(state(model)), hf)
  assert "model.embed_tokens.weight is [61, 32], expected [64, 32]" in str(error.value)
  assert "9 missing:" in str(error.value) and "model.layers.3.mlp.up_proj" in str(error.value)


SEVEN_B = dict(
  model_type="llama", hidden_size=4096, intermediate_size=11008, num_attention_heads=32,
  num_hidden_layers=32, hidden_act="silu", rms_norm_eps=1e-6,
)  # fmt: skip
SMALL = dict(
  width=2048, heads=32, kv_heads=4, head_dim=64, layers=22, mlp_width=5632, eps=1e-5,
  vocab_size=32000,
)  # fmt: skip


@pytest.mark.parametrize(
  "hf, want",
  [
    pytest.param(  # neither kv heads, nor rope, nor positions
      SEVEN_B | dict(vocab_size=32000, architectures=["LLaMAForCausalLM"], pad_token_id=-1),
      DecoderConfig.llama_7b(vocab_size=32000),
      id="LLaMA-1",
    ),
    pytest.param(
      SEVEN_B | dict(vocab_size=32001, max_position_embeddings=2048, max_sequence_length=2048),
      DecoderConfig.llama_7b(vocab_size=32001),
      id="Vicuna v0",
    ),
    pytest.param(
      SEVEN_B | dict(
        vocab_size=32000, rms_norm_eps=1e-5, max_position_embeddings=4096, num_key_value_heads=32,
        rope_scaling={"factor": 4.0, "type": "linear"},
      ),
      DecoderConfig.llama_7b(
        vocab_size=32000, eps=1e-5, max_length=4096,
        rope_scaling=RopeScaling(kind="linear", factor=4.0),
      ),
      id="Vicuna v1.5 16k",
    ),
    pytest.param(
      SEVEN_B | dict(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_key_value_heads=4,
        vocab_size=32000, rms_norm_eps=1e-5, rope_scaling=None, attention_bias=False,
      ),
      DecoderConfig(**SMALL),
      id="TinyLlama",
    ),
    pytest.param(
      dict(
        model_type="llama", hidden_size=576, intermediate_size=1536, num_attention_heads=9,
        num_key_value_heads=3, num_hidden_layers=30, rms_norm_eps=1e-5, rope_theta=100000,
        rope_scaling=None, tie_word_embeddings=True, vocab_size=49152, hidden_act="silu",
        max_position_embeddings=8192, rope_interleaved=False, mlp_bias=False,
      ),
      DecoderConfig(
        vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, mlp_width=1536,
        rope_base=100000.0, eps=1e-5, tie_embeddings=True, max_length=8192,
      ),
      id="SmolLM2",
    ),
    pytest.param(
      dict(
        model_type="llama", hidden_size=2048, intermediate_size=8192, num_attention_heads=32,
        num_key_value_heads=8, num_hidden_layers=16, head_dim=64, rms_norm_eps=1e-5,
        rope_theta=500000.0, tie_word_embeddings=True, vocab_size=128256, hidden_act="silu",
        max_position_embeddings=131072, attention_bias=False, mlp_bias=False,
        rope_scaling=LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192},
      ),
      DecoderConfig(
        vocab_size=128256, width=2048, layers=16, heads=32, kv_heads=8, head_dim=64,
        mlp_width=8192, rope_base=500000.0, eps=1e-5, tie_embeddings=True, max_length=131072,
        rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
      ),
      id="LLaMA-3.2",
    ),
  ],
)  # fmt: skip
def test_published_configs(hf, want):
  assert llama.config_from_hf(hf) == want
  assert llama.config_from_hf(llama.config_to_hf(want)) == want
  modern = LlamaConfig(**{k: v for k, v in hf.items() if k != "pad_token_id"}).to_dict()
  assert "rope_parameters" in modern and "rope_theta" not in modern
  assert llama.config_from_hf(modern) == want


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(model_type="mistral"), "model_type='mistral': expected 'llama'"),
    (dict(attention_bias=True), "attention_bias=True"),
    (dict(mlp_bias=True), "mlp_bias=True"),
    (dict(hidden_act="gelu_pytorch_tanh"), "hidden_act='gelu_pytorch_tanh'"),
    (dict(sliding_window=4096), "sliding_window=4096"),
    (dict(num_local_experts=8), "num_local_experts=8"),
    (dict(quantization_config={"quant_method": "awq"}), "quantization_config.*quantised"),
    (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_scaling.type='dynamic'"),
    (dict(rope_parameters={"rope_type": "yarn"}), "rope_parameters.rope_type='yarn'"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "rope_scaling.low_freq_factor"),
    (dict(rope_scaling={"type": "linear"}), "rope_scaling.factor=None"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    (dict(num_key_value_heads=3), "num_key_value_heads=3.*divisor"),
    (dict(head_dim=7), "head_dim=7"),
    (dict(hidden_size=33), "hidden_size=33.*multiple"),
    (dict(vocab_size=0), "vocab_size=0"),
    (dict(tie_word_embeddings="yes"), "tie_word_embeddings='yes'.*bool"),
  ],
)
def test_configurations_that_are_not_run_are_refused_by_field(change, message):
  with pytest.raises(WeightsError, match=message):
    llama.config_from_hf({"model_type": "llama"} | SIZES | change)


def test_all_refused_fields_are_named_at_once():
  hf = {"model_type": "qwen2", "attention_bias": True, "rope_scaling": {"type": "yarn"}}
  with pytest.raises(WeightsError) as error:
    llama.config_from_hf(hf)
  assert len(str(error.value).splitlines()) == 4

"""LLaMA models in GGUF files: configuration, the rotary layout, and the whole decoder's logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_folders import gguf_permuted, gguf_tensors, write_gguf_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from regionjax.config import DecoderConfig, RopeScaling
from regionjax.models.decoder import Decoder
from regionjax.weights.check_oracle import open_gguf_decoder
from regionjax.weights.families import llama
from regionjax.weights.families.gguf import as_hf, config_from_gguf, half_split
from regionjax.weights.gguf_file import open_gguf
from regionjax.weights.leaves import read_all
from regionjax.weights.release import flatten, unflatten
from regionjax.weights.tensors import WeightsError

CONFIG = DecoderConfig(
  vocab_size=61, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48, max_length=64,
  rope_base=500.0, eps=1e-5,
)  # fmt: skip


def hf_model(config: DecoderConfig) -> LlamaForCausalLM:
  torch.manual_seed(0)
  model = LlamaForCausalLM(LlamaConfig(**llama.config_to_hf(config), attn_implementation="eager"))
  with torch.no_grad():  # HF's own initialisation is so small that attention is nearly uniform
    for p in model.parameters():
      p.copy_(torch.randn_like(p) * 0.25 + (p if p.ndim == 1 else 0))
  return model.eval()


def metadata(config: DecoderConfig) -> dict:
  return {
    "llama.block_count": config.layers,
    "llama.context_length": config.max_length,
    "llama.embedding_length": config.width,
    "llama.feed_forward_length": config.mlp_width,
    "llama.attention.head_count": config.heads,
    "llama.attention.head_count_kv": config.kv_heads,
    "llama.attention.layer_norm_rms_epsilon": config.eps,
    "llama.rope.freq_base": config.rope_base,
    "llama.rope.dimension_count": config.head_dim,
    "llama.vocab_size": config.vocab_size,
  }


@pytest.fixture(scope="module")
def model():
  return hf_model(CONFIG)


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
  folder = tmp_path_factory.mktemp("gguf")
  return write_gguf_file(folder / "model.gguf", gguf_tensors(model), metadata(CONFIG))


def changed(path, tmp_path, *, arch="llama", drop=(), **fields):
  """A copy of the file with other metadata ('_' for '.') and without some tensors."""
  source = open_gguf(path)
  kept = {k: v for k, v in source.fields.items() if not k.startswith("general.")}
  kept |= {k.replace("__", "."): v for k, v in fields.items()}
  tensors = {name: tensor.array() for name, tensor in source.items() if name not in drop}
  kept = {k: v for k, v in kept.items() if v is not None}
  return write_gguf_file(tmp_path / "changed.gguf", tensors, kept, arch=arch)


def logits_of(config: DecoderConfig, source, tokens: np.ndarray) -> jax.Array:
  """Through the LLaMA table."""
  module = Decoder(config)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)

  def run(m):
    x, _ = m(
      m.embed(jnp.asarray(tokens)), positions_bt=positions, segment_ids_bt=jnp.ones_like(positions)
    )
    return m.logits(x)

  tree = jax.eval_shape(lambda: module.init(jax.random.key(0), method=run))["params"]
  wanted = {f"decoder/{name}": leaf.shape for name, leaf in flatten(tree).items()}
  plan = llama.table(config).plan(source, wanted)
  params = unflatten({name: read_all(leaf) for name, leaf in plan.leaves.items()})["decoder"]
  return module.apply({"params": params}, method=run)


def relative(a, b) -> float:
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_half_split_undoes_the_permutation(heads):
  weight = np.random.default_rng(0).normal(size=(8 * heads, 5))
  there = gguf_permuted(weight, heads)
  assert not np.array_equal(there, weight)
  np.testing.assert_array_equal(half_split(there, heads), weight)
  names = np.arange(8)  # channel i of a head lies at row 2i, channel i + 4 at row 2i + 1
  assert gguf_permuted(names, 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
  np.testing.assert_array_equal(half_split(gguf_permuted(names, 1), 1), names)


def test_the_configuration_is_the_models(path):
  source = open_gguf(path)
  assert config_from_gguf(source) == CONFIG
  assert config_from_gguf(source, vocab_multiple=16).padded_vocab == 64


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_model_that_was_written(tmp_path, tied):
  config = dataclasses.replace(CONFIG, tie_embeddings=tied)
  model = hf_model(config)
  path = write_gguf_file(tmp_path / "model.gguf", gguf_tensors(model), metadata(config))
  source = open_gguf(path)
  assert config_from_gguf(source) == config
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 17))
  with torch.no_grad():
    theirs = model(torch.tensor(tokens)).logits.numpy()
    again = open_gguf_decoder(path).whole()(torch.tensor(tokens)).logits.numpy()
  assert relative(logits_of(config, as_hf(source), tokens), theirs) < 1e-4
  assert relative(again, theirs) < 1e-4  # so the file is as transformers expects one


def test_without_the_permutation_the_logits_are_wrong(model, path, monkeypatch):
  """What makes the trap silent: nothing but the values tells."""
  tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 17))
  with torch.no_grad():
    theirs = model(torch.tensor(tokens)).logits.numpy()
  monkeypatch.setattr("regionjax.weights.families.gguf.half_split", lambda rows, heads: rows)
  assert relative(logits_of(CONFIG, as_hf(open_gguf(path)), tokens), theirs) > 0.1


def test_tensors_come_by_their_names_one_by_one(model, path):
  brought = as_hf(open_gguf(path))
  state = model.state_dict()
  assert brought.keys() == state.keys()
  for name, tensor in brought.items():
    np.testing.assert_array_equal(tensor.array(), state[name].numpy(), err_msg=name)
    tensor.release()
  brought.close()
  with pytest.raises(WeightsError, match="was closed"):
    brought["lm_head.weight"].array()


def test_foreign_tensors_are_listed_by_the_table(model, path, tmp_path):
  tensors = gguf_tensors(model) | {
    "blk.0.attn_q.bias": np.zeros(32, np.float32),
    "blk.1.attn_q.weight": np.zeros((24, 32), np.float32),
  }
  source = open_gguf(write_gguf_file(tmp_path / "odd.gguf", tensors, metadata(CONFIG)))
  with pytest.raises(WeightsError) as caught:
    logits_of(CONFIG, as_hf(source), np.zeros((1, 2), int))
  assert "blk.0.attn_q.bias" in str(caught.value)
  assert "model.layers.1.self_attn.q_proj.weight" in str(caught.value)


@pytest.mark.parametrize(
  ("fields", "scaling"),
  [
    ({}, None),
    ({"llama__rope__scaling__type": "none"}, None),
    ({"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 2.5},
     RopeScaling("linear", factor=2.5)),
    ({"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 1.0}, None),
    ({"llama__rope__scale_linear": 4.0}, RopeScaling("linear", factor=4.0)),
  ],
)  # fmt: skip
def test_linear_scaling(path, tmp_path, fields, scaling):
  source = open_gguf(changed(path, tmp_path, **fields))
  assert config_from_gguf(source) == dataclasses.replace(CONFIG, rope_scaling=scaling)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_read_from_its_divisors(path, tmp_path, factor):
  """The file has a tensor of them and no word in its metadata."""
  scaling = RopeScaling("llama3", factor=factor)
  wide = dataclasses.replace(CONFIG, head_dim=32, rope_base=5e5, rope_scaling=scaling)
  hf = LlamaConfig(**llama.config_to_hf(wide))
  scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](hf, "cpu")
  divisors = 5e5 ** (-np.arange(0, 32, 2) / 32) / scaled.numpy()
  tensors = {n: t.array() for n, t in open_gguf(path).items()}
  tensors["rope_freqs.weight"] = divisors.astype(np.float32)
  fields = metadata(wide) | {"llama.attention.key_length": 32, "llama.attention.value_length": 32}
  source = open_gguf(write_gguf_file(tmp_path / "long.gguf", tensors, fields))
  assert config_from_gguf(source) == wide
  assert "rope_freqs.weight" not in as_hf(source)
  tensors["rope_freqs.weight"][-3] *= 1.01
  source = open_gguf(write_gguf_file(tmp_path / "odd.gguf", tensors, fields))
  with pytest.raises(WeightsError, match=rf"other divisors than LLaMA 3's scaling by {factor:g}"):
    config_from_gguf(source)


def test_what_llama_cpp_leaves_out_has_its_defaults(path, tmp_path):
  source = open_gguf(
    changed(
      path, tmp_path, llama__attention__head_count_kv=None, llama__rope__freq_base=None,
      llama__rope__dimension_count=None, llama__vocab_size=None,
      llama__feed_forward_length=[48, 48], llama__attention__sliding_window=40,
    )
  )  # fmt: skip
  assert config_from_gguf(source) == dataclasses.replace(
    CONFIG, kv_heads=4, rope_base=10000.0, max_length=40
  )


REFUSED = {
  "another architecture": ({"arch": "qwen2"}, "its architecture is 'qwen2'; expected 'llama'"),
  "an adapter": ({"general__type": "adapter"}, "holds a model's adapter"),
  "experts": ({"llama__expert_count": 8}, "a mixture of 8 experts"),
  "no embedding": ({"drop": ["token_embd.weight"]}, "has no tensor 'token_embd.weight'"),
  "part of a head": ({"llama__rope__dimension_count": 4}, "dimension_count is 4, but .* 8"),
  "values": ({"llama__attention__value_length": 16}, "value_length is 16, but .* 8 channels"),
  "yarn": ({"llama__rope__scaling__type": "yarn"}, "'yarn' is not computed here"),
  "factor": ({"llama__rope__scale_linear": -1.0}, "rope_scaling.factor=-1.0: expected a positive"),
  "widths by layer": ({"llama__feed_forward_length": [48, 64]}, "differs by layer"),
  "no layers": ({"llama__block_count": 0}, "block_count is 0; expected at least 1"),
  "heads": ({"llama__attention__head_count_kv": 3}, "can't share decoder.kv_heads=3"),
  "missing": ({"llama__context_length": None}, "no 'llama.context_length'"),
  "text for a number": ({"llama__block_count": "2"}, "block_count is '2'; expected int"),
  "vocabulary": ({"llama__vocab_size": 60}, "has 61 rows, but llama.vocab_size says 60"),
  "tokens": ({"tokenizer__ggml__tokens": ["a", "b"]}, "tokenizer.ggml.tokens says 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_here_is_named(name, path, tmp_path):
  change, match = REFUSED[name]
  source = open_gguf(changed(path, tmp_path, **change))
  with pytest.raises(WeightsError, match=match) as caught:
    config_from_gguf(source)
  assert "changed.gguf" in str(caught.value)

"""The decoder agrees with transformers' LlamaForCausalLM and with itself in every layout."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regionjax.config import ConfigError, DecoderConfig
from regionjax.models.decoder import Decoder, init_cache
from regionjax.models.params import stack_layers, unstack_layers

CONFIG = DecoderConfig(
  vocab_size=61, width=32, layers=2, heads=4, kv_heads=4, head_dim=8, mlp_width=48, max_length=64
)
VARIANTS = {
  "plain": {},
  "grouped": dict(kv_heads=2),
  "one_key_head": dict(kv_heads=1),
  "tied": dict(tie_embeddings=True),
  "wide_heads": dict(head_dim=12, rope_base=500.0, eps=1e-5, activation="gelu"),
}


def relative(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.max(np.abs(a - b)) / np.max(np.abs(b))


def hf_model(config: DecoderConfig) -> LlamaForCausalLM:
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
      hidden_act=config.activation,
      rms_norm_eps=config.eps,
      rope_theta=config.rope_base,
      rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
      tie_word_embeddings=config.tie_embeddings,
      attn_implementation="eager",
    )
  ).eval()
  with torch.no_grad():  # HF's own initialisation is so small that attention is nearly uniform
    for p in model.parameters():
      p.copy_(torch.randn_like(p) * 0.25 + (p if p.ndim == 1 else 0))
  return model


def from_hf(model: LlamaForCausalLM, config: DecoderConfig) -> dict:
  state = {k.removeprefix("model."): v.numpy() for k, v in model.state_dict().items()}
  params = {
    "embed": {"embedding": state["embed_tokens.weight"]},
    "norm": {"scale": state["norm.weight"]},
  }
  if not config.tie_embeddings:
    params["head"] = {"kernel": state["lm_head.weight"].T}
  names = {
    **{n: f"self_attn.{n}_proj" for n in "qkvo"},
    **{n: f"mlp.{n}_proj" for n in ("gate", "up", "down")},
  }
  for i in range(config.layers):
    at = f"layers.{i}."
    params[f"layers_{i}"] = {
      "norm1": {"scale": state[at + "input_layernorm.weight"]},
      "norm2": {"scale": state[at + "post_attention_layernorm.weight"]},
      **{n: {"kernel": state[f"{at}{key}.weight"].T} for n, key in names.items()},
    }
  return params


def forward(module, params, tokens, *, positions=None, segments=None, cache=None):
  """Logits of token ids, through embed, layers and head."""
  if positions is None:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
  segments = jnp.ones_like(tokens) if segments is None else segments

  def run(m):
    x, new = m(m.embed(tokens), positions_bt=positions, segment_ids_bt=segments, cache=cache)
    return m.logits(x), new

  return jax.jit(lambda p: module.apply({"params": p}, method=run))(params)


@functools.cache
def initial(config, **kw):
  """A decoder and fresh parameters for it."""
  module = Decoder(config, **kw)
  tokens = jnp.zeros((1, 2), jnp.int32)

  def run(m):
    x, _ = m(m.embed(tokens), positions_bt=tokens, segment_ids_bt=tokens)
    return m.logits(x)

  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), method=run))["params"]
  rng = np.random.default_rng(0)  # drawn with numpy: compiling the initialisation takes seconds

  def draw(s):
    scale = s.shape[-2] ** -0.5 if s.shape[-2:-1] else 0.1
    return jnp.asarray(rng.normal(size=s.shape) * scale + (len(s.shape) < 2), s.dtype)

  return module, jax.tree.map(draw, shapes)


def some_tokens(shape, seed=0, vocab=61):
  return jnp.asarray(np.random.default_rng(seed).integers(0, vocab, shape), jnp.int32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_llama(variant):
  config = dataclasses.replace(CONFIG, **VARIANTS[variant])
  model = hf_model(config)
  tokens = some_tokens((2, 17))
  with torch.no_grad():
    theirs = model(torch.tensor(np.asarray(tokens)).long(), output_hidden_states=True)
  params = from_hf(model, config)
  ours, _ = forward(Decoder(config), stack_layers(params), tokens)
  assert ours.dtype == jnp.float32
  assert relative(ours, theirs.logits) < 1e-4

  # Layer by layer: each of our layers on the other's input.
  one = Decoder(dataclasses.replace(config, layers=1), scan_layers=False)
  positions = jnp.broadcast_to(jnp.arange(17)[None], (2, 17))
  run = jax.jit(
    lambda p, x: one.apply(
      {"params": p}, x, positions_bt=positions, segment_ids_bt=jnp.ones_like(positions)
    )[0]
  )
  for i in range(config.layers):
    tree = {"layers_0": params[f"layers_{i}"], "norm": params["norm"]}
    ours = run(tree, jnp.asarray(theirs.hidden_states[i].numpy()))
    with torch.no_grad():
      want = theirs.hidden_states[i + 1]
      if i + 1 < config.layers:  # HF's last hidden state is already normed
        want = model.model.norm(want)
    assert relative(ours, want) < 1e-5


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("variant", ["grouped", "tied"])
def test_declares_exactly_the_converted_parameters(variant, scan_layers):
  config = dataclasses.replace(CONFIG, **VARIANTS[variant])
  params = from_hf(hf_model(config), config)
  own = initial(config, scan_layers=scan_layers)[1]
  params = stack_layers(params) if scan_layers else params
  assert jax.tree.map(np.shape, own) == jax.tree.map(np.shape, params)


def test_stack_and_unstack_are_inverse():
  _, params = initial(CONFIG)
  nested = {"decoder": params, "vision": {"layers": params["layers"]}}
  there = unstack_layers(nested)
  assert "layers_1" in there["decoder"] and "layers" not in there["vision"]
  back = stack_layers(there)
  assert jax.tree.structure(back) == jax.tree.structure(nested)
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), back, nested)))
  as_numpy = unstack_layers(jax.tree.map(np.asarray, nested))
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(as_numpy))


def loss_of(module):
  tokens = some_tokens((2, 12))

  def loss(params):
    logits, _ = forward(module, params, tokens)
    return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 0])

  return loss


def test_scan_equals_loop_in_value_and_gradient():
  scanned, params = initial(CONFIG)
  loop = Decoder(CONFIG, scan_layers=False)
  value, grads = jax.jit(jax.value_and_grad(loss_of(scanned)))(params)
  value2, grads2 = jax.jit(jax.value_and_grad(loss_of(loop)))(unstack_layers(params))
  assert relative(value, value2) < 1e-6
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(stack_layers(grads2))):
    assert relative(a, b) < 1e-5


def dots(hlo) -> int:
  return len(re.findall(r" dot\(", hlo))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_remat_changes_the_program_and_not_the_result(scan_layers):
  _, params = initial(CONFIG, scan_layers=scan_layers)
  counts, results, exps = {}, {}, {}
  for policy in ("none", "dots", "full"):
    module = Decoder(CONFIG, scan_layers=scan_layers, remat=policy)
    step = jax.jit(jax.value_and_grad(loss_of(module))).lower(params).compile()
    counts[policy] = dots(step.as_text())
    exps[policy] = step.as_text().count(" exponential(")
    results[policy] = step(params)
    for a, b in zip(jax.tree.leaves(results[policy]), jax.tree.leaves(results["none"])):
      assert relative(a, b) < 1e-5
  # 'dots' recomputes what stands between the matmuls (the gate's sigmoid), 'full' also them.
  assert counts["none"] <= counts["dots"] < counts["full"], counts
  assert exps["none"] < exps["dots"] <= exps["full"], exps


def test_an_unknown_remat_policy_names_the_known_ones():
  with pytest.raises(ConfigError, match=r"remat='some'.*none, full, dots"):
    initial(CONFIG, remat="some")


def test_packed_rows_equal_separate_rows():
  module, params = initial(CONFIG)
  parts = some_tokens((2, 8))
  packed = jnp.concatenate([parts.reshape(1, 16), jnp.zeros((1, 4), jnp.int32)], axis=1)
  segments = jnp.asarray([[1] * 8 + [2] * 8 + [0] * 4])
  positions = jnp.asarray([[*range(8), *range(8), *range(4)]])
  together, _ = forward(module, params, packed, positions=positions, segments=segments)
  assert relative(together[0, :16].reshape(2, 8, -1), forward(module, params, parts)[0]) < 1e-5
  assert bool(jnp.isfinite(together).all())


def test_padding_changes_nothing():
  module, params = initial(CONFIG)
  tokens = some_tokens((2, 8))
  base, _ = forward(module, params, tokens)
  padded = jnp.pad(tokens, ((0, 0), (0, 5)), constant_values=33)
  segments = jnp.pad(jnp.ones_like(tokens), ((0, 0), (0, 5)))
  logits, _ = forward(module, params, padded, segments=segments)
  assert relative(logits[:, :8], base) < 1e-5


@pytest.mark.parametrize("variant, scan_layers", [("plain", True), ("grouped", False)])
def test_prefill_and_ragged_decode_equal_the_forward_pass(variant, scan_layers):
  config = dataclasses.replace(CONFIG, **VARIANTS[variant])
  module, params = initial(config, scan_layers=scan_layers)
  tokens = some_tokens((3, 12))
  whole, _ = forward(module, params, tokens)

  # Three turns of ragged chunks; row b's chunks end where its lengths say. Padding is garbage.
  cache = init_cache(config, 3, 12)
  done = np.zeros(3, int)
  for lengths in ([3, 1, 5], [4, 5, 0], [1, 1, 1], [4, 5, 6]):
    lengths = np.asarray(lengths)
    width = max(lengths)
    chunk = np.full((3, width), 7)
    for b in range(3):
      chunk[b, : lengths[b]] = np.asarray(tokens)[b, done[b] : done[b] + lengths[b]]
    inside = np.arange(width)[None] < lengths[:, None]
    logits, cache = forward(
      module,
      params,
      jnp.asarray(chunk),
      positions=jnp.asarray(done[:, None] + np.arange(width)[None]),
      segments=jnp.asarray(inside.astype(np.int32)),
      cache=cache,
    )
    for b in range(3):
      want = whole[b, done[b] : done[b] + lengths[b]]
      if lengths[b]:
        assert relative(logits[b, : lengths[b]], want) < 1e-5
    done += lengths
    assert np.asarray(cache.length_b).tolist() == done.tolist()
  assert done.tolist() == [12, 12, 12]


def test_rows_that_pad_the_vocabulary_are_never_likely():
  config = dataclasses.replace(CONFIG, vocab_multiple=16)
  for tied in (False, True):
    module, params = initial(dataclasses.replace(config, tie_embeddings=tied))
    assert params["embed"]["embedding"].shape == (64, 32)
    logits, _ = forward(module, params, some_tokens((1, 5)))
    assert logits.shape == (1, 5, 64)
    probabilities = jax.nn.softmax(logits)
    assert float(probabilities[..., 61:].max()) == 0.0
    # The rest is what a decoder without the padding says.
    cut = jax.tree.map(lambda a: a, params)
    cut["embed"] = {"embedding": params["embed"]["embedding"][:61]}
    if not tied:
      cut["head"] = {"kernel": params["head"]["kernel"][:, :61]}
    plain = Decoder(dataclasses.replace(CONFIG, tie_embeddings=tied))
    assert relative(logits[..., :61], forward(plain, cut, some_tokens((1, 5)))[0]) < 1e-6


def test_bfloat16_compute_gives_float32_logits():
  module, params = initial(CONFIG)
  half = Decoder(CONFIG, dtype=jnp.bfloat16)
  tokens = some_tokens((2, 9))
  logits, _ = forward(half, params, tokens)
  assert logits.dtype == jnp.float32
  assert relative(logits, forward(module, params, tokens)[0]) < 0.05
  cache = init_cache(CONFIG, 2, 16, jnp.bfloat16)
  cached, cache = forward(half, params, tokens, cache=cache)
  assert cache.k[0].dtype == jnp.bfloat16
  assert relative(cached, logits) < 0.05

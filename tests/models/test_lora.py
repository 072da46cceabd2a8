"""LoRA in the decoder: the parameter tree, B = 0, merging in every layout, gradients, FLOPs."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from regionjax.config import (
  ConfigError,
  DecoderConfig,
  LoraConfig,
  ModelConfig,
  RegionConfig,
  VisionConfig,
  from_dict,
  to_dict,
)
from regionjax.flops import flops_by_part, flops_per_example
from regionjax.infer.engine import Engine
from regionjax.models.decoder import Decoder, init_cache
from regionjax.models.lora import merge_lora, without_lora
from regionjax.models.params import (
  batch_shapes,
  init_params,
  model_for,
  param_shapes,
  stack_layers,
  unstack_layers,
)
from regionjax.ops.losses import cross_entropy
from regionjax.tokenizer import load_tokenizer
from regionjax.train.state import flatten_paths, merge, split

BASE = ModelConfig(
  name="lora",
  vision=VisionConfig.tiny(
    image_size=32, patch_size=16, stem=(), width=16, layers=1, heads=1, mlp_width=16
  ),
  region=dataclasses.replace(RegionConfig.tiny("pool"), layers=(1,), width=16, position_width=8),
  decoder=DecoderConfig(
    vocab_size=61, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48,
    max_length=64, tie_embeddings=True,
  ),
  compute_dtype="float32",
)  # fmt: skip


def with_lora(config=BASE, *, rank=3, **kw):
  decoder = dataclasses.replace(config.decoder, lora=LoraConfig(rank=rank, **kw))
  return dataclasses.replace(config, decoder=decoder)


def relative(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.max(np.abs(a - b)) / np.max(np.abs(b))


def drawn(config, seed=0):
  """Random numpy parameters, B included, without compiling an initialiser."""
  rng = np.random.default_rng(seed)

  def draw(s):
    if len(s.shape) < 2:
      return (1 + 0.1 * rng.normal(size=s.shape)).astype(np.float32)
    return (rng.normal(size=s.shape) * s.shape[-2] ** -0.5).astype(np.float32)

  return jax.tree.map(draw, param_shapes(config))


TOKENS = np.random.default_rng(1).integers(0, 61, (2, 12)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))


def decoder_logits(module, params, *, cuts=(0, 12), cache=None):
  """Logits of TOKENS by the decoder alone, in the pieces between `cuts`."""

  def run(m):
    out, kept = [], cache
    for a, z in itertools.pairwise(cuts):
      at = POSITIONS[:, a:z]
      x = m.embed(TOKENS[:, a:z])
      x, kept = m(x, positions_bt=at, segment_ids_bt=np.ones_like(at), cache=kept)
      out.append(m.logits(x))
    return jnp.concatenate(out, axis=1)

  return module.apply({"params": params["decoder"]}, method=run)


def logits(config, params, *, scan_layers=True, **kw):
  module = Decoder(config.decoder, scan_layers=scan_layers)
  return jax.jit(lambda p: decoder_logits(module, p, **kw))(params)


def loss_of(config, **kw):
  module = Decoder(config.decoder, **kw)
  ones = np.ones(TOKENS.shape, np.float32)
  return lambda p: cross_entropy(decoder_logits(module, p), np.roll(TOKENS, -1, 1), ones)[0]


def test_without_lora_the_tree_is_what_it_was():
  names = flatten_paths(param_shapes(BASE))
  assert not [path for path in names if "lora" in path]
  assert param_shapes(with_lora(rank=0)) == param_shapes(BASE)
  assert BASE.decoder.lora == LoraConfig() and not LoraConfig().adapts("q")


def test_leaves_and_their_shapes():
  have = flatten_paths(param_shapes(with_lora(targets="q|v|down")))
  new = {p: s.shape for p, s in have.items() if p not in flatten_paths(param_shapes(BASE))}
  assert new == {
    "decoder/layers/q/lora_a": (2, 32, 3),
    "decoder/layers/q/lora_b": (2, 3, 32),
    "decoder/layers/v/lora_a": (2, 32, 3),
    "decoder/layers/v/lora_b": (2, 3, 16),
    "decoder/layers/down/lora_a": (2, 48, 3),
    "decoder/layers/down/lora_b": (2, 3, 32),
  }


def test_initialised_it_is_the_base_model():
  config = with_lora(rank=8, targets="q|down")
  params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
  layers = params["decoder"]["layers"]
  for name in ("q", "down"):
    adapted = layers[name]
    assert not np.any(adapted["lora_b"])
    a = adapted["lora_a"]
    assert float(jnp.std(a)) == pytest.approx(a.shape[-2] ** -0.5, rel=0.15)
    assert not np.array_equal(*a), "layers are drawn apart"
    # As without LoRA: the draw of the kernel itself keeps its level.
    gain = 0.5 if name == "down" else 1.0
    assert float(jnp.std(adapted["kernel"])) == pytest.approx(gain * a.shape[-2] ** -0.5, rel=0.15)
  np.testing.assert_array_equal(logits(config, params), logits(BASE, params))


@pytest.mark.parametrize("targets", ["q|v|o|up", ".*"])
def test_merged_equals_unmerged_in_every_layout(targets):
  config = with_lora(targets=targets, alpha=6.0)
  params = drawn(config)
  want = logits(config, params)
  assert relative(logits(BASE, params), want) > 1e-2, "the updates must matter to this test"
  merged_config, merged = merge_lora(config, params)
  assert merged_config == BASE == without_lora(config)
  assert jax.tree.map(np.shape, merged) == jax.tree.map(np.shape, param_shapes(BASE))
  assert relative(logits(BASE, merged), want) < 1e-5
  # One by one; scanned and unrolled hold the same model before and after.
  loose = unstack_layers(params)
  assert relative(logits(config, loose, scan_layers=False), want) < 1e-5
  _, merged_loose = merge_lora(config, loose)
  for a, b in zip(jax.tree.leaves(stack_layers(merged_loose)), jax.tree.leaves(merged)):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_merging_jax_arrays_gives_what_numpy_gives():
  config = with_lora()
  params = drawn(config)
  _, ours = merge_lora(config, params)
  _, theirs = merge_lora(config, jax.tree.map(jnp.asarray, params))
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(ours))
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(theirs))
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
    assert relative(b, a) < 1e-6


def test_the_sum_is_made_in_float32_and_cast_once():
  config = with_lora()
  params = drawn(config)
  half = jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16), params)
  wide = jax.tree.map(lambda a: a.astype(np.float32), half)
  exact = merge_lora(config, wide)[1]["decoder"]["layers"]
  kept = merge_lora(config, half)[1]["decoder"]["layers"]
  asked = merge_lora(config, half, dtype=np.float32)[1]["decoder"]["layers"]
  for name in ("q", "down"):
    assert kept[name]["kernel"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
      kept[name]["kernel"], exact[name]["kernel"].astype(ml_dtypes.bfloat16)
    )
    np.testing.assert_array_equal(asked[name]["kernel"], exact[name]["kernel"])
  np.testing.assert_array_equal(params["decoder"]["layers"]["q"]["kernel"], drawn(config)[
    "decoder"]["layers"]["q"]["kernel"])  # fmt: skip


def test_parameters_of_another_model_are_not_merged():
  with pytest.raises(ValueError, match=r"adapts 'down', but its parameters lack lora_a, lora_b"):
    merge_lora(with_lora(), drawn(BASE))
  same = drawn(BASE)
  assert merge_lora(BASE, same) == (BASE, same)


def test_the_cache_path_has_the_updates_too():
  config = with_lora()
  loose = unstack_layers(drawn(config))
  whole = logits(config, loose, scan_layers=False)
  cache = init_cache(config.decoder, 2, 12)
  parts = logits(config, loose, scan_layers=False, cuts=(0, 7, 12), cache=cache)
  assert relative(parts, whole) < 1e-5


def test_the_engine_merges():
  tokenizer = load_tokenizer("tiny")
  decoder = dataclasses.replace(BASE.decoder, vocab_size=tokenizer.vocab_size)
  config = with_lora(dataclasses.replace(BASE, decoder=decoder))
  params = drawn(config)
  engine = Engine(config, params, tokenizer)
  plain, merged = merge_lora(config, params)
  assert engine.config == plain
  want = unstack_layers(merged)
  assert jax.tree.structure(engine.params) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, engine.params, want)


def test_gradients_reach_what_is_named_and_nothing_else():
  config = with_lora(targets="q|up")
  patterns = (".*lora_.*", "decoder/norm/.*")
  trainable, frozen = split(drawn(config), patterns)
  names = {f"decoder/layers/{m}/lora_{ab}" for m in ("q", "up") for ab in "ab"}
  loss = loss_of(config)
  grads = jax.jit(jax.grad(lambda part: loss(merge(part, frozen))))(trainable)
  flat = flatten_paths(grads)
  assert set(flat) == names | {"decoder/norm/scale"}
  assert all(np.any(g) for g in flat.values())


@pytest.mark.slow  # compiling a recomputed scan
def test_remat_keeps_value_and_gradient():
  config = with_lora()
  params = drawn(config)
  plain, saved = (jax.jit(jax.value_and_grad(loss_of(config, remat=p)))(params)
                  for p in ("none", "dots"))  # fmt: skip
  for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(plain)):
    if np.any(b):  # the vision encoder gets no gradient here
      assert relative(a, b) < 1e-5


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(rank=-1), "rank=-1: expected 1 or more"),
    (dict(rank=4, alpha=0.0), "alpha=0.0: expected a positive number"),
    (dict(rank=4, targets="("), "is not a regex"),
    (dict(rank=4, targets="qkv"), "'qkv' matches none of q, k, v, o, gate, up, down"),
  ],
)
def test_bad_settings_are_named(settings, message):
  with pytest.raises(ConfigError, match=message):
    LoraConfig(**settings)


def test_a_config_with_lora_survives_json():
  config = with_lora(rank=8, alpha=4.0, targets="q|v")
  assert from_dict(ModelConfig, to_dict(config)) == config
  with pytest.raises(ConfigError, match=r"'decoder.lora.ranks'; did you mean rank"):
    from_dict(ModelConfig, {"decoder": {"lora": {"ranks": 8}}})


def test_flops_of_the_updates():
  config, sizes = with_lora(targets="q|gate"), dict(tokens=50.0, images=1.0, regions=2.0)
  weights = 2 * 3 * ((32 + 32) + (32 + 48))  # layers, rank, both sides of both maps
  forward = flops_by_part(config, **sizes, training=False)
  assert forward["lora"] == 2 * 50 * weights
  plain = flops_by_part(BASE, **sizes, training=False)
  assert plain["lora"] == 0 and {**forward, "lora": 0} == plain
  only = flops_by_part(config, **sizes, trainable=(".*lora_.*",))
  assert only["lora"] == 3 * forward["lora"]  # and the gradient passes through frozen maps:
  linear = 2 * 50 * 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
  assert only["decoder"] == 3 * forward["decoder"] - linear
  assert only["head"] == 2 * forward["head"] and only["vision"] == forward["vision"]
  whole = flops_by_part(config, **sizes)
  assert whole["lora"] == only["lora"] and whole["decoder"] == 3 * forward["decoder"]


def test_flops_of_a_frozen_decoder_with_lora_are_the_compilers_within_5_percent():
  decoder = DecoderConfig.tiny(
    vocab_size=1024, width=256, heads=2, kv_heads=2, head_dim=128, mlp_width=1024, layers=2
  )
  vision = dataclasses.replace(BASE.vision, width=128, mlp_width=512)
  config = with_lora(
    dataclasses.replace(BASE, vision=vision, decoder=decoder, scan_layers=False), rank=32
  )
  sizes = dict(tokens=48, images=1, regions=4)
  patterns = (".*lora_.*", "regions/.*", "connector/.*")
  model = model_for(config, image_slot_id=5, region_slot_id=6)
  trainable, frozen = split(param_shapes(config), patterns)

  def loss(part, rest, batch):
    out = model.apply({"params": merge(part, rest)}, batch)
    return cross_entropy(out, batch["targets_bt"], batch["loss_weights_bt"])[0]

  lowered = jax.jit(jax.value_and_grad(loss)).lower(
    trainable, frozen, batch_shapes(config, rows=1, **sizes)
  )
  theirs = lowered.cost_analysis()["flops"]
  ours = flops_per_example(config, **sizes, trainable=patterns)
  assert abs(ours / theirs - 1) < 0.05, (ours, theirs)

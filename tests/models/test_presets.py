"""The presets' parameter counts, and their FLOPs against the compiler's count."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from regionjax.config import ConfigError, ModelConfig
from regionjax.flops import flops_by_part, flops_per_example
from regionjax.models.params import (
  batch_shapes,
  count_params,
  init_params,
  model_for,
  param_shapes,
)
from regionjax.ops.losses import cross_entropy


def without_clip(config):
  counts = count_params(config)
  return sum(counts.values()) - counts["vision"]


def test_gpt4roi_counts():
  # spec of the original checkpoint: 7B with 32,006 rows, its region module and its projector
  counts = count_params(ModelConfig.gpt4roi_7b())
  assert counts["regions"] == 299_142_912
  assert counts["connector"] == 4_198_400
  assert counts["decoder"] == 6_738_464_768
  assert without_clip(ModelConfig.gpt4roi_7b()) == 7_041_806_080
  assert without_clip(ModelConfig.gpt4roi_13b()) == 13_321_366_272


def test_chatspot_has_no_region_module_and_the_same_vocabulary():
  config = ModelConfig.chatspot_7b()
  assert "regions" not in count_params(config)
  assert without_clip(config) == 7_041_806_080 - 299_142_912
  assert param_shapes(config)["decoder"]["embed"]["embedding"].shape == (32_006, 4096)


PUBLISHED = (ModelConfig.gpt4roi_7b, ModelConfig.gpt4roi_13b, ModelConfig.chatspot_7b)


@pytest.mark.parametrize("preset", PUBLISHED, ids=lambda preset: preset.__name__)
def test_published_presets_compute_in_bfloat16_and_know_their_flops(preset):
  config = preset()
  assert config.compute_dtype == "bfloat16"
  counts, tokens = count_params(config), 600
  language = 6 * counts["decoder"] * tokens  # forward and backward, 6 per weight and token
  ours = config.flops_per_example(tokens=tokens, images=1, regions=4)
  # One image's vision tower and region module add a quarter at most; a table of embeddings, which
  # is among the weights, multiplies nothing.
  assert 0.98 * language < ours < (1.3 if "regions" in counts else 1.05) * language
  forward = config.flops_per_example(tokens=tokens, images=1, regions=4, training=False)
  assert 2.9 * forward < ours <= 3 * forward  # pixels and coordinates get no gradient


def test_padding_rows_are_counted():
  config = ModelConfig.gpt4roi_7b()
  padded = dataclasses.replace(config.decoder, vocab_multiple=256)
  grown = count_params(dataclasses.replace(config, decoder=padded))["decoder"]
  assert grown - count_params(config)["decoder"] == 2 * (32_256 - 32_006) * 4096


def test_tiny_fits_its_checkpoint():
  for kind in ("pool", "pyramid", "text", "pool+text", "pyramid+text", "none"):
    config = ModelConfig.tiny(kind)
    assert config.compute_dtype == "float32"
    assert sum(count_params(config).values()) * 2 < 4 * 2**20  # bytes in bfloat16


def wide(kind):
  """Unscanned, without tied work, wide enough that norms and softmax are small change."""
  base = ModelConfig.tiny(kind)
  return dataclasses.replace(
    base,
    vision=dataclasses.replace(base.vision, image_size=64, width=256, mlp_width=1024, layers=2),
    region=dataclasses.replace(base.region, layers=(1, 2), upsample=(2, 1), width=128),
    decoder=dataclasses.replace(
      base.decoder, vocab_size=1024, width=256, head_dim=128, mlp_width=1024, layers=2
    ),
    scan_layers=False,
  )


@pytest.mark.parametrize("kind", ["pool", "pyramid", "none"])
@pytest.mark.parametrize("training", [False, True])
def test_flops_are_the_compilers_within_5_percent(kind, training):
  config = wide(kind)
  sizes = dict(tokens=48, images=1, regions=4)
  model = model_for(config, image_slot_id=5, region_slot_id=6)
  shapes = batch_shapes(config, rows=1, **sizes)
  params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

  def loss(p, batch):
    logits = model.apply({"params": p}, batch)
    return cross_entropy(logits, batch["targets_bt"], batch["loss_weights_bt"])[0]

  function = jax.value_and_grad(loss) if training else loss
  theirs = jax.jit(function).lower(params, shapes).cost_analysis()["flops"]
  ours = flops_per_example(config, **sizes, training=training)
  assert abs(ours / theirs - 1) < 0.05, (ours, theirs)


def test_frozen_parts_cost_less():
  config = ModelConfig.tiny()
  sizes = dict(tokens=100.0, images=1.0, regions=3.0)
  forward = flops_by_part(config, **sizes, training=False)
  whole = flops_by_part(config, **sizes)
  for part in ("decoder", "head"):
    assert whole[part] == pytest.approx(3 * forward[part])
  assert 2 * forward["regions"] < whole["regions"] < 3 * forward["regions"]
  assert 2 * forward["vision"] < whole["vision"] < 3 * forward["vision"]  # pixels get no gradient
  assert config.flops_per_example(**sizes) == pytest.approx(sum(whole.values()))

  # Stage 1 of GPT4RoI trains the region module alone: the decoder only passes gradients on.
  stage1 = flops_by_part(config, **sizes, trainable=("regions/.*",))
  assert stage1["vision"] == forward["vision"]
  assert stage1["connector"] == forward["connector"]
  assert stage1["head"] == 2 * forward["head"]
  assert 2 * forward["decoder"] <= stage1["decoder"] < whole["decoder"]
  frozen = flops_by_part(config, **sizes, trainable=("connector/.*", "regions/.*", "decoder/.*"))
  assert frozen["vision"] == forward["vision"] and frozen["decoder"] == whole["decoder"]
  with pytest.raises(ConfigError, match="not a regex"):
    flops_by_part(config, **sizes, trainable=("(",))


def test_attention_counts_half_the_square():
  config = ModelConfig.gpt4roi_7b()

  def decoder(tokens):
    return flops_by_part(config, tokens=tokens, images=0, regions=0, training=False)["decoder"]

  linear = 2 * 1000 * 6_476_005_376  # weights of the 32 layers without norms
  assert decoder(1000) - linear == pytest.approx(4 * 1000**2 / 2 * 32 * 4096)


def test_gpt4roi_work_is_the_originals():
  parts = flops_by_part(ModelConfig.gpt4roi_7b(), tokens=600, images=1, regions=10, training=False)
  assert parts["vision"] == pytest.approx(0.16e12, rel=0.05)  # CLIP ViT-L/14 at 224
  # five rounds of convolutions over four levels, 0.41 TFLOP each, and 14.8 GFLOP of crop
  # convolutions per box; the first round's are done on the grid of patches, for a fifteenth
  assert parts["regions"] == pytest.approx((4 + 1 / 15) * 0.41e12 + 10 * 14.8e9, rel=0.05)


def test_images_without_regions_cost_no_pyramid():
  config = ModelConfig.gpt4roi_7b()

  def regions(**options):
    sizes = dict(tokens=600, images=4, regions=0, training=False)
    return flops_by_part(config, **sizes, **options)["regions"]

  assert regions(region_images=4) == regions() > 6e12 and regions(region_images=0) == 0
  assert regions(region_images=1) == pytest.approx(regions() / 4)


def test_init_is_jittable_and_keeps_the_residual_stream_level():
  config = ModelConfig.tiny()
  params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
  layers = params["decoder"]["layers"]
  kernel = layers["up"]["kernel"]
  assert float(jnp.std(kernel)) == pytest.approx(160**-0.5, rel=0.15)
  expected = 416**-0.5 * (2 * config.decoder.layers) ** -0.5
  assert float(jnp.std(layers["down"]["kernel"])) == pytest.approx(expected, rel=0.15)
  assert not bool((kernel[0] == kernel[1]).all())  # layers are drawn apart

"""The vision tower agrees with transformers' CLIPVisionModel and with itself in every layout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from regionjax.config import VisionConfig
from regionjax.models.params import stack_layers, unstack_layers
from regionjax.models.vit import VisionTransformer

CONFIG = VisionConfig(
  image_size=28, patch_size=7, width=32, layers=2, heads=4, mlp_width=48, select_layer=-1
)


def relative(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.max(np.abs(a - b)) / np.max(np.abs(b))


def hf_model(config: VisionConfig) -> CLIPVisionModel:
  torch.manual_seed(0)
  model = CLIPVisionModel(
    CLIPVisionConfig(
      hidden_size=config.width,
      intermediate_size=config.mlp_width,
      num_hidden_layers=config.layers,
      num_attention_heads=config.heads,
      image_size=config.image_size,
      patch_size=config.patch_size,
      hidden_act=config.activation,
      attn_implementation="eager",
    )
  ).eval()
  with torch.no_grad():  # HF's own initialisation is so small that attention is nearly uniform
    for p in model.parameters():
      p.copy_(torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.2) + (p if p.ndim == 1 else 0))
  return model


def random_params(module: VisionTransformer, images) -> dict:
  """Drawn with numpy: compiling the initialisation takes seconds."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.2, s.dtype), shapes)


def from_hf(model: CLIPVisionModel, config: VisionConfig) -> dict:
  state = {k.removeprefix("vision_model."): v.numpy() for k, v in model.state_dict().items()}

  def both(key, names=("scale", "bias")):
    weight = state[f"{key}.weight"]
    return {names[0]: weight.T if weight.ndim == 2 else weight, names[1]: state[f"{key}.bias"]}

  kernel = ("kernel", "bias")
  params = {
    "class_token": state["embeddings.class_embedding"],
    "positions": state["embeddings.position_embedding.weight"],
    "patch": {
      "kernel": state["embeddings.patch_embedding.weight"]
      .transpose(2, 3, 1, 0)
      .reshape(-1, config.width)
    },
    "pre_norm": both("pre_layrnorm"),
  }
  for i in range(config.layers):
    at = f"encoder.layers.{i}."
    params[f"layers_{i}"] = {
      "norm1": both(at + "layer_norm1"),
      "q": both(at + "self_attn.q_proj", kernel),
      "k": both(at + "self_attn.k_proj", kernel),
      "v": both(at + "self_attn.v_proj", kernel),
      "o": both(at + "self_attn.out_proj", kernel),
      "norm2": both(at + "layer_norm2"),
      "up": both(at + "mlp.fc1", kernel),
      "down": both(at + "mlp.fc2", kernel),
    }
  return params


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "relu"])
def test_agrees_with_clip(activation):
  config = dataclasses.replace(CONFIG, activation=activation)
  model = hf_model(config)
  images = np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype(np.float32)
  with torch.no_grad():
    theirs = model(torch.tensor(images).permute(0, 3, 1, 2), output_hidden_states=True)
  params = stack_layers(from_hf(model, config))
  ours = jax.jit(VisionTransformer(config).apply)({"params": params}, images)
  assert len(ours) == config.layers + 1 == len(theirs.hidden_states)
  for a, b in zip(ours, theirs.hidden_states):
    assert relative(a, b) < 1e-5


def test_declares_exactly_the_converted_parameters():
  params = from_hf(hf_model(CONFIG), CONFIG)
  images = jnp.zeros((1, 28, 28, 3))
  for scan_layers, tree in ((False, params), (True, stack_layers(params))):
    module = VisionTransformer(CONFIG, scan_layers=scan_layers)
    own = jax.eval_shape(lambda m=module: m.init(jax.random.key(0), images))["params"]
    assert jax.tree.map(np.shape, own) == jax.tree.map(np.shape, tree)


@pytest.mark.parametrize("hw", [(42, 42), (21, 21), (28, 56), (63, 14), (35, 28)])
def test_position_interpolation_agrees_with_clip(hw):
  model = hf_model(CONFIG)
  images = np.random.default_rng(1).normal(size=(1, *hw, 3)).astype(np.float32)
  with torch.no_grad():
    theirs = model(
      torch.tensor(images).permute(0, 3, 1, 2),
      output_hidden_states=True,
      interpolate_pos_encoding=True,
    ).hidden_states
  module = VisionTransformer(CONFIG, scan_layers=False)
  ours = jax.jit(module.apply)({"params": from_hf(model, CONFIG)}, images)
  for a, b in zip(ours, theirs):
    assert relative(a, b) < 1e-4


def test_a_non_square_table_serves_its_own_grid_unchanged():
  config = dataclasses.replace(CONFIG, image_size=(14, 28))
  module = VisionTransformer(config)
  params = random_params(module, jnp.zeros((1, 14, 28, 3)))
  assert params["positions"].shape == (1 + 2 * 4, config.width)
  turned = jax.eval_shape(module.apply, {"params": params}, jnp.zeros((1, 28, 14, 3)))
  assert turned[0].shape == (1, 9, 32)
  other = dataclasses.replace(config, image_size=(28, 28))
  with pytest.raises(Exception, match="positions"):  # the table's shape is the config's grid
    VisionTransformer(other).apply({"params": params}, jnp.zeros((1, 28, 28, 3)))


def test_layouts_agree_and_unused_blocks_do_not_run():
  images = jax.random.normal(jax.random.key(1), (2, 28, 28, 3))
  scanned = VisionTransformer(CONFIG)
  params = random_params(scanned, images)
  whole = jax.jit(scanned.apply)({"params": params}, images)
  loop = VisionTransformer(CONFIG, scan_layers=False)
  for a, b in zip(whole, jax.jit(loop.apply)({"params": unstack_layers(params)}, images)):
    assert relative(a, b) < 1e-6

  short = VisionTransformer(CONFIG, depth=1, scan_layers=False)
  tree = jax.eval_shape(short.init, jax.random.key(0), images)["params"]
  assert "layers_0" in tree and "layers_1" not in tree
  kept = {k: v for k, v in unstack_layers(params).items() if k != "layers_1"}
  hidden = jax.jit(short.apply)({"params": kept}, images)
  assert len(hidden) == 2
  for a, b in zip(hidden, whole):
    assert relative(a, b) < 1e-6
  none = jax.eval_shape(
    VisionTransformer(CONFIG, depth=0).init_with_output, jax.random.key(0), images
  )
  assert len(none[0]) == 1


def test_bfloat16_stays_near_float32():
  images = jax.random.normal(jax.random.key(1), (2, 28, 28, 3))
  module = VisionTransformer(CONFIG)
  params = {"params": random_params(module, images)}
  half = jax.jit(VisionTransformer(CONFIG, dtype=jnp.bfloat16).apply)(params, images)
  assert all(x.dtype == jnp.bfloat16 for x in half)
  assert relative(half[-1].astype(jnp.float32), jax.jit(module.apply)(params, images)[-1]) < 0.05


def test_an_image_that_patches_do_not_tile_is_refused():
  with pytest.raises(ValueError, match=r"30x28.*multiples of the patch size 7"):
    VisionTransformer(CONFIG).init(jax.random.key(0), jnp.zeros((1, 30, 28, 3)))


def test_a_stem_takes_the_place_of_the_patches_pixels():
  config = dataclasses.replace(CONFIG, image_size=(16, 24), patch_size=8, stem=(4, 6, 12))
  module = VisionTransformer(config)
  images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 16, 24, 3)), jnp.float32)
  params = random_params(module, images)
  assert params["stem_1"]["kernel"].shape == (3, 3, 4, 6)
  assert params["patch"]["kernel"].shape == (12, 32)
  hidden = jax.jit(module.apply)({"params": params}, images)
  assert hidden[0].shape == (2, 1 + 2 * 3, 32)
  # Each patch sees its own pixels, and 7 of its right and lower neighbours'.
  grad = jax.grad(lambda x: module.apply({"params": params}, x)[0][0, 1].sum())(images)
  assert jnp.any(grad[0, :8, :8]) and not jnp.any(grad[0, :, 16:]) and not jnp.any(grad[1])

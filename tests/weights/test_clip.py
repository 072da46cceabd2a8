"""CLIP's vision tower through its table: published names, parity of every block, and back."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from regionjax.config import ModelConfig, RegionConfig, VisionConfig
from regionjax.models.params import param_shapes
from regionjax.models.vit import VisionTransformer
from regionjax.weights.families import clip
from regionjax.weights.leaves import from_arrays, read_all
from regionjax.weights.release import flatten, unflatten
from regionjax.weights.sources import open_weights
from regionjax.weights.tensors import Tensor, WeightsError

# Odd sizes throughout; 3 blocks.
SIZES = dict(
  hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, image_size=35,
  patch_size=5, hidden_act="quick_gelu",
)  # fmt: skip
PREFIX = "vision_model."


class Unread(Tensor):
  def array(self):
    raise AssertionError(f"{self.name} was read")


def block(prefix, width, mlp):
  shapes = {}
  for name in ("layer_norm1", "layer_norm2"):
    shapes |= {f"{prefix}{name}.weight": (width,), f"{prefix}{name}.bias": (width,)}
  for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
    shapes |= {
      f"{prefix}self_attn.{name}.weight": (width, width),
      f"{prefix}self_attn.{name}.bias": (width,),
    }
  shapes |= {f"{prefix}mlp.fc1.weight": (mlp, width), f"{prefix}mlp.fc1.bias": (mlp,)}
  return shapes | {f"{prefix}mlp.fc2.weight": (width, mlp), f"{prefix}mlp.fc2.bias": (width,)}


def published_clip_l14():
  """The names and shapes of openai/clip-vit-large-patch14, a whole CLIP."""
  shapes = {"logit_scale": (), "text_projection.weight": (768, 768)}
  shapes |= {"visual_projection.weight": (768, 1024)}
  at = "text_model."
  shapes |= {
    f"{at}embeddings.position_ids": (1, 77),
    f"{at}embeddings.position_embedding.weight": (77, 768),
    f"{at}embeddings.token_embedding.weight": (49408, 768),
    f"{at}final_layer_norm.weight": (768,),
    f"{at}final_layer_norm.bias": (768,),
  }
  for i in range(12):
    shapes |= block(f"{at}encoder.layers.{i}.", 768, 3072)
  return shapes | published_tower(1024, 4096, layers=24, patch=14, tokens=257)


def published_tower(width, mlp, *, layers, patch, tokens):
  shapes = {
    f"{PREFIX}embeddings.class_embedding": (width,),
    f"{PREFIX}embeddings.position_ids": (1, tokens),
    f"{PREFIX}embeddings.patch_embedding.weight": (width, 3, patch, patch),
    f"{PREFIX}embeddings.position_embedding.weight": (tokens, width),
  }
  for name in ("pre_layrnorm", "post_layernorm"):
    shapes |= {f"{PREFIX}{name}.weight": (width,), f"{PREFIX}{name}.bias": (width,)}
  for i in range(layers):
    shapes |= block(f"{PREFIX}encoder.layers.{i}.", width, mlp)
  return shapes


def unread(shapes):
  tensors = {name: Unread(name, shape, np.float32) for name, shape in shapes.items()}
  for name in shapes:
    if name.endswith("position_ids"):
      tensors[name] = Unread(name, shapes[name], np.int64)
  return tensors


def wanted(vision: VisionConfig) -> dict:
  model = ModelConfig.tiny("none")
  config = ModelConfig(vision=vision, region=RegionConfig(kind="none"), decoder=model.decoder)
  tree = flatten(param_shapes(config))
  return {path: leaf.shape for path, leaf in tree.items() if path.startswith("vision/")}


def relative(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.max(np.abs(a - b)) / np.max(np.abs(b))


def randomised(model):
  """Stronger weights than HF's own initialisation, under which attention is nearly uniform."""
  torch.manual_seed(0)
  with torch.no_grad():
    for p in model.parameters():
      p.copy_(torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.2) + (p if p.ndim == 1 else 0))
  return model.eval()


def saved(model, folder):
  """What `save_pretrained` wrote, opened by our own reader."""
  model.save_pretrained(folder)
  return open_weights(folder), json.loads((folder / "config.json").read_text())


def convert(source, hf):
  vision = clip.config_from_hf(hf)
  plan = clip.table(vision).plan(source, wanted(vision))
  return vision, {path: read_all(leaf) for path, leaf in plan.leaves.items()}, plan


@pytest.mark.parametrize(
  "sizes", [SIZES, SIZES | dict(hidden_act="gelu", layer_norm_eps=1e-3, patch_size=7)]
)
def test_hidden_states_agree_with_transformers(sizes, tmp_path):
  model = randomised(CLIPVisionModel(CLIPVisionConfig(**sizes, attn_implementation="eager")))
  source, hf = saved(model, tmp_path)
  assert "embeddings.class_embedding" in source  # the layout of transformers 5
  vision, params, _ = convert(source, hf)
  images = np.random.default_rng(0).normal(size=(2, 35, 35, 3)).astype(np.float32)
  with torch.no_grad():
    theirs = model(torch.tensor(images).permute(0, 3, 1, 2), output_hidden_states=True)
  tree = unflatten(params)["vision"]
  ours = jax.jit(VisionTransformer(vision).apply)({"params": tree}, images)
  assert len(ours) == len(theirs.hidden_states) == 4
  for a, b in zip(ours, theirs.hidden_states):
    assert relative(a, b) < 1e-5


def test_a_whole_clip_gives_its_vision_tower(tmp_path):
  text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
  config = CLIPConfig(text_config=text, vision_config=SIZES, projection_dim=8)
  model = randomised(CLIPModel(config))
  source, hf = saved(model, tmp_path)
  vision, params, plan = convert(source, hf)
  assert vision.width == 24 and vision.blocks_used == vision.layers == 3
  state = model.state_dict()
  up = np.stack([state[f"vision_model.encoder.layers.{i}.mlp.fc1.weight"].T for i in range(3)])
  np.testing.assert_array_equal(params["vision/layers/up/kernel"], up)
  assert set(plan.ignored) == {n for n in source if not n.startswith("vision_model.")}
  assert set(plan.spare) == {f"{PREFIX}post_layernorm.{n}" for n in ("weight", "bias")}


def test_the_published_names_of_clip_l14():
  shapes = published_clip_l14()
  vision = VisionConfig.clip_vit_l14(select_layer=-1)
  plan = clip.table(vision).plan(unread(shapes), wanted(vision))
  assert plan.leaves["vision/layers/up/kernel"].shape == (24, 1024, 4096)
  assert set(plan.ignored) == {
    n for n in shapes if not n.startswith(PREFIX) or n.endswith("position_ids")
  }
  # GPT4RoI reads up to the 23rd block; the 24th and the last norm are kept aside.
  used = VisionConfig.clip_vit_l14()
  plan = clip.table(used).plan(unread(shapes), wanted(used))
  assert plan.leaves["vision/layers/up/kernel"].shape == (23, 1024, 4096)
  last = f"{PREFIX}encoder.layers.23."
  assert set(plan.spare) == {n for n in shapes if n.startswith((last, f"{PREFIX}post_layernorm"))}


def test_a_block_too_many_or_too_few_is_named():
  shapes = published_clip_l14()
  vision = VisionConfig.clip_vit_l14(select_layer=-1)
  extra = block(f"{PREFIX}encoder.layers.24.", 1024, 4096)
  with pytest.raises(WeightsError) as error:
    clip.table(vision).plan(unread(shapes | extra), wanted(vision))
  assert (
    "16 unexpected:" in str(error.value) and "missing" not in str(error.value).split("\n  C")[0]
  )
  lacking = {n: s for n, s in shapes.items() if ".layers.7." not in n or "text" in n}
  with pytest.raises(WeightsError, match=r"16 missing:"):
    clip.table(vision).plan(unread(lacking), wanted(vision))


def test_there_and_back_is_bit_exact_and_transformers_loads_it(tmp_path):
  model = randomised(CLIPVisionModel(CLIPVisionConfig(**SIZES)))
  source, hf = saved(model, tmp_path / "theirs")
  vision, params, plan = convert(source, hf)
  back = clip.table(vision).back(params, spare=plan.spare)
  arrays = {name: read_all(leaf) for name, leaf in back.items()}
  assert arrays.keys() == {PREFIX + name for name in source}  # the published layout
  for name, tensor in source.items():
    np.testing.assert_array_equal(arrays[PREFIX + name], tensor.array())
  # and from the published layout again
  again = clip.table(vision).plan(from_arrays(arrays), wanted(vision))
  for path, leaf in again.leaves.items():
    np.testing.assert_array_equal(read_all(leaf), params[path])

  out = tmp_path / "ours"
  out.mkdir()
  safetensors.numpy.save_file(arrays, out / "model.safetensors", metadata={"format": "pt"})
  (out / "config.json").write_text(json.dumps(clip.config_to_hf(vision)))
  loaded, info = CLIPVisionModel.from_pretrained(out, output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"]
  for name, want in model.state_dict().items():
    assert torch.equal(loaded.state_dict()[name], want), name
  assert loaded.config.hidden_act == model.config.hidden_act


def test_config_there_and_back():
  vision = clip.config_from_hf(CLIPVisionConfig(**SIZES).to_dict())
  assert clip.config_from_hf(clip.config_to_hf(vision)) == vision
  published = {  # openai/clip-vit-large-patch14: an older and a newer version of the group
    "model_type": "clip",
    "vision_config": {"hidden_size": 768, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-05},
    "vision_config_dict": {
      "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
      "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
    },
  }  # fmt: skip
  assert clip.config_from_hf(published) == VisionConfig.clip_vit_l14(select_layer=-1)
  numbers = {"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 0.25]}
  vision = clip.config_from_hf(published, preprocessor=numbers)
  assert vision.mean == (0.5, 0.5, 0.5) and vision.std == (1.0, 1.0, 0.25)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(model_type="siglip_vision_model"), "model_type='siglip_vision_model'"),
    (dict(hidden_act="gelu_new"), "hidden_act='gelu_new'"),
    (dict(image_size=36), "image_size=36.*patch_size=5"),
    (dict(num_channels=1), "num_channels=1"),
    (dict(hidden_size=25), "hidden_size=25.*num_attention_heads=3"),
    (dict(num_hidden_layers="3"), "num_hidden_layers='3'.*int"),
    (dict(num_hidden_layers=0), "num_hidden_layers=0"),
    (dict(quantization_config={"bits": 4}), "quantization_config.*quantised"),
  ],
)
def test_configurations_that_are_not_run_are_refused_by_field(change, message):
  with pytest.raises(WeightsError, match=message):
    clip.config_from_hf({"model_type": "clip_vision_model"} | SIZES | change)


def test_all_refused_fields_are_named_at_once():
  with pytest.raises(WeightsError) as error:
    clip.config_from_hf(
      {"model_type": "clip", "vision_config": {"hidden_act": 3, "image_size": 50}}
    )
  assert "vision_config.hidden_act=3" in str(error.value)
  assert "vision_config.image_size=50" in str(error.value)
  with pytest.raises(WeightsError, match="image_mean"):
    clip.config_from_hf({"model_type": "clip"}, preprocessor={"image_mean": [0.5]})


def test_towers_that_clip_does_not_have_are_not_written():
  with pytest.raises(WeightsError, match="stem"):
    clip.table(VisionConfig.tiny())
  with pytest.raises(WeightsError, match=r"image_size=\(28, 42\)"):
    clip.config_to_hf(VisionConfig(image_size=(28, 42)))

"""LLaVA-1.5 through its table: logits with images, all three layouts of its names, and back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from regionjax.config import ConnectorConfig, ModelConfig, RegionConfig
from regionjax.models.params import batch_shapes, model_for, param_shapes
from regionjax.weights.families import llava
from regionjax.weights.leaves import from_arrays, read_all
from regionjax.weights.release import flatten, unflatten
from regionjax.weights.sources import open_weights
from regionjax.weights.tensors import Tensor, WeightsError

IMAGE = 60  # the image token's id
VISION = dict(
  model_type="clip_vision_model", hidden_size=24, intermediate_size=40, num_hidden_layers=3,
  num_attention_heads=3, image_size=15, patch_size=5, projection_dim=8,
)  # fmt: skip
TEXT = dict(
  model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
  num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=64,
)  # fmt: skip


class Unread(Tensor):
  def array(self):
    raise AssertionError(f"{self.name} was read")


def relative(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.max(np.abs(a - b)) / np.max(np.abs(b))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
  """(model, folder that `save_pretrained` wrote)."""
  torch.manual_seed(0)
  config = LlavaConfig(
    vision_config=VISION, text_config=TEXT, image_token_index=IMAGE, attn_implementation="eager"
  )
  model = LlavaForConditionalGeneration(config).eval()
  with torch.no_grad():  # HF's own initialisation is so small that attention is nearly uniform
    for p in model.parameters():
      p.copy_(torch.randn_like(p) * 0.25 + (p if p.ndim == 1 else 0))
  folder = tmp_path_factory.mktemp("llava")
  model.save_pretrained(folder)
  return model, folder


def hf_config(folder):
  return json.loads((folder / "config.json").read_text())


def wanted(config: ModelConfig) -> dict:
  tree = flatten(param_shapes(config))
  return {path: leaf.shape for path, leaf in tree.items() if not path.startswith("regions/")}


def convert(source, hf, **kw):
  config = llava.config_from_hf(hf, **kw)
  plan = llava.table(config).plan(source, wanted(config))
  return config, {path: read_all(leaf) for path, leaf in plan.leaves.items()}, plan


def published(name: str) -> str:
  """The name that llava-hf publishes for one of transformers 5's `save_pretrained`."""
  tower = "vision_tower."
  return f"{tower}vision_model.{name[len(tower) :]}" if name.startswith(tower) else name


def test_logits_with_images_agree_with_transformers(theirs):
  model, folder = theirs
  config, params, _ = convert(open_weights(folder), hf_config(folder), vocab_multiple=48)
  assert config.image_tokens == 9 and config.decoder.padded_vocab == 96
  rng = np.random.default_rng(0)
  tokens = rng.integers(3, IMAGE, (2, 24)).astype(np.int32)
  tokens[0, 2:11] = tokens[1, 11:20] = llava.image_token(hf_config(folder))
  images = rng.normal(size=(2, 15, 15, 3)).astype(np.float32)
  with torch.no_grad():
    want = model(
      input_ids=torch.tensor(tokens).long(),
      pixel_values=torch.tensor(images).permute(0, 3, 1, 2),
    ).logits

  shapes = batch_shapes(config, rows=2, tokens=24, images=1, regions=1)
  batch = {name: jnp.zeros(s.shape, s.dtype) for name, s in shapes.items()}
  batch |= dict(
    tokens_bt=jnp.asarray(tokens),
    images_bkhwc=jnp.asarray(images)[:, None],
    segment_ids_bt=jnp.ones((2, 24), jnp.int32),
    positions_bt=jnp.broadcast_to(jnp.arange(24)[None], (2, 24)),
  )
  lm = model_for(dataclasses.replace(config, compute_dtype="float32"), image_slot_id=IMAGE)
  got = jax.jit(lambda p, b: lm.apply({"params": p}, b))(unflatten(params), batch)
  assert relative(got[..., :64], want) < 1e-4


def test_all_layouts_give_the_same_parameters(theirs):
  model, folder = theirs
  hf, source = hf_config(folder), open_weights(folder)
  _, params, plan = convert(source, hf)
  # The third block and the last norm feed nothing.
  tower = "vision_tower.vision_model."
  assert params["vision/layers/up/kernel"].shape == (2, 24, 40)
  assert len(plan.spare) == 18 and all(
    n.startswith((f"{tower}encoder.layers.2.", f"{tower}post_layernorm.")) for n in plan.spare
  )
  files = {name: tensor.array() for name, tensor in source.items()}
  layouts = {
    "in memory": {name: value.numpy() for name, value in model.state_dict().items()},
    "published": {published(name): value for name, value in files.items()},
  }
  assert "model.vision_tower.embeddings.class_embedding" in layouts["in memory"]
  assert f"{tower}embeddings.class_embedding" in layouts["published"]
  assert "language_model.lm_head.weight" in layouts["published"]
  for name, arrays in layouts.items():
    _, same, _ = convert(from_arrays(arrays), hf)
    for path, value in params.items():
      np.testing.assert_array_equal(value, same[path], err_msg=name)


def test_there_and_back_is_bit_exact_and_transformers_loads_it(theirs, tmp_path):
  model, folder = theirs
  source = open_weights(folder)
  config, params, plan = convert(source, hf_config(folder), vocab_multiple=48)
  back = llava.table(config).back(params, spare=plan.spare)
  arrays = {name: read_all(leaf) for name, leaf in back.items()}
  assert arrays.keys() == {published(name) for name in source}
  for name, tensor in source.items():
    np.testing.assert_array_equal(arrays[published(name)], tensor.array())

  safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
  hf = llava.config_to_hf(config, image_token=IMAGE)
  (tmp_path / "config.json").write_text(json.dumps(hf))
  loaded, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"]
  for name, value in model.state_dict().items():
    assert torch.equal(loaded.state_dict()[name], value), name
  assert loaded.config.image_seq_length == 9 and loaded.config.image_token_id == IMAGE
  assert llava.config_from_hf(hf, vocab_multiple=48) == config


PUBLISHED_7B = {  # llava-hf/llava-1.5-7b-hf
  "model_type": "llava",
  "image_token_index": 32000,
  "pad_token_id": 32001,
  "projector_hidden_act": "gelu",
  "text_config": {
    "_name_or_path": "lmsys/vicuna-7b-v1.5", "max_position_embeddings": 4096,
    "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064,
  },
  "tie_word_embeddings": False,
  "vision_config": {
    "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
    "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24,
    "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
  },
  "vision_feature_layer": -2,
  "vision_feature_select_strategy": "default",
  "vocab_size": 32064,
}  # fmt: skip


def published_7b():
  """The names and shapes of llava-hf/llava-1.5-7b-hf."""
  tower, text = "vision_tower.vision_model.", "language_model.model."
  shapes = {
    f"{tower}embeddings.class_embedding": (1024,),
    f"{tower}embeddings.patch_embedding.weight": (1024, 3, 14, 14),
    f"{tower}embeddings.position_embedding.weight": (577, 1024),
    "language_model.lm_head.weight": (32064, 4096),
    f"{text}embed_tokens.weight": (32064, 4096),
    f"{text}norm.weight": (4096,),
    "multi_modal_projector.linear_1.weight": (4096, 1024),
    "multi_modal_projector.linear_2.weight": (4096, 4096),
    **{f"multi_modal_projector.linear_{i}.bias": (4096,) for i in (1, 2)},
  }
  norms = [f"{tower}pre_layrnorm", f"{tower}post_layernorm"]
  linears = {}
  for i in range(24):
    at = f"{tower}encoder.layers.{i}."
    norms += [f"{at}layer_norm1", f"{at}layer_norm2"]
    linears |= {f"{at}self_attn.{n}": (1024, 1024) for n in ("q_proj", "k_proj", "v_proj")}
    linears |= {f"{at}self_attn.out_proj": (1024, 1024), f"{at}mlp.fc1": (4096, 1024)}
    linears[f"{at}mlp.fc2"] = (1024, 4096)
  for name in norms:
    shapes |= {f"{name}.weight": (1024,), f"{name}.bias": (1024,)}
  for name, shape in linears.items():
    shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
  for i in range(32):
    at = f"{text}layers.{i}."
    shapes |= {f"{at}self_attn.{n}_proj.weight": (4096, 4096) for n in "qkvo"}
    shapes |= {f"{at}mlp.{n}_proj.weight": (11008, 4096) for n in ("gate", "up")}
    shapes[f"{at}mlp.down_proj.weight"] = (4096, 11008)
    shapes |= {f"{at}{n}.weight": (4096,) for n in ("input_layernorm", "post_attention_layernorm")}
  return shapes


def test_the_published_names_of_llava_7b():
  shapes = published_7b()
  assert len(shapes) == 686
  config = llava.config_from_hf(PUBLISHED_7B, region=RegionConfig(), vocab_multiple=128)
  assert config.decoder.vocab_size == 32064 and config.decoder.padded_vocab == 32128
  assert config.vision.image_hw == (336, 336) and config.image_tokens == 576
  assert config.connector == ConnectorConfig("mlp") and config.region.kind == "pyramid"
  source = {name: Unread(name, shape, np.float16) for name, shape in shapes.items()}
  plan = llava.table(config).plan(source, wanted(config))
  assert len(plan.spare) == 18 and not plan.ignored
  assert plan.leaves["decoder/head/kernel"].shape == (4096, 32128)
  # A bare config.json has what transformers fills in.
  assert llava.config_from_hf({"model_type": "llava"}).vision == config.vision


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(model_type="llava_next"), "model_type='llava_next'"),
    (dict(vision_feature_layer=[-2, -5]), r"vision_feature_layer=\[-2, -5\].*int"),
    (dict(vision_feature_layer=-5), "vision_feature_layer=-5.*4 hidden states"),
    (dict(vision_feature_select_strategy="full"), "vision_feature_select_strategy='full'"),
    (dict(projector_hidden_act="relu"), "projector_hidden_act='relu'"),
    (dict(multimodal_projector_bias=False), "multimodal_projector_bias=False"),
    (dict(image_token_index=64), "image_token_index=64.*vocab_size=64"),
    (dict(text_config=TEXT | dict(model_type="mistral")), "text_config.model_type='mistral'"),
    (dict(text_config=TEXT | dict(mlp_bias=True)), "text_config.mlp_bias=True"),
    (dict(vision_config=VISION | dict(model_type="siglip_vision_model")), "vision_config.model"),
    (dict(vision_config=7), "vision_config=7: expected an object"),
  ],
)
def test_configurations_that_are_not_run_are_refused_by_field(change, message):
  hf = dict(model_type="llava", vision_config=VISION, text_config=TEXT, image_token_index=IMAGE)
  assert llava.config_from_hf(hf).decoder.kv_heads == 2
  with pytest.raises(WeightsError, match=message):
    llava.config_from_hf(hf | change)


def test_models_that_llava_does_not_have_are_not_written():
  with pytest.raises(WeightsError, match=r"connector.kind='linear'"):
    llava.table(ModelConfig.gpt4roi_7b())
  with pytest.raises(WeightsError, match=r"connector.kind='linear'"):
    llava.config_to_hf(ModelConfig.chatspot_7b(), image_token=32001)

"""GPT4RoI through its table: the 368 names, the published sizes, the golden figures, and back."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from region_module import draw, figures, inputs, relative

from regionjax.config import ConnectorConfig, DecoderConfig, ModelConfig, RegionConfig, VisionConfig
from regionjax.models.params import param_shapes
from regionjax.models.region_encoders import make_region_encoder
from regionjax.weights.families import gpt4roi
from regionjax.weights.leaves import from_arrays, read_all
from regionjax.weights.release import flatten, unflatten
from regionjax.weights.tensors import Tensor, WeightsError

MODULE = "model.spi_module."


class Unread(Tensor):
  def array(self):
    raise AssertionError(f"{self.name} was read")


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of a checkpoint; the published ones."""

  width: int = 4096
  mlp: int = 11008
  layers: int = 32
  heads: int = 32
  vocab: int = 32006
  vision: int = 1024
  maps: int = 1024
  token: int = 1024
  position: int = 256

  @property
  def hf(self) -> dict:
    return dict(
      model_type="llava", hidden_size=self.width, intermediate_size=self.mlp,
      num_hidden_layers=self.layers, num_attention_heads=self.heads, vocab_size=self.vocab,
      rms_norm_eps=1e-6, hidden_act="silu", max_position_embeddings=2048, mm_use_im_start_end=True,
      mm_hidden_size=self.vision, mm_vision_select_layer=-2, use_mm_proj=True, pad_token_id=0,
    )  # fmt: skip


PUBLISHED = Sizes()
SMALL = Sizes(16, 24, 32, 2, 70, vision=8, maps=64, token=20, position=12)


def published(s: Sizes) -> dict[str, tuple[int, ...]]:
  """The names and shapes of the published delta at any size."""
  shapes = {"model.embed_tokens.weight": (s.vocab, s.width), "model.norm.weight": (s.width,)}
  shapes["lm_head.weight"] = (s.vocab, s.width)
  for i in range(s.layers):
    at = f"model.layers.{i}."
    shapes |= {f"{at}self_attn.{n}_proj.weight": (s.width, s.width) for n in "qkvo"}
    shapes |= {f"{at}mlp.{n}_proj.weight": (s.mlp, s.width) for n in ("gate", "up")}
    shapes[f"{at}mlp.down_proj.weight"] = (s.width, s.mlp)
    norms = ("input_layernorm", "post_attention_layernorm")
    shapes |= {f"{at}{n}.weight": (s.width,) for n in norms}
    shapes[f"{at}self_attn.rotary_emb.inv_freq"] = (s.width // s.heads // 2,)

  def affine(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

  shapes |= affine("model.mm_projector", s.width, s.vision)
  fuse, roi = f"{MODULE}mlvl_fuse.", f"{MODULE}roi_align."
  for l in range(4):
    shapes |= affine(f"{fuse}input_conv.{l}", s.maps, s.vision + 2, 1, 1)
    shapes |= affine(f"{roi}pconvs.{l}", s.maps, s.maps, 3, 3)
  for r in range(5):
    shapes[f"{fuse}fuse_convs.{r}.conv.weight"] = (s.maps, s.maps, 3, 3)
    shapes |= affine(f"{fuse}fuse_convs.{r}.gn", s.maps)
  shapes |= affine(f"{roi}pos_embedd.0", s.position, 4) | affine(f"{roi}pos_embedd.2", s.position)
  shapes |= affine(f"{roi}pos_embedd.3", s.token, s.position) | affine(
    f"{roi}pos_embedd.5", s.token
  )
  shapes |= affine(f"{roi}flatten_linear", s.token, s.maps * 14 * 14)
  return shapes | affine(f"{roi}updims", s.width, s.token)


def vision_of(s: Sizes) -> VisionConfig:
  return VisionConfig.clip_vit_l14(width=s.vision, heads=2, mlp_width=8)


@functools.cache
def config_of(s: Sizes, vocab_multiple: int = 1) -> ModelConfig:
  return gpt4roi.config_from_hf(
    s.hf, vision=vision_of(s), tensors=unread(s), vocab_multiple=vocab_multiple
  )


def unread(s: Sizes) -> dict[str, Tensor]:
  return {name: Unread(name, shape, np.float16) for name, shape in published(s).items()}


def wanted(config: ModelConfig) -> dict:
  tree = flatten(param_shapes(config))
  return {p: leaf.shape for p, leaf in tree.items() if p.split("/")[0] in gpt4roi.PARTS}


def test_the_368_published_names_at_their_published_sizes():
  shapes = published(PUBLISHED)
  assert len(shapes) == 368 and sum("spi_module" in n for n in shapes) == 43
  model = {n: s for n, s in shapes.items() if "inv_freq" not in n}
  assert sum(math.prod(s) for s in model.values()) == 7_041_806_080
  config = gpt4roi.config_from_hf(PUBLISHED.hf, tensors=unread(PUBLISHED), vocab_multiple=128)
  reference = ModelConfig.gpt4roi_7b()
  assert (config.vision, config.region) == (reference.vision, reference.region)
  assert config.decoder == dataclasses.replace(reference.decoder, vocab_multiple=128)
  plan = gpt4roi.table(config).plan(unread(PUBLISHED), wanted(config))
  assert len(plan.ignored) == 32 and all("inv_freq" in name for name in plan.ignored)
  assert not plan.spare
  assert plan.leaves["decoder/embed/embedding"].shape == (32128, 4096)
  assert plan.leaves["regions/flatten/kernel"].shape == (200704, 1024)
  # and the way back is those names without the frequencies
  back = gpt4roi.table(config).back(plan.leaves)
  assert {name: leaf.shape for name, leaf in back.items()} == model


def test_13b_differs_in_width_alone():
  sizes = Sizes(5120, 13824, 40, 40)
  config = gpt4roi.config_from_hf(sizes.hf, tensors=unread(sizes))
  assert config.decoder == DecoderConfig.llama_13b()
  plan = gpt4roi.table(config).plan(unread(sizes), wanted(config))
  assert plan.leaves["regions/output/kernel"].shape == (1024, 5120)
  assert plan.leaves["connector/linear/kernel"].shape == (1024, 5120)


def test_there_and_back_is_bit_exact():
  rng = np.random.default_rng(0)
  stored = {
    name: rng.normal(size=shape).astype(np.float16) for name, shape in published(SMALL).items()
  }
  config = config_of(SMALL, vocab_multiple=32)
  assert config.decoder.padded_vocab == 96
  table = gpt4roi.table(config)
  plan = table.plan(from_arrays(stored), wanted(config))
  params = {path: read_all(leaf) for path, leaf in plan.leaves.items()}
  assert not params["decoder/embed/embedding"][70:].any()
  back = {name: read_all(leaf) for name, leaf in table.back(params).items()}
  assert back.keys() == {n for n in stored if "inv_freq" not in n} and len(back) == 336
  for name, array in back.items():
    assert array.dtype == np.float16
    np.testing.assert_array_equal(array, stored[name])
  hf = gpt4roi.config_to_hf(config)
  assert hf.items() >= {k: v for k, v in SMALL.hf.items() if k != "pad_token_id"}.items()
  again = gpt4roi.config_from_hf(
    hf, vision=vision_of(SMALL), tensors=unread(SMALL), vocab_multiple=32
  )
  assert again == config


def test_region_tokens_through_the_table_are_the_golden_ones():
  sizes = Sizes(layers=1, mlp=8, vision=128, maps=128)
  stored = {
    name: draw(name.removeprefix(MODULE), shape)
    if name.startswith(MODULE)
    else np.broadcast_to(np.float32(0), shape)
    for name, shape in published(sizes).items()
  }
  source = from_arrays(stored)
  vision = VisionConfig.clip_vit_l14(width=128)
  config = gpt4roi.config_from_hf(sizes.hf, vision=vision, tensors=source)
  config = dataclasses.replace(config, compute_dtype="float32")
  assert config.region == RegionConfig(width=128)
  plan = gpt4roi.table(config).plan(source, wanted(config))
  params = {p: read_all(leaf) for p, leaf in plan.leaves.items() if p.startswith("regions/")}

  data = figures()
  hidden, boxes, mask = inputs(data)
  zeros = jnp.zeros(mask.shape, jnp.int32)
  args = (boxes, zeros, zeros + 2, mask, jnp.zeros((*mask.shape, 256), jnp.float32))
  encoder = make_region_encoder(config)
  tokens = jax.jit(encoder.apply)({"params": unflatten(params)["regions"]}, hidden, *args)
  for i in range(2):
    assert relative(np.asarray(tokens)[i][np.asarray(mask)[i]], data[f"tokens_{i}"]) < 1e-4


def test_hidden_states_are_counted_from_the_selected_one():
  sizes = dataclasses.replace(SMALL, vision=16)
  vision = VisionConfig(width=16, layers=12, heads=2, mlp_width=16, image_size=56)
  config = gpt4roi.config_from_hf(sizes.hf, vision=vision)
  assert config.region.layers == (2, 5, 8, 11) and config.vision.blocks_used == 11
  with pytest.raises(WeightsError, match=r"hidden states -1, 2, 5, 8 of the CLIP given.*0 to 9"):
    gpt4roi.config_from_hf(sizes.hf, vision=dataclasses.replace(vision, layers=9))


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(model_type="llava_llama"), "model_type='llava_llama'"),
    (dict(mm_hidden_size=768), "mm_hidden_size=768.*1024 wide"),
    (dict(use_mm_proj=False), "use_mm_proj=False"),
    (dict(mm_vision_select_layer="-2"), "mm_vision_select_layer='-2'"),
    (dict(hidden_act="gelu_new"), "hidden_act='gelu_new'"),
  ],
)
def test_configurations_that_are_not_run_are_refused_by_field(change, message):
  with pytest.raises(WeightsError, match=message):
    gpt4roi.config_from_hf(PUBLISHED.hf | change)


def test_a_checkpoint_of_something_else_is_named():
  tensors = {n: t for n, t in unread(SMALL).items() if "spi_module" not in n}
  with pytest.raises(WeightsError, match=r"no GPT4RoI checkpoint.*flatten_linear.*input_conv"):
    gpt4roi.config_from_hf(SMALL.hf, vision=vision_of(SMALL), tensors=tensors)
  tensors = unread(SMALL)
  name = f"{MODULE}roi_align.flatten_linear.weight"
  tensors[name] = Unread(name, (20, 64 * 13), np.float16)
  with pytest.raises(WeightsError, match=r"flatten_linear.weight \[20, 832\]"):
    gpt4roi.config_from_hf(SMALL.hf, vision=vision_of(SMALL), tensors=tensors)


def test_a_reduced_checkpoint_is_listed_completely():
  tensors = unread(SMALL)
  gone = [n for n in tensors if (".layers.5." in n and "inv_freq" not in n) or "pconvs.2" in n]
  for name in gone:
    del tensors[name]
  tensors["model.vision_tower.x"] = Unread("model.vision_tower.x", (1,), np.float16)
  config = config_of(SMALL)
  with pytest.raises(WeightsError) as error:
    gpt4roi.table(config).plan(tensors, wanted(config))
  assert f"{len(gone)} missing:" in str(error.value) and "1 unexpected:" in str(error.value)
  assert all(f"    {name} [" in str(error.value) for name in gone)


def test_models_that_gpt4roi_does_not_have_are_not_written():
  mlp = dataclasses.replace(ModelConfig.gpt4roi_7b(), connector=ConnectorConfig("mlp"))
  for config in (mlp, ModelConfig.chatspot_7b()):
    with pytest.raises(WeightsError, match=r"GPT4RoI has a linear connector"):
      gpt4roi.table(config)
    with pytest.raises(WeightsError, match=r"GPT4RoI has a linear connector"):
      gpt4roi.config_to_hf(config)

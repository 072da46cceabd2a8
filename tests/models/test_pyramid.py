"""GPT4RoI's region module: the original's own figures, sizes from the config, invariances."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from region_module import draw, figures, inputs, relative

from regionjax.config import DecoderConfig, ModelConfig, RegionConfig, VisionConfig
from regionjax.mesh import AXES
from regionjax.models import pyramid_maps
from regionjax.models.pyramid import PyramidEncoder
from regionjax.models.region_encoders import make_region_encoder
from regionjax.ops import conv as conv_ops

CONFIG = RegionConfig(width=128)


def linear(key: str, fan_in: int, fan_out: int) -> dict:
  return {
    "kernel": draw(f"{key}.weight", (fan_out, fan_in)).T,
    "bias": draw(f"{key}.bias", (fan_out,)),
  }


def conv(key: str, fan_in: int, fan_out: int, size: int, bias: bool = True) -> dict:
  kernel = draw(f"{key}.weight", (fan_out, fan_in, size, size)).transpose(2, 3, 1, 0)
  return {"kernel": kernel} | ({"bias": draw(f"{key}.bias", (fan_out,))} if bias else {})


def norm(key: str, width: int) -> dict:
  return {"scale": draw(f"{key}.weight", (width,)), "bias": draw(f"{key}.bias", (width,))}


def golden_params(c: RegionConfig, channels: int, out_width: int) -> dict:
  """The original's state dict, name by name, as our tree."""
  params = {}
  for l in range(len(c.layers)):
    params[f"input_conv_{l}"] = conv(f"mlvl_fuse.input_conv.{l}", channels + 2, c.width, 1)
    params[f"crop_conv_{l}"] = conv(f"roi_align.pconvs.{l}", c.width, c.width, 3)
  for r in range(c.rounds):
    key = f"mlvl_fuse.fuse_convs.{r}"
    params[f"round_{r}"] = {
      "conv": conv(f"{key}.conv", c.width, c.width, 3, bias=False),
      "norm": norm(f"{key}.gn", c.width),
    }
  key = "roi_align.pos_embedd"
  params["position_0"] = linear(f"{key}.0", 4, c.position_width)
  params["position_norm_0"] = norm(f"{key}.2", c.position_width)
  params["position_1"] = linear(f"{key}.3", c.position_width, c.token_width)
  params["position_norm_1"] = norm(f"{key}.5", c.token_width)
  params["output"] = linear("roi_align.updims", c.token_width, out_width)
  size = c.output_size
  flat = linear("roi_align.flatten_linear", c.width * size * size, c.token_width)
  kernel = flat["kernel"].reshape(c.width, size, size, c.token_width)  # PyTorch flattens C, H, W
  flat["kernel"] = kernel.transpose(1, 2, 0, 3).reshape(-1, c.token_width)
  params["flatten"] = flat
  return {"params": params}


@pytest.fixture(scope="module")
def golden():
  data = figures()
  encoder = PyramidEncoder(config=CONFIG, in_width=128, out_width=4096, grid=(16, 16))
  variables = golden_params(CONFIG, channels=128, out_width=4096)
  return data, encoder, variables, *inputs(data)


def region_args(boxes, mask, image=None):
  zeros = jnp.zeros(mask.shape, jnp.int32)
  cover = jnp.zeros(mask.shape + (256,), jnp.float32)
  return boxes, zeros if image is None else image, zeros + 2, mask, cover


@pytest.fixture(scope="module", params=["direct", pytest.param("winograd", marks=pytest.mark.slow)])
def run(golden, request):
  """Everything that the golden figures speak of, from one program.

  Its width of 128 is too small for Winograd's convolution, which the published width gets on a CPU.
  """
  _, encoder, variables, hidden, boxes, mask = golden

  @jax.jit
  def everything(variables, hidden):
    def loss(hidden):
      maps = encoder.apply(variables, hidden, method="maps")
      tokens = encoder.apply(variables, maps, *region_args(boxes, mask), method="read")
      squares = jnp.where(mask[..., None], tokens**2, 0.0)
      loss = jnp.sum(jnp.sum(squares, (1, 2)) / (jnp.sum(mask, 1) * tokens.shape[-1]))
      return loss, (maps, tokens)

    grads, (maps, tokens) = jax.grad(loss, has_aux=True)(hidden)
    image = jnp.zeros(mask.shape, jnp.int32)
    crops = encoder.apply(variables, maps, boxes, image, mask, method="crop_tokens")
    return maps, crops, tokens, grads

  if request.param == "direct":
    return everything(variables, hidden)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(conv_ops, "WINOGRAD_WIDTH", 128)
    traced = everything.trace(variables, hidden)
    assert "6,6,128,128" in str(traced.jaxpr)  # a kernel's transform for tiles of 4x4
    return traced.lower().compile()(variables, hidden)


def test_parameter_names_and_shapes_are_the_original_ones(golden):
  _, encoder, variables, hidden, boxes, mask = golden
  abstract = jax.eval_shape(encoder.init, jax.random.key(0), hidden, *region_args(boxes, mask))
  assert jax.tree.map(np.shape, abstract) == jax.tree.map(np.shape, variables)


def test_fused_maps(golden, run):
  data, maps = golden[0], run[0]
  assert [m.shape for m in maps] == [(2, 1, s, s, 128) for s in (128, 64, 32, 16)]
  for l, level in enumerate(maps):
    corner = np.asarray(level)[:, 0, :6, :6, :8].transpose(0, 3, 1, 2)
    assert relative(corner, data[f"fused_{l}_corner"]) < 1e-4
    mean_abs = np.abs(np.asarray(level)).mean((1, 2, 3))
    assert relative(mean_abs, data[f"fused_{l}_mean_abs"]) < 1e-4


def test_tokens(golden, run):
  data, mask = golden[0], np.asarray(golden[-1])
  crops, tokens = np.asarray(run[1]), np.asarray(run[2])
  assert relative(crops[mask], data["after_flatten_linear"]) < 1e-4
  assert np.all(tokens[~mask] == 0)  # the padding rows hold NaN boxes
  for i in range(2):
    assert relative(tokens[i][mask[i]], data[f"tokens_{i}"]) < 1e-4


def test_gradients(golden, run):
  for l, g in enumerate(run[3]):
    expected = float(golden[0][f"grad_features_{l}_norm"])
    assert abs(float(jnp.linalg.norm(g)) - expected) < 1e-4 * expected


def test_two_images_in_one_row_give_the_same_tokens(golden, run):
  data, encoder, variables, _, boxes, mask = golden
  maps = [m.reshape(1, 2, *m.shape[2:]) for m in run[0]]
  order = np.array([4, 0, 5, 1, 6, 2, 7, 3])  # interleave the two images' boxes
  args = region_args(
    boxes.reshape(1, 8, 4)[:, order],
    mask.reshape(1, 8)[:, order],
    jnp.asarray(order // 4, jnp.int32)[None],
  )
  read = jax.jit(lambda v, maps, args: encoder.apply(v, maps, *args, method="read"))
  tokens = np.asarray(read(variables, maps, args))[0][np.argsort(order)].reshape(2, 4, -1)
  for i in range(2):
    assert relative(tokens[i][np.asarray(mask)[i]], data[f"tokens_{i}"]) < 1e-4


def abstract_params(config: ModelConfig) -> dict:
  encoder = make_region_encoder(config)
  s = jax.ShapeDtypeStruct
  hidden = [
    s((1, 1, config.vision.tokens, config.vision.width), jnp.float32) for _ in config.region.layers
  ]
  ints, mask = s((1, 2), jnp.int32), s((1, 2), jnp.bool_)
  boxes, cover = s((1, 2, 4), jnp.float32), s((1, 2, config.vision.tokens), jnp.float32)
  args = (boxes, ints, ints, mask, cover)
  return jax.eval_shape(encoder.init, jax.random.key(0), hidden, *args)["params"]


def count(params) -> int:
  return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def test_published_parameter_counts():
  seven = abstract_params(ModelConfig.gpt4roi_7b())
  assert count(seven) == 299_142_912
  # 13B, which the original code could not build, differs in the output layer's width alone.
  assert count(abstract_params(ModelConfig.gpt4roi_13b())) - count(seven) == 1024 * 1025
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(seven))


SMALL = ModelConfig(
  name="small",
  vision=VisionConfig(image_size=(32, 48), patch_size=8, width=24, layers=3, heads=2),
  region=RegionConfig(
    layers=(1, 3), width=16, output_size=3, sampling_ratio=1, upsample=(2, 1), rounds=2,
    groups=4, position_width=8, token_width=20,
  ),
  decoder=DecoderConfig.tiny(width=36),
  compute_dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def small():
  rng = np.random.default_rng(0)
  h, w = SMALL.vision.grid
  hidden = [
    jnp.asarray(rng.standard_normal((2, 2, h * w, SMALL.vision.width), dtype=np.float32))
    for _ in SMALL.region.layers
  ]
  corners = np.sort(rng.uniform(0, 1, (2, 5, 2, 2)), axis=2).reshape(2, 5, 4)
  mask = jnp.arange(5)[None, :] < jnp.array([[5], [3]])
  image = jnp.asarray(rng.integers(0, 2, (2, 5)), jnp.int32)
  cover = jnp.zeros((2, 5, h * w), jnp.float32)
  encoder = make_region_encoder(SMALL)
  args = (jnp.asarray(corners, jnp.float32), image, jnp.where(mask, 2, 0), mask, cover)
  variables = jax.jit(encoder.init)(jax.random.key(0), hidden, *args)
  return encoder, variables, hidden, args


def loss(encoder, variables, hidden, args):
  tokens = encoder.apply(variables, hidden, *args)
  return jnp.sum(tokens.astype(jnp.float32) ** 2), tokens


@pytest.fixture(scope="module")
def small_run(small):
  encoder, variables, hidden, args = small
  run = jax.jit(jax.grad(lambda v: loss(encoder, v, hidden, args), has_aux=True))
  return run(variables)


def test_every_size_is_configuration(small, small_run):
  """A grid that is not square, two levels, no width of the original."""
  encoder, variables, hidden, _ = small
  tokens = np.asarray(small_run[1])
  assert tokens.shape == (2, 5, 36)
  assert np.all(tokens[1, 3:] == 0) and np.all(tokens[0].any(-1))
  maps_of = jax.jit(lambda hidden: encoder.apply(variables, hidden, method="maps"))
  maps = maps_of(hidden)
  assert [m.shape for m in maps] == [(2, 2, 4 * m, 6 * m, 16) for m in (2, 1)]
  # One batch of images or one image at a time: images and rows don't see each other.
  for a, b in zip(maps_of([x[1:, 1:] for x in hidden]), maps):
    assert relative(a, np.asarray(b)[1:, 1:]) < 1e-5


def test_recomputing_the_rounds_changes_no_gradient(small, small_run):
  encoder, variables, hidden, args = small

  def gradient(encoder):
    return jax.jit(jax.grad(lambda v: loss(encoder, v, hidden, args)[0]))

  recomputing = gradient(encoder.clone(remat="full"))
  for a, b in zip(jax.tree.leaves(recomputing(variables)), jax.tree.leaves(small_run[0])):
    np.testing.assert_allclose(a, b, atol=1e-5 * float(np.abs(b).max()))

  def convolutions(f):
    return str(jax.make_jaxpr(f)(variables)).count("conv_general_dilated[")

  # Each of 2 rounds convolves 2 levels once more.
  assert convolutions(recomputing) == convolutions(gradient(encoder)) + 2 * 2


@pytest.fixture
def skipping(monkeypatch, small):
  """The module that leaves images without regions out, and what it and the plain one compute."""
  encoder, variables, hidden, args = small
  mask = args[3] & (args[1] != jnp.array([[0], [1]]))  # no region in the first row's image 0, ...
  used = jnp.any((args[1][..., None] == jnp.arange(2)[None, None]) & mask[..., None], axis=1)
  args = (*args[:3], mask, args[4])
  # What is left out isn't read at all: NaN there would show.
  hole = jnp.where(used[:, :, None, None], 0.0, jnp.nan)
  broken = [x + hole for x in hidden]

  def run(encoder, hidden, used):
    def loss(variables, hidden):
      maps = encoder.apply(variables, hidden, used, method="maps")
      tokens = encoder.apply(variables, maps, *args, method="read")
      return jnp.sum(tokens**2), (maps, tokens)

    (_, aux), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables, hidden)
    return *aux, *grads

  plain = jax.jit(lambda hidden: run(encoder, hidden, None))(hidden)
  monkeypatch.setattr(pyramid_maps, "WORTH_SKIPPING", 0.0)
  only_used = jax.jit(lambda hidden: run(encoder.clone(remat="full"), hidden, used))(broken)
  return np.asarray(used), plain, only_used


def test_images_without_regions_are_left_out(skipping):
  used, (maps, tokens, grads, hidden_grads), (ours, our_tokens, our_grads, our_hidden) = skipping
  assert used.tolist() == [[False, True], [True, False]]
  for a, b in zip(ours, maps):
    assert np.all(np.asarray(a)[~used] == 0)
    assert relative(np.asarray(a)[used], np.asarray(b)[used]) < 1e-5
  assert relative(our_tokens, np.asarray(tokens)) < 1e-5
  for a, b in zip(jax.tree.leaves(our_grads), jax.tree.leaves(grads)):
    assert relative(a, np.asarray(b)) < 1e-5
  for a, b in zip(our_hidden, hidden_grads):
    assert np.all(np.asarray(a)[~used] == 0) and relative(a, np.asarray(b)) < 1e-5


def test_which_maps_are_worth_leaving_out():
  published, tiny = ModelConfig.gpt4roi_7b(), ModelConfig.tiny("pyramid")

  def pays(config, **change):
    c = config.region
    sizes = pyramid_maps.Sizes(config.vision.grid, c.upsample, c.groups, jnp.float32, "full")
    return pyramid_maps.skipping_pays(c.width, c.rounds, sizes._replace(**change), 2)

  def on_mesh(*shape):
    mesh = AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)
    with jax.sharding.use_abstract_mesh(mesh):
      return pays(published)

  assert pays(published) and not pays(tiny) and not pays(published, remat="none")
  assert on_mesh(1, 2, 1) and on_mesh(1, 1, 8)
  assert not on_mesh(1, 4, 1)  # two rows
  assert not on_mesh(1, 2, 2)  # devices of both rows would wait for each other


def test_bfloat16_stays_close(small, small_run):
  encoder, variables, hidden, args = small
  half = jax.jit(encoder.clone(dtype=jnp.bfloat16).apply)(variables, hidden, *args)
  assert half.dtype == jnp.bfloat16
  assert relative(half.astype(jnp.float32), np.asarray(small_run[1])) < 5e-2


@pytest.mark.parametrize(
  "change, message",
  [(dict(layers=(1, 2, 3)), "region.upsample"), (dict(width=18), "region.groups=4")],
)
def test_bad_sizes(change, message):
  region = dataclasses.replace(SMALL.region, **change)
  with pytest.raises(ValueError, match=message):
    abstract_params(dataclasses.replace(SMALL, region=region))


def test_one_patch_is_too_few_for_coordinates():
  vision = dataclasses.replace(SMALL.vision, image_size=(8, 48))
  with pytest.raises(ValueError, match="a grid of 1x6 patches"):
    abstract_params(dataclasses.replace(SMALL, vision=vision))

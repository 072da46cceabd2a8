"""GPT4RoI's region module: the published module's own figures, sizes from the config, invariances.

`tests/data/region_module_128.npz` holds what the original module computes in float32 with maps of
128 channels (2 per GroupNorm group) for two images of 3 and 4 boxes, one of them empty and one
leaving its image. Its parameters are not stored: they are drawn from their names.
"""

import dataclasses
import math
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regionjax.config import ModelConfig, RegionConfig, VisionConfig
from regionjax.models.pyramid import PyramidEncoder
from regionjax.models.region_encoders import make_region_encoder

GOLDEN = Path(__file__).parents[1] / "data" / "region_module_128.npz"
CONFIG = RegionConfig(width=128)


def draw(key: str, shape: tuple[int, ...]) -> np.ndarray:
  """The golden figures' parameter of this name, in PyTorch's layout."""
  rng = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
  x = rng.standard_normal(shape, dtype=np.float32)
  if key.endswith("bias"):
    return x * np.float32(0.02)
  if len(shape) == 1:
    return 1 + np.float32(0.1) * x
  return (x / math.sqrt(math.prod(shape[1:]))).astype(np.float32)


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


def relative(a, b) -> float:
  return float(np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(b)))


@pytest.fixture(scope="module")
def golden():
  with np.load(GOLDEN) as z:
    data = dict(z)
  encoder = PyramidEncoder(config=CONFIG, out_width=4096, grid=(16, 16))
  variables = golden_params(CONFIG, channels=128, out_width=4096)
  # Two rows of one image each.
  hidden = [jnp.asarray(data[f"features_{l}"])[:, None] for l in range(4)]
  boxes = jnp.asarray(data["boxes"])
  mask = jnp.all(jnp.isfinite(boxes), axis=-1)
  return data, encoder, variables, hidden, boxes, mask


def region_args(boxes, mask, image=None):
  zeros = jnp.zeros(mask.shape, jnp.int32)
  cover = jnp.zeros(mask.shape + (256,), jnp.float32)
  return boxes, zeros if image is None else image, zeros + 2, mask, cover


@pytest.fixture(scope="module")
def golden_maps(golden):
  _, encoder, variables, hidden, _, _ = golden
  return jax.jit(lambda h: encoder.apply(variables, h, method="maps"))(hidden)


def test_parameter_names_and_shapes_are_the_original_ones(golden):
  _, encoder, variables, hidden, boxes, mask = golden
  abstract = jax.eval_shape(encoder.init, jax.random.key(0), hidden, *region_args(boxes, mask))
  assert jax.tree.map(np.shape, abstract) == jax.tree.map(np.shape, variables)


def test_fused_maps(golden, golden_maps):
  data = golden[0]
  assert [m.shape for m in golden_maps] == [(2, 1, s, s, 128) for s in (128, 64, 32, 16)]
  for l, level in enumerate(golden_maps):
    corner = np.asarray(level)[:, 0, :6, :6, :8].transpose(0, 3, 1, 2)
    assert relative(corner, data[f"fused_{l}_corner"]) < 1e-4
    mean_abs = np.abs(np.asarray(level)).mean((1, 2, 3))
    assert relative(mean_abs, data[f"fused_{l}_mean_abs"]) < 1e-4


def test_tokens(golden, golden_maps):
  data, encoder, variables, _, boxes, mask = golden
  crops = encoder.apply(
    variables, golden_maps, boxes, jnp.zeros(mask.shape, jnp.int32), mask, method="crop_tokens"
  )
  assert relative(crops[mask], data["after_flatten_linear"]) < 1e-4
  tokens = encoder.apply(variables, golden_maps, *region_args(boxes, mask), method="read")
  assert np.all(np.asarray(tokens)[~np.asarray(mask)] == 0)  # the padding rows hold NaN boxes
  for i in range(2):
    assert relative(tokens[i][mask[i]], data[f"tokens_{i}"]) < 1e-4


def test_two_images_in_one_row_give_the_same_tokens(golden, golden_maps):
  data, encoder, variables, _, boxes, mask = golden
  maps = [m.reshape(1, 2, *m.shape[2:]) for m in golden_maps]
  order = jnp.array([4, 0, 5, 1, 6, 2, 7, 3])  # interleave the two images' boxes
  boxes_18 = boxes.reshape(1, 8, 4)[:, order]
  mask_18 = mask.reshape(1, 8)[:, order]
  image_18 = (order // 4)[None].astype(jnp.int32)
  tokens = encoder.apply(
    variables, maps, *region_args(boxes_18, mask_18, image_18), method="read"
  )
  tokens = np.asarray(tokens)[0][np.argsort(order)].reshape(2, 4, -1)
  for i in range(2):
    assert relative(tokens[i][np.asarray(mask)[i]], data[f"tokens_{i}"]) < 1e-4


def test_gradients(golden):
  data, encoder, variables, hidden, boxes, mask = golden

  @jax.jit
  def grads(hidden):
    def loss(hidden):
      tokens = encoder.apply(variables, hidden, *region_args(boxes, mask))
      squares = jnp.where(mask[..., None], tokens**2, 0.0)
      return jnp.sum(jnp.sum(squares, (1, 2)) / (jnp.sum(mask, 1) * tokens.shape[-1]))

    return jax.grad(loss)(hidden)

  for l, g in enumerate(grads(hidden)):
    expected = float(data[f"grad_features_{l}_norm"])
    assert abs(float(jnp.linalg.norm(g)) - expected) < 1e-4 * expected

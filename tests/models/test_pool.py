"""The pool encoder: what it reads, for points, boxes and masks; padding; the factory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regionjax.config import REGION_KINDS, ModelConfig, VisionConfig
from regionjax.models.pool import PoolEncoder, bin_boxes, cover_mean
from regionjax.models.pyramid import PyramidEncoder
from regionjax.models.region_encoders import make_region_encoder

TINY = ModelConfig.tiny("pool")
CONFIG = dataclasses.replace(
  TINY,
  vision=VisionConfig.tiny(image_size=(64, 96), patch_size=16, stem=(), width=32, layers=4),
  region=dataclasses.replace(TINY.region, layers=(1, 4), output_size=2, point_window=0.0),
)
GRID = (4, 6)


def relative(a, b) -> float:
  return float(np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(b)))


@pytest.fixture(scope="module")
def case():
  rng = np.random.default_rng(0)
  hidden = [
    jnp.asarray(rng.standard_normal((2, 2, 24, 32), dtype=np.float32)) for _ in CONFIG.region.layers
  ]
  boxes = np.sort(rng.uniform(0, 1, (2, 6, 2, 2)), axis=2).reshape(2, 6, 4).astype(np.float32)
  boxes[:, 0, 2:] = boxes[:, 0, :2]  # a point
  kinds = np.tile(np.array([1, 2, 3, 2, 3, 0], np.int32), (2, 1))
  cover = rng.uniform(0, 1, (2, 6, 24)).astype(np.float32)
  image = rng.integers(0, 2, (2, 6)).astype(np.int32)
  args = tuple(jnp.asarray(x) for x in (boxes, image, kinds, kinds > 0, cover))
  encoder = make_region_encoder(CONFIG)
  variables = jax.jit(encoder.init)(jax.random.key(0), hidden, *args)
  return jax.jit(encoder.apply, static_argnames="method"), variables, hidden, args


def with_arg(args, index, value):
  return (*args[:index], jnp.asarray(value), *args[index + 1 :])


def test_shape_padding_and_two_phases(case):
  apply, variables, hidden, args = case
  out = apply(variables, hidden, *args)
  assert out.shape == (2, 6, CONFIG.decoder.width) and out.dtype == jnp.float32
  assert np.all(np.asarray(out)[:, 5] == 0) and np.all(np.asarray(out)[:, :5].any(-1))
  maps = apply(variables, hidden, method="maps")
  assert jnp.array_equal(apply(variables, maps, *args, method="read"), out)


def test_what_stands_in_padding_changes_nothing(case):
  apply, variables, hidden, args = case

  def loss(hidden, args):
    return jnp.sum(apply(variables, hidden, *args) ** 2)

  junk = with_arg(args, 0, args[0].at[:, 5].set(jnp.nan))
  junk = with_arg(junk, 4, junk[4].at[:, 5].set(jnp.nan))
  junk = with_arg(junk, 1, junk[1].at[:, 5].set(7))
  run = jax.jit(jax.value_and_grad(loss))
  (loss_a, grads_a), (loss_b, grads_b) = run(hidden, junk), run(hidden, args)
  assert loss_a == loss_b
  for a, b in zip(grads_a, grads_b):
    assert np.all(np.isfinite(np.asarray(a))) and jnp.array_equal(a, b)


@pytest.mark.parametrize("index, name", [(0, "box"), (1, "image"), (2, "kind"), (4, "cover")])
def test_every_input_is_read(case, index, name):
  apply, variables, hidden, args = case
  changed = {
    "box": args[0].at[:, :, 2:].add(0.1),
    "image": 1 - args[1],
    "kind": args[2] % 3 + 1,
    "cover": args[4][:, :, ::-1],
  }[name]
  out = np.asarray(apply(variables, hidden, *args))[:, :5]
  other = np.asarray(apply(variables, hidden, *with_arg(args, index, changed)))[:, :5]
  assert np.all(np.abs(out - other).max(-1) > 1e-4)


def test_all_hidden_layers_are_read(case):
  apply, variables, hidden, args = case
  out = np.asarray(apply(variables, hidden, *args))
  for l in range(len(hidden)):
    changed = list(hidden)
    changed[l] = changed[l][..., ::-1]
    assert relative(apply(variables, changed, *args), out) > 1e-2


def test_order_of_regions_and_of_images_is_free(case):
  apply, variables, hidden, args = case
  out = np.asarray(apply(variables, hidden, *args))
  order = np.array([3, 0, 5, 2, 4, 1])
  permuted = apply(variables, hidden, *(a[:, order] for a in args))
  assert relative(permuted, out[:, order]) < 1e-5
  swapped = apply(variables, [x[:, ::-1] for x in hidden], *with_arg(args, 1, 1 - args[1]))
  assert relative(swapped, out) < 1e-5


def test_a_point_reads_its_patch(case):
  """A point on a patch's centre depends on that patch and on no other."""
  apply, variables, hidden, _ = case
  row, column = 2, 4
  x, y = (column + 0.5) / GRID[1], (row + 0.5) / GRID[0]
  cover = np.zeros((2, 1, 24), np.float32)
  cover[:, :, row * GRID[1] + column] = 1.0
  ones = jnp.ones((2, 1), jnp.int32)
  boxes = jnp.tile(jnp.array([x, y, x, y], jnp.float32), (2, 1, 1))
  args = (boxes, 0 * ones, ones, ones > 0, jnp.asarray(cover))
  grads = jax.jit(jax.grad(lambda h: jnp.sum(apply(variables, h, *args) ** 2)))(hidden)
  touched = np.abs(np.asarray(grads[0])).max((0, 3)).reshape(2, *GRID)
  assert touched[0, row, column] > 1e-4
  touched[0, row, column] = 0
  assert touched.max() < 1e-6


def test_a_window_is_read_around_points_alone():
  rng = np.random.default_rng(0)
  boxes = np.sort(rng.uniform(0, 1, (1, 4, 2, 2)), axis=2).reshape(1, 4, 4).astype(np.float32)
  boxes[:, 1, 2:] = boxes[:, 1, :2]
  kinds = jnp.asarray([[2, 1, 3, 0]])
  out = np.asarray(bin_boxes(jnp.asarray(boxes), kinds, 0.25))
  np.testing.assert_array_equal(out[:, [0, 2, 3]], boxes[:, [0, 2, 3]])
  np.testing.assert_allclose(out[0, 1], boxes[0, 1] + [-0.125, -0.125, 0.125, 0.125], atol=1e-7)


def test_cover_mean():
  rng = np.random.default_rng(1)
  patches = rng.standard_normal((2, 3, 10, 4)).astype(np.float32)
  cover = rng.uniform(0, 1, (2, 5, 10)).astype(np.float32)
  cover[0, 0] = 0
  image = rng.integers(0, 3, (2, 5)).astype(np.int32)
  out = np.asarray(cover_mean(jnp.asarray(patches), jnp.asarray(cover), jnp.asarray(image)))
  for b in range(2):
    for r in range(5):
      weights = cover[b, r] / max(cover[b, r].sum(), 1e-9)
      np.testing.assert_allclose(out[b, r], weights @ patches[b, image[b, r]], atol=1e-6)


def test_factory():
  for kind in REGION_KINDS:
    config = dataclasses.replace(TINY, region=dataclasses.replace(TINY.region, kind=kind))
    encoder = make_region_encoder(config)
    expected = {"pool": PoolEncoder, "pyramid": PyramidEncoder}.get(kind.split("+")[0])
    assert encoder is None if expected is None else type(encoder) is expected

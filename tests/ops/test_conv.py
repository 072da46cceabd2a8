"""Convolutions against torch's, Winograd's against the direct one, enlarged maps against plain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from regionjax.ops import conv, winograd
from regionjax.ops.conv import Enlarged, conv2d, conv2d_enlarged, enlarged_flops
from regionjax.ops.resize import align_corners_matrix, interpolate, resize_align_corners


def relative(a, b) -> float:
  a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
  return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))


@pytest.mark.parametrize(("stride", "pad"), [(1, (1, 1, 1, 1)), (2, (0, 1, 0, 1))])
def test_conv_is_torchs_on_the_padded_image(stride, pad):
  rng = np.random.default_rng(0)
  x, kernel, bias = (rng.normal(size=s).astype(np.float32) for s in ((2, 8, 6, 3), (3, 3, 3, 5), 5))
  theirs = torch.nn.functional.conv2d(
    torch.nn.functional.pad(torch.tensor(x).permute(0, 3, 1, 2), pad),
    torch.tensor(kernel).permute(3, 2, 0, 1), torch.tensor(bias), stride=stride,
  ).permute(0, 2, 3, 1)  # fmt: skip
  ours = conv2d(jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(bias), stride=stride)
  np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
  bare = conv2d(jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel), stride=stride)
  assert bare.dtype == jnp.bfloat16 and bare.shape == ours.shape


def value_and_gradients(implementation, x, kernel, cotangent):
  run = lambda x, k: conv2d(x, k, implementation=implementation)  # noqa: E731
  y, transpose = jax.vjp(run, x, kernel)
  return y, *transpose(cotangent.astype(y.dtype))


def inputs(shape, features):
  rng = np.random.default_rng(1)
  shapes = (shape, (3, 3, shape[-1], features), (*shape[:3], features))
  return [jnp.asarray(rng.standard_normal(s, dtype=np.float32)) for s in shapes]


@pytest.mark.parametrize(
  ("shape", "features", "tiles"),
  [
    ((2, 9, 7, 16), 24, 512),  # all at once
    ((3, 13, 18, 8), 6, 12),  # 12 rows of 5 tiles, two at a time
    ((1, 30, 5, 4), 8, 6),  # 8 rows of 2 tiles in chunks of 3: one row of zeros behind
    ((1, 1, 2, 3), 5, 512),  # smaller than a tile
  ],
)
def test_winograd_is_the_direct_convolution(monkeypatch, shape, features, tiles):
  monkeypatch.setattr(winograd, "TILES", tiles)
  arrays = inputs(shape, features)
  # Traced here: the size of a chunk is read while tracing.
  ours = jax.jit(lambda *a: value_and_gradients("winograd", *a))(*arrays)
  theirs = jax.jit(lambda *a: value_and_gradients("direct", *a))(*arrays)
  for name, a, b in zip(("result", "x", "kernel"), ours, theirs):
    assert a.shape == b.shape and relative(a, b) < 1e-5, name


def test_winograd_computes_bfloat16_in_float32():
  x, kernel, cotangent = inputs((1, 10, 6, 32), 16)
  half = [a.astype(jnp.bfloat16) for a in (x, kernel)]
  run = jax.jit(value_and_gradients, static_argnums=0)
  exact = run("direct", *(a.astype(jnp.float32) for a in half), cotangent)
  ours = run("winograd", *half, cotangent)
  assert all(a.dtype == jnp.bfloat16 for a in ours)
  for a, b in zip(ours, exact):
    # The cotangent is rounded on its way in and each result on its way out, once.
    assert relative(a, b) < 2**-7


def test_winograd_is_for_wide_convolutions_on_a_cpu(monkeypatch):
  monkeypatch.setattr(conv, "WINOGRAD_WIDTH", 8)
  monkeypatch.setattr(conv, "WINOGRAD_TILES", 4)

  def convolutions(shape, platform, **options):
    x, kernel, cotangent = inputs(shape, shape[-1])

    def run(x, kernel, cotangent):
      y, transpose = jax.vjp(lambda x, k: conv2d(x, k, **options), x, kernel)
      return y, transpose(cotangent)

    lowered = jax.jit(run).trace(x, kernel, cotangent).lower(lowering_platforms=(platform,))
    return lowered.as_text().count("stablehlo.convolution")

  wide, narrow, small = (1, 8, 8, 8), (1, 8, 8, 6), (1, 4, 8, 8)
  assert convolutions(wide, "cpu") == 0
  assert convolutions(wide, "tpu") == convolutions(wide, "cuda") == 3
  assert convolutions(narrow, "cpu") == convolutions(small, "cpu") == 3
  assert convolutions(wide, "tpu", implementation="winograd") == 0
  assert convolutions(wide, "cpu", implementation="direct") == 3


def test_winograd_memory_does_not_grow_with_the_image():
  """What is compiled for GPT4RoI's largest map, and for four of them."""

  def temporary(images):
    s = jax.ShapeDtypeStruct
    args = s((images, 128, 128, 1024), jnp.float32), s((3, 3, 1024, 1024), jnp.float32)
    compiled = jax.jit(winograd.forward).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  one, four, image = temporary(1), temporary(4), 128 * 128 * 1024 * 4
  assert one < 8 * image  # 0.5 GB
  assert four - one < 3 * (2.5 * image)  # the padded input, and the next two rows of each tile


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(implementation="fft"), "expected None or one of 'direct', 'winograd'"),
    (dict(implementation="winograd", stride=2), "3x3 with stride 2"),
  ],
)
def test_refusals(options, message):
  x, kernel, _ = inputs((1, 4, 4, 2), 2)
  with pytest.raises(ValueError, match=message):
    conv2d(x, kernel, **options)


def test_enlarged_maps_are_convolved_as_if_they_were_large():
  rng = np.random.default_rng(2)
  x, y = (jnp.asarray(rng.standard_normal((2, 3, 4, c), dtype=np.float32)) for c in (5, 2))
  kernel = jnp.asarray(rng.standard_normal((3, 3, 7, 6), dtype=np.float32))
  size = (9, 11)

  def matrices(*between):
    sides = zip((3, 4), between, size)
    return [align_corners_matrix(m, t) @ align_corners_matrix(s, m) for s, m, t in sides]

  parts = [Enlarged(x, *matrices(*size)), Enlarged(y, *matrices(6, 5))]

  def small(x, y, kernel):
    return conv2d_enlarged([parts[0]._replace(x_bhwc=x), parts[1]._replace(x_bhwc=y)], kernel)

  def large(x, y, kernel):
    through = resize_align_corners(resize_align_corners(y, (6, 5)), size)
    return conv2d(jnp.concatenate([resize_align_corners(x, size), through], axis=-1), kernel)

  def all_of(run):
    out, transpose = jax.vjp(run, x, y, kernel)
    return out, *transpose(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

  for a, b in zip(jax.jit(lambda: all_of(small))(), jax.jit(lambda: all_of(large))()):
    assert a.shape == b.shape and relative(a, b) < 1e-5
  half = conv2d_enlarged([p._replace(x_bhwc=p.x_bhwc.astype(jnp.bfloat16)) for p in parts], kernel)
  assert half.dtype == jnp.bfloat16 and relative(half, small(x, y, kernel)) < 2e-2
  np.testing.assert_allclose(interpolate(*parts[0]), resize_align_corners(x, size), atol=1e-6)


def test_flops_of_enlarged_maps_are_the_compilers():
  x, kernel = jnp.ones((1, 4, 6, 32)), jnp.ones((3, 3, 32, 16))
  part = Enlarged(x, align_corners_matrix(4, 20), align_corners_matrix(6, 24))
  run = jax.jit(lambda x, k: conv2d_enlarged([part._replace(x_bhwc=x)], k))
  theirs = run.lower(x, kernel).cost_analysis()["flops"]
  assert sum(enlarged_flops([(4, 6, 32)], (20, 24), 16)) == pytest.approx(theirs, rel=0.01)

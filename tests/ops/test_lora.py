"""The low-rank update against numpy, on its own and inside the linear maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regionjax.ops.lora import LowRank, lora
from regionjax.ops.mlp import gated_mlp, linear

RNG = np.random.default_rng(0)


def draw(*shape, dtype=np.float32):
  return jnp.asarray(RNG.normal(size=shape), dtype)


def relative(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.max(np.abs(a - b)) / np.max(np.abs(b))


def update(d, e, rank=3, scale=0.5):
  return LowRank(draw(d, rank), draw(rank, e), scale)


def kernel_with(kernel, ab):
  return kernel + ab.a_dr @ ab.b_re * ab.scale


@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 4, 5)])
def test_is_the_product_in_any_layout_of_rows(shape):
  x, a, b = draw(*shape), draw(5, 3), draw(3, 6)
  got = lora(x, a, b, scale=0.25)
  assert got.shape == (*shape[:-1], 6)
  want = np.asarray(x, np.float64) @ np.asarray(a, np.float64) @ np.asarray(b, np.float64) / 4
  assert relative(got, want) < 1e-6


def test_computes_in_the_dtype_of_the_activations():
  x, a, b = draw(4, 5, dtype=jnp.bfloat16), draw(5, 3), draw(3, 6)
  got = lora(x, a, b, scale=2.0)
  assert got.dtype == jnp.bfloat16
  assert relative(got.astype(np.float32), lora(x.astype(np.float32), a, b, scale=2.0)) < 0.03


def test_a_zero_b_adds_nothing_and_gets_the_first_gradient():
  x, a, b = draw(4, 5), draw(5, 3), jnp.zeros((3, 6))
  assert not np.any(lora(x, a, b, scale=1.0))
  da, db = jax.grad(lambda a, b: lora(x, a, b, scale=1.0).sum(), argnums=(0, 1))(a, b)
  assert not np.any(da) and np.all(db != 0)


def test_a_linear_map_with_an_update_is_that_of_the_merged_kernel():
  x, kernel, bias, ab = draw(2, 4, 5), draw(5, 6), draw(6), update(5, 6)
  want = linear(x, kernel_with(kernel, ab), bias)
  assert relative(linear(x, kernel, bias, ab), want) < 1e-6
  assert relative(linear(x, kernel, bias), want) > 0.1


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)])
def test_each_map_of_the_gated_mlp_takes_its_own_update(which):
  x, kernels = draw(2, 4, 5), (draw(5, 7), draw(5, 7), draw(7, 5))
  every = (update(5, 7), update(5, 7), update(7, 5))
  updates = tuple(ab if i in which else None for i, ab in enumerate(every))
  merged = [k if ab is None else kernel_with(k, ab) for k, ab in zip(kernels, updates)]
  got = gated_mlp(x, *kernels, name="silu", updates=updates)
  assert relative(got, gated_mlp(x, *merged, name="silu")) < 1e-5

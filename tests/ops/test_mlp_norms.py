"""Linear maps, gated MLP and norms, against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from regionjax.ops import mlp, norms


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_linear_works_on_any_leading_axes_and_keeps_the_inputs_dtype():
  x, kernel, bias = draw(2, 3, 4), draw(4, 5, seed=1), draw(5, seed=2)
  np.testing.assert_allclose(mlp.linear(x, kernel, bias), x @ kernel + bias, atol=1e-5)
  np.testing.assert_allclose(mlp.linear(jnp.asarray(x[0]), kernel), x[0] @ kernel, atol=1e-5)
  assert mlp.linear(jnp.asarray(x, jnp.bfloat16), kernel, bias).dtype == jnp.bfloat16


def test_gated_mlp_is_the_definition():
  x, gate, up, down = draw(3, 4), draw(4, 6, seed=1), draw(4, 6, seed=2), draw(6, 4, seed=3)
  want = (np.maximum(x @ gate, 0) * (x @ up)) @ down
  np.testing.assert_allclose(mlp.gated_mlp(x, gate, up, down, name="relu"), want, atol=1e-4)


def test_an_unknown_activation_names_the_known_ones():
  with pytest.raises(ValueError, match=r"activation='swish'.*relu, gelu, quick_gelu, silu"):
    mlp.activation("swish")


def test_norm_statistics_are_float32():
  # In bf16 the mean square of 1000 + noise would lose the noise, and 300 ** 2 * 256 the sum.
  x = jnp.asarray(1000 + 8 * draw(2, 256), jnp.bfloat16)
  exact = np.asarray(x, np.float64)
  centred = exact - exact.mean(-1, keepdims=True)
  want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
  ours = norms.layer_norm(x, jnp.ones(256), jnp.zeros(256), eps=1e-5)
  assert ours.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(ours, np.float64), want, atol=0.02)
  want = exact / np.sqrt((exact**2).mean(-1, keepdims=True))
  ours = norms.rms_norm(x, jnp.ones(256), eps=1e-6)
  np.testing.assert_allclose(np.asarray(ours, np.float64), want, atol=0.01)


def test_group_norm_is_torchs():
  x, scale, bias = draw(2, 3, 4, 8), draw(8, seed=1), draw(8, seed=2)
  theirs = torch.nn.functional.group_norm(
    torch.tensor(x).permute(0, 3, 1, 2), 4, torch.tensor(scale), torch.tensor(bias), eps=1e-5
  ).permute(0, 2, 3, 1)
  ours = norms.group_norm(jnp.asarray(x), scale, bias, groups=4, eps=1e-5)
  np.testing.assert_allclose(ours, theirs, atol=1e-5)

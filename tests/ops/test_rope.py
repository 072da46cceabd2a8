"""Rotary positions: the half-split layout, and what makes them relative."""

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from regionjax.config import RopeScaling
from regionjax.ops.rope import apply_rope, frequencies, rope_table


def rotate_by_hand(x, position, base):
  """[H] float64; channel i turns with channel i + H/2."""
  h = len(x)
  out = np.empty(h)
  for i in range(h // 2):
    angle = position * base ** (-2 * i / h)
    a, b = x[i], x[i + h // 2]
    out[i] = a * np.cos(angle) - b * np.sin(angle)
    out[i + h // 2] = b * np.cos(angle) + a * np.sin(angle)
  return out


def test_is_the_half_split_rotation():
  x = np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float32)
  positions = np.asarray([[0, 1, 2, 3], [7, 0, 100, 2047]])
  ours = apply_rope(jnp.asarray(x), rope_table(jnp.asarray(positions), head_dim=6, base=500.0))
  for b in range(2):
    for n in range(3):
      for t in range(4):
        want = rotate_by_hand(x[b, n, t].astype(np.float64), positions[b, t], 500.0)
        # 2047 radians in f32 are known to 1e-4.
        np.testing.assert_allclose(
          ours[b, n, t], want, atol=1e-3 if positions[b, t] > 1000 else 1e-5
        )


def test_products_depend_on_the_distance_only():
  q, k = (
    jnp.asarray(np.random.default_rng(s).normal(size=(1, 1, 1, 8)), jnp.float32) for s in (0, 1)
  )

  def product(i, j):
    turned = [
      apply_rope(x, rope_table(jnp.asarray([[p]]), head_dim=8, base=1e4))
      for x, p in ((q, i), (k, j))
    ]
    return float(jnp.sum(turned[0] * turned[1]))

  assert abs(product(5, 3) - product(105, 103)) < 1e-4
  assert abs(product(5, 3) - product(5, 4)) > 1e-3


def test_angles_are_float32_and_the_result_keeps_its_dtype():
  table = rope_table(jnp.asarray([[1023]]), head_dim=4, base=1e4)
  assert all(a.dtype == jnp.float32 for a in table)
  x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
  turned = apply_rope(x, table)
  assert turned.dtype == jnp.bfloat16
  want = rotate_by_hand(np.ones(4), 1023, 1e4)
  np.testing.assert_allclose(turned[0, 0, 0].astype(jnp.float32), want, atol=0.01)


SCALINGS = {
  "linear": RopeScaling("linear", factor=4.0),
  "llama 3.1": RopeScaling("llama3", factor=8.0, original_max_length=8192),
  "llama 3.2": RopeScaling("llama3", factor=32.0, original_max_length=8192),
  "steep": RopeScaling(
    "llama3", factor=3.0, low_freq_factor=2.0, high_freq_factor=2.5, original_max_length=100
  ),
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_scaled_frequencies_are_those_of_transformers(name, head_dim):
  scaling = SCALINGS[name]
  config = LlamaConfig(
    hidden_size=head_dim,
    num_attention_heads=1,
    rope_parameters={
      "rope_type": scaling.kind,
      "rope_theta": 5e5,
      "factor": scaling.factor,
      "low_freq_factor": scaling.low_freq_factor,
      "high_freq_factor": scaling.high_freq_factor,
      "original_max_position_embeddings": scaling.original_max_length,
    },
  )
  theirs, attention_factor = ROPE_INIT_FUNCTIONS[scaling.kind](config, "cpu")
  assert attention_factor == 1.0
  ours = frequencies(head_dim=head_dim, base=5e5, scaling=scaling)
  np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
  plain = frequencies(head_dim=head_dim, base=5e5)
  assert (ours <= plain).all() and ours[-1] == pytest.approx(plain[-1] / scaling.factor, rel=1e-6)
  assert (ours[0] == plain[0]) == (scaling.kind == "llama3")
  if name.startswith("llama"):  # and some lie between the two ends
    between = (ours < 0.99 * plain) & (ours > 1.01 * plain / scaling.factor)
    assert between.sum() > 2


def test_the_table_is_of_scaled_frequencies():
  positions = jnp.asarray([[0, 9, 1000]])
  cos, sin = rope_table(positions, head_dim=64, base=1e4, scaling=SCALINGS["linear"])
  angles = np.asarray(positions, np.float64)[..., None] * 1e4 ** (-np.arange(0, 64, 2) / 64) / 4
  np.testing.assert_allclose(cos, np.cos(angles), atol=1e-4)
  np.testing.assert_allclose(sin, np.sin(angles), atol=1e-4)

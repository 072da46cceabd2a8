"""Sampling against numpy, and its independence of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regionjax.infer import sampling


def nucleus(logits: np.ndarray, top_p: float) -> set[int]:
  """The textbook nucleus of one row, by a loop."""
  probabilities = np.exp(logits - logits.max())
  probabilities /= probabilities.sum()
  kept, total = set(), 0.0
  for index in np.argsort(-logits, kind="stable"):
    kept.add(int(index))
    total += probabilities[index]
    if total >= top_p:
      break
  return kept


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 0.95))
def test_top_p_keeps_the_nucleus(seed, top_p):
  logits = np.random.default_rng(seed).normal(scale=2.0, size=(3, 17)).astype(np.float32)
  kept = np.isfinite(np.asarray(sampling.top_p_filter(jnp.asarray(logits), top_p)))
  for row in range(3):
    probabilities = np.exp(logits[row]) / np.exp(logits[row]).sum()
    sums = np.cumsum(np.sort(probabilities)[::-1])
    if np.abs(sums - top_p).min() < 1e-5:
      continue  # a rounding error away from the edge of the nucleus
    assert set(np.flatnonzero(kept[row])) == nucleus(logits[row], top_p)


def test_top_p_one_keeps_everything():
  logits = jnp.asarray([[0.0, -30.0, -60.0]])
  np.testing.assert_array_equal(sampling.top_p_filter(logits, 1.0), logits)


def test_draws_follow_the_distribution():
  """Shares of 4,000 draws at temperature 0.7 are those of the softmax, within 4 deviations."""
  logits = np.asarray([1.0, 0.0, 2.0, -1.0, 0.5], np.float32)
  n, temperature = 4000, 0.7
  keys = sampling.row_keys(3, jnp.arange(n))
  drawn = sampling.sample(
    jnp.tile(jnp.asarray(logits), (n, 1)), keys, jnp.zeros(n, jnp.int32),
    temperature=temperature, top_p=1.0,
  )  # fmt: skip
  expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
  shares = np.bincount(np.asarray(drawn), minlength=5) / n
  assert np.all(np.abs(shares - expected) < 4 * np.sqrt(expected * (1 - expected) / n))


def test_draws_stay_in_the_nucleus():
  logits = np.random.default_rng(0).normal(size=(1, 30)).astype(np.float32)
  keys = sampling.row_keys(0, jnp.arange(500))
  drawn = sampling.sample(
    jnp.tile(jnp.asarray(logits), (500, 1)), keys, jnp.zeros(500, jnp.int32),
    temperature=1.0, top_p=0.4,
  )  # fmt: skip
  assert set(np.asarray(drawn).tolist()) <= nucleus(logits[0], 0.4)
  assert len(set(np.asarray(drawn).tolist())) > 1


def test_a_row_does_not_depend_on_its_batch():
  logits = jax.random.normal(jax.random.key(1), (6, 50))
  step = jnp.arange(6, dtype=jnp.int32)

  def draw(n):
    keys = sampling.row_keys(9, jnp.arange(n))
    return sampling.sample(logits[:n], keys, step[:n], temperature=1.0, top_p=0.9)

  np.testing.assert_array_equal(draw(6)[:2], draw(2))


def test_seeds_differ_and_repeat():
  logits = jnp.zeros((64, 100))

  def draw(seed):
    keys, step = sampling.row_keys(seed, jnp.arange(64)), jnp.zeros(64, jnp.int32)
    return np.asarray(sampling.sample(logits, keys, step, temperature=1.0, top_p=1.0))

  np.testing.assert_array_equal(draw(0), draw(0))
  assert (draw(0) != draw(1)).mean() > 0.8
  assert len(np.unique(draw(0))) > 20  # rows of one batch draw differently


def test_greedy_takes_the_lowest_of_ties():
  assert sampling.greedy(jnp.asarray([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]])).tolist() == [1, 0]


@pytest.mark.parametrize(
  "settings",
  [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}],
)
def test_bad_settings_are_refused(settings):
  with pytest.raises(ValueError, match="expected"):
    sampling.Sampling(**settings)

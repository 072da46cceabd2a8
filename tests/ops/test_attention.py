"""Attention, its masks and the cache append, against loops in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regionjax.ops import attention
from regionjax.ops.attention import packed


def by_hand(q, k, v, mask):
  """[N, T, H] queries of one row, float64."""
  n, t, h = q.shape
  groups = n // k.shape[0]
  out = np.zeros_like(q)
  for i in range(n):
    for j in range(t):
      keys = np.flatnonzero(mask[j])
      scores = k[i // groups, keys] @ q[i, j] / np.sqrt(h)
      weights = np.exp(scores - scores.max())
      out[i, j] = weights @ v[i // groups, keys] / weights.sum()
  return out


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attend_is_the_definition(kv_heads):
  q, k, v = draw(2, 4, 5, 6), draw(2, kv_heads, 7, 6, seed=1), draw(2, kv_heads, 7, 6, seed=2)
  mask = np.random.default_rng(3).random((2, 5, 7)) < 0.5
  mask[:, :, 0] = True
  ours = attention.attend(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)), jnp.asarray(mask))
  theirs = np.stack([by_hand(q[b], k[b], v[b], mask[b]) for b in range(2)])
  np.testing.assert_allclose(ours, theirs, atol=1e-5)
  open_ = attention.attend(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)))
  theirs = np.stack([by_hand(q[b], k[b], v[b], np.ones((5, 7), bool)) for b in range(2)])
  np.testing.assert_allclose(open_, theirs, atol=1e-5)


def test_a_query_without_keys_gives_numbers():
  q = jnp.ones((1, 2, 3, 4))
  out = attention.attend(q, q, q, jnp.zeros((1, 3, 3), bool))
  assert bool(jnp.isfinite(out).all())
  grad = jax.grad(lambda x: attention.attend(x, q, q, jnp.zeros((1, 3, 3), bool)).sum())(q)
  assert bool(jnp.isfinite(grad).all())


@pytest.mark.parametrize("length", [12, 15])
def test_blocks_of_queries_change_nothing(length, monkeypatch):
  q, k, v = (jnp.asarray(draw(2, n, length, 6, seed=n), jnp.float32) for n in (4, 2, 2))
  segments = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, (2, length)), axis=1))
  mask = np.tril(np.ones((length, length), bool))
  mask = mask[None] & (np.asarray(segments)[:, :, None] == np.asarray(segments)[:, None])
  whole = jax.jit(attention.attend)(q, k, v, mask)
  monkeypatch.setattr(packed, "MIN_BLOCKED", 8)
  jaxpr = str(jax.make_jaxpr(attention.attend_packed)(q, k, v, segments))
  assert jaxpr.count("dot_general") == 2 * packed.QUERY_BLOCKS
  blocked = jax.jit(lambda *a: attention.attend_packed(*a))(q, k, v, segments)
  np.testing.assert_allclose(blocked, whole, atol=1e-6)


def test_packed_mask_is_causal_inside_segments():
  segments = np.asarray([[1, 1, 2, 2, 2, 0, 0]])
  jitted = jax.jit(attention.packed_mask, static_argnames=("start", "end"))
  mask = np.asarray(jitted(jnp.asarray(segments), start=0, end=7))[0]
  for i in range(7):
    for j in range(7):
      assert mask[i, j] == (j <= i and segments[0, i] == segments[0, j])
  part = jitted(jnp.asarray(segments), start=3, end=5)[0]
  np.testing.assert_array_equal(part, mask[3:5, :5])


def jaxpr_equations(jaxpr):
  """All equations, those inside calls included."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from jaxpr_equations(inner)


def test_scores_and_softmax_are_float32_in_bfloat16():
  q, k, v = (jnp.asarray(draw(1, 2, 9, 16, seed=s) * 4, jnp.bfloat16) for s in range(3))
  jaxpr = jax.make_jaxpr(lambda *a: attention.attend(*a))(q, k, v).jaxpr
  exps = [e for e in jaxpr_equations(jaxpr) if e.primitive.name == "exp"]
  assert exps and all(e.outvars[0].aval.dtype == jnp.float32 for e in exps)
  exact = attention.attend(*(a.astype(jnp.float32) for a in (q, k, v)))
  ours = attention.attend(q, k, v)
  assert ours.dtype == jnp.bfloat16
  assert float(jnp.abs(ours - exact).max() / jnp.abs(exact).max()) < 0.02


def test_append_writes_behind_each_rows_end_and_drops_the_rest():
  cache = jnp.full((3, 2, 5, 1), -1.0)
  new = jnp.arange(3 * 2 * 3, dtype=jnp.float32).reshape(3, 2, 3, 1)
  out = np.asarray(attention.append(cache, new, jnp.asarray([0, 2, 4])))
  for b, start in enumerate((0, 2, 4)):
    want = np.full((2, 8), -1.0)
    want[:, start : start + 3] = np.asarray(new)[b, :, :, 0]
    np.testing.assert_array_equal(out[b, :, :, 0], want[:, :5])


def test_cache_mask_reads_up_to_the_token_itself():
  mask = np.asarray(attention.cache_mask(jnp.asarray([0, 3]), new=2, size=6))
  assert mask.sum(-1).tolist() == [[1, 2], [4, 5]]
  assert mask[1, 0].tolist() == [True] * 4 + [False] * 2


def test_heads_split_and_merge():
  x = jnp.asarray(draw(2, 3, 8), jnp.float32)
  split = attention.split_heads(x, 4)
  assert split.shape == (2, 4, 3, 2)
  np.testing.assert_array_equal(split[1, 2, 0], x[1, 0, 4:6])
  np.testing.assert_array_equal(attention.merge_heads(split), x)

"""Cross-entropy against torch, its gradient, and how its parts merge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from regionjax.ops.losses import cross_entropy, head_choices, head_cross_entropy, token_losses


def example(seed=0):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(2, 5, 11)).astype(np.float32) * 3
  return logits, rng.integers(0, 11, (2, 5)), rng.random((2, 5)).astype(np.float32)


def test_agrees_with_torch_in_value_and_gradient():
  logits, targets, weights = example()
  tensor = torch.tensor(logits, requires_grad=True)
  losses = torch.nn.functional.cross_entropy(
    tensor.reshape(-1, 11), torch.tensor(targets).reshape(-1), reduction="none"
  )
  theirs = (losses * torch.tensor(weights).reshape(-1)).sum()
  theirs.backward()
  ours, grad = jax.value_and_grad(lambda x: cross_entropy(x, targets, weights)[0])(logits)
  np.testing.assert_allclose(ours, theirs.item(), rtol=1e-6)
  np.testing.assert_allclose(grad, tensor.grad.numpy(), atol=1e-6)
  np.testing.assert_allclose(cross_entropy(logits, targets, weights)[1], weights.sum(), rtol=1e-6)


def test_parts_add_up():
  logits, targets, weights = example()
  whole = cross_entropy(logits, targets, weights)
  halves = [
    cross_entropy(logits[i : i + 1], targets[i : i + 1], weights[i : i + 1]) for i in (0, 1)
  ]
  for a, *b in zip(whole, *halves):
    np.testing.assert_allclose(a, sum(b), rtol=1e-6)


def test_what_is_not_supervised_adds_nothing_even_where_impossible():
  logits, targets, weights = example()
  logits[0, 0, targets[0, 0]] = -np.inf
  weights[0, 0] = 0.0
  loss, grad = jax.value_and_grad(lambda x: cross_entropy(x, targets, weights)[0])(logits)
  assert np.isfinite(loss) and np.isfinite(np.asarray(grad)).all()
  assert not np.asarray(grad)[0, 0].any()


def test_bfloat16_logits_are_summed_in_float32_and_extremes_stay_finite():
  logits, targets, weights = example()
  low = jnp.asarray(logits, jnp.bfloat16)
  loss, weight = cross_entropy(low, targets, weights)
  assert loss.dtype == weight.dtype == jnp.float32
  np.testing.assert_allclose(
    loss, cross_entropy(low.astype(jnp.float32), targets, weights)[0], rtol=1e-6
  )
  huge = token_losses(jnp.asarray([[[1e4, -1e30, 0.0]]]), jnp.asarray([[0]]))
  assert float(huge[0, 0]) == 0.0


def test_no_scatter_and_no_gather():
  logits, targets, weights = example()
  step = jax.jit(jax.grad(lambda x: cross_entropy(x, targets, weights)[0]))
  text = step.lower(logits).as_text()
  assert "scatter" not in text and "gather" not in text


def dialogue(rows=3, tokens=21, width=6, vocabulary=11):
  """Rows whose supervised tokens are few, none and all; a length that pieces don't divide."""
  rng = np.random.default_rng(3)
  x = rng.normal(size=(rows, tokens, width)).astype(np.float32)
  params = {
    "kernel": rng.normal(size=(width, vocabulary)).astype(np.float32),
    "bias": rng.normal(size=(vocabulary,)).astype(np.float32),
  }
  weights = rng.random((rows, tokens)).astype(np.float32)
  weights[0] *= rng.random(tokens) < 0.3
  weights[1] = 0
  return params, x, rng.integers(0, vocabulary, (rows, tokens)), weights


def head(params, x_btd):
  return x_btd @ params["kernel"] + params["bias"][None, None]


@pytest.mark.parametrize("shards", [1, 3])
def test_the_head_in_pieces_is_the_head_at_once(shards):
  params, x, targets, weights = dialogue()

  def whole(params, x):
    return cross_entropy(head(params, x), targets, weights)

  def pieces(params, x):
    return head_cross_entropy(head, params, x, targets, weights, shards=shards)

  for wrt in ((0, 1), (0,), (1,)):
    (loss, weight), grads = jax.value_and_grad(whole, wrt, has_aux=True)(params, x)
    (ours, ours_weight), ours_grads = jax.jit(jax.value_and_grad(pieces, wrt, has_aux=True))(
      params, x
    )
    np.testing.assert_allclose(ours, loss, rtol=1e-6)
    np.testing.assert_allclose(ours_weight, weight, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours_grads, grads)
  # A loss that is scaled, and one that nobody differentiates.
  scaled = jax.grad(lambda x: 3 * pieces(params, x)[0])(x)
  np.testing.assert_allclose(scaled, 3 * jax.grad(lambda x: whole(params, x)[0])(x), atol=5e-5)
  np.testing.assert_allclose(jax.jit(pieces)(params, x)[0], whole(params, x)[0], rtol=1e-6)


def test_pieces_without_a_target_are_not_computed():
  """The output layer is called for as many tokens as the supervised ones fill pieces."""
  params, x, targets, weights = dialogue(rows=2, tokens=64)
  weights[:] = 0
  weights[0, ::8] = 1  # 8 of 64 tokens: one piece of eight
  seen = []

  def counted(params, x_btd):
    jax.debug.callback(lambda: seen.append(x_btd.shape))
    return head(params, x_btd)

  step = jax.jit(jax.grad(lambda x: head_cross_entropy(counted, params, x, targets, weights)[0]))
  jax.block_until_ready(step(x))
  jax.effects_barrier()
  assert seen == [(1, 16, 6)]


@pytest.mark.parametrize("shards", [1, 3])
def test_choices_are_those_of_all_logits(shards):
  params, x, targets, weights = dialogue()
  wanted = np.random.default_rng(4).random(targets.shape) < 0.5
  loss, weight, chosen = jax.jit(
    lambda *arrays: head_choices(head, params, *arrays, shards=shards)
  )(x, targets, weights, wanted)
  logits = head(params, x)
  np.testing.assert_allclose(loss, cross_entropy(logits, targets, weights)[0], rtol=1e-6)
  np.testing.assert_allclose(weight, weights.sum(), rtol=1e-6)
  np.testing.assert_array_equal(chosen, np.where(wanted, logits.argmax(-1), -1))

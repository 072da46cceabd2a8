"""Cross-entropy against torch, its gradient, and how its parts merge."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from regionjax.ops.losses import cross_entropy, token_losses


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

"""Losses as (sum, weight) pairs, so that microbatches and hosts merge by addition.

Axes: b rows, t tokens, v vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def cross_entropy(logits_btv: Array, targets_bt: Array, weights_bt: Array) -> tuple[Array, Array]:
  """Weighted token cross-entropy in f32.

  Args:
    logits_btv: [B, T, V] of any float dtype.
    targets_bt: [B, T] int32 in [0, V).
    weights_bt: [B, T] float; 0 where nothing is supervised.

  Returns:
    (sum of weight * loss, sum of weights), two f32 scalars. The mean is their ratio.
  """
  weights_bt = weights_bt.astype(jnp.float32)
  losses_bt = token_losses(logits_btv, targets_bt)
  # A target that nobody asked for may be impossible (a row that pads the vocabulary): 0 * inf.
  losses_bt = jnp.where(weights_bt == 0, 0.0, losses_bt)
  return jnp.sum(losses_bt * weights_bt), jnp.sum(weights_bt)


def token_losses(logits_btv: Array, targets_bt: Array) -> Array:
  """-log p(target) of every token.

  The target's logit is picked by a comparison inside the reduction: no one-hot array exists, the
  backward pass is elementwise (a gather's would be a scatter, one loop turn per token on a CPU),
  and a vocabulary split over devices needs no gather.

  Args:
    logits_btv: [B, T, V] of any float dtype.
    targets_bt: [B, T] int32 in [0, V).

  Returns:
    [B, T] f32.
  """
  # One matrix of all tokens: with three axes the CPU's head and loss take 1.7 x (77 against 44 ms
  # for 3,072 tokens of 1,024 entries, forward and backward on one core).
  logits_xv = logits_btv.reshape(-1, logits_btv.shape[-1]).astype(jnp.float32)
  vocabulary_1v = jnp.arange(logits_xv.shape[-1])[None, :]
  chosen_xv = jnp.where(vocabulary_1v == targets_bt.reshape(-1, 1), logits_xv, 0.0)
  losses_x = jax.nn.logsumexp(logits_xv, axis=-1) - jnp.sum(chosen_xv, axis=-1)
  return losses_x.reshape(targets_bt.shape)

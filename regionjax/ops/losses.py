"""Losses as (sum, weight) pairs, so that microbatches and hosts merge by addition.

Axes: b rows, t tokens, v vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def cross_entropy(logits_btv: Array, targets_bt: Array, weights_bt: Array) -> tuple[Array, Array]:
  """Weighted token cross-entropy in f32.

  The target's logit is picked by a comparison inside the reduction: no one-hot array exists, the
  backward pass is elementwise (a gather's would be a scatter, one loop turn per token on a CPU),
  and a vocabulary split over devices needs no gather.

  Args:
    logits_btv: [B, T, V] of any float dtype.
    targets_bt: [B, T] int32 in [0, V).
    weights_bt: [B, T] float; 0 where nothing is supervised.

  Returns:
    (sum of weight * loss, sum of weights), two f32 scalars. The mean is their ratio.
  """
  losses_bt = token_losses(logits_btv, targets_bt)
  weights_bt = weights_bt.astype(jnp.float32)
  return jnp.sum(losses_bt * weights_bt), jnp.sum(weights_bt)


def token_losses(logits_btv: Array, targets_bt: Array) -> Array:
  """-log p(target) of every token, [B, T] f32."""
  logits_btv = logits_btv.astype(jnp.float32)
  vocabulary_11v = jnp.arange(logits_btv.shape[-1])[None, None, :]
  chosen_btv = jnp.where(vocabulary_11v == targets_bt[:, :, None], logits_btv, 0.0)
  return jax.nn.logsumexp(logits_btv, axis=-1) - jnp.sum(chosen_btv, axis=-1)

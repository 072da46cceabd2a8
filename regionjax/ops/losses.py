"""Losses as (sum, weight) pairs, so that microbatches and hosts merge by addition.

The output layer and its loss are one function here, run over pieces of the rows: logits of all
tokens never exist (in f32 they are 0.5 GB for 4,096 tokens of LLaMA's vocabulary), and a piece
without a supervised token is skipped. Answers are a third of a dialogue, so two thirds of the
output layer's work are.

Axes: b rows, t tokens, d decoder channels, v vocabulary, n pieces, x tokens of a piece.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

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


PIECES = 8  # of a row: how finely unsupervised tokens are skipped, and the share of logits alive
Head = Callable[[Any, Array], Array]  # (parameters, [1, X, D]) -> logits [1, X, V]


def head_cross_entropy(
  head: Head, params: Any, x_btd: Array, targets_bt: Array, weights_bt: Array
) -> tuple[Array, Array]:
  """`cross_entropy(head(params, x_btd), ...)`, piece by piece.

  The gradient of a piece is taken right behind its loss, so the backward pass needs no logits and
  computes none again. Parameters that nobody differentiates cost nothing.

  Args:
    head: the output layer.
    params: its parameters, and no others: a gradient is kept for each.
    x_btd: [B, T, D], what it reads.
    targets_bt: [B, T] int32 in [0, V).
    weights_bt: [B, T] float; 0 where nothing is supervised.

  Returns:
    (sum of weight * loss, sum of weights), two f32 scalars.
  """
  loss = _loss_sum(head, params, x_btd, targets_bt, weights_bt)
  return loss, jnp.sum(weights_bt.astype(jnp.float32))


def head_choices(
  head: Head, params: Any, x_btd: Array, targets_bt: Array, weights_bt: Array, wanted_bt: Array
) -> tuple[Array, Array, Array]:
  """The loss as `head_cross_entropy` has it, and the most probable tokens.

  Args:
    wanted_bt: [B, T] bool, where a token is wanted; elsewhere it is -1.

  Returns:
    (sum of weight * loss, sum of weights, [B, T] int32).
  """
  order_bt, inverse_bt = _supervised_first((weights_bt != 0) | wanted_bt)

  def piece(_: None, parts: tuple[Array, ...]) -> tuple[None, tuple[Array, Array]]:
    x_xd, targets_x, weights_x, wanted_x = parts

    def live() -> tuple[Array, Array]:
      logits_1xv = head(params, x_xd[None])
      loss, _ = cross_entropy(logits_1xv, targets_x[None], weights_x[None])
      return loss, jnp.argmax(logits_1xv[0], axis=-1).astype(jnp.int32)

    def dead() -> tuple[Array, Array]:
      return jnp.zeros((), jnp.float32), jnp.full(targets_x.shape, -1, jnp.int32)

    return None, jax.lax.cond(jnp.any((weights_x != 0) | wanted_x), live, dead)

  parts = _pieces(order_bt, x_btd, targets_bt, weights_bt, wanted_bt)
  _, (losses_n, tokens_nx) = jax.lax.scan(piece, None, parts)
  tokens_bt = jnp.take_along_axis(_whole(tokens_nx, targets_bt.shape), inverse_bt, axis=1)
  weight = jnp.sum(weights_bt.astype(jnp.float32))
  return jnp.sum(losses_n), weight, jnp.where(wanted_bt, tokens_bt, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_sum(head: Head, params: Any, x_btd: Array, targets_bt: Array, weights_bt: Array) -> Array:
  return _losses(head, params, x_btd, targets_bt, weights_bt, wrt=())[0]


def _loss_forward(head: Head, *primals: Any) -> tuple[Array, Any]:
  """The loss, and its gradients for the backward pass to scale."""
  of_params, of_x = (
    any(leaf.perturbed for leaf in jax.tree.leaves(primal)) for primal in primals[:2]
  )
  params, x_btd, targets_bt, weights_bt = jax.tree.map(lambda leaf: leaf.value, primals)
  wrt = (("params",) if of_params else ()) + (("x",) if of_x else ())
  return _losses(head, params, x_btd, targets_bt, weights_bt, wrt=wrt)


def _loss_backward(head: Head, gradients: Any, scale: Any) -> tuple[Any, Any, None, None]:
  del head
  if isinstance(scale, SymbolicZero):
    return None, None, None, None
  scaled = jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients)
  return scaled.get("params"), scaled.get("x"), None, None


_loss_sum.defvjp(_loss_forward, _loss_backward, symbolic_zeros=True)


def _losses(
  head: Head, params: Any, x_btd: Array, targets_bt: Array, weights_bt: Array,
  *, wrt: tuple[str, ...],
) -> tuple[Array, dict[str, Any]]:  # fmt: skip
  """The loss of all pieces and its gradients with respect to 'params' and 'x'."""
  order_bt, inverse_bt = _supervised_first(weights_bt != 0)

  def piece(total: Any, parts: tuple[Array, ...]) -> tuple[Any, Any]:
    x_xd, targets_x, weights_x = parts
    given = {name: value for name, value in (("params", params), ("x", x_xd)) if name in wrt}

    def loss_of(given: dict[str, Any]) -> Array:
      logits_1xv = head(given.get("params", params), given.get("x", x_xd)[None])
      return cross_entropy(logits_1xv, targets_x[None], weights_x[None])[0]

    def live(total: Any) -> tuple[Any, Any]:
      loss, new = jax.value_and_grad(loss_of)(given) if wrt else (loss_of(given), {})
      grad_x = new.pop("x", None)
      return jax.tree.map(jnp.add, total, {"loss": loss} | new), grad_x

    def dead(total: Any) -> tuple[Any, Any]:
      return total, jnp.zeros_like(x_xd) if "x" in wrt else None

    return jax.lax.cond(jnp.any(weights_x != 0), live, dead, total)

  zero = {"loss": jnp.zeros((), jnp.float32)}
  if "params" in wrt:
    zero["params"] = jax.tree.map(jnp.zeros_like, params)
  parts = _pieces(order_bt, x_btd, targets_bt, weights_bt)
  total, grad_nxd = jax.lax.scan(piece, zero, parts)
  loss = total.pop("loss")
  if "x" in wrt:
    grad_btd = _whole(grad_nxd, x_btd.shape)
    total["x"] = jnp.take_along_axis(grad_btd, inverse_bt[..., None], axis=1)
  return loss, total


def _supervised_first(live_bt: Array) -> tuple[Array, Array]:
  """([B, T] positions in an order that has each row's live ones first, where each one went)."""
  order_bt = jnp.argsort(~live_bt, axis=1, stable=True)
  return order_bt, jnp.argsort(order_bt, axis=1)


def _pieces(order_bt: Array, *arrays: Array) -> tuple[Array, ...]:
  """Arrays [B, T, ...] reordered, padded with zeros and cut along T, [N, B * T / N, ...]."""
  b, t = order_bt.shape
  n = min(PIECES, t)
  pad = -t % n

  def cut(a: Array) -> Array:
    a = jnp.take_along_axis(a, order_bt.reshape(b, t, *(1,) * (a.ndim - 2)), axis=1)
    a = jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2))
    a = jnp.moveaxis(a.reshape(b, n, -1, *a.shape[2:]), 1, 0)
    return a.reshape(n, -1, *a.shape[3:])

  return tuple(map(cut, arrays))


def _whole(a: Array, shape: tuple[int, ...]) -> Array:
  """What `_pieces` cut, [N, B * T / N, ...], as [B, T, ...] again, without the padding."""
  b, t = shape[:2]
  a = jnp.moveaxis(a.reshape(a.shape[0], b, -1, *a.shape[2:]), 0, 1)
  return a.reshape(b, -1, *a.shape[3:])[:, :t]

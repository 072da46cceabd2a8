"""The train step and the eval step: pure functions, jitted once per run.

Losses and counts leave the step as sums, never as means: accumulation and evaluation add them and
divide once, so that every supervised token weighs the same wherever it was packed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from regionjax.config import Config
from regionjax.mesh import batch_sharding, replicated
from regionjax.models.region_lm import images_used
from regionjax.ops.losses import head_choices, head_cross_entropy
from regionjax.partition import row_shards
from regionjax.train.optim import learning_rate
from regionjax.train.state import TrainState, merge


class Forward(NamedTuple):
  """A model in two parts, so that the output layer runs only where something is supervised.

  Attributes:
    hidden: (parameters, batch) -> [B, T, D].
    head: (its parameters, [B, T, D]) -> logits [B, T, V].
    head_params: all parameters -> the head's, as it reads them: on a mesh whole over `fsdp`, since
      it runs piece by piece and would gather them in each.
  """

  hidden: Callable[[Any, Any], jax.Array]
  head: Callable[[Any, jax.Array], jax.Array]
  head_params: Callable[[Any], Any]


def loss_sums(forward: Forward, params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
  """Summed cross-entropy and summed weight of one (micro)batch, both float32 scalars."""
  return head_cross_entropy(
    forward.head, forward.head_params(params), forward.hidden(params, batch),
    batch["targets_bt"], batch["loss_weights_bt"], shards=row_shards(len(batch["targets_bt"])),
  )  # fmt: skip


def microbatches(batch: Any, count: int) -> Any:
  """Splits rows [B, ...] into [count, B // count, ...], row r going to microbatch r % count.

  Interleaved, not in blocks: every device then holds its share of every microbatch, and the split
  moves no data between devices.
  """
  return jax.tree.map(
    lambda x: jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1), batch
  )


def gradients(
  forward: Forward,
  trainable: Any,
  frozen: Any,
  batch: Any,
  *,
  accumulate: int = 1,
  shardings: Any = None,
) -> tuple[Any, jax.Array, jax.Array]:
  """Gradients of the mean loss over the supervised tokens of the whole batch.

  Args:
    accumulate: microbatches, run one after the other; the sums of loss gradients and of weights
      are added in float32 and divided once, so the result is that of the undivided batch.
    shardings: where the gradients of each microbatch are put (like `trainable`); None leaves that
      to the compiler, which may then hold them whole on every device.

  Returns:
    gradients (like `trainable`, float32), loss sum, weight sum.
  """

  def total(trainable: Any, part: Any) -> tuple[jax.Array, jax.Array]:
    return loss_sums(forward, merge(trainable, frozen), part)

  def grad(trainable: Any, part: Any) -> Any:
    sums, grads = jax.value_and_grad(total, has_aux=True)(trainable, part)
    if shardings is not None:
      grads = jax.lax.with_sharding_constraint(grads, shardings)
    return sums, grads

  if accumulate == 1:
    (loss, weight), grads = grad(trainable, batch)
  else:

    def add(carry: Any, part: Any) -> tuple[Any, None]:
      (loss, weight), grads = grad(trainable, part)
      return jax.tree.map(jnp.add, carry, (loss, weight, grads)), None

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jax.tree.map(jnp.zeros_like, trainable))
    (loss, weight, grads), _ = jax.lax.scan(add, start, microbatches(batch, accumulate))
  # A batch without a supervised token has a zero gradient, not a NaN.
  scale = jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)
  return jax.tree.map(lambda g: g * scale, grads), loss, weight


def counts(batch: Any) -> dict[str, jax.Array]:
  """What one batch holds, int32: LLM tokens (slots included), examples, images, regions.

  'region_images' are those that some region lies in.
  """
  segments = batch["segment_ids_bt"]
  images = batch["image_mask_bk"].shape[1]
  used_bk = images_used(batch["box_image_br"], batch["region_mask_br"], images)
  return {
    "tokens": jnp.sum(segments > 0, dtype=jnp.int32),
    "examples": jnp.sum(jnp.max(segments, axis=1), dtype=jnp.int32),
    "images": jnp.sum(batch["image_mask_bk"], dtype=jnp.int32),
    "regions": jnp.sum(batch["region_mask_br"], dtype=jnp.int32),
    "region_images": jnp.sum(used_bk, dtype=jnp.int32),
  }


def train_step(
  config: Config,
  forward: Forward,
  optimizer: Any,
  state: TrainState,
  batch: Any,
  progress: jax.Array,
  *,
  shardings: Any = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update. `progress` (float32 scalar in [0, 1]) drives the learning rate.

  Args:
    shardings: of the trainable parameters on a mesh, for their gradients.

  Returns:
    The new state, and scalars: loss_sum, weight_sum, grad_norm, learning_rate, and `counts`.
  """
  grads, loss, weight = gradients(
    forward, state.trainable, state.frozen, batch, accumulate=config.train.accumulate,
    shardings=shardings,
  )  # fmt: skip
  with jax.named_scope("optimizer"):
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    rate = learning_rate(config.train, state.step, progress)
    trainable = jax.tree.map(lambda p, u: p - rate * u, state.trainable, updates)
  metrics = {
    "loss_sum": loss,
    "weight_sum": weight,
    "grad_norm": optax.tree.norm(grads),
    "learning_rate": rate,
  } | counts(batch)
  new = dataclasses.replace(state, step=state.step + 1, trainable=trainable, opt_state=opt_state)
  return new, metrics


def eval_step(
  forward: Forward, answers: int, trainable: Any, frozen: Any, batch: Any
) -> dict[str, jax.Array]:
  """Loss and exactness of each answer, teacher-forced.

  An answer counts as right when the arg-max of every one of its tokens, stop included, is the
  target. That equals greedy generation giving exactly this answer: up to the first wrong token
  both see the same prefix.

  Args:
    answers: at least the largest value of `answer_ids_bt`.

  Returns:
    loss_sum, weight_sum (float32 scalars), right_ba and present_ba (bool [B, answers]).
  """
  params, ids = merge(trainable, frozen), batch["answer_ids_bt"]
  loss, weight, chosen_bt = head_choices(
    forward.head, forward.head_params(params), forward.hidden(params, batch),
    batch["targets_bt"], batch["loss_weights_bt"], ids > 0, shards=row_shards(len(ids)),
  )  # fmt: skip
  wrong = (chosen_bt != batch["targets_bt"]) & (ids > 0)
  spread = jax.nn.one_hot(ids - 1, answers, dtype=jnp.bool_)  # padding (-1) is all False
  wrong_ba = jnp.any(spread & wrong[..., None], axis=1)
  present_ba = jnp.any(spread, axis=1)
  return {
    "loss_sum": loss,
    "weight_sum": weight,
    "right_ba": present_ba & ~wrong_ba,
    "present_ba": present_ba,
  }


def make_train_step(
  config: Config, forward: Forward, optimizer: Any, mesh: Mesh, *, shardings: Any = None
) -> Callable:
  """`train_step` jitted on a mesh: (state, batch, progress) -> (state, metrics); donates state.

  Args:
    shardings: of the state, a tree like it (`partition.shardings`); None has all of it on every
      device.
  """
  same, rows = replicated(mesh), batch_sharding(mesh)
  lies = same if shardings is None else shardings
  trainable = None if shardings is None else shardings.trainable

  def step(state: TrainState, batch: Any, progress: jax.Array) -> Any:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return train_step(config, forward, optimizer, state, batch, progress, shardings=trainable)

  return jax.jit(
    step, in_shardings=(lies, rows, same), out_shardings=(lies, same), donate_argnums=0
  )


def make_eval_step(
  forward: Forward, answers: int, mesh: Mesh, *, shardings: Any = None
) -> Callable:
  """`eval_step` jitted on a mesh: (trainable, frozen, batch) -> sums and flags.

  Args:
    shardings: of the state, as for `make_train_step`.
  """
  same, rows = replicated(mesh), batch_sharding(mesh)
  lies = (same, same) if shardings is None else (shardings.trainable, shardings.frozen)

  def step(trainable: Any, frozen: Any, batch: Any) -> Any:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return eval_step(forward, answers, trainable, frozen, batch)

  return jax.jit(step, in_shardings=(*lies, rows), out_shardings=same)

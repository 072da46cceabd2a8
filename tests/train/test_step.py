import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regionjax.mesh import make_mesh
from regionjax.train.optim import make_optimizer
from regionjax.train.state import cast, make_init, split
from regionjax.train.step import (
  counts,
  eval_step,
  gradients,
  make_eval_step,
  make_train_step,
  microbatches,
  train_step,
)


def closest(a, b):
  """The largest of max|a-b| / max|b| over the leaves of two trees."""
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return max(float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y))) for x, y in pairs)


def test_accumulation_equals_the_big_batch(micro, functions, random_batch):
  apply, init = functions(micro)
  params, batch = init(jax.random.key(0)), random_batch(micro)
  weights = microbatches(batch, 4)["loss_weights_bt"].sum((1, 2))
  assert len(set(weights.tolist())) > 1, "equal weights would hide a mean of means"
  one = jax.jit(lambda: gradients(apply, params, {}, batch))()
  four = jax.jit(lambda: gradients(apply, params, {}, batch, accumulate=4))()
  assert closest(four, one) < 1e-5


def test_a_batch_without_targets_has_zero_gradient(micro, functions, random_batch):
  apply, init = functions(micro)
  batch = random_batch(micro)
  batch["loss_weights_bt"][:] = 0
  grads, loss, weight = jax.jit(lambda p: gradients(apply, p, {}, batch))(init(jax.random.key(0)))
  assert float(loss) == float(weight) == 0
  assert all(not np.any(g) for g in jax.tree.leaves(grads))


def test_the_gradient_of_a_part_is_that_of_the_whole(micro, functions, random_batch):
  apply, init = functions(micro)
  params, batch = init(jax.random.key(0)), random_batch(micro)
  trainable, frozen = split(params, ["regions/.*", "decoder/norm/scale"])
  whole = jax.jit(lambda: gradients(apply, params, {}, batch)[0])()
  part = jax.jit(lambda: gradients(apply, trainable, frozen, batch)[0])()
  assert closest(part, split(whole, ["regions/.*", "decoder/norm/scale"])[0]) < 1e-5


def test_a_step_lowers_the_loss_and_keeps_what_is_frozen(micro, functions, random_batch):
  config = dataclasses.replace(
    micro, train=dataclasses.replace(micro.train, trainable=("decoder/.*",), learning_rate=3e-3)
  )
  apply, init = functions(config)
  optimizer, mesh = make_optimizer(config.train), make_mesh(devices=jax.devices()[:1])
  state = jax.jit(make_init(config, init, optimizer))(jax.random.key(0), {})
  frozen = jax.tree.map(np.array, state.frozen)
  step, batch = make_train_step(config, apply, optimizer, mesh), random_batch(config)
  losses = []
  for _ in range(10):
    given = state
    state, metrics = step(state, batch, np.float32(0.3))
    losses.append(float(metrics["loss_sum"] / metrics["weight_sum"]))
  assert losses[-1] < losses[0] - 0.5
  assert int(state.step) == 10
  jax.tree.map(np.testing.assert_array_equal, state.frozen, frozen)
  assert all(x.is_deleted() for x in jax.tree.leaves(given.trainable)), "the state is donated"
  assert step._cache_size() == 1


def test_the_step_is_the_same_unjitted(micro, functions, random_batch):
  apply, init = functions(micro)
  optimizer = make_optimizer(micro.train)
  state = jax.jit(make_init(micro, init, optimizer))(jax.random.key(0), {})
  batch, progress = random_batch(micro), jnp.float32(0.25)
  plain = train_step(micro, apply, optimizer, state, batch, progress)
  step = make_train_step(micro, apply, optimizer, make_mesh(devices=jax.devices()[:1]))
  jitted = step(jax.tree.map(jnp.copy, state), batch, progress)
  assert closest(jitted[0].opt_state, plain[0].opt_state) < 1e-4
  assert closest(jitted[1], plain[1]) < 1e-5


def test_counts(micro, random_batch):
  found = counts(random_batch(micro))
  rows, t = micro.data.rows, micro.data.tokens_per_row
  expected = dict(tokens=rows * (t - 7), examples=2 * rows, images=rows, regions=2 * rows)
  assert {name: int(value) for name, value in found.items()} == expected


def test_exact_answers_are_found_by_a_loop_too(micro, functions, random_batch):
  """A model that knows some targets: its answers are judged as a plain loop judges them."""
  batch = random_batch(micro)
  targets, ids = batch["targets_bt"], batch["answer_ids_bt"]
  rng = np.random.default_rng(1)
  said = np.where(rng.random(targets.shape) < 0.8, targets, 0)
  said[0] = targets[0]

  def apply(params, batch):
    return jax.nn.one_hot(said, 1024)

  out = eval_step(apply, 4, {}, {}, batch)
  assert out["right_ba"].shape == (micro.data.rows, 4)
  for row in range(micro.data.rows):
    for k in range(4):
      there = ids[row] == k + 1
      assert bool(out["present_ba"][row, k]) == bool(there.any())
      right = bool(there.any()) and bool((said[row] == targets[row])[there].all())
      assert bool(out["right_ba"][row, k]) == right
  assert bool(out["right_ba"][0, 0]) and not bool(out["right_ba"].all())


EIGHT = """
import pickle, sys
import jax, numpy as np
from regionjax.mesh import make_mesh, put_batch, replicated
from regionjax.models.params import init_params, model_for
from regionjax.train.optim import make_optimizer
from regionjax.train.state import make_init
from regionjax.train.step import make_train_step

config, batch = pickle.load(sys.stdin.buffer)
assert jax.device_count() == 8
model = model_for(config.model, image_slot_id=5, region_slot_id=6)
apply = lambda params, batch: model.apply({"params": params}, batch)
optimizer = make_optimizer(config.train)
build = make_init(config, lambda key: init_params(config.model, key), optimizer)
results = []
for mesh in (
  make_mesh(devices=jax.devices()[:1]), make_mesh(), make_mesh(data=2, fsdp=2, tensor=2)
):
  state = jax.jit(build, out_shardings=replicated(mesh))(jax.random.key(0), {})
  step = make_train_step(config, apply, optimizer, mesh)
  losses = []
  for _ in range(3):
    state, metrics = step(state, put_batch(batch, mesh), np.float32(0.1))
    losses.append(float(metrics["loss_sum"]) / float(metrics["weight_sum"]))
  results.append(losses)
print(results)
"""


@pytest.mark.parametrize("accumulate", [1, 2])
def test_eight_devices_equal_one(micro, random_batch, accumulate):
  import ast
  import os
  import pickle

  config = dataclasses.replace(
    micro,
    data=dataclasses.replace(micro.data, rows=16),
    train=dataclasses.replace(micro.train, accumulate=accumulate),
  )
  flags = "--xla_force_host_platform_device_count=8"
  done = subprocess.run(
    [sys.executable, "-c", EIGHT],
    input=pickle.dumps((config, random_batch(config))),
    env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr.decode()
  one, eight, mixed = ast.literal_eval(done.stdout.decode())
  np.testing.assert_allclose(eight, one, rtol=1e-5)
  np.testing.assert_allclose(mixed, one, rtol=1e-5)


def test_eval_step_matches_the_training_loss(micro, functions, random_batch):
  apply, init = functions(micro)
  params, batch = init(jax.random.key(0)), random_batch(micro)
  _, loss, weight = jax.jit(lambda: gradients(apply, params, {}, batch))()
  step = make_eval_step(apply, 3, make_mesh(devices=jax.devices()[:1]))
  out = step(cast(params, jnp.float32), {}, batch)
  np.testing.assert_allclose(out["loss_sum"], loss, rtol=1e-6)
  np.testing.assert_allclose(out["weight_sum"], weight)

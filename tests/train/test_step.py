"""The steps, mostly on a bigram model: it compiles in a tenth of the real model's time."""

import ast
import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_cases import run_source

from regionjax.mesh import make_mesh, replicated
from regionjax.train.optim import make_optimizer
from regionjax.train.state import make_init, split
from regionjax.train.step import (
  Forward,
  counts,
  eval_step,
  gradients,
  make_eval_step,
  make_train_step,
  microbatches,
  train_step,
)

BIGRAMS = Forward(
  hidden=lambda params, batch: params["embed"]["embedding"][batch["tokens_bt"]],
  head=lambda head, x_btd: x_btd @ head["kernel"] + head["bias"][None, None],
  head_params=lambda params: params["head"],
)


def init(key):
  keys = jax.random.split(key, 2)
  return {
    "embed": {"embedding": jax.random.normal(keys[0], (200, 8))},
    "head": {"kernel": jax.random.normal(keys[1], (8, 200)), "bias": jnp.ones(200)},
  }


@pytest.fixture
def params():
  return init(jax.random.key(0))


def one_device():
  return make_mesh(devices=jax.devices()[:1])


def build(config):
  return jax.jit(
    make_init(config, init, make_optimizer(config.train)), out_shardings=replicated(one_device())
  )(jax.random.key(0), {})


def distance(a, b):
  """The largest of max|a-b| / max|b| over the leaves of two trees."""
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return max(float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y))) for x, y in pairs)


@pytest.mark.parametrize("count", [2, 4])
def test_accumulation_equals_the_big_batch(micro, params, random_batch, count):
  batch = random_batch(micro)
  weights = microbatches(batch, count)["loss_weights_bt"].sum((1, 2))
  assert len(set(weights.tolist())) > 1, "equal weights would hide a mean of means"
  one = jax.jit(lambda: gradients(BIGRAMS, params, {}, batch))()
  parts = jax.jit(lambda: gradients(BIGRAMS, params, {}, batch, accumulate=count))()
  assert distance(parts, one) < 1e-5


def test_microbatches_hold_every_row_once(micro, random_batch):
  batch = random_batch(micro)
  parts = microbatches(batch, 2)
  np.testing.assert_array_equal(parts["tokens_bt"][1], batch["tokens_bt"][1::2])
  assert parts["images_bkhwc"].shape == (2, 2, *batch["images_bkhwc"].shape[1:])


def test_a_batch_without_targets_has_zero_gradient(micro, params, random_batch):
  batch = random_batch(micro)
  batch["loss_weights_bt"][:] = 0
  grads, loss, weight = jax.jit(lambda: gradients(BIGRAMS, params, {}, batch))()
  assert float(loss) == float(weight) == 0
  assert all(not np.any(g) for g in jax.tree.leaves(grads))


def test_the_gradient_of_a_part_is_that_of_the_whole(micro, params, random_batch):
  batch = random_batch(micro)
  trainable, frozen = split(params, ["head/.*"])
  whole = jax.jit(lambda: gradients(BIGRAMS, params, {}, batch)[0])()
  part = jax.jit(lambda: gradients(BIGRAMS, trainable, frozen, batch)[0])()
  assert set(part) == {"head"}
  assert distance(part["head"], whole["head"]) < 1e-6


def test_a_step_lowers_the_loss_and_keeps_what_is_frozen(micro, random_batch):
  config = dataclasses.replace(
    micro, train=dataclasses.replace(micro.train, trainable=("head/.*",), learning_rate=0.1)
  )
  state = build(config)
  frozen = jax.tree.map(np.array, state.frozen)
  step = make_train_step(config, BIGRAMS, make_optimizer(config.train), one_device())
  batch, losses = random_batch(config), []
  for k in range(10):
    given = state
    state, metrics = step(state, batch, np.float32(k / 10))
    losses.append(float(metrics["loss_sum"] / metrics["weight_sum"]))
  assert losses[-1] < losses[0] - 0.5
  assert int(state.step) == 10
  jax.tree.map(np.testing.assert_array_equal, state.frozen, frozen)
  assert all(x.is_deleted() for x in jax.tree.leaves(given.trainable)), "the state is donated"
  assert step._cache_size() == 1, "progress is an array: nothing is compiled again"


@pytest.mark.slow  # every operation is compiled on its own
def test_the_step_is_the_same_unjitted(micro, random_batch):
  state, batch, progress = build(micro), random_batch(micro), jnp.float32(0.25)
  optimizer = make_optimizer(micro.train)
  plain = train_step(micro, BIGRAMS, optimizer, state, batch, progress)
  jitted = make_train_step(micro, BIGRAMS, optimizer, one_device())(state, batch, progress)
  assert distance(jitted[0].trainable, plain[0].trainable) < 1e-5
  assert distance(jitted[1], plain[1]) < 1e-5


def test_counts(micro, random_batch):
  found = counts(random_batch(micro))
  rows, t = micro.data.rows, micro.data.tokens_per_row
  expected = dict(tokens=rows * (t - 7), examples=2 * rows, images=rows, regions=2 * rows)
  expected["region_images"] = rows  # both regions lie in the row's first image
  assert {name: int(value) for name, value in found.items()} == expected


def test_exact_answers_are_those_that_a_loop_finds(micro, random_batch):
  batch = random_batch(micro)
  targets, ids = batch["targets_bt"], batch["answer_ids_bt"]
  said = np.where(np.random.default_rng(1).random(targets.shape) < 0.8, targets, 0)
  said[0] = targets[0]
  parrot = Forward(lambda params, batch: jax.nn.one_hot(said, 200), lambda _, x: x, lambda _: {})
  judge = functools.partial(eval_step, parrot, 4)
  out = jax.jit(judge)({}, {}, batch)
  assert out["right_ba"].shape == (micro.data.rows, 4)
  for row in range(micro.data.rows):
    for k in range(4):
      there = ids[row] == k + 1
      right = bool(there.any()) and bool((said[row] == targets[row])[there].all())
      assert bool(out["present_ba"][row, k]) == bool(there.any())
      assert bool(out["right_ba"][row, k]) == right
  assert bool(out["right_ba"][0, 0]) and not bool(out["right_ba"][:, :2].all())


def test_the_eval_step_has_the_training_loss(micro, params, random_batch):
  batch = random_batch(micro)
  _, loss, weight = jax.jit(lambda: gradients(BIGRAMS, params, {}, batch))()
  out = make_eval_step(BIGRAMS, 3, one_device())(params, {}, batch)
  np.testing.assert_allclose(out["loss_sum"], loss, rtol=1e-6)
  np.testing.assert_allclose(out["weight_sum"], weight)


EIGHT = """
import pickle, sys, types
import jax, numpy as np
from regionjax import partition
from regionjax.mesh import make_mesh, put_batch
from regionjax.train.optim import make_optimizer
from regionjax.train.start import model_functions
from regionjax.train.state import make_init
from regionjax.train.step import make_eval_step, make_train_step

configs, batch, steps = pickle.load(sys.stdin.buffer)
assert jax.device_count() == 8
one = make_mesh(devices=jax.devices()[:1])
meshes = {"one": one, "data": make_mesh(), "mixed": make_mesh(data=2, fsdp=2, tensor=2)}
results = {}
for name, config in configs.items():
  slots = types.SimpleNamespace(image_slot_id=5, region_slot_id=6)
  forward, init = model_functions(config, slots)
  optimizer, mesh = make_optimizer(config.train), meshes[name]
  build = make_init(config, init, optimizer)
  if name == "one":
    first = jax.tree.map(np.asarray, jax.jit(build)(jax.random.key(0), {}))
  lies = partition.shardings(config.model, first, mesh)
  state = jax.device_put(first, lies)
  step = make_train_step(config, forward, optimizer, mesh, shardings=lies)
  evaluate = make_eval_step(forward, 3, mesh, shardings=lies)
  losses = []
  for k in range(steps + 1):
    rows = put_batch(batch, mesh)
    sums = evaluate(state.trainable, state.frozen, rows)
    losses.append(float(sums["loss_sum"]) / float(sums["weight_sum"]))
    if k < steps:
      state, _ = step(state, rows, np.float32(0.1))
  results[name] = losses
print(results)
"""


def eight(configs, batch, steps):
  return ast.literal_eval(run_source(EIGHT, pickle.dumps((configs, batch, steps))).decode())


@pytest.fixture
def wide(micro):
  """Sixteen rows: two for each of eight devices; two heads of everything."""
  model = dataclasses.replace(
    micro.model,
    vision=dataclasses.replace(micro.model.vision, heads=2),
    decoder=dataclasses.replace(micro.model.decoder, heads=2, kv_heads=2, head_dim=16),
  )
  return dataclasses.replace(micro, model=model, data=dataclasses.replace(micro.data, rows=16))


@pytest.mark.slow  # one step, without the optimiser: tests/partition/test_equality.py
def test_training_on_eight_devices_is_that_on_one(wide, random_batch):
  parts = dataclasses.replace(wide, train=dataclasses.replace(wide.train, accumulate=2))
  losses = eight({"one": wide, "data": wide, "mixed": parts}, random_batch(wide), steps=3)
  assert losses["one"][3] < losses["one"][0]
  np.testing.assert_allclose(losses["data"], losses["one"], rtol=1e-5)
  np.testing.assert_allclose(losses["mixed"], losses["one"], rtol=1e-5)

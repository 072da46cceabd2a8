import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from regionjax.config import ConfigError, TrainConfig
from regionjax.train.optim import decay_mask, decays, learning_rate, make_optimizer
from regionjax.train.state import flatten_paths

CONFIG = TrainConfig(steps=100, warmup_steps=10, learning_rate=2.0, decay_fraction=0.2)


def rate(config, step, progress=None):
  progress = step / config.steps if progress is None else progress
  return float(learning_rate(config, jnp.int32(step), jnp.float32(progress)))


@pytest.mark.parametrize(
  "schedule, points",
  [
    ("cosine", {0: 0.2, 4: 1.0, 9: 2.0, 10: 2.0, 55: 1.0, 100: 0.0}),
    ("wsd", {0: 0.2, 9: 2.0, 50: 2.0, 80: 2.0, 90: 1.0, 100: 0.0}),
  ],
)
def test_schedules(schedule, points):
  config = dataclasses.replace(CONFIG, schedule=schedule)
  for step, expected in points.items():
    assert rate(config, step) == pytest.approx(expected, abs=1e-5), step


def test_the_clock_can_be_ahead_of_the_steps():
  assert rate(CONFIG, 20, progress=1.0) == pytest.approx(0, abs=1e-6)
  assert rate(CONFIG, 20, progress=0.55) == pytest.approx(1.0, abs=1e-5)


def test_no_warmup_starts_at_the_peak():
  assert rate(dataclasses.replace(CONFIG, warmup_steps=0), 0) == pytest.approx(2.0)


def test_an_unknown_schedule_is_refused():
  with pytest.raises(ConfigError, match="'linear': expected cosine or wsd"):
    rate(dataclasses.replace(CONFIG, schedule="linear"), 0)


def test_only_kernels_decay(micro, functions):
  import jax

  _, init = functions(micro)
  params = jax.eval_shape(init, jax.random.key(0))
  mask = flatten_paths(decay_mask(params))
  assert mask.keys() == flatten_paths(params).keys()
  kept = {path.rsplit("/", 1)[-1] for path, decayed in mask.items() if not decayed}
  assert kept == {"bias", "scale", "embedding", "positions", "class_token"}
  assert decays("decoder/layers/up/kernel")


def test_update_is_adamw_by_hand():
  config = dataclasses.replace(CONFIG, weight_decay=0.1, clip_norm=1.0)
  optimizer = make_optimizer(config)
  params = {"a": {"kernel": jnp.array([2.0, -1.0]), "bias": jnp.array([1.0])}}
  grads = {"a": {"kernel": jnp.array([3.0, 0.0]), "bias": jnp.array([4.0])}}
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  # At the first step Adam's update is the sign of the gradient, whatever clipping made of it.
  np.testing.assert_allclose(updates["a"]["kernel"], [1 + 0.2, -0.1], rtol=1e-5)
  np.testing.assert_allclose(updates["a"]["bias"], [1.0], rtol=1e-5)


def test_clipping_is_by_global_norm():
  optimizer = make_optimizer(dataclasses.replace(CONFIG, clip_norm=1.0))
  params = {"kernel": jnp.zeros(2)}
  _, state = optimizer.update({"kernel": jnp.array([3.0, 4.0])}, optimizer.init(params), params)
  first_moment = state[1].mu["kernel"]
  np.testing.assert_allclose(first_moment, 0.1 * np.array([0.6, 0.8]), rtol=1e-5)

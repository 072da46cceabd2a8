import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regionjax.config import ConfigError
from regionjax.train.optim import make_optimizer
from regionjax.train.state import abstract, make_init, merge, split, trainable_paths

PATHS = ["vision/patch/kernel", "regions/output/kernel", "decoder/head/kernel"]


def test_split_and_merge_are_inverse():
  params = {"a": {"kernel": 1, "bias": 2}, "b": {"c": {"kernel": 3}}}
  trainable, frozen = split(params, ["b/.*", "a/bias"])
  assert trainable == {"a": {"bias": 2}, "b": {"c": {"kernel": 3}}}
  assert frozen == {"a": {"kernel": 1}}
  assert merge(trainable, frozen) == params


def test_a_regex_matches_whole_paths():
  assert trainable_paths(PATHS, ["regions/.*"]) == {"regions/output/kernel"}
  with pytest.raises(ConfigError, match=r"'regions' matches no parameter.*parts: decoder, region"):
    trainable_paths(PATHS, ["decoder/.*", "regions"])


@pytest.mark.parametrize("patterns, message", [(["("], "not a regex"), ([], "is empty")])
def test_bad_patterns(patterns, message):
  with pytest.raises(ConfigError, match=message):
    trainable_paths(PATHS, patterns)


def test_frozen_parts_are_stored_in_the_compute_dtype_and_have_no_moments(micro, functions):
  config = dataclasses.replace(
    micro,
    model=dataclasses.replace(micro.model, compute_dtype="bfloat16"),
    train=dataclasses.replace(micro.train, trainable=("regions/.*", "connector/.*")),
  )
  _, init = functions(config)
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  build = make_init(config, init, make_optimizer(config.train))
  state = abstract(build, sharding)
  assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {jnp.dtype(jnp.float32)}
  assert {x.dtype for x in jax.tree.leaves(state.frozen)} == {jnp.dtype(jnp.bfloat16)}
  assert set(state.trainable) == {"regions", "connector"}
  assert set(state.frozen) == {"vision", "decoder"}
  size = sum(x.size for x in jax.tree.leaves(state.trainable))
  moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
  assert moments == 2 * size


def test_given_parameters_replace_initialised_ones(micro):
  def init(key):
    return {"a": {"kernel": jax.random.normal(key, (2, 3)), "bias": jnp.zeros(3)}}

  build = make_init(micro, init, make_optimizer(micro.train))
  given = {"a": {"bias": np.full(3, 3.0, np.float16)}}
  state = jax.jit(build)(jax.random.key(0), given)
  np.testing.assert_array_equal(state.params["a"]["bias"], np.full(3, 3.0, np.float32))
  np.testing.assert_array_equal(state.params["a"]["kernel"], init(jax.random.key(0))["a"]["kernel"])

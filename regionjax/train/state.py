"""The state of a run: what trains, what is frozen, the optimiser's moments.

Parameters are split by path into two trees. The trainable one is float32 and is the only one that
is differentiated and has moments; the frozen one is stored in the compute dtype.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from regionjax.config import Config, ConfigError

Params = dict[str, Any]


@flax.struct.dataclass
class TrainState:
  """What the train step takes and returns.

  Attributes:
    step: int32 scalar, steps done.
    trainable: float32 parameters that are updated.
    frozen: parameters in the compute dtype that are not.
    opt_state: the optimiser's state, for `trainable` only.
  """

  step: jax.Array
  trainable: Params
  frozen: Params
  opt_state: Any

  @property
  def params(self) -> Params:
    """All parameters in one tree."""
    return merge(self.trainable, self.frozen)


def flatten_paths(tree: Params) -> dict[str, Any]:
  """Nested dicts -> {'a/b/c': leaf}."""
  return flax.traverse_util.flatten_dict(tree, sep="/")


def unflatten_paths(flat: dict[str, Any]) -> Params:
  """The inverse of `flatten_paths`."""
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def merge(trainable: Params, frozen: Params) -> Params:
  """The inverse of `split`."""
  return unflatten_paths(flatten_paths(trainable) | flatten_paths(frozen))


def trainable_paths(paths: Sequence[str], patterns: Sequence[str]) -> set[str]:
  """Paths that fully match any of the regexes.

  Raises:
    ConfigError: a regex is malformed or matches no path.
  """
  chosen: set[str] = set()
  for pattern in patterns:
    try:
      compiled = re.compile(pattern)
    except re.error as error:
      raise ConfigError(f"train.trainable: {pattern!r} is not a regex ({error})") from error
    matched = {path for path in paths if compiled.fullmatch(path)}
    if not matched:
      roots = sorted({path.split("/")[0] for path in paths})
      raise ConfigError(
        f"train.trainable: {pattern!r} matches no parameter; a regex must match a whole path, "
        f"e.g. {paths[0]!r} or '{roots[-1]}/.*' (parts: {', '.join(roots)})"
      )
    chosen |= matched
  if not chosen:
    raise ConfigError("train.trainable is empty: nothing would train; '.*' trains everything")
  return chosen


def split(params: Params, patterns: Sequence[str]) -> tuple[Params, Params]:
  """Parameters -> (trainable, frozen) by regexes on their paths; see `trainable_paths`."""
  flat = flatten_paths(params)
  chosen = trainable_paths(list(flat), patterns)
  trainable = {path: leaf for path, leaf in flat.items() if path in chosen}
  frozen = {path: leaf for path, leaf in flat.items() if path not in chosen}
  return unflatten_paths(trainable), unflatten_paths(frozen)


def cast(tree: Params, dtype: Any) -> Params:
  """Floating-point leaves in `dtype`."""
  return jax.tree.map(
    lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
  )


def make_init(
  config: Config, init: Callable[[jax.Array], Params], optimizer: Any
) -> Callable[[jax.Array, Params], TrainState]:
  """A pure function (key, given parameters) -> TrainState.

  Args:
    init: key -> parameters.
    optimizer: an optax transformation.

  `given` (nested, any float dtype) replaces some or all of the initialised leaves; it must have
  been checked (see `train.start`). Jit the result: initialisation, splitting and casting in one
  program keep no second copy of the parameters.
  """
  dtype = jnp.dtype(config.model.compute_dtype)

  def build(key: jax.Array, given: Params) -> TrainState:
    params = unflatten_paths(flatten_paths(init(key)) | flatten_paths(given))
    trainable, frozen = split(params, config.train.trainable)
    trainable = cast(trainable, jnp.float32)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      trainable=trainable,
      frozen=cast(frozen, dtype),
      opt_state=optimizer.init(trainable),
    )

  return build


def abstract(
  build: Callable[[jax.Array, Params], TrainState],
  sharding: Sharding | Callable[[TrainState], Any],
) -> TrainState:
  """Shapes, dtypes and shardings of the state that `make_init`'s result gives; computes nothing.

  Args:
    build: from `make_init`.
    sharding: one for every array, or a function from the tree of shapes to one of shardings.
  """
  shapes = jax.eval_shape(lambda: build(jax.random.key(0), {}))
  if isinstance(sharding, Sharding):
    lies = jax.tree.map(lambda _: sharding, shapes)
  else:
    lies = sharding(shapes)
  return jax.tree.map(
    lambda x, lie: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lie), shapes, lies
  )

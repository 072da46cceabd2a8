"""AdamW, the learning-rate schedules and the rule of what decays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from regionjax.config import ConfigError, TrainConfig
from regionjax.train.state import flatten_paths, unflatten_paths

SCHEDULES = ("cosine", "wsd")


def decays(path: str) -> bool:
  """Whether weight decay applies to the parameter at `path` ('a/b/kernel').

  It pulls matrices only, and every matrix of a linear map or convolution is named `kernel`. Biases,
  the scales of norms, and tables of vectors that are looked up or added (embeddings, positions, the
  class token) are left alone: a rare token's row would shrink between its appearances.
  """
  return path.rsplit("/", 1)[-1] == "kernel"


def decay_mask(params: Any) -> Any:
  """A tree of bools like `params`: True where weight decay applies."""
  return unflatten_paths({path: decays(path) for path in flatten_paths(params)})


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
  """Clipping by global norm, Adam moments, decoupled weight decay; not yet scaled by the rate.

  The rate is applied by the train step (`params - rate * update`), because it may depend on the
  clock, which the optimiser's own step count doesn't know.
  """
  parts = []
  if config.clip_norm > 0:
    parts.append(optax.clip_by_global_norm(config.clip_norm))
  parts.append(optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.adam_eps))
  if config.weight_decay > 0:
    parts.append(optax.add_decayed_weights(config.weight_decay, mask=decay_mask))
  return optax.chain(*parts)


def learning_rate(config: TrainConfig, step: jax.Array, progress: jax.Array) -> jax.Array:
  """The rate of one step.

  Args:
    step: int32 scalar, 0-based.
    progress: float32 scalar in [0, 1]: the share of the run that is over, by steps or, when
      `stop_after_minutes` is set, by the clock if that is further.

  Returns:
    float32 scalar: linear warm-up over `warmup_steps`, then `cosine` to zero, or `wsd`: constant
    and a linear fall to zero over the last `decay_fraction`.

  Raises:
    ConfigError: an unknown schedule.
  """
  if config.schedule == "cosine":
    warm = min(config.warmup_steps / max(config.steps, 1), 0.5)
    shape = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((progress - warm) / (1 - warm), 0, 1)))
  elif config.schedule == "wsd":
    shape = jnp.clip((1 - progress) / max(config.decay_fraction, 1e-6), 0, 1)
  else:
    raise ConfigError(f"train.schedule={config.schedule!r}: expected {' or '.join(SCHEDULES)}")
  warmup = jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
  return jnp.asarray(config.learning_rate * warmup * shape, jnp.float32)

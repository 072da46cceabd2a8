"""Model FLOPs of a training step, from what its batch held."""

from __future__ import annotations

from collections.abc import Mapping

from regionjax.config import Config
from regionjax.flops import flops_per_example


def step_flops(config: Config, values: Mapping[str, float]) -> float:
  """FLOPs of the forward and backward pass over the examples of one batch.

  Attention within an example is quadratic in its length; all examples of a batch are taken to be
  of its mean length. Padding isn't counted.

  Args:
    config: the run.
    values: `counts` of the batch (see `step.counts`).
  """
  examples = values["examples"]
  if not examples:
    return 0.0
  return examples * flops_per_example(
    config.model,
    tokens=values["tokens"] / examples,
    images=values["images"] / examples,
    regions=values["regions"] / examples,
    region_images=values["region_images"] / examples,
    trainable=config.train.trainable,
  )

"""The endless sequence of draws: shuffled, repeated, mixed sources, addressed by index.

The sequence is a Grain `MapDataset`, so draw i is a pure function of (config, i): nothing has to be
remembered but the next index, on any number of hosts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from regionjax.config import ConfigError, SourceConfig
from regionjax.data.errors import DataError
from regionjax.data.schema import Example

# A source this long is drawn in its own order: no run reaches its end, and Grain's shuffle is of
# 32-bit indices.
ENDLESS = 2**31


@dataclasses.dataclass(frozen=True)
class Draw:
  """One example as it came out of the mixture."""

  index: int
  source: str
  example: Example

  @property
  def label(self) -> str:
    """Names the example in messages."""
    name = self.example.meta.get("id", "without id")
    return f"example {name!r} of source {self.source!r} (draw {self.index})"


class Mixture:
  """Draws of several sources by weight.

  Every source is shuffled anew in each epoch and repeated without end (one of 2**31 or more
  examples is taken in order); the weights are met exactly over any long stretch, by strides and not
  by chance.

  Attributes:
    lengths: examples in each source.

  Args:
    configs: name and weight of each source.
    sources: objects with `__len__`, `__getitem__` and `name`, in the order of `configs`.
    seed: sets the shuffles.

  Raises:
    ConfigError: no sources, a weight that is not positive.
    DataError: an empty source.
  """

  def __init__(self, configs: Sequence[SourceConfig], sources: Sequence[Any], *, seed: int):
    import grain  # imports jax; workers and inference never come here

    if not configs:
      raise ConfigError("data.sources is empty: name at least one source")
    if len(sources) != len(configs):
      raise ConfigError(
        f"data.sources names {len(configs)} sources but {len(sources)} were given; one each"
      )
    parts = []
    for k, (config, source) in enumerate(zip(configs, sources)):
      if not config.weight > 0:
        raise ConfigError(
          f"data.sources[{k}] ({config.name!r}): weight {config.weight} must be positive; "
          "take the source out of the list to leave it unused"
        )
      if len(source) == 0:
        raise DataError(f"source {config.name!r} (data.sources[{k}]) holds no examples")
      part = grain.MapDataset.source(_Tagged(source, k))
      if len(source) < ENDLESS:
        # A seed of its own per source: two sources of one length must not share their order.
        own = int(np.random.SeedSequence([seed, k]).generate_state(1)[0])
        part = part.seed(own).shuffle().repeat()
      parts.append(part)
    weights = [config.weight for config in configs]
    self._dataset = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)
    self._names = [config.name for config in configs]
    self.lengths = [len(source) for source in sources]

  def __getitem__(self, index: int) -> Draw:
    try:
      k, example = self._dataset[index]
    except DataError as error:
      raise DataError(f"draw {index}: {error}") from error
    return Draw(index, self._names[k], example)


class _Tagged:
  """A source whose examples carry the source's number, and whose errors carry its name."""

  def __init__(self, source: Any, number: int):
    self._source = source
    self._number = number

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> tuple[int, Example]:
    try:
      return self._number, self._source[index]
    except Exception as error:
      name = getattr(self._source, "name", type(self._source).__name__)
      raise DataError(
        f"source {name!r}, example {index}: {type(error).__name__}: {error}"
      ) from error

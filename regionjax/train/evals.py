"""Evaluation during training: loss and exact-match accuracy on fixed batches.

They are held out where the source has a test split, which files of one's own don't.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from regionjax.config import Config, SourceConfig
from regionjax.data.scenes_dialogue import TASKS
from regionjax.mesh import own_rows, put_batch
from regionjax.train.step import Forward, make_eval_step

Batches = Sequence[tuple[Any, Any]]  # (batch, meta) as data.pipeline gives them, all hosts' rows


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What one evaluation found.

  Attributes:
    loss: mean cross-entropy per supervised token, in nats.
    cells: (task, kind of reference) -> (right answers, answers).
  """

  loss: float
  cells: dict[tuple[str, str], tuple[int, int]]

  @property
  def answers(self) -> int:
    return sum(n for _, n in self.cells.values())

  @property
  def accuracy(self) -> float:
    """Share of exactly right answers; NaN without any."""
    return _share(self.cells.values())

  def by(self, part: int) -> dict[str, float]:
    """Accuracy by task (0) or by kind of reference (1)."""
    groups: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
    for key, cell in self.cells.items():
      groups[key[part]].append(cell)
    return {name: _share(groups[name]) for name in sorted(groups)}

  def to_json(self) -> dict[str, Any]:
    """A row of `metrics.jsonl`."""
    return {
      "loss": self.loss,
      "accuracy": self.accuracy,
      "answers": self.answers,
      "by_task": self.by(0),
      "by_reference": self.by(1),
    }


class Evaluator:
  """Evaluates parameters on the same batches every time.

  Args:
    forward: the model.
    batches: `(batch, meta)` with the rows of all hosts.
    mesh: where to run.
    shardings: of the state on it; see `make_eval_step`.
  """

  def __init__(
    self, forward: Forward, batches: Batches, mesh: Mesh, *, shardings: Any = None
  ) -> None:
    self._batches, self._mesh = batches, mesh
    most = max((int(b["answer_ids_bt"].max()) for b, _ in batches), default=0)
    self._step = make_eval_step(forward, max(most, 1), mesh, shardings=shardings)

  def __call__(self, trainable: Any, frozen: Any) -> Evaluation:
    """Evaluates; reads each batch's result while the next one computes."""
    loss = weight = 0.0
    cells: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0])
    pending = None
    for batch, meta in [*self._batches, (None, None)]:
      result = None
      if batch is not None:
        rows = own_rows(self._mesh, len(batch["tokens_bt"]))
        own = put_batch({name: value[rows] for name, value in batch.items()}, self._mesh)
        result = (self._step(trainable, frozen, own), meta)
      if pending is not None:
        sums, answers = jax.device_get(pending[0]), pending[1]
        loss, weight = loss + float(sums["loss_sum"]), weight + float(sums["weight_sum"])
        _count(cells, sums["right_ba"], sums["present_ba"], answers)
      pending = result
    return Evaluation(
      loss / weight if weight else float("nan"), {key: (r, n) for key, (r, n) in cells.items()}
    )


SPLIT_SOURCES = ("scenes",)  # those that hold examples out


def held_out_config(source: SourceConfig) -> SourceConfig:
  """The test split of a source; a source without splits is taken as it is.

  Of `scenes` always the same ones, whatever the run's seed, so that runs can be compared; one
  question per example, so that no answer profits from an earlier answer in its dialogue; and all
  tasks equally often, however training weighs them.
  """
  if source.name not in SPLIT_SOURCES:
    return source
  tasks = dict.fromkeys(source.args.get("tasks") or TASKS, 1.0)
  fixed = {"split": "test", "turns": 1, "seed": 0, "tasks": tasks}
  return dataclasses.replace(source, args={**source.args, **fixed})


def held_out_batches(config: Config, renderer: Any) -> list[tuple[Any, Any]]:
  """`train.eval_examples` held-out examples, shared over the sources by their weights."""
  from regionjax.data.pipeline import make_eval_batches
  from regionjax.data.sources import make_source

  total = sum(source.weight for source in config.data.sources)
  out: list[tuple[Any, Any]] = []
  for source in config.data.sources:
    count = max(1, round(config.train.eval_examples * source.weight / total))
    out += make_eval_batches(make_source(held_out_config(source)), renderer, config, count)
  return out


def _count(cells: Any, right_ba: np.ndarray, present_ba: np.ndarray, meta: Any) -> None:
  for row, answers in enumerate(meta):
    for k, answer in enumerate(answers):
      if present_ba[row, k]:
        cell = cells[answer["task"] or "none", answer["ref_kind"] or "none"]
        cell[0] += int(right_ba[row, k])
        cell[1] += 1


def _share(cells: Any) -> float:
  right, n = (sum(column) for column in zip(*cells)) if cells else (0, 0)
  return right / n if n else float("nan")

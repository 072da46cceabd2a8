"""What the host remembers of a run besides the arrays: counts, clock, last and best evaluation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

TOTALS = ("tokens", "examples", "images", "regions", "supervised", "flops")


@dataclasses.dataclass
class Ledger:
  """JSON-able; saved in every checkpoint, so that a resumed run counts on.

  Attributes:
    step: steps done.
    elapsed: seconds, over all parts of the run.
    totals: sums over all steps: LLM tokens (slots included, padding not), examples, images, region
      slots, supervised tokens, model FLOPs.
    window: loss and weight sums since the last logged row.
    train: the last logged row.
    evaluation: the last evaluation, with its step.
    best: step and loss of the best evaluation.
  """

  step: int = 0
  elapsed: float = 0.0
  totals: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(TOTALS, 0))
  window: dict[str, float] = dataclasses.field(
    default_factory=lambda: {"loss_sum": 0.0, "weight_sum": 0.0}
  )
  train: dict[str, Any] | None = None
  evaluation: dict[str, Any] | None = None
  best: dict[str, Any] | None = None

  def add(self, values: Mapping[str, float], flops: float) -> None:
    """Counts one step's metrics in."""
    for name in ("tokens", "examples", "images", "regions"):
      self.totals[name] += int(values[name])
    self.totals["supervised"] += float(values["weight_sum"])
    self.totals["flops"] += flops
    for name in self.window:
      self.window[name] += float(values[name])

  def close_window(self) -> float:
    """Mean loss per supervised token since the last call; NaN if nothing was supervised."""
    weight = self.window["weight_sum"]
    loss = self.window["loss_sum"] / weight if weight else math.nan
    self.window = dict.fromkeys(self.window, 0.0)
    return loss

  def note_evaluation(self, step: int, values: Mapping[str, Any]) -> bool:
    """Remembers an evaluation; returns whether it is the best so far."""
    self.evaluation = {"step": step, **values}
    if self.best is not None and not values["loss"] < self.best["loss"]:
      return False
    self.best = {"step": step, "loss": values["loss"]}
    return True

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

"""Metrics of a run as `metrics.jsonl` and TensorBoard events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorboardX


class MetricsWriter:
  """Appends rows `{"kind": ..., "step": ..., values}` to a run's metrics.

  Args:
    workdir: holds `metrics.jsonl` and `tensorboard/`.
    step: the run continues behind this step; rows of later steps, left by a run that was stopped
      between checkpoints, are dropped, so that each step is logged once.
    enabled: False on all processes but one: nothing is written.
  """

  def __init__(self, workdir: Path, *, step: int = 0, enabled: bool = True) -> None:
    self._file = self._events = None
    if not enabled:
      return
    path = workdir / "metrics.jsonl"
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(path)
    self._file = path.open("a")
    self._events = tensorboardX.SummaryWriter(
      str(workdir / "tensorboard"), purge_step=step + 1 if step else None
    )

  def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
    """Writes one row; numbers and nested mappings of numbers become TensorBoard scalars."""
    if self._file is None or self._events is None:
      return
    self._file.write(json.dumps({"kind": kind, "step": step} | dict(values)) + "\n")
    self._file.flush()
    for name, value in scalars(values, kind).items():
      self._events.add_scalar(name, value, step)
    self._events.flush()

  def close(self) -> None:
    """Closes both files."""
    if self._file is not None and self._events is not None:
      self._file.close()
      self._events.close()


def scalars(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
  """Nested numbers -> {'prefix/a/b': number}; everything else is left out."""
  flat: dict[str, float] = {}
  for key, value in values.items():
    if isinstance(value, Mapping):
      flat |= scalars(value, f"{prefix}/{key}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
      flat[f"{prefix}/{key}"] = value
  return flat


def read_metrics(path: Path) -> list[dict[str, Any]]:
  """Rows of a `metrics.jsonl`; a line cut off by a crash is left out, no file gives no rows."""
  rows = []
  if path.is_file():
    for line in path.read_text().splitlines():
      try:
        row = json.loads(line)
      except json.JSONDecodeError:
        continue
      if isinstance(row, dict) and "step" in row and "kind" in row:
        rows.append(row)
  return rows

"""The picture of a run: losses, and accuracy by task and by kind of reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_run(rows: Sequence[dict[str, Any]], path: Path, *, title: str) -> Path:
  """Draws the metrics of a run.

  Args:
    rows: as `metrics.read_metrics` gives them.
    path: a PNG file.
    title: of the picture.

  Returns:
    The path.
  """
  train = [row for row in rows if row["kind"] == "train"]
  evals = [row for row in rows if row["kind"] == "eval"]
  figure = Figure(figsize=(16, 4.8), layout="constrained")
  FigureCanvasAgg(figure)  # draws without a display and without pyplot's global state
  figure.suptitle(title)
  left, middle, right = figure.subplots(1, 3)
  _losses(left, train, evals)
  _accuracies(middle, evals, "by_task", "evaluation: accuracy by task")
  _accuracies(right, evals, "by_reference", "evaluation: accuracy by kind of reference")
  figure.savefig(path, dpi=110)
  return path


def smooth(values: Sequence[float], share: float = 0.05) -> np.ndarray:
  """Running mean over a centred window of that share of all values, cut off at both ends."""
  x = np.asarray(values, np.float64)
  half = max(1, round(len(x) * share / 2))
  total = np.concatenate([[0.0], np.cumsum(x)])
  start = np.maximum(np.arange(len(x)) - half, 0)
  stop = np.minimum(np.arange(len(x)) + half + 1, len(x))
  return (total[stop] - total[start]) / (stop - start)


def _losses(axes: Any, train: Sequence[dict], evals: Sequence[dict]) -> None:
  if train:
    steps, losses = [r["step"] for r in train], [r["loss"] for r in train]
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(losses), color="tab:blue", label="training, smoothed")
  if evals:
    axes.plot(
      [r["step"] for r in evals], [r["loss"] for r in evals],
      color="tab:orange", marker="o", markersize=4, label="evaluation",
    )  # fmt: skip
  values = [r["loss"] for r in [*train, *evals]]
  if values and 0 < 10 * min(values) < max(values):
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize=7)
  axes.set(title="loss per supervised token", xlabel="step", ylabel="nats")
  _finish(axes)


def _accuracies(axes: Any, evals: Sequence[dict], key: str, title: str) -> None:
  names = sorted({name for row in evals for name in row.get(key, {})})
  styles = ["-", "--", ":"]
  for k, name in enumerate(names):
    points = [(r["step"], r[key][name]) for r in evals if name in r.get(key, {})]
    # Ten colours; the line style tells apart the tasks past the tenth.
    axes.plot(
      *zip(*points), styles[k // 10 % 3], color=f"C{k % 10}", marker="o", markersize=3, label=name
    )
  axes.set(title=title, xlabel="step", ylabel="exact match", ylim=(-0.02, 1.02))
  _finish(axes)


def _finish(axes: Any) -> None:
  axes.grid(alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)
  if axes.get_legend_handles_labels()[1]:
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)

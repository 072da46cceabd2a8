"""What a region's way into the language model is worth: one table and two curves.

  python launch/compare_regions.py --minutes 8 --seeds 3 --out runs/compare

trains the tiny model once for each way (`pyramid`, `pool`, `text`, `pool+text`, `none`) and seed,
with the same scenes in the same order, the same decoder and the same minutes on the same machine,
and writes `table.md`, `curves.png` and `results.json`. A run that has a `summary.json` is not run
again, and one that was stopped goes on from its checkpoint, so the command can be repeated until
everything is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from regionjax.train.metrics import read_metrics

KINDS = ("pyramid", "pool", "text", "pool+text", "none")
CONFIG = Path(__file__).parent.parent / "configs" / "tiny.py"


def run_cell(kind: str, seed: int, args: argparse.Namespace) -> Path:
  """Trains one cell unless it is done; returns its work folder."""
  workdir = args.out / f"{kind.replace('+', '_')}-s{seed}"
  if (workdir / "summary.json").exists():
    return workdir
  command = [
    sys.executable, "-m", "regionjax.cli", "train", f"{CONFIG}:region={kind},seed={seed}",
    f"--train.stop_after_minutes={args.minutes}", "--train.steps=1000000",
    f"--train.eval_every={args.eval_every}", f"--train.eval_examples={args.eval_examples}",
    "--train.save_every=200", "--train.log_every=20", "--workdir", str(workdir), *args.overrides,
  ]  # fmt: skip
  print(f"== {workdir.name}", flush=True)
  subprocess.run(command, check=True)
  return workdir


def read_cell(workdir: Path) -> dict[str, Any]:
  """The curve and the end of one run.

  Returns:
    `curve`: rows of (examples, flops, accuracy); `end`: summary.json.
  """
  rows = read_metrics(workdir / "metrics.jsonl")
  train = [r for r in rows if r["kind"] == "train"]
  steps = [r["step"] for r in train]
  curve = []
  for row in rows:
    if row["kind"] == "eval" and train:
      at = [np.interp(row["step"], steps, [r[key] for r in train]) for key in ("examples", "flops")]
      curve.append((*map(float, at), row["accuracy"]))
  return {"curve": curve, "end": json.loads((workdir / "summary.json").read_text())}


def mean_and_spread(values: Sequence[float]) -> str:
  """`mean ± sample standard deviation` in percent, over seeds."""
  array = 100 * np.asarray(values, float)
  spread = array.std(ddof=1) if len(array) > 1 else float("nan")
  return f"{array.mean():.1f} ± {spread:.1f}"


def table(cells: dict[str, list[dict[str, Any]]]) -> str:
  """Accuracy at the end of the budget, by task and by kind of reference, as Markdown."""
  kinds = list(cells)
  lines = ["| | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]

  def row(name: str, values: list[str]) -> None:
    lines.append("| " + " | ".join([name, *values]) + " |")

  ends = {kind: [cell["end"] for cell in cells[kind]] for kind in kinds}
  overall = [[end["accuracy"]["accuracy"] for end in ends[kind]] for kind in kinds]
  row("**all questions**", [mean_and_spread(values) for values in overall])
  for group in ("by_task", "by_reference"):
    names = sorted({name for k in kinds for e in ends[k] for name in e["accuracy"][group]})
    for name in names:
      label = name if group == "by_task" else f"asked by {name}"
      values = [[e["accuracy"][group].get(name, np.nan) for e in ends[k]] for k in kinds]
      row(label, [mean_and_spread(v) for v in values])
  row("examples seen", [f"{np.mean([e['examples'] for e in ends[k]]):,.0f}" for k in kinds])
  row("model TFLOP spent", [f"{np.mean([e['flops'] for e in ends[k]]) / 1e12:.1f}" for k in kinds])
  row("parameters", [f"{ends[k][0]['parameters']['total']:,}" for k in kinds])
  return "\n".join(lines) + "\n"


def plot(cells: dict[str, list[dict[str, Any]]], path: Path, *, title: str) -> None:
  """Accuracy against examples and against FLOPs; one thin line a seed, a bold one for the mean."""
  figure = Figure(figsize=(12, 4.6), layout="constrained")
  FigureCanvasAgg(figure)
  figure.suptitle(title)
  for axes, column, label in zip(
    figure.subplots(1, 2), (0, 1), ("examples seen", "model FLOPs spent"), strict=True
  ):
    for k, (kind, runs) in enumerate(cells.items()):
      curves = [np.asarray(run["curve"]) for run in runs if run["curve"]]
      for curve in curves:
        axes.plot(curve[:, column], 100 * curve[:, 2], color=f"C{k}", alpha=0.3, linewidth=0.8)
      grid = np.linspace(max(c[0, column] for c in curves), min(c[-1, column] for c in curves), 60)
      mean = np.mean([np.interp(grid, c[:, column], c[:, 2]) for c in curves], axis=0)
      axes.plot(grid, 100 * mean, color=f"C{k}", linewidth=2, label=kind)
    axes.set(xlabel=label, ylabel="held-out exact match, %")
    axes.set_xscale("log")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
  figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--out", type=Path, default=Path("runs/compare"))
  parser.add_argument("--minutes", type=float, default=8.0, help="of training for each run")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
  parser.add_argument("--eval-every", type=int, default=100, help="steps")
  parser.add_argument("--eval-examples", type=int, default=768)
  parser.add_argument("overrides", nargs="*", help="further settings, after --: --data.rows=8")
  args = parser.parse_args(argv)

  args.out.mkdir(parents=True, exist_ok=True)
  for seed in range(args.seeds):  # seed by seed: a table of all kinds exists after the first
    for kind in args.kinds:
      run_cell(kind, seed, args)
    cells = {
      kind: [read_cell(run_cell(kind, s, args)) for s in range(seed + 1)] for kind in args.kinds
    }
    text = table(cells)
    (args.out / "table.md").write_text(text)
    (args.out / "results.json").write_text(json.dumps(cells, indent=1) + "\n")
    plot(
      cells, args.out / "curves.png",
      title=f"scenes, {args.minutes:g} minutes a run, {seed + 1} seeds (thin lines)",
    )  # fmt: skip
    print(text, flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main())

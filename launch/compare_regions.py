"""What a region's way into the language model is worth: a table and curves.

  python launch/compare_regions.py --minutes 8 --seeds 3 --out runs/compare

trains the tiny model once for each way (`pyramid`, `pool`, `text`, `pool+text`, `none`) and seed,
with the same scenes in the same order, the same decoder and the same minutes on the same machine,
and writes `table.md`, `results.json` and pictures of the curves: all questions and each kind of
reference in `curves.png`, each task in `tasks-1.png` and `tasks-2.png`. A run that has a
`summary.json` is not run again, and one that was stopped goes on from its checkpoint, so the
command can be repeated until everything is there.
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
from matplotlib.lines import Line2D

from regionjax.train.metrics import read_metrics

KINDS = ("pyramid", "pool", "text", "pool+text", "none")
Cells = dict[str, list[dict[str, Any]]]  # way -> what `read_cell` gives for each seed
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
  """The curves and the end of one run.

  Returns:
    `curves`: 'all', each task and each kind of reference -> rows of (examples, flops, accuracy),
      one an evaluation; `end`: summary.json.
  """
  rows = read_metrics(workdir / "metrics.jsonl")
  train = [r for r in rows if r["kind"] == "train"]
  steps = [r["step"] for r in train]
  curves: dict[str, list[tuple[float, float, float]]] = {}
  for row in rows:
    if row["kind"] == "eval" and train:
      examples, flops = (
        float(np.interp(row["step"], steps, [r[key] for r in train]))
        for key in ("examples", "flops")
      )
      named = {"all": row["accuracy"], **row["by_task"]}
      named |= {f"by {kind}": value for kind, value in row["by_reference"].items()}
      for name, accuracy in named.items():
        curves.setdefault(name, []).append((examples, flops, accuracy))
  return {"curves": curves, "end": json.loads((workdir / "summary.json").read_text())}


def mean_and_spread(values: Sequence[float]) -> str:
  """`mean ± sample standard deviation` in percent, over seeds."""
  array = 100 * np.asarray(values, float)
  spread = array.std(ddof=1) if len(array) > 1 else float("nan")
  return f"{array.mean():.1f} ± {spread:.1f}"


def table(cells: Cells) -> str:
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


def plot(cells: Cells, names: Sequence[str], path: Path, *, title: str) -> None:
  """One panel a name, above against examples and below against FLOPs.

  One thin line a seed, a bold one for the mean.
  """
  figure = Figure(figsize=(2.6 * len(names) + 0.6, 5.6), layout="constrained")
  FigureCanvasAgg(figure)
  figure.suptitle(title)
  grid = figure.subplots(2, len(names), squeeze=False, sharey=True)
  for column, name in enumerate(names):
    for x, label in enumerate(("examples seen", "model FLOPs spent")):
      axes = grid[x][column]
      for k, runs in enumerate(cells.values()):
        curves = [np.asarray(run["curves"][name]) for run in runs if name in run["curves"]]
        _draw_curves(axes, curves, x, f"C{k}")
      axes.set(title=name if x == 0 else None, xlabel=label, xscale="log")
      axes.grid(alpha=0.3)
      axes.spines[["top", "right"]].set_visible(False)
  for axes in grid[:, 0]:
    axes.set(ylabel="exact match, %", ylim=(0, 100))
  handles = [Line2D([], [], color=f"C{k}", linewidth=2) for k in range(len(cells))]
  figure.legend(handles, list(cells), loc="outside lower center", ncols=len(cells), frameon=False)
  figure.savefig(path, dpi=110)


def _draw_curves(axes: Any, curves: Sequence[np.ndarray], x: int, colour: str) -> None:
  """Curves [evaluations, (examples, flops, accuracy)] over column `x`, and their mean."""
  for curve in curves:
    axes.plot(curve[:, x], 100 * curve[:, 2], color=colour, alpha=0.3, linewidth=0.8)
  if not curves:
    return
  shared = np.linspace(max(c[0, x] for c in curves), min(c[-1, x] for c in curves), 60)
  mean = np.mean([np.interp(shared, c[:, x], c[:, 2]) for c in curves], axis=0)
  axes.plot(shared, 100 * mean, color=colour, linewidth=2)


def draw_all(cells: Cells, out: Path, *, title: str) -> None:
  """curves.png (all questions, and by kind of reference), tasks-1.png and tasks-2.png."""
  names = sorted({name for runs in cells.values() for run in runs for name in run["curves"]})
  references = [name for name in names if name.startswith("by ") and name != "by none"]
  tasks = [name for name in names if name != "all" and not name.startswith("by ")]
  half = -(-len(tasks) // 2)
  for file, panels in (
    ("curves.png", ["all", *references]),
    ("tasks-1.png", tasks[:half]),
    ("tasks-2.png", tasks[half:]),
  ):
    if panels:
      plot(cells, panels, out / file, title=title)


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
    title = f"scenes, {args.minutes:g} minutes a run, {seed + 1} seeds (thin lines)"
    draw_all(cells, args.out, title=title)
    print(text, flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main())

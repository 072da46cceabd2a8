"""What a region's way into the language model is worth: a table and curves.

  python launch/compare_regions.py --minutes 8 --seeds 3 --out runs/compare

trains the tiny model once for each way (`pyramid`, `pool`, `text`, `pool+text`, `none`) and seed,
with the same scenes and dialogues in the same order, the same decoder and the same minutes on the
same machine, and writes `table.md`, `results.json` and pictures of the curves: all questions and
each kind of reference in `curves.png`, each task in `tasks-1.png` and `tasks-2.png`.

Coordinates as text make a dialogue about three times as long as slots do. So that all ways learn
from the same questions, dialogues are short (6 to 9 questions) and rows as long as each way needs:
192 tokens, and 512 with text. What a row still has no room for is dropped, 0.3 to 2 % of the
questions; the table says how many for each way.

`--minutes` is the whole of a run: training stops a little earlier, so that the last evaluation and
the export fit in. Ctrl-C or SIGTERM lets the run at hand save and stops. The command can be
repeated until everything is there: it goes on from the checkpoint of a run that was stopped, and
does not repeat one that has a `summary.json`; a run made under other settings is refused.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from regionjax.config import Config, ConfigError, from_dict
from regionjax.config_files import difference, load_config, read_config
from regionjax.conversation import Renderer
from regionjax.data.mixing import Draw, Mixture
from regionjax.data.sources import make_source
from regionjax.data.stream import Rejected, encode_draw
from regionjax.tokenizer import load_tokenizer
from regionjax.train.evals import held_out_config
from regionjax.train.metrics import read_metrics
from regionjax.train.progress import short

KINDS = ("pyramid", "pool", "text", "pool+text", "none")
Cells = dict[str, list[dict[str, Any]]]  # way -> what `read_cell` gives for each seed
CONFIG = Path(__file__).parent.parent / "configs" / "tiny.py"

# What a run takes besides training's own clock, for the slowest way: starting Python and jax (7 s),
# an evaluation that begins just before the time is up (25 s with rows of 512 tokens), the export
# and the picture (10 s).
FINISH_MINUTES = 0.75
DRAWS = 200  # dialogues in which dropped questions are counted: 1 s
# Settings that change nothing in what is compared.
FREE = ("train.save_every", "train.log_every", "train.keep", "data.workers", "data.prefetch")


class StoppedError(Exception):
  """A signal ended the run at hand; the argument is its number."""


def cell_dir(kind: str, seed: int, out: Path) -> Path:
  return out / f"{kind.replace('+', '_')}-s{seed}"


def settings(kind: str, seed: int, args: argparse.Namespace) -> list[str]:
  """What follows `regionjax train` for a cell: the config file and its overrides."""
  written = ["--data.tokens_per_row=512"] if kind.endswith("text") else []
  return [
    f"{CONFIG}:region={kind},seed={seed}",
    "--data.sources.0.args.turns=(6,9)", *written,
    f"--train.stop_after_minutes={args.minutes - FINISH_MINUTES:.6g}", "--train.steps=1000000",
    f"--train.eval_every={args.eval_every}", f"--train.eval_examples={args.eval_examples}",
    "--train.save_every=50", "--train.log_every=20", *args.overrides,
  ]  # fmt: skip


def check_cell(workdir: Path, config: Config) -> None:
  """Raises ConfigError, with the differences, if a cell is there and was made otherwise."""
  if (workdir / "summary.json").exists():
    found = from_dict(Config, json.loads((workdir / "summary.json").read_text())["config"])
  elif (workdir / "config.json").exists():
    found = read_config(workdir / "config.json")
  else:
    return
  changed = {k: pair for k, pair in difference(found, config).items() if k not in FREE}
  if changed:
    lines = [f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in changed.items()]
    raise ConfigError(
      f"{workdir} holds a run under other settings:\n" + "\n".join(lines) + "\nGive the settings "
      "it was made with, another --out, or delete it (train.stop_after_minutes is --minutes less "
      f"{FINISH_MINUTES:g})"
    )


def run_cell(kind: str, seed: int, args: argparse.Namespace) -> None:
  """Trains one cell, or goes on training it, unless it is done.

  Raises:
    StoppedError: by a signal, after the cell was saved.
    ConfigError: it ended without a result; it has said why itself.
  """
  workdir = cell_dir(kind, seed, args.out)
  if (workdir / "summary.json").exists():
    return
  print(f"== {workdir.name}", flush=True)
  command = [sys.executable, "-m", "regionjax.cli", "train", *settings(kind, seed, args)]
  code = run_child([*command, "--workdir", str(workdir)])
  if not (workdir / "summary.json").exists():
    raise ConfigError(f"the run in {workdir} ended with exit code {code} and without a result")


def run_child(command: Sequence[str]) -> int:
  """Runs a command and waits until it has ended by itself; signals meanwhile are passed on to it.

  The child has a process group of its own: a terminal sends Ctrl-C to the whole group, and the
  second SIGINT tells `regionjax train` not to save.

  Returns:
    Its exit code.

  Raises:
    StoppedError: there was a signal (and the child has ended).
  """
  received: list[int] = []
  # nohup, and shells for what they run behind, ignore a signal on purpose.
  heard = [
    number
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if signal.getsignal(number) is not signal.SIG_IGN
  ]
  before = {n: signal.signal(n, lambda number, _: received.append(number)) for n in heard}
  try:
    child = subprocess.Popen(command, process_group=0)
    passed = 0
    while child.poll() is None:
      for number in received[passed:]:
        # `regionjax train` saves on SIGINT and SIGTERM.
        child.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
        passed += 1
      with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(timeout=0.1)
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
  if received:
    raise StoppedError(received[0])
  return child.returncode


def read_cell(workdir: Path) -> dict[str, Any]:
  """The curves and the end of one run.

  Returns:
    `curves`: 'all', each task and each kind of reference -> rows of (examples, flops, accuracy),
      one an evaluation; `end`: summary.json.
  """
  rows = read_metrics(workdir / "metrics.jsonl")
  end = json.loads((workdir / "summary.json").read_text())
  # The last evaluation comes after the last logged step: what the run saw in all is in the summary.
  known = [(r["step"], r["examples"], r["flops"]) for r in rows if r["kind"] == "train"]
  steps, examples, flops = zip(*known, (end["steps"], end["examples"], end["flops"]))
  curves: dict[str, list[tuple[float, float, float]]] = {}
  for row in rows:
    if row["kind"] == "eval":
      x = tuple(float(np.interp(row["step"], steps, values)) for values in (examples, flops))
      named = {"all": row["accuracy"], **row["by_task"]}
      named |= {f"by {kind}": value for kind, value in row["by_reference"].items()}
      for name, accuracy in named.items():
        curves.setdefault(name, []).append((*x, accuracy))
  return {"curves": curves, "end": end}


def count_questions(config: Config) -> dict[str, int]:
  """How many questions the evaluation asks: in 'all', by task, and by reference as 'by KIND'."""
  renderer = Renderer(config.prompt, config.model, load_tokenizer(config.prompt.tokenizer))
  source = make_source(held_out_config(config.data.sources[0]))
  counts: collections.Counter[str] = collections.Counter()
  for i in range(min(config.train.eval_examples, len(source))):
    with contextlib.suppress(Rejected):
      item = encode_draw(Draw(i, source.name, source[i]), renderer, config)
      for task, _, kind in item.encoded.answers:
        counts.update(("all", task or "none", f"by {kind or 'none'}"))
  return dict(counts)


def share_dropped(config: Config) -> float:
  """Share of the questions in the first DRAWS training dialogues that find no room in a row."""
  renderer = Renderer(config.prompt, config.model, load_tokenizer(config.prompt.tokenizer))
  sources = [make_source(source) for source in config.data.sources]
  mixture = Mixture(config.data.sources, sources, seed=config.data.seed)
  asked = kept = 0
  for draw in (mixture[i] for i in range(DRAWS)):
    asked += sum(turn.role == "assistant" and turn.supervise for turn in draw.example.turns)
    with contextlib.suppress(Rejected):
      kept += len(encode_draw(draw, renderer, config).encoded.answers)
  return 1 - kept / asked


def mean_and_spread(values: Sequence[float]) -> str:
  """`mean ± sample standard deviation` in percent, over seeds; of one seed its value."""
  array = 100 * np.asarray(values, float)
  return f"{array.mean():.1f}" + (f" ± {array.std(ddof=1):.1f}" if len(array) > 1 else "")


def table(
  cells: Cells, questions: Mapping[str, Mapping[str, int]], dropped: Mapping[str, float]
) -> str:
  """Accuracy at the end of the budget, by task and by kind of reference, as Markdown.

  Args:
    cells: the runs.
    questions: way -> what `count_questions` gives.
    dropped: way -> what `share_dropped` gives.
  """
  kinds = list(cells)
  lines = ["| | n | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 2) + "|"]

  def row(label: str, values: list[str], name: str = "") -> None:
    counts = sorted({questions[kind].get(name, 0) for kind in kinds}) if name else []
    lines.append("| " + " | ".join([label, " or ".join(map(str, counts)), *values]) + " |")

  ends = {kind: [cell["end"] for cell in cells[kind]] for kind in kinds}
  overall = [[end["accuracy"]["accuracy"] for end in ends[kind]] for kind in kinds]
  row("**all questions**", [mean_and_spread(values) for values in overall], "all")
  for group, prefix, label in (("by_task", "", ""), ("by_reference", "by ", "asked by ")):
    names = sorted({name for k in kinds for e in ends[k] for name in e["accuracy"][group]})
    for name in names:
      values = [[e["accuracy"][group].get(name, np.nan) for e in ends[k]] for k in kinds]
      row(label + name, [mean_and_spread(v) for v in values], prefix + name)
  row("examples seen", [f"{np.mean([e['examples'] for e in ends[k]]):,.0f}" for k in kinds])
  cut = {
    k: [e["data"]["truncated"] / sum(e["data"]["draws"].values()) for e in ends[k]] for k in kinds
  }
  row("dialogues cut short, %", [f"{100 * np.mean(cut[k]):.1f}" for k in kinds])
  row("questions dropped, %", [f"{100 * dropped[k]:.1f}" for k in kinds])
  row("model TFLOP spent", [f"{np.mean([e['flops'] for e in ends[k]]) / 1e12:.1f}" for k in kinds])
  row("parameters", [f"{ends[k][0]['parameters']['total']:,}" for k in kinds])
  seeds = max(len(runs) for runs in cells.values())
  lines += [
    "",
    f"Exact match in %: mean ± sample standard deviation over the seeds (here {seeds}; each has "
    "its own initialisation and training scenes). All runs are asked the same n unseen questions: "
    "what another draw of questions would change, about 50/√n points, is not in the ±.",
  ]
  return "\n".join(lines) + "\n"


def plot(cells: Cells, names: Sequence[str], path: Path, *, title: str) -> None:
  """One panel a name, above against examples and below against FLOPs.

  One thin line a seed, a bold one for the mean.
  """
  points = [row for runs in cells.values() for run in runs for n in names if n in run["curves"]
            for row in run["curves"][n]]  # fmt: skip
  top = min(100.0, 110 * max((accuracy for *_, accuracy in points), default=1.0) + 5)
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
      axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
      axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
      axes.xaxis.set_minor_formatter(NullFormatter())
      axes.grid(alpha=0.3)
      axes.spines[["top", "right"]].set_visible(False)
  for axes in grid[:, 0]:
    axes.set(ylabel="exact match, %", ylim=(0, top))
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


def check_answers(cells: Cells, questions: Mapping[str, Mapping[str, int]], out: Path) -> None:
  """Raises ConfigError if a run was evaluated on other questions than are counted now."""
  for kind, runs in cells.items():
    for seed, run in enumerate(runs):
      then, now = run["end"]["accuracy"]["answers"], questions[kind]["all"]
      if then != now:
        raise ConfigError(
          f"{cell_dir(kind, seed, out)} was evaluated on {then} questions and this version asks "
          f"{now}: the code has changed since; name another --out"
        )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=Path, default=Path("runs/compare"))
  parser.add_argument("--minutes", type=float, default=8.0, help="the whole of each run")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
  parser.add_argument("--eval-every", type=int, default=150, help="steps")
  parser.add_argument("--eval-examples", type=int, default=1040, help="13 tasks share them")
  parser.add_argument("overrides", nargs="*", help="further settings, after --: --data.rows=8")
  args = parser.parse_args(argv)
  if args.minutes <= FINISH_MINUTES:
    parser.error(
      f"--minutes={args.minutes:g}: the last evaluation and the export alone take "
      f"{FINISH_MINUTES:g}; give more"
    )
  return args


def main(argv: Sequence[str] | None = None) -> int:
  args = parse_arguments(argv)
  try:
    return compare(args)
  except StoppedError as stopped:
    print("stopped; the same command goes on from here", file=sys.stderr)
    return 128 + stopped.args[0]
  except KeyboardInterrupt:  # between two runs
    return 128 + signal.SIGINT
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2


def compare(args: argparse.Namespace) -> int:
  """Trains all cells and writes tables and pictures, anew after each seed."""
  configs: dict[str, Config] = {}
  for kind in args.kinds:  # all are checked before the first one costs minutes
    for seed in reversed(range(args.seeds)):
      spec, *overrides = settings(kind, seed, args)
      configs[kind] = load_config(spec, overrides)
      check_cell(cell_dir(kind, seed, args.out), configs[kind])
  args.out.mkdir(parents=True, exist_ok=True)
  questions = {kind: count_questions(config) for kind, config in configs.items()}
  dropped = {kind: share_dropped(config) for kind, config in configs.items()}
  for seed in range(args.seeds):  # seed by seed: a table of all kinds exists after the first
    for kind in args.kinds:
      run_cell(kind, seed, args)
    cells = {
      kind: [read_cell(cell_dir(kind, s, args.out)) for s in range(seed + 1)] for kind in args.kinds
    }
    check_answers(cells, questions, args.out)
    text = table(cells, questions, dropped)
    (args.out / "table.md").write_text(text)
    (args.out / "results.json").write_text(json.dumps(cells, indent=1) + "\n")
    title = f"scenes, {args.minutes:g} minutes a run, {seed + 1} seeds (thin lines)"
    draw_all(cells, args.out, title=title)
    print(text, flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main())

"""What an evaluation found, as figures, as a table and as a bar chart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from regionjax.evaluate.accuracy import Question, constant_chance
from regionjax.evaluate.intervals import wilson

# A model that reads the region loses it when the region goes: blanked, it may not do better than
# this multiple of answering for a random object of the same scene.
BLANKED_LIMIT = 1.2


@dataclasses.dataclass(frozen=True)
class Outcome:
  """One question answered. `blanked_right` is None where the question names no region."""

  question: Question
  text: str
  right: bool
  blanked_text: str | None = None
  blanked_right: bool | None = None


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table: some questions of one kind.

  Attributes:
    name: of the task or of the kind of reference.
    total, correct: questions and right answers.
    chance: accuracy of the best single answer to each task.
    dependent: questions whose answer depends on the region; the next three are about these only.
    dependent_correct: right answers to them.
    blanked_correct: right answers to them of the model that isn't shown the regions.
    random_object: expected accuracy of answering for a random object of the same scene; None where
      that isn't known.
  """

  name: str
  total: int
  correct: int
  chance: float
  dependent: int
  dependent_correct: int
  blanked_correct: int
  random_object: float | None

  @property
  def accuracy(self) -> float:
    return self.correct / self.total if self.total else 0.0

  @property
  def blanked(self) -> float | None:
    """Accuracy without regions on the questions that depend on them."""
    return self.blanked_correct / self.dependent if self.dependent else None

  @property
  def blanked_ratio(self) -> float | None:
    """`blanked` over `random_object`; at most BLANKED_LIMIT if the model reads its regions."""
    if self.blanked is None or not self.random_object:
      return None
    return self.blanked / self.random_object

  @property
  def reads_regions(self) -> bool | None:
    """Whether it answers for the region that is meant: far better with regions than without."""
    if self.blanked_ratio is None or self.random_object is None:
      return None
    better = self.dependent_correct > BLANKED_LIMIT * self.random_object * self.dependent
    return better and self.blanked_ratio <= BLANKED_LIMIT

  def to_json(self) -> dict[str, Any]:
    low, high = wilson(self.correct, self.total)
    blanked = {}
    if self.dependent:
      blow, bhigh = wilson(self.blanked_correct, self.dependent)
      blanked = {
        "dependent_accuracy": self.dependent_correct / self.dependent,
        "blanked": self.blanked, "blanked_low": blow, "blanked_high": bhigh,
        "random_object": self.random_object, "blanked_ratio": self.blanked_ratio,
        "reads_regions": self.reads_regions,
      }  # fmt: skip
    return {
      "name": self.name, "total": self.total, "correct": self.correct,
      "accuracy": self.accuracy, "low": low, "high": high, "chance": self.chance,
      "dependent": self.dependent, **blanked,
    }  # fmt: skip


def make_row(name: str, outcomes: Iterable[Outcome]) -> Row:
  """Counts some outcomes."""
  items = list(outcomes)
  dependent = [o for o in items if o.question.region_dependent]
  chances = [o.question.object_chance for o in dependent]
  known = bool(chances) and all(c is not None for c in chances)
  return Row(
    name=name,
    total=len(items),
    correct=sum(o.right for o in items),
    chance=constant_chance(o.question for o in items),
    dependent=len(dependent),
    dependent_correct=sum(o.right for o in dependent),
    blanked_correct=sum(bool(o.blanked_right) for o in dependent),
    random_object=sum(c for c in chances if c is not None) / len(chances) if known else None,
  )


@dataclasses.dataclass(frozen=True)
class Report:
  """A finished evaluation.

  Attributes:
    title: what was evaluated.
    outcomes: one per question.
    seconds: it took, compilation included.
  """

  title: str
  outcomes: tuple[Outcome, ...]
  seconds: float = 0.0

  def rows(self, key: Callable[[Question], str]) -> list[Row]:
    """One row per value of `key`, in the order of first appearance by name."""
    names = sorted({key(o.question) for o in self.outcomes})
    return [make_row(n, (o for o in self.outcomes if key(o.question) == n)) for n in names]

  @property
  def tasks(self) -> list[Row]:
    return self.rows(lambda q: q.task)

  @property
  def references(self) -> list[Row]:
    """Rows for box, point, ...: single-region name and attribute questions, else all tasks."""
    order = ("box", "point", "polygon", "mask", "scribble", "mixed")
    named = [o for o in self.outcomes if o.question.reference != "none"]
    plain = [o for o in named if o.question.task in ("name", "attribute")]
    picked = plain or named
    kinds = {o.question.reference for o in picked}
    return [
      make_row(k, (o for o in picked if o.question.reference == k)) for k in order if k in kinds
    ]

  @property
  def total(self) -> Row:
    return make_row("all", self.outcomes)

  def to_json(self) -> dict[str, Any]:
    """Everything as plain values; the answers included."""
    return {
      "title": self.title,
      "seconds": round(self.seconds, 2),
      "total": self.total.to_json(),
      "tasks": [r.to_json() for r in self.tasks],
      "references": [r.to_json() for r in self.references],
      "answers": [
        {
          "id": str(o.question.example.meta.get("id", "")),
          "task": o.question.task,
          "about": o.question.about,
          "reference": o.question.reference,
          "question": o.question.example.turns[-2].text,
          "accepted": list(o.question.accepted) or [_place(o.question)],
          "answer": o.text,
          "right": o.right,
          "blanked_answer": o.blanked_text,
          "blanked_right": o.blanked_right,
        }
        for o in self.outcomes
      ],
    }

  def table(self) -> str:
    """The report for people."""
    plain = any(o.question.task in ("name", "attribute") for o in self.outcomes)
    lines = [self.title, ""]
    lines += _table("task", [*self.tasks, self.total])
    if self.references:
      which = "name and attribute questions" if plain else "questions"
      lines += ["", f"{which} by kind of reference", ""]
      lines += _table("reference", self.references)
    lines += [
      "",
      "accuracy: answers that equal the right one but for case and blanks (a box: IoU >= 0.5),",
      "  with Wilson's 95 % interval. chance: one answer for each task, the best in hindsight.",
      "blanked: the same model without the regions, on questions whose answer depends on them.",
      "random object: answering those for a random object of the same scene; a model that reads",
      f"  its regions falls to at most {BLANKED_LIMIT} x that (`ratio`) when blanked.",
    ]
    total = self.total
    if total.blanked_ratio is not None:
      lines += [
        "",
        f"blanked / random object = {total.blanked_ratio:.2f}; reads its regions: "
        + ("yes" if total.reads_regions else "NO"),
      ]
    return "\n".join(lines) + "\n"


def _table(first: str, rows: Sequence[Row]) -> list[str]:
  head = (first, "n", "accuracy", "95 %", "chance", "blanked", "random object", "ratio")
  body = []
  for row in rows:
    low, high = wilson(row.correct, row.total)
    body.append(
      (
        row.name, str(row.total), _percent(row.accuracy), f"{100 * low:.0f}-{100 * high:.0f}",
        _percent(row.chance), _percent(row.blanked), _percent(row.random_object),
        "-" if row.blanked_ratio is None else f"{row.blanked_ratio:.2f}",
      )
    )  # fmt: skip
  widths = [max(len(r[c]) for r in [head, *body]) for c in range(len(head))]
  lines = [
    "  ".join([r[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(r[1:], widths[1:]))])
    for r in [head, *body]
  ]
  return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _percent(value: float | None) -> str:
  return "-" if value is None else f"{100 * value:.1f}"


def _place(question: Question) -> list[float]:
  assert question.place is not None
  return [round(v, 4) for v in question.place.box_xyxy]


def bar_chart(report: Report, path: Path) -> None:
  """Writes accuracy against blanked, random object and chance, per task, as a picture."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  rows = [*report.tasks, report.total]
  figure = Figure(figsize=(max(6.0, 1.0 + 0.85 * len(rows)), 4.6), dpi=120, layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  width = 0.2
  series = (
    ("this model", "#1f77b4", [r.accuracy for r in rows]),
    ("blanked (no regions)", "#ff7f0e", [r.blanked for r in rows]),
    ("random object of the scene", "#9467bd", [r.random_object for r in rows]),
    ("chance (best single answer per task)", "#bbbbbb", [r.chance for r in rows]),
  )
  for at, (label, colour, values) in enumerate(series):
    xs = [i + (at - 1.5) * width for i, v in enumerate(values) if v is not None]
    ys = [100 * v for v in values if v is not None]
    axes.bar(xs, ys, width, label=label, color=colour)
  bounds = [wilson(r.correct, r.total) for r in rows]
  axes.errorbar(
    [i - 1.5 * width for i in range(len(rows))],
    [100 * r.accuracy for r in rows],
    yerr=[
      [100 * (r.accuracy - low) for r, (low, _) in zip(rows, bounds)],
      [100 * (high - r.accuracy) for r, (_, high) in zip(rows, bounds)],
    ],
    fmt="none", ecolor="black", elinewidth=1, capsize=2,
  )  # fmt: skip
  axes.set_xticks(range(len(rows)), [f"{r.name}\nn={r.total}" for r in rows], fontsize=8)
  axes.set_ylim(0, 105)
  axes.set_ylabel("exact answers, %")
  axes.set_title(report.title, fontsize=10)
  axes.spines[["top", "right"]].set_visible(False)
  axes.yaxis.grid(True, alpha=0.3)
  axes.set_axisbelow(True)
  axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
  figure.savefig(path)

"""Questions with known answers, and whether a generated text answers them.

One rule for every task: the text equals an accepted answer but for case and white space. Two tasks
are judged by what the text means: a place is right when its box overlaps the wanted one with
IoU >= 0.5, and a choice by its letter.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

from regionjax.data.schema import SLOT, Example
from regionjax.mentions import parse
from regionjax.regions import Region

MIN_IOU = 0.5
# "(B)", wherever it stands, or a letter alone; the article of "a star" is no choice.
_LETTER = re.compile(r"\(([A-Z])\)|^\W*([A-Z])\W*$")


@dataclasses.dataclass(frozen=True)
class Question:
  """One answer that is wanted of the model.

  Attributes:
    example: the dialogue up to and with that answer, which is its last turn.
    task: what kind of question it is.
    about: what of the object is asked, '' if the source doesn't say.
    reference: kind of the regions in the question; 'mixed' for several, 'none' without any.
    accepted: answers that count as right; empty for a place.
    place: the region that is wanted as the answer, or None.
    choices: whether it is answered by a letter.
    region_dependent: whether the right answer depends on which region is meant.
    object_chance: probability of being right with the answer for a random object of the same
      scene, the one asked about included; None where that isn't known.
  """

  example: Example
  task: str
  about: str = ""
  reference: str = "none"
  accepted: tuple[str, ...] = ()
  place: Region | None = None
  choices: bool = False
  region_dependent: bool = False
  object_chance: float | None = None


def questions_of(example: Example) -> list[Question]:
  """Every supervised answer of an example as a question; earlier answers are given as they are."""
  notes = list(example.meta.get("turns", ()))
  questions = []
  for at, turn in enumerate(example.turns):
    if turn.role != "assistant" or not turn.supervise:
      continue
    note = notes[len(questions)] if len(questions) < len(notes) else {}
    last = at == len(example.turns) - 1
    questions.append(_question(example, at, note, last=last))
  return questions


def _question(example: Example, at: int, note: dict[str, Any], *, last: bool) -> Question:
  turn, asked = example.turns[at], example.turns[at - 1].text
  mentioned = [int(k) for kind, k in SLOT.findall(turn.text) if kind == "region"]
  kinds = {example.regions[int(k)].kind for kind, k in SLOT.findall(asked) if kind == "region"}
  reference = note.get("ref") or (kinds.pop() if len(kinds) == 1 else "mixed" if kinds else "none")
  choices = bool(last and example.choices) or turn.task in ("choice", "rationale")
  texts = example.references if last and example.references else (turn.text,)
  return Question(
    example=dataclasses.replace(
      example,
      turns=example.turns[: at + 1],
      choices=example.choices if last else (),
      answer=example.answer if last else None,
    ),
    task=turn.task or str(note.get("task") or example.meta.get("task", "")) or "answer",
    about=str(note.get("about", "")),
    reference=str(reference),
    accepted=() if mentioned else tuple(_literal(text) for text in texts),
    place=example.regions[mentioned[0]] if mentioned else None,
    choices=choices,
    region_dependent=bool(note.get("region_dependent", False)),
    object_chance=note.get("chance"),
  )


def _literal(text: str) -> str:
  """An answer as the model writes it: escapes undone (see `mentions.escape`)."""
  return "".join(part for part in parse(text) if isinstance(part, str))


def collect(source: Any, n: int, *, start: int = 0) -> list[Question]:
  """The questions of a source's examples from `start` on, until there are at least `n`."""
  questions: list[Question] = []
  for i in range(start, len(source)):
    if len(questions) >= n:
      break
    questions += questions_of(source[i])
  return questions


def normalise(text: str) -> str:
  """Lower case, every run of white space one blank, none at the ends."""
  return " ".join(text.lower().split())


def is_right(question: Question, text: str, places: Sequence[Region] = ()) -> bool:
  """Whether a text answers a question.

  Args:
    question: what was asked.
    text: the generated answer.
    places: the regions written in it, for questions that ask for a place; the first one counts.
  """
  if question.place is not None:
    return bool(places) and iou(places[0], question.place) >= MIN_IOU
  if question.choices:
    return letter(text) != "" and letter(text) in map(letter, question.accepted)
  return normalise(text) in {normalise(answer) for answer in question.accepted}


def letter(text: str) -> str:
  """The choice that a text names, a capital letter; '' if it names none."""
  found = _LETTER.search(text.upper())
  return (found[1] or found[2]) if found else ""


def iou(a: Region, b: Region) -> float:
  """Intersection over union of the enclosing boxes; 0 for two boxes without area."""
  ax1, ay1, ax2, ay2 = a.box_xyxy
  bx1, by1, bx2, by2 = b.box_xyxy
  width = max(min(ax2, bx2) - max(ax1, bx1), 0.0)
  height = max(min(ay2, by2) - max(ay1, by1), 0.0)
  common = width * height
  union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - common
  return common / union if union > 0 else 0.0


def constant_chance(questions: Iterable[Question]) -> float:
  """Accuracy of one answer for each task, the best in hindsight: what looking at nothing scores.

  Candidates are the questions' own answers, places included.
  """
  tasks: dict[str, list[Question]] = {}
  for question in questions:
    tasks.setdefault(question.task, []).append(question)
  count = sum(map(len, tasks.values()))
  return sum(map(_most_right, tasks.values())) / count if count else 0.0


def _most_right(items: Sequence[Question]) -> int:
  """How many of the questions the best single answer is right for."""
  texts = {normalise(a): a for q in items for a in q.accepted}
  places = list(dict.fromkeys(q.place for q in items if q.place is not None))
  best = max((sum(is_right(q, a) for q in items) for a in texts.values()), default=0)
  return max(best, max((sum(is_right(q, "", [p]) for q in items) for p in places), default=0))

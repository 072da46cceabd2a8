"""`regionjax demo`: the shipped model on scenes it has never seen, in pictures and figures.

It asks at least `-n` questions about held-out scenes, prints the table of accuracies and writes to
the folder `--out`:

  card-*.png    a scene with numbered regions (box, point, outline, two regions) and a dialogue
  summary.png   accuracy next to the same model without regions and to chance
  report.md     all of it in one page; table.txt and results.json hold the figures
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from regionjax.data.errors import DataError
from regionjax.data.schema import SLOT, Example

if TYPE_CHECKING:
  from regionjax.infer.chat import RegionChat


@dataclasses.dataclass(frozen=True)
class Card:
  """What one picture shows.

  Attributes:
    name: of the file.
    title: in the report.
    tasks: of its questions.
    reference: how they point.
    turns: questions asked.
    scene: index of the scene.
  """

  name: str
  title: str
  tasks: tuple[str, ...]
  reference: str
  turns: int
  scene: int


_ONE = ("name", "attribute", "yesno")
CARDS = (
  Card("box", "Asked by box", _ONE, "box", 4, 3),
  Card("point", "Asked by point", _ONE, "point", 4, 11),
  Card("polygon", "Asked by outline (polygon)", _ONE, "polygon", 4, 5),
  Card("mask", "Asked by outline (mask)", _ONE, "mask", 4, 8),
  Card("two-regions", "Two regions compared", ("compare",), "box", 3, 2),
  Card("pick", "One of several regions", ("pick", "compare"), "mask", 2, 9),
  Card("read", "Reading words and digits", ("read",), "box", 3, 12),
  Card("dialogue", "A dialogue whose turns build on each other", ("dialogue",), "point", 3, 6),
  Card("choice", "Four choices", ("choice", "rationale"), "polygon", 2, 4),
  Card("locate", "Phrase to box", ("locate",), "box", 3, 7),
  Card("caption", "Descriptions of regions and of the image", ("caption", "scene"), "mask", 3, 10),
  Card("count", "Counting, and a description", ("count", "caption"), "point", 3, 1),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of `regionjax demo`."""
  parser.description = __doc__
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("--out", type=Path, default=Path("regionjax-demo"), help="output folder")
  parser.add_argument("-n", type=int, default=500, help="least number of questions (default: 500)")
  parser.add_argument("--checkpoint", default="tiny", help="a release folder (default: shipped)")


def run(args: argparse.Namespace) -> int:
  """Runs `regionjax demo`."""
  start = time.perf_counter()
  if args.n < 1:
    raise DataError(f"-n {args.n}: expected at least one question")
  if args.out.exists() and not args.out.is_dir():
    raise DataError(f"--out {args.out}: it is a file; name a folder")

  from regionjax.evaluate.protocol import evaluate, progress_line
  from regionjax.evaluate.report import bar_chart
  from regionjax.evaluate.scenes import answers_of, scenes_questions
  from regionjax.infer.chat import load

  chat = load(args.checkpoint)
  args.out.mkdir(parents=True, exist_ok=True)
  print(f"{len(CARDS)} pictures and {args.n} questions about scenes the model has never seen")
  captions = [make_card(chat, card, args.out) for card in CARDS]
  title = f"{chat.config.name}: unseen scenes, unseen handwritten digits"
  questions = scenes_questions(args.n, answers=answers_of(chat.config))
  report = evaluate(chat, questions, title=title, progress=progress_line)
  table = report.table()
  bar_chart(report, args.out / "summary.png")
  (args.out / "table.txt").write_text(table, encoding="utf-8")
  results = json.dumps(report.to_json(), indent=1, ensure_ascii=False)
  (args.out / "results.json").write_text(results + "\n", encoding="utf-8")
  (args.out / "report.md").write_text(_page(table, captions), encoding="utf-8")
  print()
  print(table)
  seconds = time.perf_counter() - start
  print(f"{len(report.outcomes)} questions and {len(CARDS)} pictures in {seconds:.0f} s")
  print(f"look at {args.out / 'summary.png'} and {args.out / file_name(CARDS[0])}, or at the page")
  print(f"with everything: {args.out / 'report.md'}")
  return 0


def file_name(card: Card) -> str:
  """The picture's file name; numbered, so that folders list them in the report's order."""
  return f"card-{CARDS.index(card) + 1:02d}-{card.name}.png"


def make_card(chat: RegionChat, card: Card, out: Path) -> str:
  """Holds one card's dialogue with the model's own answers, draws it, and says how it went."""
  from regionjax.data.sources import load_image
  from regionjax.data.sources.scenes import ScenesSource
  from regionjax.evaluate.accuracy import is_right, questions_of
  from regionjax.evaluate.scenes import SEED, answers_of
  from regionjax.infer.cards import session_card

  source = ScenesSource(
    "test", SEED, tasks=card.tasks, references=(card.reference,), turns=card.turns,
    answers=answers_of(chat.config),
  )  # fmt: skip
  # Not every scene allows so many questions of one kind; the first that does is taken.
  tries = (source[i] for i in range(card.scene, card.scene + 100))
  example = next((e for e in tries if len(questions_of(e)) >= card.turns), source[card.scene])
  session = chat.start(load_image(example.images[0]))
  numbers: dict[int, int] = {}  # region of the example -> its number in the dialogue
  notes = []
  for question in questions_of(example):
    text, new = people_text(question.example.turns[-2].text, numbers)
    answer = session.ask(text, [example.regions[k] for k in new])
    right = is_right(question, answer.text, answer.regions)
    notes.append("✓" if right else f"✗ ({right_answer(question.example)})")
  session_card(session, notes=notes).save(out / file_name(card))
  good = sum(note == "✓" for note in notes)
  return f"{card.title}: {good} of {len(notes)} right"


def people_text(text: str, numbers: dict[int, int]) -> tuple[str, list[int]]:
  """An example's question as a person writes it, and its regions that are new.

  Args:
    text: with `{region:k}`.
    numbers: region -> number in the dialogue; grows by the new ones, in order of mention.
  """
  new = []
  for kind, index in SLOT.findall(text):
    if kind == "region" and int(index) not in numbers:
      numbers[int(index)] = len(numbers) + 1
      new.append(int(index))
  return SLOT.sub(
    lambda m: f"<region{numbers[int(m[2])]}>" if m[1] == "region" else m[0], text
  ), new


def right_answer(example: Example) -> str:
  """The last turn's text, its regions as boxes."""

  def box(match: re.Match[str]) -> str:
    x1, y1, x2, y2 = example.regions[int(match[2])].box_xyxy
    return f"[{x1:.2f}, {y1:.2f}, {x2:.2f}, {y2:.2f}]"

  return SLOT.sub(box, example.turns[-1].text)


def _page(table: str, captions: Sequence[str]) -> str:
  cards = "\n\n".join(
    f"### {caption}\n\n![{card.title}]({file_name(card)})" for card, caption in zip(CARDS, captions)
  )
  return (
    "# regionjax demo\n\nScenes, handwritten digits and questions that the model has never seen."
    f"\n\n![accuracy by task](summary.png)\n\n```\n{table}```\n\n## Dialogues\n\n"
    "Every answer is the model's own; ✓ is right, ✗ names the right one.\n\n" + cards + "\n"
  )

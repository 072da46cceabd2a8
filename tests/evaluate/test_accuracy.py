"""Which questions an example asks, and which texts answer them."""

import collections
import dataclasses

import pytest

from regionjax.data.schema import Example, ImageRef, Turn
from regionjax.evaluate.accuracy import (
  Question,
  constant_chance,
  iou,
  is_right,
  letter,
  normalise,
  questions_of,
)
from regionjax.evaluate.scenes import scenes_questions
from regionjax.mentions import escape
from regionjax.regions import Region

BOX = Region.box(0.2, 0.2, 0.6, 0.6)


def example(*turns: Turn, **fields) -> Example:
  regions = (BOX, Region.point(0.1, 0.9))
  return Example(
    images=(ImageRef("file", "a.png", (64, 48)),), regions=regions, region_images=(0, 0),
    turns=turns, **fields,
  )  # fmt: skip


def said(text: str, task: str = "name") -> Turn:
  return Turn("assistant", text, supervise=True, task=task)


PLAIN = Question(example(), "name", accepted=("a red  Star", "star"))


@pytest.mark.parametrize(
  ("text", "right"),
  [("A red star", True), (" star\n", True), ("a red star.", False), ("stars", False), ("", False)],
)
def test_exact_but_for_case_and_blanks(text, right):
  assert is_right(PLAIN, text) is right
  assert normalise("  A\tred\n star ") == "a red star"


@pytest.mark.parametrize(
  ("text", "named"),
  [("(B)", "B"), ("b", "B"), ("B.", "B"), ("The answer is (B).", "B"), ("a star", ""),
   ("a", "A"), ("(B) a star", "B"), ("", ""), ("star", ""), ("AB", "")],
)  # fmt: skip
def test_letters(text, named):
  assert letter(text) == named
  question = Question(example(), "choice", accepted=("(B)",), choices=True)
  assert is_right(question, text) is (named == "B")


def test_places_need_half_the_overlap():
  question = Question(example(), "locate", place=BOX)
  assert is_right(question, "", [BOX])
  assert is_right(question, "", [Region.box(0.2, 0.2, 0.6, 0.41)])  # IoU 0.525
  assert not is_right(question, "", [Region.box(0.2, 0.2, 0.6, 0.39)])  # 0.475
  assert not is_right(question, "", [Region.point(0.4, 0.4), BOX])  # the first one counts
  assert not is_right(question, "somewhere")


def test_iou():
  assert iou(BOX, Region.box(0.4, 0.4, 0.8, 0.8)) == pytest.approx(0.04 / 0.28)
  assert iou(BOX, Region.box(0.7, 0.7, 0.8, 0.8)) == 0
  assert iou(Region.point(0.4, 0.4), Region.point(0.4, 0.4)) == 0
  mask = Region.polygon([(0.2, 0.2), (0.6, 0.2), (0.6, 0.6), (0.2, 0.6)])
  assert iou(BOX, mask) == pytest.approx(1)


def test_every_supervised_answer_is_a_question():
  talk = example(
    Turn("user", "What is {region:0}?"), said("star"),
    Turn("user", "Hm?"), Turn("assistant", "yes"),
    Turn("user", "Where is it? And {region:1}?"), said("{region:0}", "locate"),
    Turn("user", "Which? (A) a (B) b"), said("(B)", "choice"),
    choices=("a", "b"), answer=1, references=("(B)",),
    meta={"id": "7", "turns": [{"task": "name", "ref": "box", "about": "category",
                                "region_dependent": True, "chance": 0.25}]},
  )  # fmt: skip
  first, second, third = questions_of(talk)
  assert (first.task, first.reference, first.about) == ("name", "box", "category")
  assert (first.region_dependent, first.object_chance) == (True, 0.25)
  assert first.example.turns == talk.turns[:2]
  assert first.accepted == ("star",)
  assert (second.task, second.reference, second.place) == ("locate", "point", BOX)
  assert (second.accepted, second.object_chance, second.region_dependent) == ((), None, False)
  assert len(second.example.turns) == 6
  assert (third.choices, third.accepted, third.example.answer) == (True, ("(B)",), 1)
  assert first.example.choices == ()


def test_several_references_and_escapes():
  talk = example(
    Turn("user", "What is {region:0}?"),
    said(escape("a {region:0} sign")),
    references=(escape("a {region:0} sign"), "a sign"),
  )
  (question,) = questions_of(talk)
  assert question.accepted == ("a {region:0} sign", "a sign")
  assert is_right(question, "A {region:0} sign")


def test_constant_chance_is_the_best_single_answer():
  def ask(answer, task="yesno"):
    return dataclasses.replace(PLAIN, task=task, accepted=(answer,))

  answers = [ask("yes"), ask("Yes"), ask("no"), ask("maybe")]
  assert constant_chance(answers) == 0.5
  assert constant_chance([*answers, ask("star", "name"), ask("moon", "name")]) == 0.5
  near = Question(example(), "locate", place=Region.box(0.2, 0.2, 0.6, 0.58))
  far = Question(example(), "locate", place=Region.box(0.7, 0.7, 0.9, 0.9))
  at_box = Question(example(), "locate", place=BOX)
  assert constant_chance([near, far, at_box]) == pytest.approx(2 / 3)
  assert constant_chance([]) == 0


def test_questions_of_the_scenes_world():
  """All tasks equally often, all references, with their chances; no scene serves twice."""
  questions = scenes_questions(200)
  tasks = collections.Counter(q.task for q in questions)
  assert set(tasks) == {
    "name", "attribute", "caption", "read", "compare", "pick", "count", "yesno", "choice",
    "rationale", "locate", "scene", "dialogue",
  }  # fmt: skip
  assert all(16 <= n <= 19 for n in tasks.values())
  ids = {q.example.meta["id"] for q in questions if q.task != "dialogue"}
  assert len(ids) == len(questions) - tasks["dialogue"]
  assert {q.reference for q in questions} == {"box", "point", "polygon", "mask", "none"}
  for question in questions:
    assert question.example.turns[-1].role == "assistant"
    assert bool(question.accepted) != (question.place is not None)
    if question.region_dependent:
      assert 0 < question.object_chance <= 1
    if question.accepted:
      assert is_right(question, question.accepted[0].upper())
    else:
      assert is_right(question, "", [question.place])
  again = scenes_questions(200)
  assert [q.accepted for q in again] == [q.accepted for q in questions]
  other = scenes_questions(200, seed=2)
  assert [q.accepted for q in other] != [q.accepted for q in questions]

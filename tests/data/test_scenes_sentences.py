"""Answers of the scenes source as sentences: the same questions, one form per kind of answer."""

import dataclasses
import re

import pytest

from regionjax.config import Config, DataConfig, SourceConfig
from regionjax.data import phrases
from regionjax.data.errors import DataError
from regionjax.data.scenes_dialogue import TASKS
from regionjax.data.sources.scenes import ScenesSource
from regionjax.evaluate.accuracy import constant_chance, is_right, questions_of
from regionjax.evaluate.scenes import answers_of, scenes_questions

SCENES = 60


@pytest.fixture(scope="module")
def pairs():
  """The same examples with short answers and with sentences."""
  short, long = ScenesSource("test"), ScenesSource("test", answers="sentence")
  return [(short[i], long[i]) for i in range(SCENES)]


def test_only_the_answers_differ_and_all_tasks_occur(pairs):
  tasks = set()
  for short, long in pairs:
    assert [t.text for t in short.turns[::2]] == [t.text for t in long.turns[::2]]
    assert short.regions == long.regions and short.choices == long.choices
    assert short.answer == long.answer
    for a, b, note in zip(short.turns[1::2], long.turns[1::2], long.meta["turns"], strict=True):
      tasks.add(note["task"])
      assert b.text == phrases.sentence(note["about"], a.text)
      letter = re.fullmatch(r"\([A-D]\)", a.text)
      assert (b.text == a.text) if letter else re.fullmatch(r"[A-Z].*\.", b.text)
      if not letter and a.text not in ("yes", "no"):
        assert a.text in b.text
  assert tasks == set(TASKS)


def test_chance_is_that_of_the_short_answers(pairs):
  for short, long in pairs:
    for a, b in zip(short.meta["turns"], long.meta["turns"], strict=True):
      assert a["chance"] == b["chance"]
      assert len(a["scene_answers"]) == len(b["scene_answers"])


@pytest.mark.parametrize(
  ("about", "answer", "sentence"),
  [
    ("category", "arrow", "It is an arrow."),
    ("colour", "orange", "It is orange."),
    ("number", "1", "There is 1."),
    ("number", "0", "There are 0."),
    ("left", "no", "No, it is further right."),
    ("colour", "yes", "Yes, it is."),
    ("which is larger", "second", "The second one is larger."),
    ("texture", "(B)", "(B)"),
  ],
)
def test_sentences(about, answer, sentence):
  assert phrases.sentence(about, answer) == sentence


def test_a_model_is_asked_for_the_form_that_it_learnt():
  config = Config(data=DataConfig(sources=(SourceConfig("scenes", args={"answers": "sentence"}),)))
  assert answers_of(config) == "sentence"
  assert answers_of(dataclasses.replace(config, data=DataConfig())) == "phrase"
  questions = scenes_questions(13, answers="sentence", tasks=["name"])
  assert all(re.fullmatch(r"It is an? \w+\.", q.accepted[0]) for q in questions)
  assert is_right(questions[0], questions[0].accepted[0].upper())
  assert 0 < constant_chance(questions) < 0.5


def test_an_unknown_form_is_refused():
  with pytest.raises(DataError, match=r"answers 'essay': expected one of phrase, sentence"):
    ScenesSource(answers="essay")


def test_a_place_stays_a_place():
  source = ScenesSource("test", tasks=["locate"], turns=1, answers="sentence")
  (question,) = questions_of(source[0])
  assert question.place is not None and question.example.turns[-1].text.startswith("It is at {")

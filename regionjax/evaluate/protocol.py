"""Runs questions through a model, as it is and blanked."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from regionjax.conversation import Renderer
from regionjax.data.schema import SLOT, ImageRef
from regionjax.data.sources import load_image
from regionjax.evaluate.accuracy import Question, is_right
from regionjax.evaluate.report import Outcome, Report
from regionjax.infer.chat import Answer, RegionChat
from regionjax.infer.prompts import answer_examples
from regionjax.infer.sampling import Sampling

MAX_NEW_TOKENS = 96  # the longest answers of the scenes world, whole-image captions, take 70


def evaluate(
  chat: RegionChat,
  questions: Sequence[Question],
  *,
  title: str,
  load: Callable[[ImageRef], np.ndarray] = load_image,
  max_new_tokens: int = MAX_NEW_TOKENS,
  progress: Callable[[int, int], None] | None = None,
) -> Report:
  """Answers every question greedily; those that name a region once more with it left out.

  Args:
    chat: the model.
    questions: from `accuracy.collect`.
    title: of the report.
    load: image reference -> pixels.
    max_new_tokens: an answer that is longer counts as wrong.
    progress: called with (answers so far, answers in all).
  """
  start = time.perf_counter()
  named = [i for i, q in enumerate(questions) if _names_a_region(q)]
  count = len(questions) + len(named)

  def say(offset: int) -> Callable[[int], None]:
    return lambda done: progress(offset + done, count) if progress else None

  answers = _answer(chat, chat.renderer, questions, load, max_new_tokens, say(0))
  blanked = _answer(
    chat, chat.renderer.blank(), [questions[i] for i in named], load, max_new_tokens,
    say(len(questions)),
  )  # fmt: skip
  without = dict(zip(named, blanked))
  outcomes = []
  for i, (question, answer) in enumerate(zip(questions, answers)):
    outcome = Outcome(question, answer.text, is_right(question, answer.text, answer.regions))
    if i in without:
      right = is_right(question, without[i].text, without[i].regions)
      outcome = dataclasses.replace(outcome, blanked_text=without[i].text, blanked_right=right)
    outcomes.append(outcome)
  return Report(title, tuple(outcomes), time.perf_counter() - start)


def progress_line(done: int, count: int) -> None:
  """Shows progress on a terminal; silent elsewhere."""
  if sys.stderr.isatty():
    print(f"\r{done} of {count} answers", end="\n" if done == count else "", file=sys.stderr)


def _names_a_region(question: Question) -> bool:
  turns = [t for t in question.example.turns[:-1] if t.role == "user"]
  return any(kind == "region" for t in turns for kind, _ in SLOT.findall(t.text))


def _answer(
  chat: RegionChat,
  renderer: Renderer,
  questions: Sequence[Question],
  load: Callable[[ImageRef], np.ndarray],
  max_new_tokens: int,
  progress: Callable[[int], None],
) -> list[Answer]:
  examples = [q.example for q in questions]
  generations = answer_examples(
    chat.engine, chat.frame, renderer, examples, load,
    max_new_tokens=max_new_tokens, sampling=Sampling(), progress=progress,
  )  # fmt: skip
  return [
    chat.answer(g, e.images[-1].size if e.images else None) for g, e in zip(generations, examples)
  ]

"""Questions of the scenes world for evaluation: every task equally often, about its own scenes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from regionjax.config import Config
from regionjax.data.errors import DataError
from regionjax.data.scenes_dialogue import TASKS
from regionjax.data.sources.scenes import ScenesSource
from regionjax.evaluate.accuracy import Question, collect

SEED = 1  # of the scenes; training keeps the best of its steps by those of seed 0
_APART = 1_000_000  # task k asks about scenes from k million on, so no two share a scene


def scenes_questions(
  n: int,
  *,
  split: str = "test",
  seed: int = SEED,
  tasks: Sequence[str] | None = None,
  answers: str = "phrase",
) -> list[Question]:
  """At least `n` questions, shared evenly over tasks; references take turns within each task.

  Drawing tasks by chance would give the rarer ones, which not every scene allows, too few questions
  to say anything.

  Args:
    n: least number; up to three more per task, since a dialogue holds two to four.
    split, seed: of the scenes, see `ScenesSource`.
    tasks: names of tasks; None: all.
    answers: 'phrase' or 'sentence'; `answers_of` says what a model learnt.

  Raises:
    DataError: an unknown split or task; the message lists what there is.
  """
  names = list(TASKS if tasks is None else dict.fromkeys(tasks))
  if not names:
    raise DataError(f"no task given: expected some of {', '.join(TASKS)}")
  quota = -(-n // len(names))
  by_task = []
  for k, task in enumerate(names):
    source = ScenesSource(split, seed, tasks=[task], turns=1, answers=answers)
    by_task.append(collect(source, quota, start=k * _APART))
  # Mixed, so that the batches of a run are alike and few shapes are compiled.
  mixed = itertools.chain.from_iterable(itertools.zip_longest(*by_task))
  return [question for question in mixed if question is not None]


def answers_of(config: Config) -> str:
  """The form of answers that a model learnt from the scenes: 'phrase', unless its run said so."""
  styles = (s.args.get("answers", "phrase") for s in config.data.sources if s.name == "scenes")
  return next(styles, "phrase")

"""The scenes world as a source of examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from regionjax.data.errors import DataError
from regionjax.data.scenes import SIDES, make_scene
from regionjax.data.scenes_dialogue import TASKS, WEIGHTS
from regionjax.data.scenes_questions import Asker
from regionjax.data.scenes_references import REFERENCES
from regionjax.data.scenes_render import render
from regionjax.data.scenes_world import SPLITS, Draw
from regionjax.data.schema import Example, ImageRef

LENGTH = 2**31 - 1  # the most that a 32-bit shuffle can address; nobody reaches the end
ANSWERS = ("phrase", "sentence")
MAX_REGIONS = 16  # an example asks nothing more once it has so many


class ScenesSource:
  """Questions about procedural scenes: example i is a dialogue about scene (split, seed, i).

  Args:
    split: 'train'; 'test' (other scenes, other handwritten digits, the same words); or
      'heldout_pairs' (as test, and what is asked about has a pair of colour and category that
      training never shows).
    tasks: names of tasks, with their usual weights, or a mapping from names to weights; None: all.
    references: the kinds of reference, used in turn, so that each is equally frequent.
    image_size: side of the images in pixels, 96 to 256. Another size is another set of scenes.
    turns: least and greatest number of questions of an example. Evaluate with (1, 1); training with
      several makes more of each image.
    answers: 'phrase' (`red`) or 'sentence' (`It is red.`), what a pretrained decoder is used to.

  Raises:
    DataError: an argument out of range; the message lists what there is.
  """

  name = "scenes"

  def __init__(
    self, split: str = "train", seed: int = 0,
    tasks: Sequence[str] | Mapping[str, float] | None = None,
    references: Sequence[str] = REFERENCES, image_size: int = 128,
    turns: int | Sequence[int] = (4, 12), answers: str = "phrase",
  ):  # fmt: skip
    if split not in SPLITS:
      raise DataError(f"scenes split {split!r}: expected one of {', '.join(SPLITS)}")
    self.split, self.seed, self.image_size = split, int(seed), int(image_size)
    if not SIDES[0] <= self.image_size <= SIDES[1]:
      raise DataError(f"scenes image_size {image_size}: expected {SIDES[0]} to {SIDES[1]} pixels")
    self.weights = _weights(tasks)
    self.references = tuple(references)
    unknown = [r for r in self.references if r not in REFERENCES]
    if unknown or not self.references:
      raise DataError(
        f"scenes references {list(references)}: expected some of {', '.join(REFERENCES)}"
      )
    low, high = (turns, turns) if isinstance(turns, int) else turns
    if not 1 <= low <= high:
      raise DataError(
        f"scenes turns {turns}: expected (least, greatest) with 1 <= least <= greatest"
      )
    self.turns = (int(low), int(high))
    if answers not in ANSWERS:
      raise DataError(f"scenes answers {answers!r}: expected one of {', '.join(ANSWERS)}")
    self.answers = answers

  def __len__(self) -> int:
    return LENGTH

  def __getitem__(self, index: int) -> Example:
    """Example `index`: a function of the arguments and the index alone.

    A scene that allows none of the tasks asked for gives way to another one, `index + LENGTH`,
    which no other example uses.
    """
    if not 0 <= index < LENGTH:
      raise IndexError(f"scenes example {index}: expected 0 to {LENGTH - 1}")
    scene_index = int(index)
    while True:
      asker = self._ask(scene_index, int(index))
      if asker.turns:
        return self._example(asker, scene_index)
      scene_index += LENGTH

  def _ask(self, scene_index: int, index: int) -> Asker:
    scene = make_scene(self.split, self.seed, scene_index, self.image_size)
    draw = Draw("ask", self.split, self.seed, scene_index, self.image_size)
    wanted = self.turns[0] + draw.below(self.turns[1] - self.turns[0] + 1)
    sentences = self.answers == "sentence"
    asker = Asker(scene, draw, self.references, index, sentences=sentences)
    weights = dict(self.weights)
    while weights and len(asker.notes) < wanted and len(asker.regions) < MAX_REGIONS:
      task = draw.weighted(tuple(weights), tuple(weights.values()))
      if not TASKS[task](asker):
        del weights[task]
    return asker

  def _example(self, asker: Asker, scene_index: int) -> Example:
    key = f"{self.split}/{self.seed}/{scene_index}"
    tasks = {note["task"] for note in asker.notes}
    options, last = asker.options, asker.turns[-1].text
    return Example(
      images=(ImageRef("scene", key, (self.image_size, self.image_size)),),
      regions=tuple(asker.regions),
      region_images=(0,) * len(asker.regions),
      turns=tuple(asker.turns),
      choices=options,
      answer="ABCD".index(last[1]) if options else None,
      references=(last,),
      meta={
        "source": self.name,
        "id": key,
        "split": self.split,
        "task": tasks.pop() if len(tasks) == 1 else "dialogue",
        "turns": asker.notes,
      },
    )


def _weights(tasks: Sequence[str] | Mapping[str, float] | None) -> dict[str, float]:
  if tasks is None:
    return dict(WEIGHTS)
  if isinstance(tasks, str):
    tasks = [tasks]
  unknown = [t for t in tasks if t not in TASKS]
  if unknown or not tasks:
    raise DataError(f"scenes tasks {list(tasks)}: expected some of {', '.join(TASKS)}")
  weights = dict(tasks) if isinstance(tasks, Mapping) else {t: WEIGHTS[t] for t in tasks}
  if min(weights.values()) < 0 or not any(weights.values()):
    raise DataError(f"scenes tasks {weights}: weights must not be negative, nor all zero")
  return {t: float(w) for t, w in weights.items() if w > 0}


def load_scene(ref: ImageRef) -> np.ndarray:
  """Renders the scene that a reference names by 'split/seed/index', uint8 [side, side, 3].

  Raises:
    DataError: another form of key, or a size that is not square.
  """
  try:
    split, seed, index = ref.key.split("/")
    number, place = int(seed), int(index)
  except ValueError:
    raise DataError(
      f"scene key {ref.key!r}: expected split/seed/index, as in 'test/0/17'"
    ) from None
  width, height = ref.size or (128, 128)
  if width != height:
    raise DataError(f"scene of {width}x{height} pixels: scenes are square")
  return render(make_scene(split, number, place, width))

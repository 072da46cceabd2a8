"""Encoded text and regions -> the engine's prompts: the same arrays as in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from regionjax.conversation import Encoded, Renderer
from regionjax.data.rows import Frame, encode_region_arrays
from regionjax.data.schema import Example, ImageRef
from regionjax.images import ImageTransform
from regionjax.infer.batching import Prompt
from regionjax.infer.engine import Engine, Generation
from regionjax.infer.sampling import Sampling
from regionjax.regions import Region

CHUNK = 64  # examples whose images are held at a time: 64 of 128 x 128 pixels are 12 MB


def make_prompt(
  encoded: Encoded,
  regions: Sequence[Region],
  region_images: Sequence[int],
  transforms: Sequence[ImageTransform],
  *,
  grid: tuple[int, int],
  region_slot_id: int,
  images: Sequence[int],
  start: int = 0,
) -> Prompt:
  """The engine's prompt for ids from `start` on.

  Args:
    encoded: the whole dialogue so far.
    regions: the example's regions, in xy of their original images.
    region_images: for each region, the index of its image in the example.
    transforms: for each image of the example, how its regions move with resizing.
    grid: patches per column and row.
    region_slot_id: the tokenizer's.
    images: for each image of the example, its index among the encoded images.
    start: ids before it are in the cache; all images are, unless it is 0.
  """
  before = int(np.sum(encoded.ids[:start] == region_slot_id)) if region_slot_id >= 0 else 0
  slots = encoded.region_slots[before:]
  arrays = None
  if slots:
    arrays = encode_region_arrays(
      regions, slots, region_images, transforms, grid, image_slots=encoded.image_slots
    )
  return Prompt(encoded.ids[start:], tuple(images[k] for k in encoded.image_slots), arrays)


def answer_examples(
  engine: Engine,
  frame: Frame,
  renderer: Renderer,
  examples: Sequence[Example],
  load: Callable[[ImageRef], np.ndarray],
  *,
  max_new_tokens: int,
  sampling: Sampling,
  progress: Callable[[int], Any] | None = None,
) -> list[Generation]:
  """Generates the last answer of each example, in batches; each distinct image is encoded once.

  Args:
    engine: the model.
    frame: how pixels become its input.
    renderer: writes the prompts; `Renderer.blank()` leaves the regions out.
    examples: an assistant's turn at the end is not shown to the model.
    load: an image reference -> uint8 [h, w, 3].
    max_new_tokens: per answer.
    sampling: how tokens are drawn.
    progress: called with the number of examples answered so far.
  """
  answers: list[Generation] = []
  for start in range(0, len(examples), CHUNK):
    chunk = examples[start : start + CHUNK]
    index: dict[ImageRef, int] = {}
    for ref in (ref for example in chunk for ref in example.images):
      index.setdefault(ref, len(index))
    prepared = [frame.prepare(load(ref)) for ref in index]
    features = engine.encode_images([image for image, _ in prepared])
    prompts = [
      make_prompt(
        renderer.prompt(example),
        example.regions,
        example.region_images,
        [prepared[index[ref]][1] for ref in example.images],
        grid=frame.grid,
        region_slot_id=renderer.tokenizer.region_slot_id,
        images=[index[ref] for ref in example.images],
      )
      for example in chunk
    ]
    answers += engine.generate(prompts, features, max_new_tokens=max_new_tokens, sampling=sampling)
    if progress is not None:
      progress(len(answers))
  return answers

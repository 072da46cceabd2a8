"""How the published systems were trained, as far as it is known: stages, data sets, schedules.

A stage's batch was given in examples; here it is packed rows, each of about `EXAMPLES_PER_ROW`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from regionjax.config.errors import ConfigError
from regionjax.config.run import Config, MeshConfig, SourceConfig

# A row of 2,048 tokens: seven dialogues about an image (258 tokens of it) and eight regions each.
EXAMPLES_PER_ROW = 7
IMAGES_PER_ROW, REGIONS_PER_ROW, TOKENS_PER_ROW = 7, 56, 2048
# Up to so many hosts of a run have no text in common.
MOST_SHARDS = 64


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of a published training.

  Attributes:
    sources: names of data sources; each reads a folder of its own name under the data folder.
    examples: in one epoch, about.
    epochs: passes over them.
    trainable: regexes on parameter paths.
    learning_rate, weight_decay: of AdamW.
    warmup_examples: seen while the rate rises.
  """

  sources: tuple[str, ...]
  examples: int
  epochs: int
  trainable: tuple[str, ...]
  learning_rate: float
  weight_decay: float
  warmup_examples: int


# arXiv 2307.03601 and its published program. Batches of 4 and 16 examples; warm-up over 0.3 % of
# stage 1 and 3,000 steps of stage 2.
GPT4ROI: Mapping[str, Stage] = {
  "stage1": Stage(
    sources=("coco", "refcoco", "refcoco_plus"), examples=358_000, epochs=2,
    trainable=("regions/.*",), learning_rate=2e-5, weight_decay=0.01, warmup_examples=2_150,
  ),
  "stage2": Stage(
    sources=("refcocog", "flickr30k", "visual_genome", "llava", "vcr"), examples=1_000_000,
    epochs=2, trainable=("regions/.*", "connector/.*", "decoder/.*"), learning_rate=2e-5,
    weight_decay=0.0, warmup_examples=48_000,
  ),
}  # fmt: skip

# arXiv 2307.09474. Schedule, warm-up and weight decay are not in the paper: those of LLaVA.
CHATSPOT: Mapping[str, Stage] = {
  "stage1": Stage(
    sources=("cc3m", "textvqa", "docvqa", "ocrvqa", "stvqa"), examples=900_000, epochs=3,
    trainable=("connector/.*",), learning_rate=2e-3, weight_decay=0.0, warmup_examples=81_000,
  ),
  "stage2": Stage(
    sources=("objects365", "art", "hiertext", "cocotext", "pointqa", "visual_genome"),
    examples=1_200_000, epochs=3, trainable=("connector/.*", "decoder/.*"), learning_rate=2e-5,
    weight_decay=0.0, warmup_examples=108_000,
  ),
}  # fmt: skip


def with_stage(
  config: Config,
  stages: Mapping[str, Stage],
  name: str,
  *,
  data: str,
  start: str,
  rows: int,
  seed: int = 0,
) -> Config:
  """A preset as one stage of its training, parameters split over all chips of a slice.

  Args:
    config: a preset.
    stages: GPT4ROI or CHATSPOT.
    name: of the stage.
    data: a folder with the data sets, each in a folder named like its source.
    start: the release to start from.
    rows: packed rows in the global batch.
    seed: of the order of the data.

  Raises:
    ConfigError: an unknown stage.
  """
  if name not in stages:
    raise ConfigError(f"config argument {name!r}: expected {' or '.join(stages)}")
  stage = stages[name]
  batch = rows * EXAMPLES_PER_ROW
  steps = max(1, round(stage.examples * stage.epochs / batch))
  return dataclasses.replace(
    config,
    name=f"{config.name}_{name}",
    model=dataclasses.replace(config.model, remat="full"),
    data=dataclasses.replace(
      config.data,
      sources=tuple(SourceConfig(s, args={"folder": f"{data}/{s}"}) for s in stage.sources),
      rows=rows, tokens_per_row=TOKENS_PER_ROW, images_per_row=IMAGES_PER_ROW,
      regions_per_row=REGIONS_PER_ROW, packing_bins=16, workers=8, seed=seed,
      shards=math.gcd(rows, MOST_SHARDS),
    ),
    train=dataclasses.replace(
      config.train,
      steps=steps, seed=seed, trainable=stage.trainable, init_from=start,
      learning_rate=stage.learning_rate, weight_decay=stage.weight_decay, beta2=0.999,
      warmup_steps=max(1, round(stage.warmup_examples / batch)), save_every=500, eval_every=0,
      mesh=MeshConfig(data=1, fsdp=-1),
    ),
  )  # fmt: skip

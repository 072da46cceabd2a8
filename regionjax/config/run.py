"""What a run is: model, prompt, data and schedule, and what of them belongs together."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from regionjax.config.model import ModelConfig

# The tokens that the two systems add to LLaMA's 32,000, in the order of their ids. `<point>` was
# reserved and never used.
GPT4ROI_TOKENS = ("[PAD]", "<im_patch>", "<bbox>", "<point>", "<im_start>", "<im_end>")
CHATSPOT_TOKENS = ("[PAD]", "<im_patch>", "<im_start>", "<im_end>", "<box>", "</box>")


@dataclasses.dataclass(frozen=True)
class PromptConfig:
  """How an Example becomes text and ids."""

  template: str = "vicuna_v0"  # vicuna_v0 | vicuna_v1 | chatml | smollm2 | llama3 | plain
  tokenizer: str = "tiny"  # 'tiny' (shipped in the package) or a folder with tokenizer files
  added_tokens: tuple[str, ...] = ()  # appended in this order where the tokenizer's files lack them
  mention: str = "name+slot"  # name+slot: `region1 <bbox>` (GPT4RoI); slot: `<bbox>` alone
  coordinates: str = "unit3"  # a name of regions.FORMATS; unit3 is ChatSpot's `0.123`
  coordinate_marks: str = "box"  # box: `<box>[0.123, ...]</box>` (ChatSpot); none: bare (LLaVA)
  max_vertices: int = 8  # polygons and masks written as text are simplified to this many points
  mask: str = "answer"  # answer: the answer and its stop string; gpt4roi: the original's mask
  image_prefix: str = ""  # put before the first turn's text; '{image:0}' stands for the image


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  name: str = "scenes"
  weight: float = 1.0
  args: typing.Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  sources: tuple[SourceConfig, ...] = (SourceConfig(),)
  resize: str = "chatspot"  # a name of images.RESIZE_RULES
  rows: int = 8  # packed rows in the global batch
  tokens_per_row: int = 512  # image and region slots included
  images_per_row: int = 2
  regions_per_row: int = 24
  packing_bins: int = 8  # rows that stay open at once, of each shard
  shards: int = 1  # parts of the global batch that are packed apart: regionjax/data/shards.py
  workers: int = 0  # processes that decode images; 0 decodes in the training process
  prefetch: int = 4  # batches decoded ahead
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How the devices are arranged; at most one size may be -1, which takes those that are left."""

  data: int = -1  # splits the rows of a batch; each part holds all parameters
  fsdp: int = 1  # splits rows and parameters; a layer's are gathered when it runs
  tensor: int = 1  # splits heads, hidden channels and the vocabulary
  slices: int = 1  # groups of devices that only a slow network joins; they split `data`


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  steps: int = 1000
  seed: int = 0
  trainable: tuple[str, ...] = (".*",)  # regexes on parameter paths; the rest is frozen
  init_from: str = ""  # a release folder to start from, or several: see train.initial
  learning_rate: float = 1e-3
  schedule: str = "cosine"  # cosine | wsd
  warmup_steps: int = 100
  decay_fraction: float = 0.2  # wsd: share of the steps that decays to zero
  weight_decay: float = 0.0
  beta1: float = 0.9
  beta2: float = 0.95
  adam_eps: float = 1e-8
  clip_norm: float = 1.0
  accumulate: int = 1  # microbatches per step, each of data.rows rows / accumulate
  eval_every: int = 500
  eval_examples: int = 256
  save_every: int = 500
  keep: int = 2  # the newest so many checkpoints stay
  keep_every: int = 0  # those at multiples of this step stay for ever; 0: none
  log_every: int = 10
  stop_after_minutes: float = 0.0  # 0: no limit; else the schedule ends when the time is up
  mesh: MeshConfig = MeshConfig()


@dataclasses.dataclass(frozen=True)
class Config:
  """One run.

  The presets bind what belongs together: sizes, template, added tokens, coordinate format and
  resize rule. `tokenizer` is a folder with the LLaMA vocabulary; sources and schedule are the
  run's own.
  """

  name: str = "tiny"
  model: ModelConfig = ModelConfig()
  prompt: PromptConfig = PromptConfig()
  data: DataConfig = DataConfig()
  train: TrainConfig = TrainConfig()

  @classmethod
  def gpt4roi_7b(cls, tokenizer: str) -> Config:
    return cls._gpt4roi(ModelConfig.gpt4roi_7b(), tokenizer)

  @classmethod
  def gpt4roi_13b(cls, tokenizer: str) -> Config:
    return cls._gpt4roi(ModelConfig.gpt4roi_13b(), tokenizer)

  @classmethod
  def chatspot_7b(cls, tokenizer: str) -> Config:
    model = ModelConfig.chatspot_7b()
    prompt = PromptConfig(
      template="vicuna_v1", tokenizer=tokenizer, added_tokens=CHATSPOT_TOKENS, mention="slot",
      coordinates="unit3",
    )  # fmt: skip
    return cls(model.name, model, prompt, DataConfig(resize="chatspot", tokens_per_row=2048))

  @classmethod
  def _gpt4roi(cls, model: ModelConfig, tokenizer: str) -> Config:
    prompt = PromptConfig(
      template="vicuna_v0", tokenizer=tokenizer, added_tokens=GPT4ROI_TOKENS, mention="name+slot",
      image_prefix="The {image:0} provides an overview of the picture.\n",
    )  # fmt: skip
    return cls(model.name, model, prompt, DataConfig(resize="gpt4roi", tokens_per_row=2048))

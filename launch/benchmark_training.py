"""One training step of a region VLM of 20 million parameters: `benchmark.py`'s case `training`.

Ours is `train.step.make_train_step`, which `regionjax train` runs, with AdamW on all parameters;
theirs (`benchmark_torch.py`) has CLIPVisionModel and LlamaForCausalLM of transformers, and between
them modules of torch with the same sizes. The batch is the same for both: rows of one image, eight
boxes and 256 tokens, a third of them supervised. `benchmark_profile.py` says where our step's time
goes.
"""

from __future__ import annotations

import types
from collections.abc import Iterator

import jax
import numpy as np

from regionjax.aot.made_up import made_up_batch
from regionjax.config import (
  Config,
  ConnectorConfig,
  DataConfig,
  DecoderConfig,
  ModelConfig,
  RegionConfig,
  TrainConfig,
  VisionConfig,
)
from regionjax.mesh import make_mesh
from regionjax.models.params import batch_shapes
from regionjax.train.optim import make_optimizer
from regionjax.train.start import model_functions
from regionjax.train.state import make_init
from regionjax.train.step import make_train_step

ROWS, TOKENS, REGIONS, SUPERVISED = 8, 256, 8, 85
IMAGE_SLOT, REGION_SLOT = 5, 6  # ids
SIZES = dict(
  image=128, patch=16, vision_width=256, vision_layers=6, vision_heads=4, vision_mlp=1024,
  vocab=4096, width=384, layers=8, heads=6, mlp=1024, bins=2, ratio=2, region_width=256,
  position_width=64, rows=ROWS, tokens=TOKENS, regions=REGIONS, supervised=SUPERVISED,
)  # fmt: skip


def make_config(dtype: str) -> Config:
  """The model and its run; 'float32' or 'bfloat16' is what is computed in."""
  s = types.SimpleNamespace(**SIZES)
  model = ModelConfig(
    name="benchmark",
    vision=VisionConfig(
      image_size=s.image, patch_size=s.patch, width=s.vision_width, layers=s.vision_layers,
      heads=s.vision_heads, mlp_width=s.vision_mlp, select_layer=-1,
    ),
    connector=ConnectorConfig("linear"),
    region=RegionConfig(
      "pool", layers=(-1,), width=s.region_width, output_size=s.bins, sampling_ratio=s.ratio,
      position_width=s.position_width,
    ),
    decoder=DecoderConfig(
      vocab_size=s.vocab, width=s.width, layers=s.layers, heads=s.heads, kv_heads=s.heads,
      head_dim=s.width // s.heads, mlp_width=s.mlp, max_length=s.tokens,
    ),
    compute_dtype=dtype,
  )  # fmt: skip
  data = DataConfig(rows=s.rows, tokens_per_row=s.tokens, images_per_row=1, regions_per_row=REGIONS)
  return Config("benchmark", model, data=data, train=TrainConfig(weight_decay=0.01))


def make_batch(config: Config) -> dict[str, np.ndarray]:
  """Rows of one example each."""
  shapes = batch_shapes(config.model, rows=ROWS, tokens=TOKENS, images=1, regions=REGIONS)
  return made_up_batch(
    shapes, vocab=SIZES["vocab"], image_slot_id=IMAGE_SLOT, region_slot_id=REGION_SLOT,
    supervised=SUPERVISED,
  )  # fmt: skip


def training_cases(dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> Iterator[tuple]:
  """(title, sizes, {'step': run one step}, facts) for each compute dtype."""
  for dtype in dtypes:
    step = TrainingStep(dtype)
    title = f"20M VLM, {ROWS}x{TOKENS}, {dtype}"
    yield title, SIZES | dict(dtype=dtype), dict(step=step), dict(parameters=step.parameters)


class TrainingStep:
  """Calls of it are steps, one after the other, on the same batch."""

  def __init__(self, dtype: str):
    config = make_config(dtype)
    slots = types.SimpleNamespace(image_slot_id=IMAGE_SLOT, region_slot_id=REGION_SLOT)
    forward, init = model_functions(config, slots)
    optimizer = make_optimizer(config.train)
    self._state = jax.jit(make_init(config, init, optimizer))(jax.random.key(0), {})
    self.parameters = sum(x.size for x in jax.tree.leaves(self._state.trainable))
    self._batch = jax.device_put(make_batch(config))
    step = make_train_step(config, forward, optimizer, make_mesh())
    self._step = step.lower(self._state, self._batch, np.float32(0.1)).compile()

  def __call__(self) -> float:
    self._state, metrics = self._step(self._state, self._batch, np.float32(0.1))
    return float(metrics["loss_sum"] / metrics["weight_sum"])

  def text(self) -> str:
    """The compiled program."""
    return self._step.as_text()

"""A model of the smallest sizes, random batches for it, and configs of short runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_cases import Watched, run

from regionjax.config import (
  Config,
  DataConfig,
  DecoderConfig,
  ModelConfig,
  PromptConfig,
  RegionConfig,
  SourceConfig,
  TrainConfig,
  VisionConfig,
)

IMAGE_SLOT, REGION_SLOT = 5, 6


@pytest.fixture(scope="session")
def micro():
  """A run of one decoder and one vision block on 32-pixel images, 4 rows of 128 tokens."""
  model = ModelConfig(
    name="micro",
    vision=VisionConfig.tiny(
      image_size=32, patch_size=16, stem=(), width=32, layers=1, heads=1, mlp_width=32
    ),
    region=dataclasses.replace(RegionConfig.tiny("pool"), layers=(1,), width=32, position_width=16),
    decoder=DecoderConfig.tiny(
      width=32, layers=1, heads=1, kv_heads=1, head_dim=32, mlp_width=32, max_length=128
    ),
    compute_dtype="float32",
  )
  return Config(
    name="micro",
    model=model,
    prompt=PromptConfig(template="plain", coordinates="unit2"),
    data=DataConfig(
      sources=(SourceConfig("scenes", args={"turns": 2}),),
      rows=4, tokens_per_row=128, images_per_row=2, regions_per_row=12, packing_bins=4, prefetch=1,
    ),
    train=TrainConfig(
      steps=12, warmup_steps=3, eval_every=6, eval_examples=6, save_every=6, log_every=2,
      weight_decay=0.1,
    ),
  )  # fmt: skip


@pytest.fixture
def random_batch():
  """(config, seed) -> a batch with two segments, images and regions in every row."""

  def make(config, seed=0, rows=None):
    rng = np.random.default_rng(seed)
    data, vision = config.data, config.model.vision
    b, t, r = rows or data.rows, data.tokens_per_row, data.regions_per_row
    tokens = rng.integers(10, 200, (b, t)).astype(np.int32)
    tokens[:, 1 : 1 + config.model.image_tokens] = IMAGE_SLOT
    tokens[:, 10:12] = REGION_SLOT
    segments = np.ones((b, t), np.int32)
    segments[:, t // 2 :] = 2
    segments[:, -7:] = 0
    answers = np.zeros((b, t), np.int32)
    answers[:, 20:24], answers[:, 30:33], answers[:, t // 2 + 5 : t // 2 + 9] = 1, 2, 3
    # Rows differ in how much they supervise: a mean of means would show.
    answers[::2, 30:33] = 0
    corner = rng.uniform(0, 0.5, (b, r, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.1, 0.5, (b, r, 2))], -1)
    mask = np.zeros((b, r), bool)
    mask[:, :2] = True
    images = rng.normal(size=(b, data.images_per_row, *vision.image_hw, 3))
    positions = np.concatenate([np.arange(t // 2), np.arange(t - t // 2)])
    return {
      "tokens_bt": tokens,
      "targets_bt": np.roll(tokens, -1, 1),
      "loss_weights_bt": (answers > 0).astype(np.float32),
      "segment_ids_bt": segments,
      "positions_bt": np.broadcast_to(positions, (b, t)).astype(np.int32),
      "answer_ids_bt": answers,
      "images_bkhwc": images.astype(np.float32),
      "image_mask_bk": np.arange(data.images_per_row)[None] < np.ones((b, 1)),
      "boxes_br4": boxes.astype(np.float32),
      "box_image_br": np.zeros((b, r), np.int32),
      "region_kind_br": np.where(mask, 2, 0).astype(np.int32),
      "region_mask_br": mask,
      "region_cover_brn": np.full((b, r, vision.tokens), 0.5, np.float32),
    }

  return make


@pytest.fixture
def functions():
  """config -> (apply, init) of its model, without a tokenizer."""
  from regionjax.models.params import init_params, model_for

  def make(config):
    model = model_for(config.model, image_slot_id=IMAGE_SLOT, region_slot_id=REGION_SLOT)
    return (
      lambda params, batch: model.apply({"params": params}, batch),
      lambda key: init_params(config.model, key),
    )

  return make


@pytest.fixture
def bits():
  """A tree -> list of (path-ordered) byte strings, to compare bit by bit."""
  return lambda tree: [np.asarray(jnp.asarray(x)).tobytes() for x in jax.tree.leaves(tree)]


@pytest.fixture(scope="session")
def compile_once(tmp_path_factory):
  """Runs compile the same programs; they come from a cache after the first."""
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = [getattr(jax.config, name) for name in names]
  for name, value in zip(names, (str(tmp_path_factory.mktemp("xla")), 0.2)):
    jax.config.update(name, value)
  yield
  for name, value in zip(names, before):
    jax.config.update(name, value)


@pytest.fixture
def no_matmul_timing(monkeypatch):
  monkeypatch.setattr("regionjax.train.loop.peak_flops", lambda devices: 1e11)


@pytest.fixture(scope="session")
def runs(tmp_path_factory, micro, compile_once):
  """A straight run of 12 steps, and one stopped at step 9 and resumed: folders and outcomes."""
  config = micro
  folder = tmp_path_factory.mktemp("runs")
  patch = pytest.MonkeyPatch()
  patch.setattr("regionjax.train.loop.peak_flops", lambda devices: 1e11)
  straight = run(config, folder / "straight")
  reports = Watched(stop_at=8)
  stopped = run(config, folder / "parts", reports, command="regionjax train X --workdir Y")
  at_stop = sorted(int(p.name) for p in (folder / "parts" / "checkpoints").iterdir())
  again = Watched()
  resumed = run(config, folder / "parts", again)
  patch.undo()
  return dict(
    config=config, folder=folder, straight=straight, stopped=stopped, resumed=resumed,
    text=reports.text.getvalue(), resumed_text=again.text.getvalue(), at_stop=at_stop,
  )  # fmt: skip

"""Everything a run needs, built from its config and checked before anything is written."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from jax.sharding import Mesh

from regionjax import mesh as meshes
from regionjax.config import Config, ConfigError, ModelConfig
from regionjax.train import workdir as workdirs
from regionjax.train.checkpoint import CheckpointError, Checkpoints
from regionjax.train.evals import Evaluator, held_out_batches
from regionjax.train.ledger import Ledger
from regionjax.train.optim import SCHEDULES, make_optimizer
from regionjax.train.state import (
  Params,
  TrainState,
  abstract,
  flatten_paths,
  make_init,
  unflatten_paths,
)
from regionjax.train.step import Apply, make_train_step
from regionjax.train.summary import source_reports

Log = Callable[[str], None]


@dataclasses.dataclass
class Run:
  """A run that is ready to go on at `ledger.step`."""

  config: Config
  workdir: Path
  mesh: Mesh
  tokenizer: Any
  pipeline: Any
  train_step: Callable[..., Any]
  evaluator: Evaluator | None
  checkpoints: Checkpoints
  state: TrainState
  ledger: Ledger
  reports: list[dict[str, Any]]  # of the sources that have something to report
  lock: IO[Any] | None  # held as long as the run uses the folder


def start(config: Config, workdir: Path, *, mesh: Mesh, log: Log = print) -> Run:
  """Builds a run, from its newest checkpoint if the folder holds one.

  Raises:
    ConfigError: settings that don't go together, or a work folder of another config or in use by
      another process, in which nothing is changed.
    CheckpointError: there are checkpoints and none is readable.
    DataError: a source's complaint about its files.
  """
  from regionjax.conversation import Renderer
  from regionjax.data.pipeline import Pipeline
  from regionjax.data.sources import make_source
  from regionjax.prompt_checks import check_resize
  from regionjax.tokenizer import load_tokenizer

  workdirs.check(workdir, config, log=log)
  tokenizer = load_tokenizer(config.prompt.tokenizer, config.prompt.added_tokens)
  check(config, mesh, tokenizer)
  renderer = Renderer(config.prompt, config.model, tokenizer)
  check_resize(config.prompt, config.data.resize)
  sources = [make_source(source) for source in config.data.sources]
  pipeline = Pipeline(
    config, renderer, sources=sources, host=jax.process_index(), hosts=jax.process_count()
  )
  reports = source_reports(sources)
  for report in reports:
    log(report["text"])
  apply, init = model_functions(config, tokenizer)
  optimizer = make_optimizer(config.train)
  build = make_init(config, init, optimizer)
  same = meshes.replicated(mesh)
  like = abstract(build, same)
  given: Params = {}
  # Digits only: a checkpoint that was being written when the run was killed is none.
  if not any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*")):
    shapes = jax.eval_shape(init, jax.random.key(0))
    given = starting_params(config, shapes, tokenizer, log=log)
  evaluator = None
  if config.train.eval_every > 0:
    evaluator = Evaluator(apply, held_out_batches(config, renderer), mesh)

  with contextlib.ExitStack() as on_failure:
    lock = workdirs.lock(workdir)
    if lock is not None:
      on_failure.callback(lock.close)
      workdirs.check(workdir, config, log=lambda _: None)  # another may have had it until now
    workdirs.register(workdir, config)
    checkpoints = Checkpoints(workdir, keep=config.train.keep, log=log)
    on_failure.callback(checkpoints.close)
    restored = checkpoints.restore_latest(like)
    if restored is None:
      key = jax.random.key(config.train.seed)
      state, ledger = jax.jit(build, out_shardings=same)(key, given), Ledger()
    else:
      state, record = restored
      ledger = _resume(record, pipeline, tokenizer)
      log(f"going on from step {ledger.step} in {workdir}")
    step = make_train_step(config, apply, optimizer, mesh)
    on_failure.pop_all()
  return Run(
    config, workdir, mesh, tokenizer, pipeline, step, evaluator, checkpoints, state, ledger,
    reports, lock,
  )  # fmt: skip


def create_state(config: Config, tokenizer: Any, rng: jax.Array) -> TrainState:
  """A fresh state on the default device."""
  _, init = model_functions(config, tokenizer)
  return jax.jit(make_init(config, init, make_optimizer(config.train)))(rng, {})


def model_functions(config: Config, tokenizer: Any) -> tuple[Apply, Callable[[jax.Array], Params]]:
  """(params, batch) -> logits, and key -> params."""
  from regionjax.models.params import init_params, model_for

  model = model_for(
    config.model,
    image_slot_id=tokenizer.image_slot_id,
    region_slot_id=tokenizer.region_slot_id,
  )

  def apply(params: Params, batch: Any) -> jax.Array:
    logits: Any = model.apply({"params": params}, batch)
    return logits

  return apply, lambda key: init_params(config.model, key)


def check(config: Config, mesh: Mesh, tokenizer: Any) -> None:
  """Raises ConfigError for settings that cannot run together."""
  train, data, decoder = config.train, config.data, config.model.decoder
  least = {
    "steps": 1, "accumulate": 1, "keep": 1, "log_every": 1, "save_every": 0, "eval_every": 0,
    "eval_examples": 1, "warmup_steps": 0, "stop_after_minutes": 0, "learning_rate": 0,
  }  # fmt: skip
  for name, low in least.items():
    if not getattr(train, name) >= low:
      raise ConfigError(f"train.{name}={getattr(train, name)}: expected at least {low}")
  if train.schedule not in SCHEDULES:
    raise ConfigError(f"train.schedule={train.schedule!r}: expected {' or '.join(SCHEDULES)}")
  shards = meshes.row_shards(mesh)
  if data.rows % (train.accumulate * shards):
    raise ConfigError(
      f"data.rows={data.rows} cannot be split into train.accumulate={train.accumulate} "
      f"microbatches on {shards} devices; make it a multiple of {train.accumulate * shards}"
    )
  if data.tokens_per_row > decoder.max_length:
    raise ConfigError(
      f"data.tokens_per_row={data.tokens_per_row} exceeds model.decoder.max_length="
      f"{decoder.max_length}"
    )
  if tokenizer.vocab_size > decoder.vocab_size:
    raise ConfigError(
      f"model.decoder.vocab_size={decoder.vocab_size} is less than the tokenizer's "
      f"{tokenizer.vocab_size} (prompt.tokenizer={config.prompt.tokenizer!r})"
    )
  if config.model.region.features and tokenizer.region_slot_id < 0:
    raise ConfigError(
      f"model.region.kind={config.model.region.kind!r} needs a region slot token, and "
      f"prompt.tokenizer={config.prompt.tokenizer!r} has none; use region.kind=text"
    )


def starting_params(config: Config, shapes: Params, tokenizer: Any, *, log: Log = print) -> Params:
  """Parameters of the release `train.init_from`, fit for the model; {} without one.

  Parts that the release lacks, or a region encoder of another kind, start fresh, and parts that the
  model lacks are left out; for images of another size the vision encoder's position table is
  resampled. All of this is named through `log`.

  Raises:
    ConfigError: shapes differ (all of them are listed), nothing fits, or the tokenizers differ.
  """
  folder = config.train.init_from
  if not folder:
    return {}
  from regionjax.weights import release

  source, params, theirs = release.load(folder)
  if theirs.fingerprint != tokenizer.fingerprint:
    raise ConfigError(
      f"train.init_from={folder}: its tokenizer ({theirs.fingerprint}) is another than "
      f"prompt.tokenizer={config.prompt.tokenizer!r} ({tokenizer.fingerprint}), so its embeddings "
      f"mean other tokens; set prompt.tokenizer={folder}"
    )
  params = _for_image_size(source.model, params, config.model, folder, log)
  given, wanted = flatten_paths(params), flatten_paths(shapes)
  shared = sorted(given.keys() & wanted.keys())
  if source.model.region.features != config.model.region.features:
    # Another kind of region encoder: equal names in it mean nothing.
    shared = [path for path in shared if not path.startswith("regions/")]
  wrong = [
    f"  {path}: {given[path].shape} in the release, {wanted[path].shape} in the model"
    for path in shared
    if given[path].shape != wanted[path].shape
  ]
  if wrong:
    raise ConfigError(f"train.init_from={folder} doesn't fit the model:\n" + "\n".join(wrong))
  if not shared:
    raise ConfigError(f"train.init_from={folder} holds no parameter of this model")
  for what, paths in (
    ("not in the release, starts fresh", wanted),
    ("of the release not used", given),
  ):
    left = paths.keys() - set(shared)
    if left:
      log(f"train.init_from={folder}: {what}: {', '.join(_brief(left, paths))}")
  return unflatten_paths({path: given[path] for path in shared})


def _for_image_size(
  source: ModelConfig, params: Params, target: ModelConfig, folder: str, log: Log
) -> Params:
  """A release's parameters, with its position table on the grid of the target's images."""
  from regionjax.models.params import resize_images

  old, new = source.vision, target.vision
  if old.patch_size != new.patch_size or old.grid == new.grid:
    return params
  _, params = resize_images(source, params, new.image_size)
  log(
    f"train.init_from={folder}: vision/positions resampled from {_times(old.grid)} patches "
    f"(images of {_times(old.image_hw)} pixels) to {_times(new.grid)} ({_times(new.image_hw)})"
  )
  return jax.tree.map(np.asarray, params)


def _times(sides: tuple[int, int]) -> str:
  return f"{sides[0]}x{sides[1]}"


def _brief(paths: Collection[str], among: Collection[str]) -> list[str]:
  """Paths, sorted, with 'part/.*' for those that are all of a part of the model."""
  whole = {p.split("/")[0] for p in paths} - {p.split("/")[0] for p in set(among) - set(paths)}
  return sorted({f"{part}/.*" if (part := p.split("/")[0]) in whole else p for p in paths})


def record(run: Run) -> dict[str, Any]:
  """The JSON part of a checkpoint."""
  return {
    "ledger": run.ledger.to_json(),
    "data": run.pipeline.get_state(),
    "tokenizer": run.tokenizer.fingerprint,
  }


def _resume(record: dict[str, Any], pipeline: Any, tokenizer: Any) -> Ledger:
  if record["tokenizer"] != tokenizer.fingerprint:
    raise CheckpointError(
      f"the checkpoint was trained with another tokenizer (fingerprint {record['tokenizer']}, "
      f"this one is {tokenizer.fingerprint}); put the old tokenizer file back"
    )
  pipeline.set_state(record["data"])
  return Ledger(**record["ledger"])

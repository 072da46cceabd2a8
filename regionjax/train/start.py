"""Everything a run needs, built from its config and checked before anything is written."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
from jax.sharding import Mesh

from regionjax import mesh as meshes
from regionjax import partition
from regionjax.config import Config, ConfigError
from regionjax.data.shards import merge_states
from regionjax.train import workdir as workdirs
from regionjax.train.checkpoint import CheckpointError, Checkpoints
from regionjax.train.evals import Evaluator, held_out_batches
from regionjax.train.initial import Given, given_params, write_origin
from regionjax.train.ledger import Ledger
from regionjax.train.optim import SCHEDULES, make_optimizer
from regionjax.train.processes import gather, together
from regionjax.train.same import check_same, check_shared
from regionjax.train.state import (
  Params,
  TrainState,
  abstract,
  flatten_paths,
  make_init,
  unflatten_paths,
)
from regionjax.train.step import Forward, make_train_step
from regionjax.train.summary import source_reports
from regionjax.weights.placement import place

Log = Callable[[str], None]
Init = Callable[[jax.Array], Params]  # key -> parameters


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

  def close(self) -> None:
    """Ends its threads, when what is being written has been, and frees the folder."""
    self.pipeline.close()
    self.checkpoints.close()
    if self.lock is not None:
      self.lock.close()


class _Prepared(NamedTuple):
  """What each process makes for itself, without the others and without writing anything."""

  tokenizer: Any
  sources: list[Any]
  reports: list[dict[str, Any]]
  pipeline: Any
  forward: Forward
  optimizer: Any
  build: Callable[[jax.Array, Params], TrainState]
  like: TrainState
  lies: TrainState
  given: Given
  evaluator: Evaluator | None


def start(config: Config, workdir: Path, *, mesh: Mesh, log: Log = print) -> Run:
  """Builds a run, from its newest checkpoint if the folder holds one.

  Raises:
    ConfigError: settings that don't go together, a mesh that can't split the model, processes that
      differ, or a work folder of another config or in use by another process, in which nothing is
      changed.
    CheckpointError: there are checkpoints and none is readable.
    DataError: a source's complaint about its files.
    ElsewhereError: one of these in another process.
  """
  with together():
    made = _prepare(config, workdir, mesh=mesh, log=log)
  check_same(config, made.sources)
  with contextlib.ExitStack() as on_failure:
    with together():
      lock = workdirs.lock(workdir)
      if lock is not None:
        on_failure.callback(lock.close)
        workdirs.check(workdir, config, log=lambda _: None)  # another may have had it until now
      workdirs.register(workdir, config)
    check_shared(workdir)
    checkpoints = Checkpoints(
      workdir, keep=config.train.keep, keep_every=config.train.keep_every, log=log
    )
    on_failure.callback(checkpoints.close)
    restored = checkpoints.restore_latest(made.like)
    if restored is None:
      if jax.process_index() == 0:
        write_origin(workdir, config, made.given)
      key = jax.random.key(config.train.seed)
      params = _placed(config, made.given.params, mesh)
      state, ledger = jax.jit(made.build, out_shardings=made.lies)(key, params), Ledger()
    else:
      state, record = restored
      ledger = _resume(record, made.pipeline, made.tokenizer)
      checkpoints.mend_best(ledger.best, ledger.step, state.trainable)
      log(f"going on from step {ledger.step} in {workdir}")
    step = make_train_step(config, made.forward, made.optimizer, mesh, shardings=made.lies)
    on_failure.pop_all()
  return Run(
    config, workdir, mesh, made.tokenizer, made.pipeline, step, made.evaluator, checkpoints, state,
    ledger, made.reports, lock,
  )  # fmt: skip


def _prepare(config: Config, workdir: Path, *, mesh: Mesh, log: Log) -> _Prepared:
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
    config, renderer, sources=sources, rows=meshes.own_rows(mesh, config.data.rows)
  )
  reports = source_reports(sources)
  for report in reports:
    log(report["text"])
  forward, init = model_functions(config, tokenizer)
  optimizer = make_optimizer(config.train)
  build = make_init(config, init, optimizer)
  like = abstract(build, lambda shapes: partition.shardings(config.model, shapes, mesh))
  lies = jax.tree.map(lambda x: x.sharding, like)
  given = Given({})
  # Digits only: a checkpoint that was being written when the run was killed is none.
  if not any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*")):
    shapes = jax.eval_shape(init, jax.random.key(0))
    given = given_params(config, shapes, tokenizer, log=log)
  evaluator = None
  if config.train.eval_every > 0:
    evaluator = Evaluator(forward, held_out_batches(config, renderer), mesh, shardings=lies)
  return _Prepared(
    tokenizer, sources, reports, pipeline, forward, optimizer, build, like, lies, given, evaluator
  )


def create_state(config: Config, tokenizer: Any, rng: jax.Array) -> TrainState:
  """A fresh state on the default device."""
  _, init = model_functions(config, tokenizer)
  return jax.jit(make_init(config, init, make_optimizer(config.train)))(rng, {})


def model_functions(config: Config, tokenizer: Any) -> tuple[Forward, Init]:
  """The model of a run, and key -> its parameters."""
  from regionjax.models.params import head_params, init_params, model_for

  model = model_for(
    config.model,
    image_slot_id=tokenizer.image_slot_id,
    region_slot_id=tokenizer.region_slot_id,
  )

  def hidden(params: Params, batch: Any) -> jax.Array:
    x_btd: Any = model.apply({"params": params}, batch, method="hidden")
    return x_btd

  def head(params: Params, x_btd: jax.Array) -> jax.Array:
    logits: Any = model.apply({"params": params}, x_btd, method="logits")
    return logits

  def params_of_head(params: Params) -> Params:
    return partition.gathered(config.model, head_params(config.model, params))

  return Forward(hidden, head, params_of_head), lambda key: init_params(config.model, key)


def check(config: Config, mesh: Mesh, tokenizer: Any) -> None:
  """Raises ConfigError for settings that cannot run together."""
  train, data, decoder = config.train, config.data, config.model.decoder
  least = {
    "steps": 1, "accumulate": 1, "keep": 1, "keep_every": 0, "log_every": 1, "save_every": 0,
    "eval_every": 0, "eval_examples": 1, "warmup_steps": 0, "stop_after_minutes": 0,
    "learning_rate": 0,
  }  # fmt: skip
  for name, low in least.items():
    if not getattr(train, name) >= low:
      raise ConfigError(f"train.{name}={getattr(train, name)}: expected at least {low}")
  if train.keep_every and (not train.save_every or train.keep_every % train.save_every):
    raise ConfigError(
      f"train.keep_every={train.keep_every}: expected a multiple of train.save_every="
      f"{train.save_every}, since only at those steps there is something to keep"
    )
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


def data_state(run: Run) -> dict[str, Any]:
  """Where the data stands, of all processes' shards; all must come here."""
  own = run.pipeline.get_state()
  shards = map(json.loads, gather(json.dumps(own["shards"])))
  return merge_states(own | {"shards": each} for each in shards)


def record(run: Run) -> dict[str, Any]:
  """The JSON part of a checkpoint; all processes must come here."""
  return {
    "ledger": run.ledger.to_json(),
    "data": data_state(run),
    "tokenizer": run.tokenizer.fingerprint,
  }


def _placed(config: Config, params: Params, mesh: Mesh) -> Params:
  """Given parameters on the mesh; each process reads only the slices that its devices hold."""
  lies = partition.shardings(config.model, params, mesh)
  return unflatten_paths(place(flatten_paths(params), flatten_paths(lies)))


def _resume(record: dict[str, Any], pipeline: Any, tokenizer: Any) -> Ledger:
  if record["tokenizer"] != tokenizer.fingerprint:
    raise CheckpointError(
      f"the checkpoint was trained with another tokenizer (fingerprint {record['tokenizer']}, "
      f"this one is {tokenizer.fingerprint}); put the old tokenizer file back"
    )
  pipeline.set_state(record["data"])
  return Ledger(**record["ledger"])

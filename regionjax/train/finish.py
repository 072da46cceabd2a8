"""What a run leaves behind: the release, the picture of its curves, the summary."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from regionjax.config import Config, ConfigError
from regionjax.config_files import read_config
from regionjax.train import workdir as workdirs
from regionjax.train.card import write_card
from regionjax.train.checkpoint import Checkpoints
from regionjax.train.ledger import Ledger
from regionjax.train.metrics import read_metrics
from regionjax.train.optim import make_optimizer
from regionjax.train.plots import plot_run
from regionjax.train.start import Run, model_functions
from regionjax.train.state import TrainState, abstract, make_init, merge
from regionjax.train.summary import summarize, write_summary


def finish(
  run: Run, *, peak: float | None, command: str = "", log: Callable[[str], None] = print
) -> dict[str, Any]:
  """Writes release/, curves.png and summary.json of a finished run; returns the summary."""
  summary = summarize(
    run.config,
    run.state,
    run.ledger,
    devices=list(run.mesh.devices.flat),
    data={**run.pipeline.stats(), "sources": run.reports},
    peak=peak,
    command=command,
  )
  export(
    run.config, run.tokenizer, run.state, run.ledger, run.checkpoints,
    folder=run.workdir / "release", summary=summary,
  )  # fmt: skip
  if jax.process_index() == 0:
    title = f"{run.config.name}: {summary['parameters']['total']:,} parameters"
    plot_run(read_metrics(run.workdir / "metrics.jsonl"), run.workdir / "curves.png", title=title)
    write_summary(run.workdir / "summary.json", summary)
  accuracy = summary["accuracy"]["accuracy"]
  log(
    f"done: {run.ledger.step} steps"
    + (f", exact match {accuracy:.1%}" if accuracy is not None else "")
    + f"; release/, curves.png and summary.json are in {run.workdir}"
  )
  return summary


def export(
  config: Config,
  tokenizer: Any,
  state: TrainState,
  ledger: Ledger,
  checkpoints: Checkpoints,
  *,
  folder: Path,
  summary: dict[str, Any],
) -> Path:
  """Writes a release of the best parameters, by held-out loss; without evaluations, of the last."""
  from regionjax.weights import release

  trainable, step = state.trainable, ledger.step
  if ledger.best is not None and ledger.best["step"] != step:
    like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), trainable
    )
    best = checkpoints.restore_best(ledger.best["step"], like)
    if best is not None:
      step, trainable = ledger.best["step"], best
  params = jax.tree.map(np.asarray, merge(trainable, state.frozen))
  if jax.process_index() == 0:
    release.save(folder, config, params, tokenizer, write_card(config, summary, step=step))
  return folder


def export_workdir(workdir: Path, folder: Path, *, log: Callable[[str], None] = print) -> Path:
  """Makes a release from a work folder, finished or not.

  Raises:
    ConfigError: it isn't a work folder, or has no checkpoint yet.
    CheckpointError: none of its checkpoints is readable.
  """
  from regionjax.tokenizer import load_tokenizer

  if not (workdir / workdirs.CONFIG).is_file():
    raise ConfigError(f"{workdir} is no work folder of regionjax train (no {workdirs.CONFIG})")
  config = read_config(workdir / workdirs.CONFIG)
  tokenizer = load_tokenizer(config.prompt.tokenizer, config.prompt.added_tokens)
  build = make_init(config, model_functions(config, tokenizer)[1], make_optimizer(config.train))
  device = jax.devices()[0]
  checkpoints = Checkpoints(workdir, keep=config.train.keep, log=log)
  try:
    like = abstract(build, jax.sharding.SingleDeviceSharding(device))
    restored = checkpoints.restore_latest(like)
    if restored is None:
      raise ConfigError(
        f"{workdir} has no checkpoint yet (train.save_every={config.train.save_every})"
      )
    state, record = restored
    ledger = Ledger(**record["ledger"])
    summary = summarize(config, state, ledger, devices=[device])
    path = workdir / "summary.json"
    if path.is_file():
      told = json.loads(path.read_text())
      summary = told if told.get("steps") == ledger.step else summary
    return export(config, tokenizer, state, ledger, checkpoints, folder=folder, summary=summary)
  finally:
    checkpoints.close()

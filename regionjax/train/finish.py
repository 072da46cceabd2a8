"""What a run leaves behind: the release, the picture of its curves, the summary."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from regionjax.config import Config, ConfigError
from regionjax.config_files import read_config
from regionjax.train import workdir as workdirs
from regionjax.train.card import write_card
from regionjax.train.checkpoint import Checkpoints
from regionjax.train.goodput import in_words, read_report
from regionjax.train.initial import Origin, read_origin
from regionjax.train.ledger import Ledger
from regionjax.train.metrics import read_metrics
from regionjax.train.optim import make_optimizer
from regionjax.train.plots import plot_run
from regionjax.train.processes import to_host, together
from regionjax.train.progress import short
from regionjax.train.start import Run, data_state, model_functions
from regionjax.train.state import (
  TrainState,
  abstract,
  flatten_paths,
  make_init,
  merge,
  unflatten_paths,
)
from regionjax.train.summary import summarize, write_summary

# What an export holds: everything; everything with LoRA merged into the maps that it updates; or
# what isn't the base release's own.
FORMS = ("full", "merged", "adapter")


def finish(
  run: Run, *, peak: float | None, command: str = "", log: Callable[[str], None] = print
) -> dict[str, Any]:
  """Writes release/, curves.png and summary.json of a finished run; returns the summary."""
  summary = summarize(
    run.config,
    run.state,
    run.ledger,
    devices=list(run.mesh.devices.flat),
    data={**run.pipeline.stats(data_state(run)), "sources": run.reports},
    peak=peak,
    command=command,
    goodput=read_report(run.workdir),
  )
  export(
    run.config, run.tokenizer, run.state, run.ledger, run.checkpoints,
    folder=run.workdir / "release", summary=summary,
  )  # fmt: skip
  with together():
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
  if summary["goodput"] is not None:
    log(in_words(summary["goodput"]))
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
  form: str = "full",
  origin: Origin | None = None,
) -> Path:
  """Writes a release of the best parameters, by held-out loss; without evaluations, of the last.

  Args:
    config, tokenizer, state, ledger, checkpoints: of the run.
    folder: where to.
    summary: what the card tells.
    form: one of FORMS.
    origin: what an adapter stands on.

  Returns:
    The folder.

  Raises:
    ConfigError: the run has nothing to merge, or no base for an adapter.
  """
  check_form(form, config, origin)
  trainable, step = state.trainable, ledger.step
  if ledger.best is not None and ledger.best["step"] != step:
    like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), trainable
    )
    best = checkpoints.restore_best(ledger.best["step"], like)
    if best is not None:
      step, trainable = ledger.best["step"], best
  frozen = state.frozen
  if form == "adapter" and origin is not None:
    frozen = _without(frozen, origin.of_base)
  params = jax.tree.map(to_host, merge(trainable, frozen))
  # The others wait: jax ends all of them when some have left for five minutes.
  with together():
    if jax.process_index() == 0:
      card = write_card(config, summary, step=step)
      _write(form, folder, config, params, tokenizer, card, origin)
  return folder


def check_form(form: str, config: Config, origin: Origin | None) -> None:
  """Raises ConfigError unless a run can be exported as `form`."""
  if form not in FORMS:
    raise ConfigError(f"form={form!r}: expected one of {', '.join(FORMS)}")
  if form == "merged" and not config.model.decoder.lora.rank:
    raise ConfigError(
      "the run has no LoRA to merge (model.decoder.lora.rank=0); export it without --merge"
    )
  if form == "adapter" and origin is None:
    raise ConfigError(
      "the run started from no release (train.init_from is empty), so there is no base for an "
      "adapter to stand on; export it without --adapter"
    )


def _without(tree: Mapping[str, Any], paths: tuple[str, ...]) -> dict[str, Any]:
  flat = flatten_paths(dict(tree))
  return unflatten_paths({path: leaf for path, leaf in flat.items() if path not in paths})


def _write(
  form: str,
  folder: Path,
  config: Config,
  params: dict[str, Any],
  tokenizer: Any,
  card: str,
  origin: Origin | None,
) -> None:
  from regionjax.models.lora import merge_lora
  from regionjax.weights import adapter, release

  if form == "adapter" and origin is not None:
    card += _base_section(origin, params)
    adapter.save_adapter(folder, config, params, tokenizer, card, base=origin.base)
    return
  if form == "merged":
    model, params = merge_lora(config.model, params)
    config = dataclasses.replace(config, model=model)
  release.save(folder, config, params, tokenizer, card)


def _base_section(origin: Origin, params: dict[str, Any]) -> str:
  base, held = origin.base, sum(leaf.size for leaf in jax.tree.leaves(params))
  return (
    "\n## Its base\n\n"
    f"This is an adapter: it holds the {short(held)} parameters that are not those of the release "
    f"it was trained from, `{base.name}` (SHA-256 of its weights `{base.sha256}`). Put that "
    "release beside this folder under that name, or say where it is:\n\n"
    '    chat = regionjax.load("this folder", base="that release")\n'
  )


def export_workdir(
  workdir: Path, folder: Path, *, form: str = "full", log: Callable[[str], None] = print
) -> Path:
  """Makes a release from a work folder, finished or not.

  Args:
    workdir: of the run.
    folder: the release to write.
    form: one of FORMS.
    log: takes a line of text.

  Raises:
    ConfigError: it isn't a work folder, has no checkpoint yet, or cannot take that form.
    CheckpointError: none of its checkpoints is readable.
  """
  from regionjax.tokenizer import load_tokenizer

  if not (workdir / workdirs.CONFIG).is_file():
    raise ConfigError(f"{workdir} is no work folder of regionjax train (no {workdirs.CONFIG})")
  config = read_config(workdir / workdirs.CONFIG)
  origin = read_origin(workdir)
  check_form(form, config, origin)
  tokenizer = load_tokenizer(config.prompt.tokenizer, config.prompt.added_tokens)
  build = make_init(config, model_functions(config, tokenizer)[1], make_optimizer(config.train))
  device = jax.devices()[0]
  checkpoints = Checkpoints(workdir, keep=config.train.keep, read_only=True, log=log)
  try:
    like = abstract(build, jax.sharding.SingleDeviceSharding(device))
    restored = checkpoints.restore_latest(like)
    if restored is None:
      raise ConfigError(
        f"{workdir} has no checkpoint yet (train.save_every={config.train.save_every})"
      )
    state, record = restored
    ledger = Ledger(**record["ledger"])
    summary = summarize(config, state, ledger, devices=[device], goodput=read_report(workdir))
    path = workdir / "summary.json"
    if path.is_file():
      told = json.loads(path.read_text())
      summary = told if told.get("steps") == ledger.step else summary
    return export(
      config, tokenizer, state, ledger, checkpoints, folder=folder, summary=summary, form=form,
      origin=origin,
    )  # fmt: skip
  finally:
    checkpoints.close()

"""The training loop.

Step t is dispatched before the metrics of step t - 1 are read, so the device never waits for the
host. Everything that must survive a stop is in the state, the data state and the ledger; a run
that is stopped and resumed gives the same bits as one that is not, unless a time limit drives its
learning rate. The processes of a run agree before each step whether to take it: one that stopped
alone would leave the others waiting for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from regionjax.config import Config
from regionjax.mesh import from_config, put_batch
from regionjax.train.finish import finish
from regionjax.train.flops import step_flops
from regionjax.train.goodput import Goodput
from regionjax.train.metrics import MetricsWriter
from regionjax.train.processes import Agreement, ElsewhereError, in_short
from regionjax.train.profile import Profiler, Steps
from regionjax.train.progress import Clock, Progress, Silent, duration, short
from regionjax.train.signals import StopRequest
from regionjax.train.speed import peak_flops
from regionjax.train.start import Run, record, start


class DivergedError(RuntimeError):
  """The loss or the gradient is no longer a number."""


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a call of `train` ended.

  Attributes:
    finished: False if a signal stopped it.
    step: steps done.
    exit_code: for the shell.
    summary: what `summary.json` holds, when finished.
  """

  finished: bool
  step: int
  exit_code: int
  summary: dict[str, Any] | None = None


def train(
  config: Config,
  workdir: str | Path,
  *,
  mesh: Mesh | None = None,
  command: str = "",
  progress: Progress | None = None,
  profile: Steps | None = None,
) -> Outcome:
  """Trains, or goes on training, in a work folder.

  With `train.stop_after_minutes` the steps, and with them the learning-rate schedule, end when the
  time is up, compilation and evaluations included; the last evaluation and the export come after.
  The clock drives such a run, so that it cannot be repeated bit by bit.

  Leaves there: config.json, checkpoints/, best/, metrics.jsonl, goodput.jsonl, tensorboard/, and
  when finished curves.png, summary.json and release/.

  Args:
    config: the run.
    workdir: its folder, made if missing.
    mesh: by default that of `train.mesh` over all devices.
    command: how to start this run again; shown when it is stopped, kept in the summary and card.
    progress: where to report; by default stderr, of process 0 alone.
    profile: the first and the last step to trace into profile/.

  Raises:
    ConfigError: the config cannot run, or the folder is that of another one.
    CheckpointError: no checkpoint of the folder is readable, or the last state cannot be saved.
    DivergedError: the loss became NaN or infinite; earlier checkpoints are kept.
    DataError: an example cannot be read; the state before it is saved.
    ElsewhereError: one of these in another process.
  """
  begun = time.monotonic()
  if progress is None:
    progress = Progress() if jax.process_index() == 0 else Silent()
  mesh = from_config(config.train.mesh) if mesh is None else mesh
  with Goodput() as goodput, contextlib.ExitStack() as at_end:
    run = start(config, Path(workdir), mesh=mesh, log=progress.message)
    at_end.callback(run.close)
    loop = _Loop(run, progress, begun, goodput=goodput, profile=profile)
    at_end.callback(loop.close)
    at_end.callback(progress.close)
    stop = loop.run()
    progress.close()
    if not loop.done:
      again = f"; to go on:\n  {command}" if command else ""
      progress.message(f"stopped at step {run.ledger.step}, saved{again}")
      return Outcome(False, run.ledger.step, stop.exit_code)
    summary = finish(run, peak=loop.peak, command=command, log=progress.message)
    return Outcome(True, run.ledger.step, 0, summary)


class _Loop:
  """Steps, evaluations, checkpoints and reports of one process's part of a run."""

  def __init__(
    self, run: Run, progress: Progress, begun: float, *, goodput: Goodput, profile: Steps | None
  ) -> None:
    self._run, self._progress, self._goodput = run, progress, goodput
    ledger = run.ledger
    self._writer = MetricsWriter(run.workdir, step=ledger.step, enabled=jax.process_index() == 0)
    self._clock = Clock(ledger.elapsed + time.monotonic() - begun)
    self._pending: tuple[int, dict[str, jax.Array]] | None = None
    self.done = False  # by its own end, not by a signal
    self._agree = Agreement()
    self._share = 0.0  # as agreed before the step
    self._compiled = False
    first = jax.process_index() == 0
    traced = profile if first else None
    self._profiler = Profiler(traced, run.workdir / "profile", log=progress.message)
    self.peak = peak_flops(list(run.mesh.devices.flat))
    goodput.begin(ledger.step, run.workdir if first else None)
    self._since = (dict(goodput.seconds), dict(ledger.totals), ledger.step)  # at the last log

  @property
  def share(self) -> float:
    """The part of the run that is over, in [0, 1]: by steps or by the clock."""
    train = self._run.config.train
    share = self._run.ledger.step / train.steps
    if train.stop_after_minutes > 0:
      share = max(share, self._clock.elapsed / (60 * train.stop_after_minutes))
    return min(share, 1.0)

  def run(self) -> StopRequest:
    """Runs until the end or a signal; the state is saved either way."""
    train = self._run.config.train
    ledger = self._run.ledger
    with StopRequest() as stop:
      while self._goes_on(stop):
        self._step()
        if train.eval_every and ledger.step % train.eval_every == 0:
          self._evaluate()
        if train.save_every and ledger.step % train.save_every == 0:
          self._save()
      self.done = self._share >= 1
      self._read()
      last = ledger.evaluation["step"] if ledger.evaluation else -1
      if self.done and self._run.evaluator is not None and last != ledger.step:
        self._evaluate()
      self._profiler.close(ledger.step)
      self._save(last=True)
    return stop

  def close(self) -> None:
    self._profiler.drop()
    self._writer.close()

  def _goes_on(self, stop: StopRequest) -> bool:
    """Whether there is another step; the same in every process.

    Raises:
      Exception: the pipeline's, such as a DataError, when all processes have saved.
      ElsewhereError: that of another process.
    """
    error = self._look_ahead()
    self._share, stopped, problem = self._agree(
      self.share, stop.received is not None, in_short(error) if error else ""
    )
    if problem and self._share < 1:  # an unreadable image, say: what was learned so far isn't lost
      self._save()
      self._run.checkpoints.wait()
      raise error or ElsewhereError(problem)
    if stopped:
      self._share = min(self._share, math.nextafter(1.0, 0.0))  # asked to stop, it isn't done
    return self._share < 1 and not stopped

  def _look_ahead(self) -> Exception | None:
    """Waits for the batch of the next step; what is wrong with it, if anything is."""
    if self._run.ledger.step >= self._run.config.train.steps:
      return None
    try:
      with self._goodput.measure("data"):
        self._run.pipeline.peek()
    except Exception as error:
      return error
    return None

  def _step(self) -> None:
    run, ledger = self._run, self._run.ledger
    batch, _ = next(run.pipeline)
    step = ledger.step + 1
    if self._profiler.starts(step):
      self._read()
      self._profiler.start(step)
    share = np.float32(self._share)
    with self._goodput.measure("step"), self._profiler.step(step):
      run.state, metrics = run.train_step(run.state, put_batch(batch, run.mesh), share)
    self._read()
    ledger.step = step
    self._pending = (step, metrics)
    if self._profiler.ends(step):
      self._read()
      self._profiler.stop(step)
    if not self._compiled:
      self._read()
      self._compiled = True  # rates and the estimate of what is left count from here
      self._clock.begin(self.share)
      self._goodput.flush(step)
      self._since = (dict(self._goodput.seconds), dict(ledger.totals), step)

  def _read(self) -> None:
    """Reads the metrics that are still on the device, and logs if it is time to."""
    if self._pending is None:
      return
    run, ledger = self._run, self._run.ledger
    step, metrics = self._pending
    self._pending = None
    with self._goodput.measure("step"):  # it may still run
      values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not (math.isfinite(values["loss_sum"]) and math.isfinite(values["grad_norm"])):
      kept = run.checkpoints.steps()
      raise DivergedError(
        f"step {step}: the loss is {values['loss_sum']} and the gradient's norm "
        f"{values['grad_norm']}; stopped. "
        + (f"The checkpoint of step {kept[-1]} is kept. " if kept else "")
        + f"Try a lower train.learning_rate (now {run.config.train.learning_rate:g}), a longer "
        "warm-up, or clipping"
      )
    ledger.add(values, step_flops(run.config, values))
    if step % run.config.train.log_every == 0 or step == 1:
      self._log(step, values)

  def _log(self, step: int, values: dict[str, float]) -> None:
    ledger = self._run.ledger
    self._goodput.flush(step)
    before, totals, first = self._since
    spent = {kind: value - before[kind] for kind, value in self._goodput.seconds.items()}
    seconds = spent["step"] + spent["data"] + spent["other"]
    rates: dict[str, float] = {}
    if self._compiled and step > first and seconds > 0:
      speed = {name: (ledger.totals[name] - totals[name]) / seconds for name in totals}
      rates = {
        "tokens_per_second": speed["tokens"],
        "examples_per_second": speed["examples"],
        "seconds_per_step": seconds / (step - first),
        "data_wait": spent["data"] / seconds,
      }
      if self.peak:
        rates["mfu"] = speed["flops"] / self.peak
    ledger.elapsed = self._clock.elapsed
    ledger.train = {
      "loss": ledger.close_window(),
      "grad_norm": values["grad_norm"],
      "learning_rate": values["learning_rate"],
      **ledger.totals,
    }
    self._writer.write("train", step, ledger.train | rates | {"elapsed": ledger.elapsed})
    self._since = (dict(self._goodput.seconds), dict(ledger.totals), step)
    self._show(step, rates)
    self._run.checkpoints.poll()

  def _show(self, step: int, rates: dict[str, float]) -> None:
    parts = [f"loss {self._run.ledger.train['loss']:.4f}"]  # type: ignore[index]
    if rates:
      parts.append(f"{short(rates['tokens_per_second'])} tok/s")
      parts.append(f"{short(rates['examples_per_second'])} ex/s")
    if "mfu" in rates:
      parts.append(f"MFU {rates['mfu']:.0%}")
    share = self.share
    parts.append(f"ETA {duration(self._clock.remaining(share) if self._compiled else None)}")
    self._progress.update(step, self._run.config.train.steps, share, parts)

  def _evaluate(self) -> None:
    run, ledger = self._run, self._run.ledger
    if run.evaluator is None:
      return
    self._read()
    before = time.monotonic()
    with self._goodput.measure("evaluation"):
      values = run.evaluator(run.state.trainable, run.state.frozen).to_json()
    if ledger.note_evaluation(ledger.step, values):
      with self._goodput.measure("checkpoint"):
        run.checkpoints.save_best(ledger.step, run.state.trainable, {"loss": values["loss"]})
    seconds = time.monotonic() - before
    self._writer.write("eval", ledger.step, values | {"seconds": seconds})
    self._goodput.flush(ledger.step)
    self._progress.message(
      f"step {ledger.step}: evaluation loss {values['loss']:.4f}, exact match "
      f"{values['accuracy']:.1%} of {values['answers']} answers ({seconds:.1f} s)"
    )

  def _save(self, *, last: bool = False) -> None:
    self._read()  # a diverged state is not saved
    run = self._run
    run.ledger.elapsed = self._clock.elapsed
    with self._goodput.measure("checkpoint"):
      self._writer.sync()  # whoever goes on from this checkpoint finds what led to it
      save = run.checkpoints.save_last if last else run.checkpoints.save
      save(run.ledger.step, run.state, record(run))
    self._goodput.flush(run.ledger.step)
    self._goodput.sync()

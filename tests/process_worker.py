"""One process of training runs over several; `start` runs all of them on one machine.

  python process_worker.py JOBS.pickle INDEX

They share eight CPU devices (or as many as the jobs say), through jax.distributed also where there
is only one of them: the order in which a CPU adds up what its devices hold belongs to the transport
between them, which is another one without it. Starting them takes longer than a short run, so they
do several, one after the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

TESTS = Path(__file__).parent
# On a busy machine the threads of eight devices may come late; XLA ends a process after 40 s. The
# programs run for milliseconds: what makes them fast costs time for nothing.
XLA_FLAGS = (
  "--xla_cpu_collective_call_terminate_timeout_seconds=600 "
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)


@dataclasses.dataclass(frozen=True)
class Job:
  """A run; `config` is a regionjax Config.

  Attributes:
    stop: (process, step): that one is sent SIGTERM when it takes this step.
    die: (process, step): that one is killed when it takes this step.
    idle_clocks: the clocks of all processes but the first stand still.
    others: process -> what is another there: the config or the work folder.
    unreadable: this process cannot read the checkpoint that is the newest at first.
    full: this process's disk is full until the last checkpoint.
    broken: (process, step): that one cannot read its images of this step.
  """

  config: Any
  workdir: Path
  stop: tuple[int, int] | None = None
  die: tuple[int, int] | None = None
  idle_clocks: bool = False
  others: Mapping[int, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  unreadable: int | None = None
  full: int | None = None
  broken: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Result:
  """How a run went.

  Attributes:
    errors: of each process, or None.
    steps: at which each process ended.
    finished: whether each thinks that the run is over.
    losses: by step, as logged.
    rows: {step: {row of the global batch: digest}}.
    text: what process 0 said.
    summaries: whether each saw the run's summary when it came back.
  """

  errors: list[str | None]
  steps: list[int]
  finished: list[bool]
  losses: dict[int, float]
  rows: dict[int, dict[int, str]]
  text: str
  summaries: list[bool]


def start(
  jobs: Sequence[Job], processes: int, scratch: Path, *, devices: int = 8, timeout: float = 600
) -> list[Result]:
  """Runs jobs one after the other in new processes, each of which has its share of the devices.

  Raises:
    RuntimeError: a process has failed, other than by an error of a run; with the end of its stderr.
  """
  scratch.mkdir(parents=True)
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  path = scratch / "jobs.pickle"
  path.write_bytes(pickle.dumps((jobs, address, processes, devices)))
  paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
  env = os.environ | {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes} {XLA_FLAGS}",
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(scratch / "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "PYTHONPATH": paths,
  }
  running = []
  try:
    for index in range(processes):
      with (scratch / f"{index}.stderr").open("w") as err:
        words = [sys.executable, __file__, str(path), str(index)]
        running.append(subprocess.Popen(words, env=env, stdout=err, stderr=err))
    codes = [process.wait(timeout) for process in running]
  finally:
    for process in running:
      process.kill()
  if any(codes):
    index = next(i for i, code in enumerate(codes) if code)
    raise RuntimeError(f"{codes}: " + (scratch / f"{index}.stderr").read_text()[-4000:])
  told = [json.loads((scratch / f"{index}.json").read_text()) for index in range(processes)]
  return [_result(job, list(each)) for job, each in zip(jobs, zip(*told))]


def _result(job: Job, told: list[dict[str, Any]]) -> Result:
  rows: dict[int, dict[int, str]] = {}
  for one in told:
    for step, digests in one["rows"].items():
      for row, digest in digests.items():
        known = rows.setdefault(int(step), {}).setdefault(int(row), digest)
        assert known == digest, f"processes differ in row {row} of step {step}"
  metrics = job.workdir / "metrics.jsonl"
  lines = metrics.read_text().splitlines() if metrics.is_file() else []
  train = [row for row in map(json.loads, lines) if row["kind"] == "train"]
  return Result(
    losses={row["step"]: row["loss"] for row in train},
    rows=rows,
    text=told[0]["text"],
    errors=[one["error"] for one in told],
    steps=[one["step"] for one in told],
    finished=[one["finished"] for one in told],
    summaries=[one["summary"] for one in told],
  )


def work(job: Job, index: int) -> dict[str, Any]:
  """Takes part in a job as its process number `index`."""
  from train_cases import full_disk

  from regionjax.data import pipeline
  from regionjax.data.errors import DataError
  from regionjax.mesh import own_rows
  from regionjax.train import loop, processes, progress, same, store

  rows: dict[int, dict[int, str]] = {}
  now = [0]
  changed = {"config": job.config, "workdir": job.workdir} | dict(job.others.get(index, {}))
  shown = progress.Progress(io.StringIO()) if index == 0 else progress.Silent(io.StringIO())
  told: dict[str, Any] = {"error": None, "step": -1, "finished": False}
  take, put = loop._Loop._step, loop.put_batch
  read, save, peek = store.Store._read, store.Store.save, pipeline.Pipeline.peek
  disk = contextlib.ExitStack()
  names = [path.name for path in (job.workdir / "checkpoints").glob("*")]
  newest = max((int(name) for name in names if name.isdigit()), default=None)

  def step(self: Any) -> None:
    now[0] = self._run.ledger.step + 1
    take(self)

  def watched(batch: Any, mesh: Any) -> Any:
    if (index, now[0]) == job.die:
      os.kill(os.getpid(), signal.SIGKILL)
    if (index, now[0]) == job.stop:
      signal.raise_signal(signal.SIGTERM)
    mine = own_rows(mesh, job.config.data.rows)
    rows[now[0]] = {row: _digest(batch, at) for at, row in enumerate(mine)}
    return put(batch, mesh)

  def reads(self: Any, step: int, like: Any) -> Any:
    if job.unreadable == index and step == newest:
      raise OSError("it is on another planet")
    return read(self, step, like)

  def saves(self: Any, step: int, *args: Any) -> None:
    if step == job.config.train.steps:
      disk.close()
    save(self, step, *args)

  def peeks(self: Any) -> None:
    if (index, self.stats()["batches"] + 1) == job.broken:
      raise DataError("image 7 is truncated")
    peek(self)

  with contextlib.ExitStack() as patches, disk:
    for owner, name, value in (
      (loop._Loop, "_step", step), (loop, "put_batch", watched),
      (loop, "peak_flops", lambda devices: None), (store.Store, "_read", reads),
      (store.Store, "save", saves),
      (store, "WRITE_SECONDS", 30 if job.full is not None else 600), (same, "SEEN_SECONDS", 1.0),
      (processes, "PIECE_BYTES", 1), (pipeline.Pipeline, "peek", peeks),
    ):  # fmt: skip
      patches.enter_context(mock.patch.object(owner, name, value))
    if job.idle_clocks and index:
      idle = property(lambda self: 0.0)
      patches.enter_context(mock.patch.object(progress.Clock, "elapsed", idle))
    if job.full == index:
      disk.enter_context(full_disk())
    try:
      outcome = loop.train(changed["config"], changed["workdir"], progress=shown)
      told |= {"step": outcome.step, "finished": outcome.finished}
    except (ValueError, OSError) as error:
      told["error"] = f"{type(error).__name__}: {error}"
  summary = (job.workdir / "summary.json").is_file()
  return told | {"rows": rows, "text": shown._stream.getvalue(), "summary": summary}


def main(path: Path, index: int) -> None:
  """Does the jobs of a file as process number `index`."""
  from regionjax.distributed import connect

  jobs, address, processes, devices = pickle.loads(path.read_bytes())
  connect(f"{address},{processes},{index}")
  import jax

  jax.config.update("jax_default_matmul_precision", "highest")
  assert jax.process_count() == processes and jax.device_count() == devices
  results = [work(job, index) for job in jobs]
  (path.parent / f"{index}.json").write_text(json.dumps(results))


def _digest(batch: Any, row: int) -> str:
  digest = hashlib.sha256()
  for name in sorted(batch):
    digest.update(np.ascontiguousarray(batch[name][row]).tobytes())
  return digest.hexdigest()


if __name__ == "__main__":
  from absl import flags

  flags.FLAGS.mark_as_parsed()
  main(Path(sys.argv[1]), int(sys.argv[2]))

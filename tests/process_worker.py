"""One process of a training run over several; `start` runs all of them on one machine.

  python process_worker.py JOB.pickle INDEX

They share eight CPU devices (or as many as the job says), through jax.distributed also where there
is only one of them: the order in which a CPU adds up what its devices hold belongs to the transport
between them, which is another one without it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Job:
  """A run; `config` is a regionjax Config.

  Attributes:
    processes, devices: in all; each process has its share of the devices.
    stop: (process, step): that one is sent SIGTERM when it takes this step.
    idle_clocks: the clocks of all processes but the first stand still.
  """

  config: Any
  workdir: Path
  processes: int
  devices: int = 8
  stop: tuple[int, int] | None = None
  idle_clocks: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
  """How a run went.

  Attributes:
    steps: at which each process ended.
    finished: whether each thinks that the run is over.
    losses: by step, as logged.
    rows: {step: {row of the global batch: digest}}.
  """

  steps: list[int]
  finished: list[bool]
  losses: dict[int, float]
  rows: dict[int, dict[int, str]]


def start(job: Job, scratch: Path, *, timeout: float = 600) -> Result:
  """Runs a job in processes of its own.

  Raises:
    RuntimeError: one of them failed; with the end of its stderr.
  """
  scratch.mkdir(parents=True)
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  path = scratch / "job.pickle"
  path.write_bytes(pickle.dumps((job, address)))
  paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
  share = job.devices // job.processes
  env = os.environ | {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={share}",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": paths,
  }
  running = []
  try:
    for index in range(job.processes):
      err = (scratch / f"{index}.stderr").open("w")
      words = [sys.executable, __file__, str(path), str(index)]
      running.append(subprocess.Popen(words, env=env, stdout=err, stderr=err))
    codes = [process.wait(timeout) for process in running]
  finally:
    for process in running:
      process.kill()
  if any(codes):
    index = next(i for i, code in enumerate(codes) if code)
    raise RuntimeError((scratch / f"{index}.stderr").read_text()[-4000:])
  told = [json.loads((scratch / f"{index}.json").read_text()) for index in range(job.processes)]
  rows: dict[int, dict[int, str]] = {}
  for one in told:
    for step, digests in one["rows"].items():
      for row, digest in digests.items():
        known = rows.setdefault(int(step), {}).setdefault(int(row), digest)
        assert known == digest, f"processes differ in row {row} of step {step}"
  metrics = (job.workdir / "metrics.jsonl").read_text().splitlines()
  train = [row for row in map(json.loads, metrics) if row["kind"] == "train"]
  return Result(
    steps=[one["step"] for one in told],
    finished=[one["finished"] for one in told],
    losses={row["step"]: row["loss"] for row in train},
    rows=rows,
  )


def work(job: Job, address: str, index: int) -> dict[str, Any]:
  """Takes part in a job as its process number `index`."""
  from regionjax.distributed import connect

  connect(f"{address},{job.processes},{index}")
  import jax

  from regionjax.mesh import own_rows, put_batch
  from regionjax.train import loop, progress

  jax.config.update("jax_default_matmul_precision", "highest")
  assert jax.process_count() == job.processes and jax.device_count() == job.devices
  rows: dict[int, dict[int, str]] = {}
  first = _steps_before(job.workdir)

  def watched(batch: Any, mesh: Any) -> Any:
    step = first + len(rows) + 1
    if (index, step) == job.stop:
      signal.raise_signal(signal.SIGTERM)
    mine = own_rows(mesh, job.config.data.rows)
    rows[step] = {row: _digest(batch, at) for at, row in enumerate(mine)}
    return put_batch(batch, mesh)

  loop.put_batch = watched
  loop.peak_flops = lambda devices: None
  if job.idle_clocks and index:
    progress.Clock.elapsed = property(lambda self: 0.0)
  outcome = loop.train(job.config, job.workdir)
  return {"step": outcome.step, "finished": outcome.finished, "rows": rows}


def _steps_before(workdir: Path) -> int:
  steps = [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
  return max(steps, default=0)


def _digest(batch: Any, row: int) -> str:
  digest = hashlib.sha256()
  for name in sorted(batch):
    digest.update(np.ascontiguousarray(batch[name][row]).tobytes())
  return digest.hexdigest()


if __name__ == "__main__":
  from absl import flags

  flags.FLAGS.mark_as_parsed()
  path, index = Path(sys.argv[1]), int(sys.argv[2])
  job, address = pickle.loads(path.read_bytes())
  result = work(job, address, index)
  (path.parent / f"{index}.json").write_text(json.dumps(result))

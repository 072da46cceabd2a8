"""`kill -9` at random moments of a run: what was lost is done again, with the same bits.

Every attempt is a process of its own that runs `regionjax train`. It is killed at a moment drawn
from half the time that an undisturbed run takes, counted from when it takes the work folder, and
started again until the run is finished; then comes the next run. So kills fall into everything that
a process does: building the state, steps, writes of checkpoints, deletions of old ones,
evaluations, the export. About 5 s per kill on two idle cores.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train_cases import rows_without_times, with_train

from regionjax.config import to_dict

ROOT = Path(__file__).parents[2]
PATIENCE = 900  # seconds that one attempt may take on a busy machine


@dataclasses.dataclass(frozen=True)
class Command:
  """`regionjax train` of the micro config."""

  config: Path
  cache: Path

  def start(self, workdir):
    """A process that trains; its output goes to `<workdir>.log`."""
    words = [sys.executable, "-m", "regionjax.cli", "train", str(self.config)]
    words += ["--workdir", str(workdir), "--compile-cache", str(self.cache)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with workdir.with_suffix(".log").open("a") as log:
      return subprocess.Popen(words, env=env, stdout=log, stderr=log)

  def attempt(self, workdir, kill_after=None):
    """Runs to the end, or until so many seconds after it took the folder; whether it ended."""
    process = self.start(workdir)
    if kill_after is not None:
      while process.poll() is None and not holds(process.pid, workdir / ".lock"):
        time.sleep(0.01)
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=kill_after)
      process.kill()  # nothing happens to one that has ended
    code = process.wait(timeout=PATIENCE)
    if code == -signal.SIGKILL:
      return False
    assert code == 0, workdir.with_suffix(".log").read_text()
    return True


def holds(pid, path):
  """Whether a process has a file open."""
  with contextlib.suppress(OSError):  # it has ended, or closed one meanwhile
    return any(os.readlink(fd) == str(path) for fd in Path(f"/proc/{pid}/fd").iterdir())
  return False


@pytest.fixture(scope="module")
def command(micro, tmp_path_factory):
  """Of a run that saves every second step and evaluates every fourth."""
  folder = tmp_path_factory.mktemp("kill")
  config = with_train(micro, steps=16, save_every=2, eval_every=4, log_every=1)
  (folder / "micro.json").write_text(json.dumps(to_dict(config)))
  (folder / "micro.py").write_text(
    "import json, pathlib\n\n\ndef get_config(arg):\n"
    "  return json.loads(pathlib.Path(__file__).with_suffix('.json').read_text())\n"
  )
  return Command(folder / "micro.py", folder / "xla")


@pytest.fixture(scope="module")
def straight(command, tmp_path_factory):
  """An undisturbed run, and the seconds that another one takes, whose programs are compiled."""
  workdir = tmp_path_factory.mktemp("straight") / "run"
  assert command.attempt(workdir)  # fills the cache
  shutil.rmtree(workdir)
  assert command.attempt(workdir)
  return workdir, json.loads((workdir / "summary.json").read_text())["goodput"]["wall_seconds"]


def outcome(workdir):
  """What must not depend on kills."""
  record = json.loads((workdir / "checkpoints" / "16" / "record" / "metadata").read_text())
  summary = json.loads((workdir / "summary.json").read_text())
  return {
    "loss": summary["loss"],
    "accuracy": summary["accuracy"],
    "state": record["checksum"],
    "data": record["data"],
    "totals": record["ledger"]["totals"],
    "metrics": rows_without_times(workdir),
    "release": (workdir / "release" / "model.safetensors").read_bytes(),
    "checkpoints": sorted(path.name for path in (workdir / "checkpoints").iterdir()),
  }


@pytest.mark.parametrize(
  "kills", [pytest.param(3, marks=pytest.mark.slow), pytest.param(50, marks=pytest.mark.release)]
)
def test_killed_runs_end_with_the_bits_of_an_undisturbed_one(kills, command, straight, tmp_path):
  reference, seconds = straight
  expected = outcome(reference)
  draw, done, lost = random.Random(kills), 0, 0.0
  for number in itertools.count():
    workdir, before = tmp_path / f"run{number}", done
    while not command.attempt(workdir, draw.uniform(0, seconds / 2) if done < kills else None):
      done += 1
    found = outcome(workdir)
    for name, value in expected.items():
      assert found[name] == value, f"{name} of run {number}, after {done - before} kills"
    assert "damaged" not in workdir.with_suffix(".log").read_text()
    goodput = json.loads((workdir / "summary.json").read_text())["goodput"]
    lost += goodput["seconds"]["lost"]
    print(f"run {number}: {done - before} kills, final loss {found['loss']['train']!r}", flush=True)
    if done >= kills:
      break
  assert kills < 10 or lost > 0, "no kill lost a step: they all came too early or too late"

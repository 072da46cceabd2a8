"""Runs that something goes wrong with: another config, bad data, NaN, a full disk, two stops."""

import collections
import contextlib
import dataclasses
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from train_cases import (
  Watched,
  checkpoint,
  contents,
  full_disk,
  rows_without_times,
  run,
  with_train,
)

from regionjax.config import ConfigError
from regionjax.data.errors import DataError
from regionjax.train import loop
from regionjax.train import workdir as workdirs
from regionjax.train.checkpoint import CheckpointError
from regionjax.train.evals import Evaluation, Evaluator
from regionjax.train.signals import StopRequest
from regionjax.train.state import flatten_paths
from regionjax.weights import release

pytestmark = [
  pytest.mark.usefixtures("compile_once", "no_matmul_timing"),
  # TensorStore leaves futures behind when a write fails half-way.
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_a_run_of_another_config_is_refused(runs):
  config = runs["config"]
  other = dataclasses.replace(config, train=dataclasses.replace(config.train, learning_rate=1.0))
  with pytest.raises(ConfigError, match=r"train.learning_rate: 0.001 there, 1.0 here"):
    run(other, runs["folder"] / "straight")


def test_a_run_with_bad_settings_writes_nothing(micro, tmp_path):
  config = dataclasses.replace(micro, train=dataclasses.replace(micro.train, accumulate=3))
  with pytest.raises(ConfigError, match="make it a multiple of 3"):
    run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(micro, tmp_path, monkeypatch):
  config = dataclasses.replace(micro, train=dataclasses.replace(micro.train, save_every=1))
  real, calls = loop.put_batch, []

  def poisoned(batch, mesh):
    calls.append(1)
    if len(calls) == 3:
      batch = batch | {"images_bkhwc": batch["images_bkhwc"] * np.float32(np.nan)}
    return real(batch, mesh)

  monkeypatch.setattr(loop, "put_batch", poisoned)
  with pytest.raises(loop.DivergedError, match=r"step 3: .*nan.* The checkpoint of step 2 is kept"):
    run(config, tmp_path, profile=(2, 9))
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]
  monkeypatch.setattr(loop, "put_batch", real)
  reports = Watched(stop_at=4, number=signal.SIGTERM)
  stopped = run(config, tmp_path, reports, profile=(3, 3))
  assert "profile of steps 3 to 3" in reports.text.getvalue(), "the other trace has been ended"
  assert stopped.exit_code == 0 and not stopped.finished and stopped.step >= 4


def test_the_best_parameters_outlive_a_kill_between_two_writes(runs, tmp_path, monkeypatch):
  """The checkpoint of step 6, which says that they are its own, was complete, they were not."""
  workdir = shutil.copytree(runs["folder"] / "straight", tmp_path / "run")
  shutil.rmtree(workdir / "checkpoints" / "12")
  shutil.rmtree(workdir / "best")
  worse = Evaluation(loss=99.0, cells={})
  monkeypatch.setattr(Evaluator, "__call__", lambda self, *_: worse)
  reports = Watched()
  assert run(runs["config"], workdir, reports).finished
  assert "going on from step 6" in reports.text.getvalue()
  arrays, _ = checkpoint(workdir, 6)
  for path, leaf in flatten_paths(release.load(workdir / "release")[1]).items():
    key = "['trainable']" + "".join(f"['{part}']" for part in path.split("/"))
    np.testing.assert_array_equal(leaf, arrays[key].astype(leaf.dtype), err_msg=path)


@pytest.mark.slow
def test_what_led_to_a_checkpoint_is_stored_with_it(micro, tmp_path, monkeypatch):
  """A bucket that is mounted as a folder gets an open file's rows when they are synced."""
  real, synced = os.fsync, []

  def watched(file):
    synced.append(Path(os.readlink(f"/proc/self/fd/{file}")))
    real(file)

  monkeypatch.setattr(os, "fsync", watched)
  run(with_train(micro, steps=1, save_every=1, log_every=1, eval_every=0), tmp_path)
  counts = collections.Counter(path.name[:6] for path in synced if tmp_path in path.parents)
  assert counts["metric"] == counts["goodpu"] == counts["events"] == 2, counts  # step 1, end


def test_bad_data_in_the_middle_loses_nothing(micro, tmp_path, monkeypatch):
  from regionjax.data.pipeline import Pipeline

  real = Pipeline.peek

  def breaks(self):
    if self.stats()["batches"] == 3:
      raise DataError("image 7 is truncated")
    real(self)

  monkeypatch.setattr(Pipeline, "peek", breaks)
  with pytest.raises(DataError, match="image 7"):
    run(micro, tmp_path)
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_a_folder_in_use_is_refused_and_left_as_it_is(runs):
  workdir = runs["folder"] / "straight"
  config = with_train(runs["config"], eval_every=0, log_every=5)  # both may change
  before = contents(workdir)
  held = workdirs.lock(workdir)
  for _ in range(2):
    with pytest.raises(ConfigError, match="in use by another process"):
      run(config, workdir)
    assert contents(workdir) == before
  held.close()
  workdirs.lock(workdir).close()


def test_a_lock_makes_no_folder_full(micro, tmp_path):
  workdirs.lock(tmp_path).close()
  assert [p.name for p in tmp_path.iterdir()] == [workdirs.LOCK]
  assert workdirs.check(tmp_path, micro) is False
  (tmp_path / "photo.jpg").write_text("x")
  with pytest.raises(ConfigError, match="is not empty and holds no run"):
    workdirs.check(tmp_path, micro)


def test_a_run_without_readable_checkpoints_never_starts_anew_by_itself(runs, tmp_path):
  workdir = shutil.copytree(runs["folder"] / "straight", tmp_path / "run")
  config = with_train(runs["config"], eval_every=0)
  for record in (workdir / "checkpoints").glob("*/record/metadata"):
    record.unlink()
  metrics = (workdir / "metrics.jsonl").read_bytes()
  for _ in range(2):
    with pytest.raises(CheckpointError) as caught:
      run(config, workdir)
    assert re.search("steps 6, 12.*name another --workdir, or delete", str(caught.value))
    assert (workdir / "metrics.jsonl").read_bytes() == metrics
    workdirs.lock(workdir).close()  # free, though `caught` keeps the frames that took it


class Filling(Watched):
  """While entered, the disk is full from the report of one step to that of another."""

  def __init__(self, workdir, first, last=None):
    super().__init__()
    self._workdir, self._first, self._last = workdir, first, last
    self._full = contextlib.ExitStack()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._full.close()

  def update(self, step, *args):
    super().update(step, *args)
    if step == self._first:
      while list(self._workdir.glob("*/*.orbax-checkpoint-tmp")):
        time.sleep(0.01)  # what is being written gets done
      self._full.enter_context(full_disk())
    if step == self._last:
      self._full.close()


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_only(runs, tmp_path):
  """Metrics wait in memory meanwhile; the run ends with the bits of an undisturbed one."""
  workdir, straight = tmp_path / "run", runs["folder"] / "straight"
  with Filling(workdir, 4, 10) as reports:
    assert run(with_train(runs["config"], save_every=2), workdir, reports).finished
  lost = re.findall(
    r"^the checkpoint of step (\d+) could not be written \(.*too large",
    reports.text.getvalue(),
    re.M,
  )
  # That of step 8 is still being written when there is space again: it may succeed.
  assert lost in (["4", "6", "8"], ["4", "6"])
  assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [10, 12]
  arrays, again = checkpoint(straight, 12)[0], checkpoint(workdir, 12)[0]
  for path in arrays:
    assert arrays[path].tobytes() == again[path].tobytes(), path
  assert rows_without_times(workdir) == rows_without_times(straight)


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run_with_an_error(runs, tmp_path):
  config = with_train(runs["config"], save_every=2, eval_every=0)
  said = r"state of step 12 could not be saved .* is of step 2\. Free some"
  with Filling(tmp_path / "run", 4) as reports, pytest.raises(CheckpointError, match=said):
    run(config, tmp_path / "run", reports)
  reports = Watched()
  assert run(config, tmp_path / "run", reports).finished
  assert "going on from step 2" in reports.text.getvalue()


def test_a_second_sigterm_changes_nothing_a_second_ctrl_c_acts():
  with StopRequest() as stop:
    for _ in range(3):
      signal.raise_signal(signal.SIGTERM)
    assert stop.received == signal.SIGTERM and stop.exit_code == 0
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_killed_before_it_had_written_its_config_can_be_started_again(micro, tmp_path):
  workdirs.lock(tmp_path).close()
  (tmp_path / "config.json.part").write_text('{"name": "mi')
  assert workdirs.check(tmp_path, micro) is False


def test_steps_to_keep_must_be_steps_that_are_saved(micro, tmp_path):
  with pytest.raises(
    ConfigError, match=r"train.keep_every=8: expected a multiple of .*save_every=6"
  ):
    run(with_train(micro, keep_every=8), tmp_path / "run")

"""Runs that are refused, stopped by what they meet, or find their folder damaged."""

import dataclasses
import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from train_runs import Watched, contents, run, with_train

from regionjax.config import ConfigError, SourceConfig
from regionjax.data.errors import DataError
from regionjax.train import loop
from regionjax.train import workdir as workdirs
from regionjax.train.checkpoint import CheckpointError

PHOTOS = Path(__file__).parents[1] / "data" / "photos"
pytestmark = pytest.mark.usefixtures("compile_once", "no_matmul_timing")


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
    run(config, tmp_path)
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]
  monkeypatch.setattr(loop, "put_batch", real)
  stopped = run(config, tmp_path, Watched(stop_at=4, number=signal.SIGTERM))
  assert stopped.exit_code == 0 and not stopped.finished and stopped.step >= 4


def test_bad_data_in_the_middle_loses_nothing(micro, tmp_path, monkeypatch):
  from regionjax.data.pipeline import Pipeline

  real = Pipeline.__next__

  def breaks(self):
    if self.stats()["batches"] == 3:
      raise DataError("image 7 is truncated")
    return real(self)

  monkeypatch.setattr(Pipeline, "__next__", breaks)
  with pytest.raises(DataError, match="image 7"):
    run(micro, tmp_path)
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_a_time_limit_ends_the_schedule(micro, tmp_path):
  train = dataclasses.replace(micro.train, stop_after_minutes=1e-4, eval_every=0)
  outcome = run(dataclasses.replace(micro, train=train), tmp_path)
  assert outcome.finished
  assert 0 <= outcome.step < 12
  assert outcome.summary["time_limited"] is True
  assert "not reproducible" in (tmp_path / "release" / "README.md").read_text()


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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
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


def test_what_is_wrong_with_a_file_of_boxes_is_reported(micro, tmp_path):
  data = json.loads((PHOTOS / "annotations.json").read_text())
  boxes = len(data["annotations"])
  data["images"].append({"id": 99, "file_name": "gone.jpg", "width": 60, "height": 40})
  data["annotations"].append(data["annotations"][0] | {"id": 999, "bbox": [5, 5, 0, 10]})
  annotations = tmp_path / "boxes.json"
  annotations.write_text(json.dumps(data))
  args = {"annotations": str(annotations), "images": str(PHOTOS), "max_regions": 3}
  sources = (SourceConfig("coco", args=args),)
  config = dataclasses.replace(micro, data=dataclasses.replace(micro.data, sources=sources))
  reports = Watched()
  run(with_train(config, eval_every=0, save_every=0), tmp_path / "run", reports)
  (told,) = json.loads((tmp_path / "run" / "summary.json").read_text())["data"]["sources"]
  table = told.pop("text")
  assert told.pop("examples") >= 8
  assert told == {
    "name": "coco",
    "used": {"images": 8, "boxes": boxes},
    "counts": {"missing image": 1, "zero-area box": 1},
    "defects": 2,
  }
  assert reports.text.getvalue().count(table) == 1
  assert "gone.jpg" in table and "annotation 999" in table

"""Metrics files, the progress line, the picture, the ledger, the work folder's check."""

import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regionjax.config import ConfigError
from regionjax.config_files import apply_overrides
from regionjax.data.scenes_dialogue import TASKS
from regionjax.train import workdir as workdirs
from regionjax.train.evals import Evaluation, held_out_config
from regionjax.train.ledger import Ledger
from regionjax.train.metrics import MetricsWriter, read_metrics, scalars
from regionjax.train.plots import plot_run, smooth
from regionjax.train.progress import Clock, Progress, duration, short
from regionjax.train.speed import peak_flops


def test_metrics_of_steps_that_will_be_repeated_are_dropped(tmp_path):
  writer = MetricsWriter(tmp_path)
  for step in (2, 4, 6, 8):
    writer.write("train", step, {"loss": 1 / step})
  writer.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"kind": "train", "st')  # killed while writing
  writer = MetricsWriter(tmp_path, step=4)
  writer.write("train", 6, {"loss": 0.5})
  writer.close()
  rows = read_metrics(tmp_path / "metrics.jsonl")
  assert [(row["step"], row["loss"]) for row in rows] == [(2, 0.5), (4, 0.25), (6, 0.5)]
  assert list((tmp_path / "tensorboard").iterdir())


def test_only_one_process_writes(tmp_path):
  writer = MetricsWriter(tmp_path, enabled=False)
  writer.write("train", 1, {"loss": 1.0})
  writer.close()
  assert not list(tmp_path.iterdir())


def test_nested_numbers_become_scalars():
  values = {"loss": 1.0, "by_task": {"name": 0.5}, "text": "x", "flag": True}
  assert scalars(values, "eval") == {"eval/loss": 1.0, "eval/by_task/name": 0.5}


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_progress_redraws_on_a_terminal():
  stream = Terminal()
  progress = Progress(stream)
  progress.update(5, 10, 0.5, ["loss 1.0"])
  progress.message("held-out loss 2.0")
  progress.close()
  first, second = stream.getvalue().split("\r\033[K")[1:]
  assert first == "step 5/10  ████████········ 50%  loss 1.0"
  assert second == "held-out loss 2.0\n" + first + "\n"


def test_progress_prints_lines_elsewhere():
  stream = io.StringIO()
  progress = Progress(stream)
  progress.update(5, 10, 0.5, ["loss 1.0"])
  progress.message("hello")
  progress.close()
  assert stream.getvalue() == "step 5/10  50%  loss 1.0\nhello\n"


@pytest.mark.parametrize("seconds, text", [(None, "--:--"), (75.2, "1:15"), (7275, "2:01:15")])
def test_duration(seconds, text):
  assert duration(seconds) == text


@pytest.mark.parametrize(
  "number, text", [(7, "7"), (1234.5, "1.23k"), (2.5e6, "2.5M"), (7.04e9, "7.04G")]
)
def test_short(number, text):
  assert short(number) == text


def test_the_clock_estimates_from_the_pace_since_begin(monkeypatch):
  now = [100.0]
  monkeypatch.setattr("time.monotonic", lambda: now[0])
  clock = Clock(elapsed=50)
  assert clock.remaining(0.1) == 0 and clock.elapsed == 50
  clock.begin(0.1)
  assert clock.remaining(0.1) is None
  now[0] = 110.0
  assert clock.elapsed == 60
  assert clock.remaining(0.2) == pytest.approx(80)


def test_smoothing_is_a_mean_without_lag():
  np.testing.assert_allclose(smooth([3.0] * 7), 3.0)
  line = np.arange(100.0)
  np.testing.assert_allclose(smooth(line)[5:95], line[5:95])
  assert np.ptp(smooth([0.0, 1.0] * 50)[5:95]) < 0.25
  assert len(smooth([])) == 0


def test_the_picture_has_lines_in_it(tmp_path):
  rows = [{"kind": "train", "step": s, "loss": 3 * math.exp(-s / 40) + 0.1} for s in range(1, 100)]
  rows += [
    {"kind": "eval", "step": s, "loss": 1.0, "by_task": {"name": s / 99}, "by_reference": {}}
    for s in (33, 66, 99)
  ]
  path = plot_run(rows, tmp_path / "curves.png", title="a run")
  pixels = np.asarray(Image.open(path).convert("RGB"))
  assert pixels.shape[0] > 300 and pixels.shape[1] > 1200
  blue = (pixels[..., 2].astype(int) - pixels[..., 0]) > 80
  assert blue[:, : pixels.shape[1] // 3].sum() > 300
  assert plot_run([], tmp_path / "empty.png", title="nothing").is_file()


def test_the_ledger_survives_json_exactly():
  ledger = Ledger(step=3)
  values = dict(tokens=7, examples=2, images=1, regions=4, weight_sum=3.0, loss_sum=0.1)
  ledger.add(values, flops=1e12)
  ledger.add(values | {"loss_sum": 0.2}, flops=1e12)
  assert ledger.note_evaluation(3, {"loss": 0.5})
  again = Ledger(**json.loads(json.dumps(ledger.to_json())))
  assert again == ledger
  assert again.totals["tokens"] == 14 and again.totals["flops"] == 2e12
  assert again.close_window() == (0.1 + 0.2) / 6
  assert math.isnan(again.close_window())


def test_the_ledger_knows_the_best_evaluation():
  ledger = Ledger()
  assert ledger.note_evaluation(1, {"loss": 0.5})
  assert not ledger.note_evaluation(2, {"loss": 0.6})
  assert not ledger.note_evaluation(3, {"loss": math.nan})
  assert ledger.best == {"step": 1, "loss": 0.5}
  assert ledger.evaluation["step"] == 3


def test_accuracy_by_task_and_by_reference():
  cells = {("name", "box"): (3, 4), ("name", "point"): (0, 1), ("count", "none"): (1, 1)}
  found = Evaluation(0.5, cells)
  assert found.accuracy == 4 / 6
  assert found.by(0) == {"count": 1.0, "name": 0.6}
  assert found.by(1) == {"box": 0.75, "none": 1.0, "point": 0.0}
  assert math.isnan(Evaluation(0.5, {}).accuracy)


def test_held_out_scenes_are_single_questions_of_the_test_split(micro):
  (source,) = micro.data.sources
  args = dict(held_out_config(source).args)
  tasks = args.pop("tasks")
  assert args == {"turns": 1, "split": "test", "seed": 0}
  assert set(tasks) == set(TASKS) and set(tasks.values()) == {1.0}
  chosen = dataclasses.replace(source, args={"tasks": {"name": 3.0, "read": 1.0}})
  assert held_out_config(chosen).args["tasks"] == {"name": 1.0, "read": 1.0}
  other = dataclasses.replace(source, name="coco", args={"images": "x"})
  assert held_out_config(other) is other


def test_a_new_folder_is_free_and_nothing_is_written(tmp_path, micro):
  assert workdirs.check(tmp_path / "a" / "b", micro) is False
  assert not (tmp_path / "a").exists()


def test_a_folder_of_another_config_is_refused_with_the_differences(tmp_path, micro):
  workdirs.register(tmp_path, micro)
  other = apply_overrides(micro, ["--train.learning_rate=0.5", "--data.sources.0.args.turns=9"])
  with pytest.raises(ConfigError) as caught:
    workdirs.check(tmp_path, other)
  message = str(caught.value)
  assert "train.learning_rate: 0.001 there, 0.5 here" in message
  assert "data.sources.0.args.turns: 2 there, 9 here" in message
  assert "train.steps" in message.splitlines()[-1]


def test_cadence_may_change_and_is_said(tmp_path, micro):
  workdirs.register(tmp_path, micro)
  said = []
  changes = [f"--{key}=3" for key in workdirs.MAY_CHANGE]
  assert workdirs.check(tmp_path, apply_overrides(micro, changes), log=said.append) is True
  assert len(said) == len(workdirs.MAY_CHANGE)
  assert "train.steps was 12, is now 3" in said


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_work_folder_is_refused(kind, tmp_path, micro):
  path = tmp_path / "there"
  if kind == "file":
    path.write_text("x")
  else:
    path.mkdir()
    (path / "photo.jpg").write_text("x")
  with pytest.raises(ConfigError, match=r"is a file|holds no run"):
    workdirs.check(path, micro)


def test_a_bucket_s_address_is_refused(micro, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)  # where a folder gs:/ would be made
  with pytest.raises(ConfigError, match=r"--workdir gs://bucket/run: expected a folder.*gcsfuse"):
    workdirs.check(Path("gs://bucket/run"), micro)
  assert workdirs.check(Path("12:30"), micro) is False


def test_peak_is_measured_on_a_cpu():
  import jax

  peak = peak_flops(jax.devices("cpu"), size=256)
  assert 1e8 < peak < 1e14

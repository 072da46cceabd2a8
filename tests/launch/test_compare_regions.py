"""The comparison: known figures become its table; runs are stopped, continued and refused."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from regionjax.config import to_dict
from regionjax.config_files import load_config
from regionjax.data.scenes_dialogue import TASKS
from regionjax.train.metrics import read_metrics

SCRIPT = Path(__file__).parents[2] / "launch" / "compare_regions.py"
SMALL_TABLE = ("--seeds", "2", "--kinds", "pool", "none", "--eval-examples", "26")


@pytest.fixture(scope="module")
def compare():
  spec = importlib.util.spec_from_file_location("compare_regions", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def cell_config(compare, kind, seed, *words):
  """The config that a command line trains a cell with."""
  spec, *overrides = compare.settings(kind, seed, compare.parse_arguments(words))
  return load_config(spec, overrides)


def write_run(folder: Path, accuracy: float, config, answers: int) -> Path:
  """A finished run of 25 steps with evaluations at steps 15 and 25, logged every 10th."""
  folder.mkdir(parents=True)
  rows = [
    {"kind": "train", "step": s, "loss": 1.0, "examples": 16 * s, "flops": 1e9 * s}
    for s in (1, 10, 20)
  ]
  rows += [
    {
      "kind": "eval", "step": step, "loss": 1.0, "accuracy": value, "by_task": {"name": value},
      "by_reference": {"box": value, "none": 0.0},
    }
    for step, value in ((15, accuracy / 2), (25, accuracy))
  ]  # fmt: skip
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  summary = {
    "accuracy": {
      "accuracy": accuracy, "answers": answers, "by_task": {"name": accuracy},
      "by_reference": {"box": accuracy},
    },
    "steps": 25, "examples": 400, "flops": 2.5e10, "parameters": {"total": 1000},
    "data": {"truncated": 3, "draws": {"scenes": 400}}, "config": to_dict(config),
  }  # fmt: skip
  (folder / "summary.json").write_text(json.dumps(summary))
  return folder


@pytest.fixture
def finished(compare, tmp_path):
  """(folder, words): four finished runs and the command they are of."""
  words = ["--out", str(tmp_path), *SMALL_TABLE]
  for kind, base in (("pool", 0.8), ("none", 0.2)):
    for seed in range(2):
      config = cell_config(compare, kind, seed, *words)
      answers = compare.count_questions(config)["all"]
      write_run(tmp_path / f"{kind}-s{seed}", base + 0.1 * seed, config, answers)
  return tmp_path, words


def test_finished_runs_become_a_table_and_a_picture_without_training_again(compare, finished):
  out, words = finished
  assert compare.main(words) == 0
  table = (out / "table.md").read_text()
  asked = compare.count_questions(cell_config(compare, "pool", 0, *words))
  assert asked["all"] == 26
  for group in (TASKS, ("by box", "by mask", "by none", "by point", "by polygon")):
    assert sum(asked.get(name, 0) for name in group) == 26
  assert "| **all questions** | 26 | 85.0 ± 7.1 | 25.0 ± 7.1 |" in table
  assert f"| name | {asked['name']} | 85.0 ± 7.1 | 25.0 ± 7.1 |" in table
  assert f"| asked by box | {asked['by box']} | 85.0 ± 7.1 | 25.0 ± 7.1 |" in table
  assert "| dialogues cut short, % |  | 0.8 | 0.8 |" in table
  assert "over the seeds (here 2" in table and "the same n unseen questions" in table
  cells = json.loads((out / "results.json").read_text())
  curves = cells["pool"][0]["curves"]
  assert set(curves) == {"all", "name", "by box", "by none"}
  # The end is the summary's, though the last logged step was the 20th.
  assert curves["by box"] == [[240.0, 1.5e10, 0.4], [400.0, 2.5e10, 0.8]]
  for name in ("curves.png", "tasks-1.png"):
    assert min(Image.open(out / name).size) > 300


def test_runs_made_under_other_settings_are_refused(compare, finished, capsys):
  out, words = finished
  assert compare.main([*words, "--minutes", "2"]) == 2
  assert "train.stop_after_minutes: 7.25 there, 1.25 now" in capsys.readouterr().err
  assert compare.main([*words, "--eval-every", "10"]) == 2
  assert "train.eval_every: 150 there, 10 now" in capsys.readouterr().err
  assert compare.main([*words, "--", "--data.rows=8"]) == 2
  assert "data.rows: 16 there, 8 now" in capsys.readouterr().err
  # So is one that was stopped, and before any other is trained.
  (out / "none-s1" / "summary.json").unlink()
  config = to_dict(cell_config(compare, "none", 1, *words, "--minutes", "2"))
  (out / "none-s1" / "config.json").write_text(json.dumps(config))
  assert compare.main([*words, "--kinds", "text", "none"]) == 2
  assert "none-s1 holds a run under other settings" in capsys.readouterr().err
  assert not (out / "table.md").exists() and not (out / "text-s0").exists()


def test_runs_asked_other_questions_are_refused(compare, finished, capsys):
  out, words = finished
  path = out / "pool-s1" / "summary.json"
  summary = json.loads(path.read_text())
  summary["accuracy"]["answers"] += 1
  path.write_text(json.dumps(summary))
  assert compare.main(words) == 2
  assert "pool-s1 was evaluated on" in capsys.readouterr().err


def test_all_ways_learn_from_the_same_questions(compare):
  dropped = {}
  for kind in compare.KINDS:
    config = cell_config(compare, kind, 0)
    assert config.data.sources[0].args["turns"] == (6, 9)
    dropped[kind] = compare.share_dropped(config)
  assert max(dropped.values()) < 0.025
  assert max(dropped.values()) - min(dropped.values()) < 0.02
  assert dropped["pool"] < dropped["text"]  # it counts: 512 tokens of text are the tighter row


def test_the_end_of_a_run_lies_within_its_minutes(compare, capsys):
  minutes = cell_config(compare, "pool", 0, "--minutes", "8").train.stop_after_minutes
  assert minutes == 8 - compare.FINISH_MINUTES
  with pytest.raises(SystemExit):
    compare.main(["--minutes", "0.5"])
  assert "the last evaluation and the export alone" in capsys.readouterr().err


CHILD = """
import pathlib, signal, sys, time
def save(number, frame):
  signal.signal(number, signal.SIG_DFL)
  time.sleep(1.0)
  pathlib.Path(sys.argv[1], "saved").write_text(signal.Signals(number).name)
  sys.exit(0)
for number in (signal.SIGINT, signal.SIGTERM):
  signal.signal(number, save)
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(60)
"""
PARENT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("compare_regions", sys.argv[1])
compare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare)
try:
  compare.run_child([sys.executable, "-c", sys.argv[2], sys.argv[3]])
except compare.StoppedError as stopped:
  sys.exit(stopped.args[0])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_waits_until_the_run_has_saved(tmp_path, number):
  command = [sys.executable, "-c", PARENT, str(SCRIPT), CHILD, str(tmp_path)]
  # A group of its own, as a shell gives it.
  parent = subprocess.Popen(command, process_group=0)
  try:
    wait_for(lambda: (tmp_path / "ready").exists(), parent)
    send(parent, number)
    assert parent.wait(timeout=30) == number
  finally:
    parent.kill()
    parent.wait()
  assert (tmp_path / "saved").read_text() == number.name


def wait_for(condition, process, seconds=120):
  deadline = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None, "the process has ended"
    assert time.monotonic() < deadline
    time.sleep(0.02)


def send(process, number):
  """As it comes in life: Ctrl-C from a terminal to the whole group, SIGTERM to the one process."""
  if number == signal.SIGINT:
    os.killpg(process.pid, number)
  else:
    process.send_signal(number)


@pytest.mark.slow
def test_a_stopped_comparison_goes_on(tmp_path):
  steps = 150
  command = [
    sys.executable, str(SCRIPT), "--out", str(tmp_path), "--seeds", "1", "--kinds", "none",
    "--eval-every", "100", "--eval-examples", "13", "--",
    f"--train.steps={steps}", "--train.save_every=25", "--data.rows=4",
    "--model.vision.layers=1", "--model.vision.mlp_width=32", "--model.decoder.layers=1",
    "--model.decoder.mlp_width=32", "--model.vision.image_size=64",
  ]  # fmt: skip
  workdir = tmp_path / "none-s0"

  def stop(number):
    # In the middle, a few steps behind where it began.
    before = logged(workdir)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0)
    try:
      wait_for(lambda: logged(workdir) > before, process)
      send(process, number)
      _, errors = process.communicate(timeout=60)
    finally:
      process.kill()
      process.wait()
    assert process.returncode == 128 + number, errors
    assert "saved; to go on" in errors and "the same command goes on from here" in errors
    assert not (workdir / "summary.json").exists()
    return max(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))

  first = stop(signal.SIGINT)
  second = stop(signal.SIGTERM)
  assert 0 < first < second < steps
  done = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  assert f"going on from step {second}" in done.stderr
  assert json.loads((workdir / "summary.json").read_text())["steps"] == steps
  rows = [row["step"] for row in read_metrics(workdir / "metrics.jsonl") if row["kind"] == "train"]
  assert rows == sorted(set(rows)) and rows[-1] > second
  assert "| none |" in (tmp_path / "table.md").read_text()
  again = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert again.returncode == 0 and "==" not in again.stdout  # nothing was trained


def logged(workdir):
  return max((row["step"] for row in read_metrics(workdir / "metrics.jsonl")), default=0)

"""Whole runs of the micro model on scenes: resume, stops, accidents, what a run leaves behind."""

import dataclasses
import io
import json
import signal

import jax
import numpy as np
import pytest

from regionjax.config import ConfigError, RegionConfig
from regionjax.data.errors import DataError
from regionjax.mesh import make_mesh
from regionjax.train import loop
from regionjax.train import workdir as workdirs
from regionjax.train.finish import export_workdir
from regionjax.train.metrics import read_metrics
from regionjax.train.progress import Progress
from regionjax.train.start import model_functions, starting_params
from regionjax.train.state import flatten_paths

TIMES = ("elapsed", "seconds", "tokens_per_second", "examples_per_second", "seconds_per_step",
         "data_wait", "mfu")  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
  """Every run here compiles the same programs; they come from a cache after the first."""
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = [getattr(jax.config, name) for name in names]
  for name, value in zip(names, (str(tmp_path_factory.mktemp("xla")), 0.2)):
    jax.config.update(name, value)
  yield
  for name, value in zip(names, before):
    jax.config.update(name, value)


@pytest.fixture(autouse=True)
def no_matmul_timing(monkeypatch):
  monkeypatch.setattr(loop, "peak_flops", lambda devices: 1e11)


class Watched(Progress):
  """Raises a signal when a step is reported."""

  def __init__(self, stop_at=None, number=signal.SIGINT):
    self.text = io.StringIO()
    super().__init__(self.text)
    self._stop_at, self._number = stop_at, number

  def update(self, step, *args):
    super().update(step, *args)
    if step == self._stop_at:
      signal.raise_signal(self._number)


def run(config, workdir, progress=None, **kwargs):
  progress = Watched() if progress is None else progress
  mesh = make_mesh(devices=jax.devices()[:1])
  return loop.train(config, workdir, mesh=mesh, progress=progress, **kwargs)


def rows_without_times(workdir):
  return [
    {key: value for key, value in row.items() if key not in TIMES}
    for row in read_metrics(workdir / "metrics.jsonl")
  ]


def checkpoint(workdir, step):
  """(arrays by path, record) of a checkpoint, read without the trainer."""
  import orbax.checkpoint as ocp

  folder = workdir / "checkpoints" / str(step)
  arrays = ocp.StandardCheckpointer().restore(folder / "state")
  record = json.loads((folder / "record" / "metadata").read_text())
  leaves, _ = jax.tree_util.tree_flatten_with_path(arrays)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}, record


@pytest.fixture(scope="module")
def runs(tmp_path_factory, micro):
  """A straight run of 12 steps, and one stopped at step 9 and resumed: folders and outcomes."""
  config = micro
  folder = tmp_path_factory.mktemp("runs")
  patch = pytest.MonkeyPatch()
  patch.setattr(loop, "peak_flops", lambda devices: 1e11)
  straight = run(config, folder / "straight")
  reports = Watched(stop_at=8)
  stopped = run(config, folder / "parts", reports, command="regionjax train X --workdir Y")
  at_stop = sorted(int(p.name) for p in (folder / "parts" / "checkpoints").iterdir())
  resumed = run(config, folder / "parts")
  patch.undo()
  return dict(
    config=config, folder=folder, straight=straight, stopped=stopped, resumed=resumed,
    text=reports.text.getvalue(), at_stop=at_stop,
  )  # fmt: skip


def test_a_stopped_run_says_how_to_go_on(runs):
  assert not runs["stopped"].finished
  assert runs["stopped"].exit_code == 130
  step = runs["stopped"].step
  assert step == 9, "metrics of step 8 are read while step 9 runs, which is finished"
  assert runs["at_stop"][-1] == step
  assert (
    f"stopped at step {step}, saved; to go on:\n  regionjax train X --workdir Y" in runs["text"]
  )


def test_a_resumed_run_equals_a_straight_one_bit_by_bit(runs):
  assert runs["straight"].finished and runs["resumed"].finished
  folder = runs["folder"]
  arrays, record = checkpoint(folder / "straight", 12)
  again, record_again = checkpoint(folder / "parts", 12)
  assert arrays.keys() == again.keys() and len(arrays) > 60
  for path in arrays:
    assert arrays[path].tobytes() == again[path].tobytes(), path
  assert record["checksum"] == record_again["checksum"]
  assert record["data"] == record_again["data"]
  for ledger in (record["ledger"], record_again["ledger"]):
    for part in (ledger, ledger["evaluation"]):
      for name in TIMES:
        part.pop(name, None)
  assert record["ledger"] == record_again["ledger"]
  assert rows_without_times(folder / "straight") == rows_without_times(folder / "parts")
  weights = [
    (folder / n / "release" / "model.safetensors").read_bytes() for n in ("straight", "parts")
  ]
  assert weights[0] == weights[1]


def test_what_a_run_logs(runs):
  rows = read_metrics(runs["folder"] / "straight" / "metrics.jsonl")
  train = [row for row in rows if row["kind"] == "train"]
  evals = [row for row in rows if row["kind"] == "eval"]
  assert [row["step"] for row in train] == [1, 2, 4, 6, 8, 10, 12]
  assert [row["step"] for row in evals] == [6, 12]
  assert train[-1]["loss"] < train[0]["loss"]
  assert train[-1]["tokens_per_second"] > 0 and 0 <= train[-1]["data_wait"] <= 1
  assert evals[0]["answers"] == 6
  assert set(evals[0]["by_reference"]) <= {"none", "mixed", "box", "point", "polygon", "mask"}


def test_what_a_run_leaves_behind(runs):
  from regionjax.weights import release

  workdir, config = runs["folder"] / "straight", runs["config"]
  summary = json.loads((workdir / "summary.json").read_text())
  assert summary == runs["straight"].summary
  parts = summary["parameters"]
  assert parts["total"] == sum(parts[p] for p in ("vision", "connector", "regions", "decoder"))
  assert summary["steps"] == 12 and summary["flops"] > 0
  assert summary["tokens"]["image"] == summary["images"] * config.model.image_tokens
  assert summary["tokens"]["llm"] > summary["tokens"]["image"] + summary["tokens"]["region"]
  assert summary["versions"]["jax"] == jax.__version__
  assert (workdir / "curves.png").read_bytes()[:4] == b"\x89PNG"
  assert (workdir / "release" / "README.md").read_text().startswith("# micro\n")
  saved, params, _ = release.load(workdir / "release")
  assert saved == config
  arrays, _ = checkpoint(workdir, 12)
  for path, leaf in flatten_paths(params).items():
    key = "['trainable']" + "".join(f"['{part}']" for part in path.split("/"))
    np.testing.assert_array_equal(leaf, arrays[key].astype(leaf.dtype), err_msg=path)


def test_a_finished_run_stays_finished(runs):
  reports = Watched()
  outcome = run(runs["config"], runs["folder"] / "straight", reports)
  assert outcome.finished and outcome.step == 12
  assert "done: 12 steps" in reports.text.getvalue()


def test_a_release_can_be_made_from_a_stopped_run(runs, tmp_path):
  out = export_workdir(runs["folder"] / "parts", tmp_path / "out")
  made = (out / "model.safetensors").read_bytes()
  assert made == (runs["folder"] / "parts" / "release" / "model.safetensors").read_bytes()
  with pytest.raises(ConfigError, match="is no work folder"):
    export_workdir(tmp_path, tmp_path / "out2")


def test_training_can_start_from_a_release(runs, micro):
  from regionjax.tokenizer import load_tokenizer
  from regionjax.weights import release

  folder = str(runs["folder"] / "straight" / "release")
  tokenizer = load_tokenizer("tiny")
  config = dataclasses.replace(micro, train=dataclasses.replace(micro.train, init_from=folder))

  def start_from(config):
    said = []
    shapes = jax.eval_shape(model_functions(config, tokenizer)[1], jax.random.key(0))
    return starting_params(config, shapes, tokenizer, log=said.append), said

  given, said = start_from(config)
  theirs = flatten_paths(release.load(folder)[1])
  assert flatten_paths(given).keys() == theirs.keys() and said == []
  model = config.model
  without = dataclasses.replace(model, region=dataclasses.replace(model.region, kind="text"))
  given, said = start_from(dataclasses.replace(config, model=without))
  assert set(given) == {"vision", "connector", "decoder"}
  assert said == [f"train.init_from={folder}: of the release not used: regions/.*"]
  pyramid = dataclasses.replace(
    RegionConfig.tiny("pyramid"), layers=(1, 1, 1, 1), width=16, position_width=16
  )
  given, said = start_from(
    dataclasses.replace(config, model=dataclasses.replace(model, region=pyramid))
  )
  assert set(given) == {"vision", "connector", "decoder"}
  assert said[0].endswith("not in the release, starts fresh: regions/.*") and len(said) == 2
  wider = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, mlp_width=64))
  with pytest.raises(ConfigError) as caught:
    start_from(dataclasses.replace(config, model=wider))
  listed = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]]
  assert listed == [f"decoder/layers/{name}/kernel" for name in ("down", "gate", "up")]


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


def test_a_folder_in_use_is_refused(tmp_path):
  held = workdirs.lock(tmp_path)
  with pytest.raises(ConfigError, match="in use by another process"):
    workdirs.lock(tmp_path)
  held.close()
  workdirs.lock(tmp_path).close()

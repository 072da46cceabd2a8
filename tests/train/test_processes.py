"""One run over several processes: the same batches, the same bits, one end, and one message."""

import dataclasses
import re
import shutil

import numpy as np
import pytest
from process_worker import Job, start
from train_cases import with_train

from regionjax.config import MeshConfig


@pytest.fixture(scope="module")
def config(micro):
  """Eight rows over data, fsdp and tensor; each of its steps is logged, none evaluated."""
  model = dataclasses.replace(
    micro.model,
    vision=dataclasses.replace(micro.model.vision, heads=2),
    decoder=dataclasses.replace(micro.model.decoder, layers=2, heads=4, kv_heads=4, head_dim=8),
  )
  train = dataclasses.replace(
    micro.train, steps=4, warmup_steps=1, eval_every=0, save_every=1, keep=4, log_every=1,
    mesh=MeshConfig(data=2, fsdp=2, tensor=2),
  )  # fmt: skip
  data = dataclasses.replace(micro.data, rows=8, shards=4)
  return dataclasses.replace(micro, model=model, train=train, data=data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(config, processes, ...) -> (Result, workdir)."""

  def go(config, processes, *, workdir=None, devices=8, **kw):
    scratch = tmp_path_factory.mktemp(f"of{processes}")
    job = Job(config, workdir or scratch / "run", **kw)
    (result,) = start([job], processes, scratch / "processes", devices=devices)
    assert result.errors == [None] * processes
    return result, job.workdir

  return go


@pytest.fixture(scope="module")
def alone_run(run, config):
  return run(config, 1)


@pytest.fixture(scope="module")
def alone(alone_run):
  return alone_run[0]


@pytest.fixture(scope="module")
def two(config, tmp_path_factory):
  """What two processes made of one task after the other, by name, and the folder of the last."""
  folder = tmp_path_factory.mktemp("two")
  other = with_train(config, learning_rate=0.5, seed=7)
  jobs = {
    "another config": Job(config, folder / "a", others={1: {"config": other}}),
    "another folder": Job(config, folder / "b", others={1: {"workdir": folder / "c"}}),
    "stopped": Job(config, folder / "run", stop=(1, 2)),
    "resumed": Job(config, folder / "run", unreadable=1),
    "broken": Job(with_train(config, save_every=0), folder / "d", broken=(1, 3)),
    "mended": Job(with_train(config, save_every=0), folder / "d"),
  }
  results = start(list(jobs.values()), 2, folder / "processes")
  return dict(zip(jobs, results)), folder


def check_same(result, wanted):
  assert result.rows == wanted.rows and len(wanted.rows) == 4
  assert {len(rows) for rows in wanted.rows.values()} == {8}
  assert result.losses == wanted.losses and len(wanted.losses) == 4


def test_a_sigterm_to_one_process_stops_and_saves_all(two):
  stopped = two[0]["stopped"]
  assert stopped.errors == [None, None] and stopped.finished == [False, False]
  assert stopped.steps[0] == stopped.steps[1] and 2 <= stopped.steps[0] < 4
  assert f"stopped at step {stopped.steps[0]}, saved" in stopped.text


def test_two_processes_do_what_one_does(alone_run, two):
  """Although they were stopped, and the second one then could not read a checkpoint."""
  (alone, straight), (results, folder) = alone_run, two
  before, after = results["stopped"], results["resumed"]
  assert after.errors == [None, None] and after.finished == [True, True]
  for step in before.rows.keys() & after.rows.keys():
    assert before.rows[step] == after.rows[step]
  check_same(dataclasses.replace(after, rows=before.rows | after.rows), alone)
  weights = [path / "release" / "model.safetensors" for path in (straight, folder / "run")]
  assert weights[0].read_bytes() == weights[1].read_bytes()
  assert after.summaries == [True, True], "nobody leaves before process 0 has written everything"


def test_a_checkpoint_that_one_process_cannot_read_is_used_by_none(two):
  results, folder = two
  last, text = results["stopped"].steps[0], results["resumed"].text
  said = f"checkpoint of step {last} is damaged (process 1: it is on another planet); moved to "
  assert said in text and f"using step {last - 1}" in text
  assert f"going on from step {last - 1}" in text
  assert (folder / "run" / "damaged" / str(last)).is_dir()


def test_images_that_one_process_cannot_read_end_all_when_they_have_saved(alone, two):
  """Process 0 had the batch already, which another one had not: it is drawn again."""
  broken, after = two[0]["broken"], two[0]["mended"]
  assert broken.errors == [
    "ElsewhereError: process 1: image 7 is truncated", "DataError: image 7 is truncated"
  ]  # fmt: skip
  assert list(broken.rows) == [1, 2] and list(after.rows) == [3, 4]
  assert "going on from step 2" in after.text
  check_same(
    dataclasses.replace(after, rows=broken.rows | after.rows, losses=broken.losses | after.losses),
    alone,
  )


def test_processes_of_different_configs_all_refuse(two):
  results, folder = two
  for error in results["another config"].errors:
    assert error.startswith("ConfigError: the processes of this run differ:")
    assert "train.learning_rate: 0.001 in process 0, 0.5 in process 1" in error
    assert "train.seed: 0 in process 0, 7 in process 1" in error
  assert not (folder / "a").exists()


def test_a_folder_that_only_one_process_has_is_refused_by_all(two):
  first, second = two[0]["another folder"].errors
  assert second.startswith("ConfigError: --workdir ") and "name one that all hosts share" in second
  assert first.startswith("ElsewhereError: process 1: --workdir ")


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_write_is_counted_by_none(run, config):
  result, workdir = run(with_train(config, steps=2), 2, full=1)
  assert result.finished == [True, True]
  (line,) = re.findall(r"^the checkpoint of step 1 could not be written .*$", result.text, re.M)
  # Who says so depends on who is first: the one that could not, or the one that waited for it.
  assert re.search("process 1: .*File too large|process 0: .*Barrier timed out", line)
  assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["2"]


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_along(alone, run, config, tmp_path):
  """None waits for it forever, and what they had saved is where the run goes on."""
  with pytest.raises(RuntimeError, match=r"\[(1|-\d+), -9\]"):
    run(config, 2, workdir=tmp_path / "run", die=(1, 3))
  after, _ = run(config, 2, workdir=tmp_path / "run")
  assert after.finished == [True, True] and min(after.rows) > 1
  assert after.losses == alone.losses


@pytest.mark.slow
def test_four_processes_do_what_one_does(alone, run, config):
  check_same(run(config, 4)[0], alone)


@pytest.mark.slow
def test_rows_that_processes_share(run, config):
  """With tensor=4 two processes of two devices hold the same rows."""
  mesh = with_train(config, mesh=MeshConfig(data=1, fsdp=2, tensor=4))
  vision = dataclasses.replace(mesh.model.vision, heads=4)
  mesh = dataclasses.replace(mesh, model=dataclasses.replace(mesh.model, vision=vision))
  check_same(run(mesh, 4)[0], run(mesh, 1)[0])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_stopped_on_four_goes_on(alone, stopped, run, config, processes, tmp_path):
  before, workdir = stopped
  shutil.copytree(workdir, tmp_path / "run")
  after, _ = run(config, processes, workdir=tmp_path / "run")
  assert before.rows | after.rows == alone.rows
  assert before.losses | after.losses == alone.losses
  assert after.finished == [True] * processes


@pytest.fixture(scope="module")
def stopped(run, config):
  """A run on four processes of which one that isn't the first got SIGTERM in its second step."""
  result, workdir = run(config, 4, stop=(2, 2))
  assert result.finished == [False] * 4
  assert len(set(result.steps)) == 1 and 2 <= result.steps[0] < 4
  return result, workdir


@pytest.mark.slow
def test_on_fewer_devices_the_batches_are_the_same(alone, run, config):
  half = with_train(config, mesh=MeshConfig(data=1, fsdp=2, tensor=2))
  result, _ = run(half, 2, devices=4)
  assert result.rows == alone.rows
  np.testing.assert_allclose(
    list(result.losses.values()), list(alone.losses.values()), rtol=1e-6, atol=0
  )


@pytest.mark.slow
def test_the_first_clock_ends_the_run_for_all(run, config):
  timed = with_train(config, steps=100_000, stop_after_minutes=0.2)
  result, _ = run(timed, 2, idle_clocks=True)
  assert result.finished == [True, True]
  assert result.steps[0] == result.steps[1] < 100_000

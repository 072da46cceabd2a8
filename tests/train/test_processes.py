"""One run over several processes: the same batches, the same bits, one end."""

import dataclasses
import shutil

import numpy as np
import pytest
from process_worker import Job, start

from regionjax.config import MeshConfig


@pytest.fixture(scope="module")
def config(micro):
  """Eight rows over data, fsdp and tensor; each of its steps is logged, none evaluated."""
  model = dataclasses.replace(
    micro.model,
    vision=dataclasses.replace(micro.model.vision, heads=2),
    decoder=dataclasses.replace(micro.model.decoder, heads=4, kv_heads=4, head_dim=8),
  )
  train = dataclasses.replace(
    micro.train, steps=4, warmup_steps=1, eval_every=0, save_every=0, log_every=1,
    mesh=MeshConfig(data=2, fsdp=2, tensor=2),
  )  # fmt: skip
  data = dataclasses.replace(micro.data, rows=8)
  return dataclasses.replace(micro, model=model, train=train, data=data)


def with_train(config, **kw):
  return dataclasses.replace(config, train=dataclasses.replace(config.train, **kw))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(config, processes, ...) -> (Result, workdir)."""

  def go(config, processes, *, workdir=None, **kw):
    scratch = tmp_path_factory.mktemp(f"of{processes}")
    workdir = workdir or scratch / "run"
    return start(Job(config, workdir, processes, **kw), scratch / "processes"), workdir

  return go


@pytest.fixture(scope="module")
def alone(run, config):
  return run(config, 1)[0]


def check_same(result, wanted):
  assert result.rows == wanted.rows and len(wanted.rows) == 4
  assert {len(rows) for rows in wanted.rows.values()} == {8}
  assert result.losses == wanted.losses and len(wanted.losses) == 4


def test_two_processes_do_what_one_does(alone, run, config):
  result, workdir = run(config, 2)
  check_same(result, alone)
  assert result.finished == [True, True]
  assert (workdir / "release" / "model.safetensors").is_file()


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

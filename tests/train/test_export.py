"""`regionjax export`: a release of a work folder, whose run may be writing there."""

import os
import shutil

import pytest
from train_cases import contents

from regionjax.cli import main
from regionjax.config import ConfigError
from regionjax.train import workdir as workdirs
from regionjax.train.checkpoint import CheckpointError
from regionjax.train.finish import export_workdir
from regionjax.train.store import Store

# TensorStore leaves futures behind when a read fails half-way.
pytestmark = [
  pytest.mark.usefixtures("compile_once"),
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def workdir(runs, tmp_path):
  """A finished run's, with checkpoints of steps 6 and 12."""
  return shutil.copytree(runs["folder"] / "straight", tmp_path / "run")


def weights(release):
  return (release / "model.safetensors").read_bytes()


def test_a_release_can_be_made_from_a_stopped_run(runs, tmp_path):
  out = export_workdir(runs["folder"] / "parts", tmp_path / "out")
  assert weights(out) == weights(runs["folder"] / "parts" / "release")
  with pytest.raises(ConfigError, match="is no work folder"):
    export_workdir(tmp_path, tmp_path / "out2")


def test_a_running_run_is_exported_and_left_as_it_is(workdir, tmp_path, capsys):
  """What it is writing has a name of its own until it is complete."""
  for part in ("checkpoints/18.orbax-checkpoint-tmp", "best/18.orbax-checkpoint-tmp"):
    shutil.copytree(workdir / "checkpoints" / "12" / "record", workdir / part)
  before = contents(workdir)
  held = workdirs.lock(workdir)
  assert main(["export", str(workdir), str(tmp_path / "out")]) == 0
  held.close()
  assert weights(tmp_path / "out") == weights(workdir / "release")
  assert contents(workdir) == before
  assert capsys.readouterr().out == f"wrote {tmp_path / 'out'}\n"


@pytest.mark.parametrize("newer", [True, False])
def test_a_checkpoint_that_goes_while_it_is_read(newer, workdir, tmp_path, monkeypatch):
  """The run keeps one: when a newer one is complete, the one before goes."""
  read, gone = Store.restore, []

  def going(store, step, like):
    if not gone:
      gone.append(step)
      target = workdir / "checkpoints" / "12"
      target.rename(workdir / "checkpoints" / "24") if newer else shutil.rmtree(target)
      assert step == 12
    return read(store, step, like)

  monkeypatch.setattr(Store, "restore", going)
  said = []
  out = export_workdir(workdir, tmp_path / "out", log=said.append)
  assert said == [] and gone == [12]
  same = weights(out) == weights(workdir / "release")
  assert same == newer, "with the newer one gone, step 6 is exported"


def test_damaged_checkpoints_are_named_and_stay(workdir, tmp_path):
  for step, others in ((12, 1), (6, 0)):
    os.truncate(workdir / "checkpoints" / str(step) / "record" / "metadata", 0)
    before, said = contents(workdir), []
    if others:
      export_workdir(workdir, tmp_path / "out", log=said.append)
      (line,) = said
      assert line.startswith("checkpoint of step 12 is damaged (")
      assert line.endswith("); using step 6")
    else:
      with pytest.raises(CheckpointError, match=r"damaged: steps 6, 12\); put a copy of one back"):
        export_workdir(workdir, tmp_path / "none", log=said.append)
      assert len(said) == 2 and not (tmp_path / "none").exists()
    assert contents(workdir) == before


def test_a_run_without_a_checkpoint(workdir, tmp_path):
  shutil.rmtree(workdir / "best")
  for left in (
    (workdir / "checkpoints" / "6", workdir / "checkpoints" / "12"),
    [workdir / "checkpoints"],
  ):
    for folder in left:
      shutil.rmtree(folder)
    before = contents(workdir)
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
      export_workdir(workdir, tmp_path / "out")
    assert contents(workdir) == before

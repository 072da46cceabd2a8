"""Short runs for the tests of training: watched ones, and what they leave behind."""

import contextlib
import dataclasses
import io
import json
import resource
import signal

import jax
import numpy as np

from regionjax.mesh import make_mesh
from regionjax.train.lines import read_rows
from regionjax.train.progress import Progress

TIMES = ("elapsed", "seconds", "tokens_per_second", "examples_per_second", "seconds_per_step",
         "data_wait", "mfu")  # fmt: skip


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
  from regionjax.train import loop  # which takes seconds to import

  progress = Watched() if progress is None else progress
  mesh = make_mesh(devices=jax.devices()[:1])
  return loop.train(config, workdir, mesh=mesh, progress=progress, **kwargs)


def rows_without_times(workdir):
  return [
    {key: value for key, value in row.items() if key not in TIMES}
    for row in read_rows(workdir / "metrics.jsonl")
  ]


def checkpoint(workdir, step):
  """(arrays by path, record) of a checkpoint, read without the trainer."""
  import orbax.checkpoint as ocp

  folder = workdir / "checkpoints" / str(step)
  arrays = ocp.StandardCheckpointer().restore(folder / "state")
  record = json.loads((folder / "record" / "metadata").read_text())
  leaves, _ = jax.tree_util.tree_flatten_with_path(arrays)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}, record


def contents(folder):
  """Everything under a folder: path -> bytes, None for folders."""
  return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def with_train(config, **changes):
  return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


@contextlib.contextmanager
def full_disk():
  """No file of this process grows past 2 kB; the error is EFBIG where a full disk's is ENOSPC."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)

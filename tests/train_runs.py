"""Short runs of the micro model: started, watched, stopped."""

import contextlib
import dataclasses
import io
import signal

import jax

from regionjax.mesh import make_mesh
from regionjax.train import loop
from regionjax.train.progress import Progress


@contextlib.contextmanager
def compiled_once(folder):
  """Every run compiles the same programs; within this they come from a cache after the first."""
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = [getattr(jax.config, name) for name in names]
  for name, value in zip(names, (str(folder), 0.2)):
    jax.config.update(name, value)
  try:
    yield
  finally:
    for name, value in zip(names, before):
      jax.config.update(name, value)


def without_matmul_timing(patch):
  patch.setattr(loop, "peak_flops", lambda devices: 1e11)


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


def contents(folder):
  """Everything under a folder: path -> bytes, None for folders."""
  return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def with_train(config, **changes):
  return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))

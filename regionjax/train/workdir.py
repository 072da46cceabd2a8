"""Who may use a work folder: the run that made it, and nobody else."""

from __future__ import annotations

import fcntl
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import jax

from regionjax.config import Config, ConfigError
from regionjax.config_files import difference, read_config, write_config

CONFIG = "config.json"
LOCK = ".lock"

# What a run may change when it goes on: how long it is and how often it looks up. Everything else
# would make the later part another experiment than the earlier one. A new `steps` or time limit
# stretches the rest of the learning-rate schedule.
MAY_CHANGE = (
  "train.steps",
  "train.stop_after_minutes",
  "train.eval_every",
  "train.eval_examples",
  "train.save_every",
  "train.log_every",
  "train.keep",
  "train.keep_every",
  "train.mesh.data",
  "train.mesh.fsdp",
  "train.mesh.tensor",
  "train.mesh.slices",
  "data.workers",
  "data.prefetch",
)


def check(workdir: Path, config: Config, *, log: Callable[[str], None] = print) -> bool:
  """Checks that a folder is free or belongs to a run with this config; writes nothing.

  Returns:
    Whether the run has been here before. Settings that may change and did are named through `log`.

  Raises:
    ConfigError: the folder belongs to another config (the differing keys are named), holds
      something else, or is an address of a bucket.
  """
  if re.fullmatch(r"[a-z][a-z0-9]+:", workdir.parts[0] if workdir.parts else ""):
    raise ConfigError(  # `Path` has made gs:/bucket of gs://bucket: a folder of that name
      f"--workdir {str(workdir).replace(':/', '://', 1)}: expected a folder; a bucket has to be "
      "mounted as one (gcsfuse), with a hierarchical namespace, since checkpoints are renamed "
      "into place: launch/tpu_pod.sh and docs/laptop-to-pod.md do so"
    )
  path = workdir / CONFIG
  if workdir.exists() and not workdir.is_dir():
    raise ConfigError(f"--workdir {workdir} is a file; name a folder")
  if not path.exists():
    # A run that was killed before it had written its config leaves these, and nothing else.
    if workdir.is_dir() and {p.name for p in workdir.iterdir()} - {LOCK, CONFIG + ".part"}:
      raise ConfigError(
        f"--workdir {workdir} is not empty and holds no run (no {CONFIG}); name another folder"
      )
    return False
  changed = difference(read_config(path), config)
  refused = {key: pair for key, pair in changed.items() if key not in MAY_CHANGE}
  if refused:
    lines = [f"  {key}: {old!r} there, {new!r} here" for key, (old, new) in refused.items()]
    raise ConfigError(
      f"--workdir {workdir} belongs to a run with another config:\n"
      + "\n".join(lines)
      + f"\nName another folder, or take these settings back. May change: {', '.join(MAY_CHANGE)}"
    )
  for key, (old, new) in changed.items():
    log(f"{key} was {old!r}, is now {new!r}")
  return True


def register(workdir: Path, config: Config) -> None:
  """Makes the folder that of this config. Call it with the lock, when the run is able to start."""
  path = workdir / CONFIG
  if jax.process_index() != 0 or (path.exists() and not difference(read_config(path), config)):
    return
  workdir.mkdir(parents=True, exist_ok=True)
  write_config(path, config)


def lock(workdir: Path) -> IO[Any] | None:
  """Takes the folder for this run, made if missing; closing what is returned, or the end of the
  process, frees it.

  Two processes in one folder would overwrite each other's checkpoints. Only host 0 writes there, so
  only host 0 locks; a file system without locks is used without one.

  Raises:
    ConfigError: another process has it.
  """
  if jax.process_index() != 0:
    return None
  workdir.mkdir(parents=True, exist_ok=True)
  file = (workdir / LOCK).open("a")
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    file.close()
    raise ConfigError(
      f"--workdir {workdir} is in use by another process; wait for it, stop it, or name another "
      "folder"
    ) from error
  except OSError:
    pass
  return file

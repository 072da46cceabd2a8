"""What the hosts of a run must have in common: settings, versions, data, and the work folder.

Each host is started by itself. One with another learning rate or an older file of annotations would
train its part of the parameters on something else, and nothing would fail.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from regionjax.config import Config, ConfigError, to_dict
from regionjax.config_files import flatten
from regionjax.train.processes import NAMED, gather, together
from regionjax.train.workdir import LOCK

# Network file systems show other hosts a new file late: NFS after a minute, by default.
SEEN_SECONDS = 90.0


def check_same(config: Config, sources: Sequence[Any]) -> None:
  """Raises ConfigError in every process unless all run the same; all must call it."""
  facts = {name: repr(value) for name, value in flatten(to_dict(config)).items()}
  for name in ("jax", "jaxlib", "regionjax"):
    facts[f"version of {name}"] = _version(name)
  for number, source in enumerate(sources):
    facts[f"examples of data.sources.{number}"] = str(len(source))
  text = json.dumps(facts, sort_keys=True)
  if len(set(gather(hashlib.sha256(text.encode()).hexdigest()))) == 1:
    return
  first, *others = [json.loads(told) for told in gather(text)]
  lines = [
    f"  {name}: {first.get(name)} in process 0, {theirs.get(name)} in process {index}"
    for index, theirs in enumerate(others, 1)
    for name in sorted(first.keys() | theirs.keys())
    if first.get(name) != theirs.get(name)
  ]
  more = f"\n  and {len(lines) - 4 * NAMED} more" if len(lines) > 4 * NAMED else ""
  raise ConfigError(
    "the processes of this run differ:\n"
    + "\n".join(lines[: 4 * NAMED])
    + f"{more}\nStart the same command on all hosts, with the same files and versions"
  )


def check_shared(workdir: Path) -> None:
  """Raises unless all processes see process 0's work folder; all must call it, it with the lock.

  Raises:
    ConfigError: this process doesn't.
    ElsewhereError: another one doesn't.
  """
  if jax.process_count() == 1:
    return
  path, first = workdir / LOCK, jax.process_index() == 0
  with together():
    if first:
      path.write_text(f"{time.time_ns()}\n")  # what is left of another run says something else
  told = gather(path.read_text() if first else "")[0]
  with together():
    end = time.monotonic() + SEEN_SECONDS
    while not (path.is_file() and path.read_text() == told):
      if time.monotonic() > end:
        raise ConfigError(
          f"--workdir {workdir} is another folder here than on the host of process 0; name one "
          "that all hosts share, on a network file system say"
        )
      time.sleep(0.2)


def _version(name: str) -> str:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return "not installed"

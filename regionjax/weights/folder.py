"""A folder that appears complete or not at all.

It is written beside its destination and renamed into place, so an interrupted save leaves either
what was there before or nothing, never half of something.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A temporary folder that takes the place of `folder` when the block ends well.

  Files in it become readable for all (`mkdtemp` makes a private folder). What stood at `folder` is
  removed; whether it may be is the caller's to check. When the block raises, nothing has changed.
  """
  folder = pathlib.Path(folder)
  folder.parent.mkdir(parents=True, exist_ok=True)
  temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
  try:
    yield temporary
    for inside in temporary.rglob("*"):
      inside.chmod(0o755 if inside.is_dir() else 0o644)
    temporary.chmod(0o755)
    _swap(temporary, folder)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise


def _swap(temporary: pathlib.Path, folder: pathlib.Path) -> None:
  """Puts `temporary` in the place of `folder`; each step is one rename."""
  if not folder.exists():
    temporary.rename(folder)
    return
  old = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
  folder.rename(old / "release")
  try:
    temporary.rename(folder)
  except OSError:
    (old / "release").rename(folder)
    raise
  shutil.rmtree(old, ignore_errors=True)

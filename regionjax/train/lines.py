"""Files that grow: appended to through a full disk, read in spite of a torn last line."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Appender:
  """Appends bytes to a file; what a full disk refuses is kept and tried again with the next.

  A run must not end because its metrics cannot be written. Every write goes to the kernel at once:
  a process that is killed loses none of it.
  """

  def __init__(self, path: Path) -> None:
    self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    self._left = b""

  def write(self, data: bytes) -> bool:
    """Appends; returns whether everything so far is in the file."""
    self._left += data
    try:
      while self._left:
        self._left = self._left[os.write(self._file, self._left) :]
    except OSError:
      return False
    return True

  def write_row(self, row: Mapping[str, Any]) -> bool:
    """Appends a line of JSON."""
    return self.write(json.dumps(row).encode() + b"\n")

  def sync(self) -> None:
    """Returns when the file's store has it all. A mounted bucket gets what was written only now.

    Left open and unsynced, a file in one is lost with its host.
    """
    with contextlib.suppress(OSError):  # a full disk, or a file that can't be synced
      os.fsync(self._file)

  def close(self) -> None:
    """Tries once more what was refused, and closes the file."""
    self.write(b"")
    os.close(self._file)


def read_rows(path: Path) -> list[dict[str, Any]]:
  """Objects of a JSONL file; a line cut off by a crash is left out, no file gives none."""
  rows = []
  if path.is_file():
    for line in path.read_text(errors="replace").splitlines():
      try:
        row = json.loads(line)
      except json.JSONDecodeError:
        continue
      if isinstance(row, dict):
        rows.append(row)
  return rows

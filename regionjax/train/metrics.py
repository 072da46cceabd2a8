"""Metrics of a run as `metrics.jsonl` and TensorBoard events."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from regionjax.train.lines import Appender, read_rows


class MetricsWriter:
  """Appends rows `{"kind": ..., "step": ..., values}` to a run's metrics.

  Args:
    workdir: holds `metrics.jsonl` and `tensorboard/`.
    step: the run continues behind this step; rows of later steps, left by a run that was stopped
      between checkpoints, are dropped, so that each step is logged once.
    enabled: False on all processes but one: nothing is written.
  """

  def __init__(self, workdir: Path, *, step: int = 0, enabled: bool = True) -> None:
    self._rows: Appender | None = None
    self._events: _Events | None = None
    if not enabled:
      return
    path = workdir / "metrics.jsonl"
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(path)
    self._rows = Appender(path)
    self._events = _Events(workdir / "tensorboard", step + 1 if step else None)

  def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
    """Writes one row; numbers and nested mappings of numbers become TensorBoard scalars."""
    if self._rows is None or self._events is None:
      return
    self._rows.write_row({"kind": kind, "step": step} | dict(values))
    self._events.scalars(scalars(values, kind), step)

  def sync(self) -> None:
    """Has both files stored; see `Appender.sync`."""
    if self._rows is not None and self._events is not None:
      self._rows.sync()
      self._events.sync()

  def close(self) -> None:
    """Closes both files."""
    if self._rows is not None and self._events is not None:
      self._rows.close()
      self._events.close()


class _Events:
  """A TensorBoard event file.

  tensorboardX's own writer isn't used: its thread dies of a full disk, and then its queue blocks
  the run.

  Args:
    folder: made if missing.
    purge: TensorBoard forgets what earlier files say of this step and later ones.
  """

  def __init__(self, folder: Path, purge: int | None) -> None:
    folder.mkdir(exist_ok=True)
    now = time.time()
    self._file = Appender(folder / f"events.out.tfevents.{now:.6f}.{socket.gethostname()}")
    self._add(Event(wall_time=now, file_version="brain.Event:2"))
    if purge is not None:
      start = SessionLog(status=SessionLog.START)
      self._add(Event(wall_time=now, step=purge, session_log=start))

  def scalars(self, values: Mapping[str, float], step: int) -> None:
    parts = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=parts)))

  def sync(self) -> None:
    self._file.sync()

  def close(self) -> None:
    self._file.close()

  def _add(self, event: Event) -> None:
    """Appends a record: length, its checksum, the event, its checksum (TFRecord)."""
    data = event.SerializeToString()
    size = struct.pack("<Q", len(data))
    sums = [struct.pack("<I", masked_crc32c(part)) for part in (size, data)]
    self._file.write(size + sums[0] + data + sums[1])


def scalars(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
  """Nested numbers -> {'prefix/a/b': number}; everything else is left out."""
  flat: dict[str, float] = {}
  for key, value in values.items():
    if isinstance(value, Mapping):
      flat |= scalars(value, f"{prefix}/{key}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
      flat[f"{prefix}/{key}"] = value
  return flat


def read_metrics(path: Path) -> list[dict[str, Any]]:
  """Rows of a `metrics.jsonl`; a line cut off by a crash is left out, no file gives no rows."""
  return [row for row in read_rows(path) if "step" in row and "kind" in row]

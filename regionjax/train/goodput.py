"""Goodput: what share of a run's time went into steps that counted, and what the rest went into.

`goodput.jsonl` in the work folder holds one row per stretch of time, `{"attempt", "step", "end",
"seconds": {kind: ...}}`: which start of the run it belongs to, the step it ended at, the Unix time
of its end, and how its seconds divide over KINDS. A killed process leaves all rows but its last.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.monitoring

from regionjax.train.lines import Appender, read_rows
from regionjax.train.progress import duration

FILE = "goodput.jsonl"
# init: building the run and restoring its state; compile: tracing, lowering and compiling, wherever
# it happens; data: waiting for a batch; other: logging and what is between these.
KINDS = ("init", "compile", "data", "step", "checkpoint", "evaluation", "other")


class Goodput:
  """Divides the wall time of this process's part of a run over KINDS, from when it is made.

  Use it in a `with` statement, whose end writes the last row.

  Attributes:
    seconds: by kind, up to the last `flush`.
  """

  def __init__(self) -> None:
    self.seconds = dict.fromkeys(KINDS, 0.0)
    self._stack = ["init"]
    self._mark = time.monotonic()
    self._compiling = _Compiling()
    self._compiled = 0.0  # of its seconds, those that have been taken into account
    self._file: Appender | None = None
    self._attempt, self._step = 1, 0
    self._written = dict(self.seconds)

  def __enter__(self) -> Goodput:
    jax.monitoring.register_event_duration_secs_listener(self._compiling)
    return self

  def __exit__(self, *_: object) -> None:
    self.flush(self._step)
    jax.monitoring.unregister_event_duration_listener(self._compiling)
    if self._file is not None:
      self._file.close()

  def begin(self, step: int, workdir: Path | None) -> None:
    """Ends the init: the run takes up at `step`.

    Args:
      workdir: where to write; None on all processes but one.
    """
    if workdir is not None:
      path = workdir / FILE
      attempts = [row["attempt"] for row in read_rows(path) if "attempt" in row]
      torn = path.is_file() and not path.read_bytes().endswith(b"\n")
      self._attempt = 1 + max(attempts, default=0)
      self._file = Appender(path)
      self._file.write(b"\n" if torn else b"")  # a process was killed while it wrote a row
    self.flush(step)
    self._stack = ["other"]

  @contextlib.contextmanager
  def measure(self, kind: str) -> Iterator[None]:
    """Counts the time inside as `kind`; of nested ones the inner one counts."""
    self._count()
    self._stack.append(kind)
    try:
      yield
    finally:
      self._count()
      self._stack.pop()

  def flush(self, step: int) -> None:
    """Writes the time since the last row; everything up to `step` has been done."""
    self._count()
    self._step = step
    spent = {kind: self.seconds[kind] - self._written[kind] for kind in KINDS}
    self._written = dict(self.seconds)
    if self._file is not None:
      seconds = {kind: round(value, 6) for kind, value in spent.items() if value > 0}
      row = {"attempt": self._attempt, "step": step, "end": time.time(), "seconds": seconds}
      self._file.write_row(row)

  def sync(self) -> None:
    """Has the file stored; see `Appender.sync`."""
    if self._file is not None:
      self._file.sync()

  def _count(self) -> None:
    """Gives the time since the last call to the innermost kind, less what compiling took of it."""
    now = time.monotonic()
    compiled = self._compiling.seconds - self._compiled
    self.seconds["compile"] += compiled
    self.seconds[self._stack[-1]] += now - self._mark - compiled
    self._mark, self._compiled = now, self._compiling.seconds


class _Compiling:
  """A listener to jax's events: seconds of tracing, lowering and compiling in this thread."""

  def __init__(self) -> None:
    self.seconds = 0.0
    self._thread = threading.get_ident()
    self._spans: list[tuple[float, float]] = []  # start and length

  def __call__(self, event: str, duration: float, **_: Any) -> None:
    if not event.startswith("/jax/core/compile/") or threading.get_ident() != self._thread:
      return
    start = time.monotonic() - duration
    while self._spans and self._spans[-1][0] >= start:  # inside this one: counted once
      self.seconds -= self._spans.pop()[1]
    self._spans.append((start, duration))
    self.seconds += duration


def report(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
  """What became of a run's time, from the rows of its `goodput.jsonl`; None without any.

  Returns:
    goodput: seconds of steps that counted / wall seconds.
    wall_seconds: in which a process of the run worked and could write it down.
    seconds: the wall seconds by kind; "lost" are those of steps that were done again, because the
      process was killed after them and before a checkpoint.
    attempts: how often the run was started.
    away_seconds: between its processes, starting Python included; not part of the wall seconds.
  """
  rows = [row for row in rows if {"attempt", "step", "end", "seconds"} <= row.keys()]
  if not rows:
    return None
  first = {row["attempt"]: row["step"] for row in reversed(rows)}  # where each attempt took up
  seconds = dict.fromkeys((*KINDS, "lost"), 0.0)
  away, ended = 0.0, None
  for row in rows:
    spent = row["seconds"]
    again = any(row["attempt"] < k and row["step"] > step for k, step in first.items())
    for kind, value in spent.items():
      seconds["lost" if again and kind == "step" else kind] += value
    if ended is not None and row["attempt"] != ended[0]:
      away += max(0.0, row["end"] - sum(spent.values()) - ended[1])
    ended = row["attempt"], row["end"]
  wall = sum(seconds.values())
  return {
    "goodput": seconds["step"] / wall if wall else None,
    "wall_seconds": wall,
    "seconds": seconds,
    "attempts": len(first),
    "away_seconds": away,
  }


def read_report(workdir: Path) -> dict[str, Any] | None:
  """The report of a work folder; None where nothing was recorded."""
  return report(read_rows(workdir / FILE))


def in_words(found: Mapping[str, Any]) -> str:
  """A line of a report, the largest losses first."""
  wall = found["wall_seconds"]
  rest = {kind: s / wall for kind, s in found["seconds"].items() if kind != "step"}
  shown = sorted((kind for kind in rest if rest[kind] >= 0.005), key=lambda kind: -rest[kind])
  losses = ", ".join(f"{kind} {rest[kind]:.0%}" for kind in shown)
  return f"goodput {found['goodput']:.0%} of {duration(wall)}" + (f" ({losses})" if losses else "")

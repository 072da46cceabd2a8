"""The progress of a run: a line that redraws itself on a terminal, elsewhere a line per update."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from typing import TextIO

_BLOCKS = " ▏▎▍▌▋▊▉█"


class Progress:
  """Shows how far a run is.

  Args:
    stream: where to write; `\\r` redraws are used if it is a terminal.
  """

  def __init__(self, stream: TextIO | None = None) -> None:
    self._stream = sys.stderr if stream is None else stream
    self._live = self._stream.isatty()
    self._last = ""

  def update(self, step: int, steps: int, share: float, parts: list[str]) -> None:
    """Draws the line.

    Args:
      step: steps done.
      steps: steps in all.
      share: what part of the run is over, in [0, 1]; a time limit may make it exceed step/steps.
      parts: texts that follow the bar.
    """
    head = f"step {step}/{steps}"
    if not self._live:
      self._write("  ".join([head, f"{share:.0%}", *parts]) + "\n")
      return
    line = "  ".join([head, _bar(share, 16) + f" {share:.0%}", *parts])
    self._last = line[: shutil.get_terminal_size().columns - 1]
    self._write("\r\033[K" + self._last)

  def message(self, text: str) -> None:
    """Prints a line of its own, above the bar."""
    if self._live and self._last:
      self._write("\r\033[K" + text + "\n" + self._last)
    else:
      self._write(text + "\n")

  def close(self) -> None:
    """Leaves the last line standing."""
    if self._live and self._last:
      self._write("\n")
      self._last = ""

  def _write(self, text: str) -> None:
    # Where it goes to a file on a full disk, or to a terminal that is gone, the run goes on.
    with contextlib.suppress(OSError):
      self._stream.write(text)
      self._stream.flush()


class Silent(Progress):
  """Shows nothing: for all processes of a run but the first."""

  def update(self, step: int, steps: int, share: float, parts: list[str]) -> None:
    return

  def message(self, text: str) -> None:
    return


class Clock:
  """Seconds of a run, over its interruptions, and an estimate of those that are left."""

  def __init__(self, elapsed: float = 0.0) -> None:
    self._start = time.monotonic() - elapsed
    self._from = (time.monotonic(), 0.0)

  @property
  def elapsed(self) -> float:
    return time.monotonic() - self._start

  def begin(self, share: float) -> None:
    """From here on the pace is measured; `share` of the run is over. Call it after compiling."""
    self._from = (time.monotonic(), share)

  def remaining(self, share: float) -> float | None:
    """Seconds until the whole run is over at the pace so far; None when nothing is known yet."""
    start, before = self._from
    if share <= before:
      return None
    return (time.monotonic() - start) * (1 - share) / (share - before)


def duration(seconds: float | None) -> str:
  """`None`, 75.2, 7275 -> '--:--', '1:15', '2:01:15'."""
  if seconds is None:
    return "--:--"
  minutes, s = divmod(round(seconds), 60)
  hours, m = divmod(minutes, 60)
  return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def short(number: float) -> str:
  """1234.5 -> '1.23k'; three significant digits and a unit."""
  for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
    if abs(number) >= size:
      return f"{number / size:.3g}{unit}"
  return f"{number:.3g}"


def _bar(share: float, width: int) -> str:
  eighths = round(min(max(share, 0.0), 1.0) * width * 8)
  full, rest = divmod(eighths, 8)
  return ("█" * full + (_BLOCKS[rest] if rest else "")).ljust(width, "·")

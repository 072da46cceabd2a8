"""Ctrl-C and SIGTERM as a request to stop at the end of a step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 0}


class StopRequest:
  """While entered, the first SIGINT or SIGTERM is only noted.

  A second Ctrl-C acts at once: somebody is impatient. A second SIGTERM doesn't: a scheduler's own
  and a copy of it that a wrapper script passes on often come in pairs, and would end the run while
  it saves.

  Attributes:
    received: the signal, or None.
  """

  received: signal.Signals | None = None

  def __enter__(self) -> StopRequest:
    self._previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # others cannot set handlers
      for number in EXIT_CODES:
        self._previous[number] = signal.signal(number, self._note)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    value: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    for number in list(self._previous):
      self._restore(number)

  @property
  def exit_code(self) -> int:
    """130 after Ctrl-C, as shells expect; 0 after SIGTERM: a preempted run that saved did well."""
    return EXIT_CODES[self.received] if self.received is not None else 0

  def _note(self, number: int, frame: FrameType | None) -> None:
    if self.received is None:
      self.received = signal.Signals(number)
    if number == signal.SIGINT:
      self._restore(number)

  def _restore(self, number: int) -> None:
    if number in self._previous:
      signal.signal(number, self._previous.pop(number))

"""A trace of chosen steps: what the devices and the host did in them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import jax

from regionjax.config import ConfigError

Steps = tuple[int, int]  # the first and the last one, both traced


def parse_steps(text: str) -> Steps:
  """`'10:12'` -> (10, 12); `'10'` -> (10, 10).

  Raises:
    ConfigError: anything else, or an empty range.
  """
  first, _, last = text.partition(":")
  last = last or first
  if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
    raise ConfigError(
      f"--profile {text!r}: expected FIRST:LAST, two steps counted from 1, such as 10:12"
    )
  return int(first), int(last)


class Profiler:
  """Traces some steps of a run into a folder; does nothing where no steps are given.

  Args:
    steps: which ones.
    folder: where to.
    log: takes a line of text.
  """

  def __init__(self, steps: Steps | None, folder: Path, *, log: Callable[[str], None]) -> None:
    self._steps, self._folder, self._log = steps, folder, log
    self._from: int | None = None  # while tracing: the first step in the trace

  def starts(self, step: int) -> bool:
    """Whether a trace is to begin with this step: earlier steps must be over on the devices."""
    return self._steps is not None and self._from is None and self._covers(step)

  def ends(self, step: int) -> bool:
    """Whether the trace is to end with this step, which must be over on the devices by then."""
    return self._from is not None and self._steps is not None and step >= self._steps[1]

  def start(self, step: int) -> None:
    """Begins the trace."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every Python call would be in it, and slow the host down
    jax.profiler.start_trace(self._folder, profiler_options=options)
    self._from = step

  def step(self, step: int) -> contextlib.AbstractContextManager[object]:
    """Marks what is dispatched inside as a step, by which viewers group."""
    if self._from is None:
      return contextlib.nullcontext()
    return jax.profiler.StepTraceAnnotation("train", step_num=step)

  def stop(self, step: int) -> None:
    """Writes the trace and says where it is."""
    jax.profiler.stop_trace()
    self._log(
      f"profile of steps {self._from} to {step} in {self._folder}; look at it with XProf "
      f"(pip install xprof; xprof --logdir {self._folder}), or open the .trace.json.gz in it at "
      "https://ui.perfetto.dev"
    )
    self._from, self._steps = None, None

  def close(self, step: int) -> None:
    """The run is at `step` and ends here: writes a trace that has begun, and says of steps that
    did not come that there is none."""
    if self._from is not None:
      self.stop(step)
    elif self._steps is not None:
      first, last = self._steps
      self._log(f"--profile {first}:{last}: none of these steps came; the run is at step {step}")

  def drop(self) -> None:
    """Ends a trace that an error has cut off: the process may train again, and trace."""
    if self._from is not None:
      jax.profiler.stop_trace()
      self._from = None

  def _covers(self, step: int) -> bool:
    return self._steps is not None and self._steps[0] <= step <= self._steps[1]

"""What the processes of a run do together; how they find each other is in `distributed`."""

from __future__ import annotations

import itertools

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

# Process 0 may take its time (a first compilation, an evaluation); when it dies jax ends the rest.
PATIENCE_MS = 2 * 60 * 60 * 1000
KEPT = 8  # decisions that stay readable; no process falls two steps behind another


def wait_for_all(what: str) -> None:
  """Returns when every process has come to `what`; at once where there is only one."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"regionjax: {what}")


def to_host(array: jax.Array) -> np.ndarray:
  """The whole array in this process's memory. With several processes, all must call it."""
  if array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


class Agreement:
  """Decides the same in every process: process 0's clock counts, and anybody's wish to stop.

  The messages go through the coordination service of `jax.distributed`. A collective on the devices
  would do too, but wait for the step that was just dispatched.
  """

  _runs = itertools.count()  # the same in every process, as long as all make the same runs

  def __init__(self) -> None:
    self._client = distributed.global_state.client if jax.process_count() > 1 else None
    self._prefix = f"regionjax/run{next(self._runs)}"
    self._turn = 0
    self._asked = False

  def __call__(self, share: float, stop: bool) -> tuple[float, bool]:
    """Called once per step by every process.

    Args:
      share: what part of the run is over, by this process's clock.
      stop: whether this process was asked to stop.

    Returns:
      (process 0's share, whether all stop now). A wish of another process is heard by process 0 in
      the same turn or the next one.
    """
    if self._client is None:
      return share, stop
    if stop and not self._asked:
      self._client.key_value_set(f"{self._prefix}/stop/{jax.process_index()}", "1")
      self._asked = True
    key = f"{self._prefix}/turn{self._turn}"
    if jax.process_index() == 0:
      stop = bool(self._client.key_value_dir_get(f"{self._prefix}/stop"))
      self._client.key_value_set(key, f"{share!r} {int(stop)}")
      if self._turn >= KEPT:
        self._client.key_value_delete(f"{self._prefix}/turn{self._turn - KEPT}")
      self._turn += 1
      return share, stop
    self._turn += 1
    told, stopping = self._client.blocking_key_value_get(key, PATIENCE_MS).split()
    return float(told), stopping == "1"

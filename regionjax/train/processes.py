"""What the processes of a run do together; how they find each other is in `distributed`."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax._src import distributed
from jax.sharding import NamedSharding, PartitionSpec

# Process 0 may take its time (a first compilation, an evaluation); when it dies jax ends the rest.
PATIENCE_MS = 2 * 60 * 60 * 1000
PIECE_BYTES = 1 << 28  # of an array that `to_host` gathers at once, or one index of its first axis
NAMED = 3  # processes of which a message tells what is wrong; there may be hundreds
KEPT = 8  # decisions that stay readable; no process falls two steps behind another


class ElsewhereError(OSError):
  """Another process of the run has failed."""


_gathers = itertools.count()  # the same in every process: all of them come to each


def gather(text: str) -> list[str]:
  """What every process says, in the order of their indices; all must come here.

  The texts go through the coordination service. A collective on the devices would hang, or take
  another's place, where one process has met an error and the others have not.
  """
  if jax.process_count() == 1:
    return [text]
  client, turn = distributed.global_state.client, next(_gathers)
  key = f"regionjax/gather{turn}"
  client.key_value_set(f"{key}/{jax.process_index():08d}", f"={text}")  # none is empty
  client.wait_at_barrier(f"{key}/barrier", PATIENCE_MS)
  told = [value[1:] for _, value in sorted(client.key_value_dir_get(f"{key}/"))]
  if jax.process_index() == 0 and turn:  # all have come here, so they have read the one before
    client.key_value_delete(f"regionjax/gather{turn - 1}/")
  return told


def problems(own: str) -> str:
  """What is wrong in any process, in one line; '' where nothing is. All must come here.

  Args:
    own: what is wrong in this one, or ''.
  """
  told = gather(own)
  return own if len(told) == 1 else _named(told)


def _named(told: Sequence[str]) -> str:
  """What the first few processes say that say anything."""
  named = [f"process {index}: {text}" for index, text in enumerate(told) if text]
  more = f"; {len(named) - NAMED} more" if len(named) > NAMED else ""
  return "; ".join(named[:NAMED]) + more


@contextlib.contextmanager
def together() -> Iterator[None]:
  """What each process does for itself: an error in one of them ends it in all. All must come here.

  Nothing inside may wait for other processes.

  Raises:
    ElsewhereError: another process has failed; in that one its own error is raised.
  """
  try:
    yield
  except Exception as error:
    problems(in_short(error))
    raise
  if told := problems(""):
    raise ElsewhereError(told)


def in_short(error: Exception) -> str:
  """An error in one line: the beginning of what it says, and the system's reason if it has one."""
  text = " ".join(str(error).split()) or type(error).__name__
  code = re.search(r"os_error_code='(\d+)'", text)  # TensorStore's way, behind two long paths
  reason = f"; {os.strerror(int(code[1]))}" if code else ""
  return (text if len(text) <= 160 else text[:157] + "...") + reason


def wait_for_all() -> None:
  """Returns when every process has come here; at once where there is only one."""
  gather("")


def to_host(array: jax.Array) -> np.ndarray | None:
  """The whole array in the memory of process 0; None in the others. All must call it.

  What lies on the devices of several processes is gathered on every device, a few of its layers
  (of the first axis, if that isn't split) at a time: beside a run's state there may be no room for
  all of them.
  """
  first = jax.process_index() == 0
  if array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array) if first else None
  whole = np.empty(array.shape, array.dtype) if first else None
  count = len(array)
  if array.sharding.shard_shape(array.shape)[0] == count:
    count = max(1, PIECE_BYTES * count // max(1, array.nbytes))
  same = NamedSharding(array.sharding.mesh, PartitionSpec())
  cut = jax.jit(_cut, static_argnames="size", out_shardings=same)
  for start in range(0, len(array), count):
    size = min(count, len(array) - start)
    piece = jax.block_until_ready(cut(array, start, size=size))  # one at a time in all processes
    if whole is not None:
      whole[start : start + size] = np.asarray(piece)
    del piece
  return whole


def _cut(array: jax.Array, start: jax.Array, *, size: int) -> jax.Array:
  return jax.lax.dynamic_slice_in_dim(array, start, size)


class Decision(NamedTuple):
  """What all processes do next.

  Attributes:
    share: what part of the run is over, by process 0's clock.
    stop: whether all stop now.
    problem: what is wrong in any process, in one line; '' where nothing is.
  """

  share: float
  stop: bool
  problem: str


class Agreement:
  """Decides the same in every process: process 0's clock counts, and anybody's wish or trouble.

  The messages go through the coordination service of `jax.distributed`, while the devices work on
  the step that was dispatched; a collective would wait for it.
  """

  _runs = itertools.count()  # the same in every process, as long as all make the same runs

  def __init__(self) -> None:
    self._client = distributed.global_state.client if jax.process_count() > 1 else None
    self._prefix = f"regionjax/run{next(self._runs)}"
    self._turn = -1

  def __call__(self, share: float, stop: bool, problem: str = "") -> Decision:
    """Called once per step by every process; returns when all have called it.

    Args:
      share: what part of the run is over, by this process's clock.
      stop: whether this process was asked to stop.
      problem: why it cannot make the next step, in one line, or ''.
    """
    if self._client is None:
      return Decision(share, stop, problem)
    self._turn += 1
    turn = f"{self._prefix}/turn{self._turn}"
    if jax.process_index() != 0:
      self._client.key_value_set(f"{turn}/{jax.process_index()}", json.dumps([stop, problem]))
      return Decision(*json.loads(self._client.blocking_key_value_get(turn, PATIENCE_MS)))
    told = [(stop, problem)]
    for index in range(1, jax.process_count()):
      told.append(json.loads(self._client.blocking_key_value_get(f"{turn}/{index}", PATIENCE_MS)))
    decision = Decision(share, any(t[0] for t in told), _named([t[1] for t in told]))
    self._client.key_value_set(turn, json.dumps(decision))
    if self._turn >= KEPT:
      old = f"{self._prefix}/turn{self._turn - KEPT}"
      self._client.key_value_delete(old)
      self._client.key_value_delete(f"{old}/")
    return decision

"""One folder of checkpoints on disk: written in the background by Orbax, checked when read.

`<step>/` is renamed into place when it is complete, so that a process killed at any moment leaves a
whole checkpoint or none. Checksums of the arrays and of the record are in the record: a checkpoint
whose bytes changed on disk is told from a good one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint import options as ocp_options

from regionjax.train.processes import in_short, problems, wait_for_all

# A write that takes longer has failed; so has one that another process has failed in.
WRITE_SECONDS = 1200


class CheckpointError(OSError):
  """A checkpoint, or all of a run's checkpoints, cannot be read or written."""


@jax.jit
def checksum(tree: Any) -> jax.Array:
  """uint32 scalar: the sum of all leaves' bits, modulo 2^32; the same on any device or mesh."""
  total = jnp.zeros((), jnp.uint32)
  for k, leaf in enumerate(jax.tree.leaves(tree)):
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, words).astype(jnp.uint32)
    total = total + jnp.uint32(2 * k + 1) * jnp.sum(bits, dtype=jnp.uint32)
  return total


class Store:
  """Checkpoints `<step>/`, each a tree of arrays and a JSON record.

  Args:
    folder: made if missing.
    keep: the newest so many stay.
    keep_every: those of its multiples stay too, for ever; 0: none.
    read_only: nothing is made, written or deleted, not even what a killed process left half-written
      (which another process may be writing).
  """

  def __init__(
    self, folder: Path, *, keep: int, keep_every: int = 0, read_only: bool = False
  ) -> None:
    self._folder = folder.absolute()
    self._writing: int | None = None
    several = jax.process_count() > 1
    if not read_only:
      if jax.process_index() == 0:
        self._folder.mkdir(parents=True, exist_ok=True)
      wait_for_all()
    kept: list[Any] = [policies.LatestN(keep)]
    if keep_every > 0:
      kept.append(policies.EveryNSteps(keep_every))
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(kept),
      enable_async_checkpointing=True,
      cleanup_tmp_directories=not read_only,
      create=False,
      read_only=read_only,
      save_interval_steps=0 if read_only else 1,
      async_options=ocp_options.AsyncOptions(timeout_secs=WRITE_SECONDS),
      # Two stores of a run write at the same time: their barriers must not be taken for each other.
      # Where the processes are named, barriers don't use the devices: one that an error keeps a
      # process from is over after some minutes, with an error, and not the end of the run.
      multiprocessing_options=ocp_options.MultiprocessingOptions(
        barrier_sync_key_prefix=folder.name,
        active_processes=set(range(jax.process_count())) if several else None,
      ),
    )
    self._manager = ocp.CheckpointManager(self._folder, options=options)

  def steps(self) -> list[int]:
    """Steps that have a checkpoint, oldest first; one that is being written counts."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
    """Starts writing; returns when the arrays have been copied from the devices.

    Call `settle` before: what went wrong with the write before would be raised here.

    Raises:
      CheckpointError: some process could not begin; nothing of this step is left.
    """
    record = json.loads(json.dumps(record))  # as it will be read
    record |= {"checksum": int(checksum(state)), "record_checksum": _crc(record)}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
    reason = ""
    try:
      self._manager.save(step, args=args, force=True)
    except Exception as error:  # whatever a full or broken disk makes a writer raise
      reason = in_short(error)
    told = problems(reason)
    if not told:
      self._writing = step
      return
    if not reason:
      with contextlib.suppress(Exception):  # begun here, it cannot end well
        self._manager.wait_until_finished()
    self._forget(step)
    raise CheckpointError(told)

  def settle(self, *, wait: bool) -> tuple[int, str] | None:
    """Takes note of a write that is over, or with `wait` waits until it is.

    With several processes only where all of them wait: one is over when it is for all.

    Returns:
      None, or the step that could not be written and why; nothing of it is left.
    """
    ready = jax.process_count() == 1 and not self._manager.is_saving_in_progress()
    if self._writing is None or not (wait or ready):
      return None
    step, self._writing = self._writing, None
    reason = ""
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      reason = in_short(error)
    if told := problems(reason):
      self._forget(step)
      return step, told
    return None

  def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    """The arrays, shaped and placed like `like`, and the record.

    Raises:
      CheckpointError: some process cannot read it, or it isn't what was written.
    """
    state, record, reason = None, {}, ""
    try:
      state, record = self._read(step, like)
    except Exception as error:  # whatever a broken file makes a reader raise
      reason = in_short(error)
    if told := problems(reason):
      raise CheckpointError(told)
    pairs = [(record.pop("checksum", None), int(checksum(state)))]
    pairs.append((record.pop("record_checksum", _crc(record)), _crc(record)))  # once had none
    wrong = [
      f"its checksum is {found}, {said} was written" for said, found in pairs if found != said
    ]
    if told := problems(wrong[0] if wrong else ""):
      raise CheckpointError(told)
    return state, record

  def _read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    """Without the manager, in which all processes wait for each other once they have read."""
    folder = epath.Path(self._folder / str(step))
    close = contextlib.closing
    with (
      close(ocp.StandardCheckpointHandler()) as arrays,
      close(ocp.JsonCheckpointHandler()) as records,
    ):
      state = arrays.restore(folder / "state", args=ocp.args.StandardRestore(like))
      return state, dict(records.restore(folder / "record", args=ocp.args.JsonRestore()))

  def delete(self, step: int) -> None:
    """Deletes a checkpoint."""
    self._manager.delete(step)

  def reload(self) -> None:
    """Looks again which steps there are."""
    self._manager.reload()

  def close(self) -> None:
    """Waits for this process's part of a write, and frees the threads.

    What came of it `settle` says, not this: a process that ends by an error closes alone.
    """
    with contextlib.suppress(Exception):
      self._manager.wait_until_finished()
    self._manager.close()

  def _forget(self, step: int) -> None:
    """Deletes what a failed write left, which would take up a full disk for good.

    The manager, which had counted on this step, looks again at what is there: it would never delete
    the old checkpoints that the new one was to replace.
    """
    if jax.process_index() == 0:
      for left in self._folder.glob(f"{step}.orbax-checkpoint-tmp*"):
        shutil.rmtree(left, ignore_errors=True)
    wait_for_all()
    self._manager.reload()


def _crc(record: dict[str, Any]) -> int:
  return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _not_orbax(record: logging.LogRecord) -> bool:
  return "/orbax/" not in record.pathname


# Orbax logs each failed write with several tracebacks. They are told in a line, by `Checkpoints`.
logging.getLogger("absl").addFilter(_not_orbax)

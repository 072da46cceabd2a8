"""One folder of checkpoints on disk: written in the background by Orbax, checked when read.

`<step>/` is renamed into place when it is complete, so that a process killed at any moment leaves a
whole checkpoint or none. Checksums of the arrays and of the record are in the record: a checkpoint
whose bytes changed on disk is told from a good one.
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint import options as ocp_options


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
    kept: list[Any] = [policies.LatestN(keep)]
    if keep_every > 0:
      kept.append(policies.EveryNSteps(keep_every))
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(kept),
      enable_async_checkpointing=True,
      cleanup_tmp_directories=not read_only,
      create=not read_only,
      read_only=read_only,
      save_interval_steps=0 if read_only else 1,
      # Two stores of a run write at the same time: their barriers must not be taken for each other.
      multiprocessing_options=ocp_options.MultiprocessingOptions(
        barrier_sync_key_prefix=folder.name
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
      Exception: whatever the file system made a writer raise; nothing of this step is left.
    """
    record = json.loads(json.dumps(record))  # as it will be read
    record |= {"checksum": int(checksum(state)), "record_checksum": _crc(record)}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
    try:
      self._manager.save(step, args=args, force=True)
    except Exception:
      self._forget(step)
      raise
    self._writing = step

  def settle(self, *, wait: bool) -> tuple[int, Exception] | None:
    """Takes note of a write that is over, or with `wait` waits until it is.

    Returns:
      None, or the step that could not be written and why; nothing of it is left.
    """
    if self._writing is None or not (wait or not self._manager.is_saving_in_progress()):
      return None
    step, self._writing = self._writing, None
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      self._forget(step)
      return step, error
    return None

  def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    """The arrays, shaped and placed like `like`, and the record.

    Raises:
      Exception: whatever a broken file makes a reader raise; CheckpointError if it reads well but
        isn't what was written.
    """
    args = ocp.args.Composite(state=ocp.args.StandardRestore(like), record=ocp.args.JsonRestore())
    restored = self._manager.restore(step, args=args)
    state, record = restored["state"], dict(restored["record"])
    pairs = [(record.pop("checksum", None), int(checksum(state)))]
    pairs.append((record.pop("record_checksum", _crc(record)), _crc(record)))  # once had none
    for expected, found in pairs:
      if found != expected:
        raise CheckpointError(f"its checksum is {found}, {expected} was written")
    return state, record

  def delete(self, step: int) -> None:
    """Deletes a checkpoint."""
    self._manager.delete(step)

  def reload(self) -> None:
    """Looks again which steps there are."""
    self._manager.reload()

  def close(self) -> None:
    """Waits, and frees the threads."""
    self.settle(wait=True)
    self._manager.close()

  def _forget(self, step: int) -> None:
    """Deletes what a failed write left, which would take up a full disk for good.

    The manager, which had counted on this step, looks again at what is there: it would never delete
    the old checkpoints that the new one was to replace.
    """
    if jax.process_index() == 0:
      for left in self._folder.glob(f"{step}.orbax-checkpoint-tmp*"):
        shutil.rmtree(left, ignore_errors=True)
    self._manager.reload()


def _crc(record: dict[str, Any]) -> int:
  return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _not_orbax(record: logging.LogRecord) -> bool:
  return "/orbax/" not in record.pathname


# Orbax logs each failed write with several tracebacks. They are told in a line, by `Checkpoints`.
logging.getLogger("absl").addFilter(_not_orbax)

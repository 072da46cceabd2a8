"""Checkpoints of a run: the newest N, and the best one in a place of its own.

Layout: `checkpoints/<step>/` holds the whole state and a JSON record (data state, totals, clock);
`best/<step>/` holds the trainable parameters with the lowest held-out loss. Orbax writes both in
the background and renames a checkpoint into place when it is complete. A checksum of the state is
in the record, so that a checkpoint whose bytes changed on disk is told from a good one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

DAMAGED = "damaged"  # folder of a run's unreadable checkpoints


class CheckpointError(OSError):
  """No checkpoint of a run can be read."""


@jax.jit
def checksum(tree: Any) -> jax.Array:
  """uint32 scalar: the sum of all leaves' bits, modulo 2^32; the same on any device or mesh."""
  total = jnp.zeros((), jnp.uint32)
  for k, leaf in enumerate(jax.tree.leaves(tree)):
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, words).astype(jnp.uint32)
    total = total + jnp.uint32(2 * k + 1) * jnp.sum(bits, dtype=jnp.uint32)
  return total


class Checkpoints:
  """Saves and restores a run's state under a work folder.

  Args:
    workdir: of the run.
    keep: how many checkpoints stay. None is for readers, under whom the run may be writing: they
      change nothing in the folder, neither what a run was killed in the middle of nor what is
      damaged, and bear that checkpoints come and go.
    log: takes a line of text.
  """

  def __init__(
    self, workdir: Path, *, keep: int | None, log: Callable[[str], None] = print
  ) -> None:
    self._workdir, self._log, self._reads = workdir, log, keep is None
    self._latest = _manager(workdir / "checkpoints", keep)
    self._best = _manager(workdir / "best", None if self._reads else 1)

  def steps(self) -> list[int]:
    """Steps that have a checkpoint, oldest first."""
    if not self._reads:
      return sorted(self._latest.all_steps())
    # Orbax remembers what it saw. Digits only: what is being written has another name.
    names = (path.name for path in (self._workdir / "checkpoints").glob("*"))
    return sorted(int(name) for name in names if name.isdigit())

  def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
    """Starts writing a checkpoint; a no-op if this step already has one.

    Returns when the arrays have been copied from the devices: the state may then be donated.

    Args:
      record: JSON-able; comes back from `restore_latest`.
    """
    if step not in self._latest.all_steps():
      _save(self._latest, step, state, record)

  def save_best(self, step: int, trainable: Any, record: dict[str, Any]) -> None:
    """Starts writing the best parameters; they replace the previous best when complete.

    Those of this step or a later one are of a part of the run that was lost and is now repeated:
    they go first, since Orbax keeps the highest step and not the newest.
    """
    for stale in [s for s in self._best.all_steps() if s >= step]:
      self._best.wait_until_finished()
      self._best.delete(stale)
    _save(self._best, step, trainable, record)

  def restore_latest(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
    """The newest readable checkpoint, or None where there is none, not even a damaged one.

    Damaged ones are named through `log`, moved to `damaged/` (not by a reader) and passed over.
    Nothing is deleted.

    Args:
      like: a tree of jax.ShapeDtypeStruct with shardings.

    Returns:
      (state, record).

    Raises:
      CheckpointError: there are checkpoints, and all are damaged; again in each later call, until
        one is put back or `damaged/` is deleted.
    """
    tried: list[int] = []
    while left := [step for step in self.steps() if step not in tried]:
      step = left[-1]
      tried.append(step)
      try:
        return _restore(self._latest, step, like)
      except Exception as error:  # whatever a broken file makes a reader raise
        if self._reads and step not in self.steps():
          continue  # its run has removed it, when a newer one was complete
        use = f"using step {left[-2]}" if len(left) > 1 else "and there is no older one"
        reason = " ".join(str(error).split())[:160]
        moved = "" if self._reads else f"; moved to {self._set_aside(step)}"
        self._log(f"checkpoint of step {step} is damaged ({reason}){moved}; {use}")
    lost = self._set_aside_before()
    if tried or lost:
      raise CheckpointError(
        f"no checkpoint under {self._workdir} can be read (damaged: steps "
        f"{', '.join(map(str, sorted({*lost, *tried})))}); put a copy of one back into "
        f"checkpoints/, name another --workdir, or delete {self._workdir / DAMAGED} to start anew "
        "from step 0 here"
      )
    return None

  def restore_best(self, step: int, like: Any) -> Any | None:
    """Trainable parameters of the best evaluation, at `step`; None, and said, if unreadable."""
    self._best.wait_until_finished()
    try:
      return _restore(self._best, step, like)[0]
    except Exception as error:
      reason = " ".join(str(error).split())[:160]
      self._log(f"the best checkpoint (step {step}) cannot be read ({reason}); not used")
      return None

  def wait(self) -> None:
    """Returns when everything has been written."""
    self._latest.wait_until_finished()
    self._best.wait_until_finished()

  def close(self) -> None:
    """Waits, and frees the threads."""
    self._latest.close()
    self._best.close()

  def _set_aside_before(self) -> list[int]:
    """Steps of the checkpoints that were found damaged, now or in an earlier call."""
    folder = self._workdir / DAMAGED
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())

  def _set_aside(self, step: int) -> Path:
    target = self._workdir / DAMAGED / str(step)
    if jax.process_index() == 0:
      if target.exists():
        shutil.rmtree(target)
      target.parent.mkdir(exist_ok=True)
      shutil.move(self._workdir / "checkpoints" / str(step), target)
    self._latest.reload()
    return target


def _manager(folder: Path, keep: int | None) -> ocp.CheckpointManager:
  """Orbax's own; without `keep` one that opens a folder and leaves it as it is."""
  # Cleaning up removes what another process is writing at this moment.
  owns = keep is not None
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=owns, create=owns
  )
  return ocp.CheckpointManager(folder.absolute(), options=options)


def _save(manager: ocp.CheckpointManager, step: int, state: Any, record: dict[str, Any]) -> None:
  record = record | {"checksum": int(checksum(state))}
  args = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
  manager.save(step, args=args, force=True)


def _restore(manager: ocp.CheckpointManager, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
  args = ocp.args.Composite(state=ocp.args.StandardRestore(like), record=ocp.args.JsonRestore())
  restored = manager.restore(step, args=args)
  state, record = restored["state"], dict(restored["record"])
  expected, found = record.pop("checksum", None), int(checksum(state))
  if found != expected:
    raise CheckpointError(f"its checksum is {found}, {expected} was written")
  return state, record

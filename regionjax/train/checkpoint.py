"""Checkpoints of a run: the newest, those kept for ever, and the best one in a place of its own.

Layout: `checkpoints/<step>/` holds the whole state and a JSON record (data state, totals, clock);
`best/<step>/` holds the trainable parameters with the lowest held-out loss. Both are written in the
background while the run goes on. A write that fails, on a full disk say, is reported and tried
again at the next save; a checkpoint that cannot be read is reported and an older one is used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from regionjax.train.processes import gather, wait_for_all
from regionjax.train.store import CheckpointError, Store

DAMAGED = "damaged"  # folder of a run's unreadable checkpoints
# Signs that a checkpoint which cannot be read may still be a good one.
NOT_ITS_FAULT = (
  "RESOURCE_EXHAUSTED", "MemoryError", "ermission denied", "PERMISSION_DENIED",
  "Too many open files",
)  # fmt: skip


class Checkpoints:
  """Saves and restores a run's state under a work folder.

  Args:
    workdir: the run's folder.
    keep: the newest so many checkpoints stay.
    keep_every: those at its multiples stay too, for ever; 0: none.
    read_only: for looking into a folder that a run may be writing: nothing there is changed,
      neither what the run was killed in the middle of nor what is damaged, and checkpoints may come
      and go.
    log: takes a line of text.
  """

  def __init__(
    self,
    workdir: Path,
    *,
    keep: int,
    keep_every: int = 0,
    read_only: bool = False,
    log: Callable[[str], None] = print,
  ) -> None:
    self._workdir, self._log, self._read_only = workdir, log, read_only
    self._latest = Store(
      workdir / "checkpoints", keep=keep, keep_every=keep_every, read_only=read_only
    )
    self._best = Store(workdir / "best", keep=1, read_only=read_only)
    self._best_of: int | None = None  # the step of the last one that was begun
    self._stores = (("checkpoint", self._latest), ("best checkpoint", self._best))

  def steps(self) -> list[int]:
    """Steps that have a checkpoint, oldest first; one that is being written counts."""
    if not self._read_only:
      return self._latest.steps()
    # Orbax remembers what it saw. Digits only: what is being written has another name.
    names = (path.name for path in (self._workdir / "checkpoints").glob("*"))
    return sorted(int(name) for name in names if name.isdigit())

  def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
    """Starts writing a checkpoint; a no-op if this step already has one.

    Returns when the arrays have been copied from the devices: the state may then be donated. Waits
    for the write before, if it still goes on. What fails is told through `log`.

    Args:
      record: JSON-able; comes back from `restore_latest`.
    """
    self._settle(wait=True, only=self._latest)
    if self._best_of is not None and self._best_of < step:
      self._settle(wait=True, only=self._best)  # the record speaks of it: it must come first
    if step not in self._latest.steps():
      self._begin("checkpoint", self._latest, step, state, record)

  def save_last(self, step: int, state: Any, record: dict[str, Any]) -> None:
    """Saves, and waits until everything has been written; tries twice.

    Raises:
      CheckpointError: this state could not be written.
    """
    for _ in range(2):
      self.save(step, state, record)
      self.wait()
      if step in self._latest.steps():
        return
    steps = self._latest.steps()
    newest = f"the newest checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint"
    raise CheckpointError(
      f"the state of step {step} could not be saved in {self._workdir}: {newest}. Free some space "
      "there, then the same command goes on from it"
    )

  def save_best(self, step: int, trainable: Any, record: dict[str, Any]) -> None:
    """Starts writing the best parameters; they replace the previous best when complete.

    Those of this step or a later one are of a part of the run that was lost and is now repeated:
    they go first, since Orbax keeps the highest step and not the newest.
    """
    self._settle(wait=True, only=self._best)
    for stale in [s for s in self._best.steps() if s >= step]:
      self._best.delete(stale)
    self._best_of = step
    self._begin("best checkpoint", self._best, step, trainable, record)

  def mend_best(self, best: dict[str, Any] | None, step: int, trainable: Any) -> None:
    """Writes the best parameters again where a run goes on from their very step and has lost them.

    The two writes of a step go on side by side, and a process can be killed between their ends.

    Args:
      best: of the ledger.
      step, trainable: of the state that was restored.
    """
    if best is None or best["step"] != step:
      return
    if step not in _as_first(self._best.steps()):
      self.save_best(step, trainable, {"loss": best["loss"]})

  def poll(self) -> None:
    """Tells, without waiting, of writes that have failed meanwhile."""
    self._settle(wait=False)

  def restore_latest(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
    """The newest readable checkpoint, or None where there is none, not even a damaged one.

    Damaged ones are named through `log`, moved to `damaged/` (not by a reader) and passed over.
    Nothing is deleted. With several processes one counts as damaged if any of them cannot read it.

    Args:
      like: a tree of jax.ShapeDtypeStruct with shardings.

    Returns:
      (state, record).

    Raises:
      CheckpointError: there are checkpoints, and all are damaged; again in each later call, until
        one is put back or `damaged/` is deleted. Or one could not be read for another reason, such
        as too little memory: it stays where it is.
    """
    tried: list[int] = []
    while left := [step for step in _as_first(self.steps()) if step not in tried]:
      step = left[-1]
      tried.append(step)
      try:
        return self._latest.restore(step, like)
      except CheckpointError as error:
        reason = str(error)
      if any(word in reason for word in NOT_ITS_FAULT):
        raise CheckpointError(
          f"checkpoint of step {step} could not be read and is left where it is ({reason}); where "
          "memory is short, spread the run over more devices or another train.mesh"
        )
      if self._read_only and step not in self.steps():
        continue  # its run has removed it, when a newer one was complete
      older = left[-2] if len(left) > 1 else None
      moved = "" if self._read_only else f"; moved to {self._set_aside(step)}"
      use = f"using step {older}" if older is not None else "and there is no older one"
      self._log(f"checkpoint of step {step} is damaged ({reason}){moved}; {use}")
    lost = _as_first(self._set_aside_before())
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
    self._settle(wait=True, only=self._best)
    try:
      return self._best.restore(step, like)[0]
    except CheckpointError as error:
      self._log(f"the best checkpoint (step {step}) cannot be read ({error}); not used")
    return None

  def wait(self) -> None:
    """Returns when everything has been written, or has failed, which is told."""
    self._settle(wait=True)

  def close(self) -> None:
    """Waits, and frees the threads. With several processes call `wait` before, in all of them."""
    if jax.process_count() == 1:
      self.wait()
    self._latest.close()
    self._best.close()

  def _begin(self, name: str, store: Store, step: int, state: Any, record: dict[str, Any]) -> None:
    try:
      store.save(step, state, record)
    except CheckpointError as error:
      self._tell(name, step, str(error))

  def _settle(self, *, wait: bool, only: Store | None = None) -> None:
    for name, store in self._stores:
      failed = store.settle(wait=wait) if only in (None, store) else None
      if failed is not None:
        self._tell(name, *failed)

  def _tell(self, name: str, step: int, reason: str) -> None:
    self._log(f"the {name} of step {step} could not be written ({reason}); going on without it")

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
    wait_for_all()
    self._latest.reload()
    return target


def _as_first(steps: list[int]) -> list[int]:
  """What process 0 sees; all must ask. A network file system may show the others an older folder,
  and what each does next must be the same."""
  return json.loads(gather(json.dumps(steps))[0])

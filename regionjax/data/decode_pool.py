"""Pixels for rows: in this process, or in a pool of processes that know nothing of the model.

A job is one row: image references and regions in, prepared images and region arrays out. This
module and what it imports stay clear of jax, so that a worker starts in a fraction of a second and
never touches an accelerator.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from regionjax.data.errors import DataError
from regionjax.data.rows import Frame, RegionArrays, concat_regions, encode_region_arrays
from regionjax.data.schema import ImageRef
from regionjax.data.sources import load_image
from regionjax.images import ImageTransform
from regionjax.regions import Region


@dataclasses.dataclass(frozen=True)
class DecodeJob:
  """One example of a row, without its text. `label` names it in errors."""

  label: str
  images: tuple[ImageRef, ...]
  image_slots: tuple[int, ...]
  regions: tuple[Region, ...]
  region_images: tuple[int, ...]
  region_slots: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class DecodedRow:
  """`images`: one float32 [H,W,3] per image slot of the row; `regions`: its region slots."""

  images: list[np.ndarray]
  regions: RegionArrays


def decode_row(jobs: Sequence[DecodeJob], frame: Frame) -> DecodedRow:
  """Loads, resizes and normalises a row's images and moves its regions along.

  Raises:
    DataError: anything that goes wrong with an example, under the example's name.
  """
  images: list[np.ndarray] = []
  parts: list[tuple[RegionArrays, int]] = []
  for job in jobs:
    try:
      prepared = {k: _prepare(job.images[k], frame) for k in sorted(set(job.image_slots))}
      transforms = {k: transform for k, (_, transform) in prepared.items()}
      part = encode_region_arrays(
        job.regions, job.region_slots, job.region_images, transforms, frame.grid,
        image_slots=job.image_slots,
      )  # fmt: skip
    except Exception as error:
      raise DataError(f"{job.label}: {type(error).__name__}: {error}") from error
    images += [prepared[k][0] for k in job.image_slots]
    parts.append((part, len(job.image_slots)))
  return DecodedRow(images, concat_regions(parts, frame.grid))


def _prepare(ref: ImageRef, frame: Frame) -> tuple[np.ndarray, ImageTransform]:
  return frame.prepare(load_image(ref))


class DecodePool:
  """Decodes rows in `workers` processes, or in the calling thread when that is 0."""

  def __init__(self, frame: Frame, workers: int):
    self._frame = frame
    self._pool: ProcessPoolExecutor | None = None
    if workers:
      # Not fork: jax's threads in the parent would leave their locks taken in the child.
      self._pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (frame,)
      )

  def submit(self, jobs: Sequence[DecodeJob]) -> Future[DecodedRow]:
    """A future of the decoded row; already done where there are no processes."""
    future: Future[DecodedRow] = Future()
    try:
      if self._pool is not None:
        return self._pool.submit(_decode_in_worker, tuple(jobs))
      future.set_result(decode_row(jobs, self._frame))
    except (DataError, BrokenProcessPool) as error:
      future.set_exception(error)
    return future

  def shutdown(self) -> None:
    """Drops what is queued and ends the processes."""
    if self._pool is not None:
      self._pool.shutdown(wait=True, cancel_futures=True)


def result(future: Future[DecodedRow]) -> DecodedRow:
  """The future's row.

  Raises:
    DataError: the example's error, or a process that died.
  """
  try:
    return future.result()
  except BrokenProcessPool as error:
    raise DataError(
      "a decode process ended without an answer: out of memory (lower data.workers or "
      "data.prefetch), or the program starts training outside `if __name__ == '__main__':`, which "
      "data.workers > 0 needs; data.workers=0 decodes in the training process"
    ) from error


_FRAME: Frame | None = None  # of this worker process


def _start_worker(frame: Frame) -> None:
  global _FRAME
  _FRAME = frame
  # Ctrl-C reaches the whole process group; the parent decides what it means.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  """A parent that is killed cannot end its workers, and they would wait for jobs for ever."""
  parent = multiprocessing.parent_process()
  if parent is not None:
    parent.join()
    os._exit(1)


def _decode_in_worker(jobs: tuple[DecodeJob, ...]) -> DecodedRow:
  assert _FRAME is not None
  return decode_row(jobs, _FRAME)

"""Batches for training and evaluation.

`Pipeline` makes the text of this host's rows of every global batch (`shards.ShardedRows`) in a
background thread, has their images decoded (in that thread, or by worker processes) and hands
finished batches to the caller, `prefetch` of them ahead. A saved state is that of the last batch
handed out, whatever has been prepared beyond it.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from regionjax.config import Config
from regionjax.data.assembly import Assembler, Meta, decode_job, row_meta
from regionjax.data.decode_pool import DecodedRow, DecodePool, result
from regionjax.data.eval_batches import make_eval_batches
from regionjax.data.mixing import Mixture
from regionjax.data.report import report
from regionjax.data.rows import Frame, encode_region_arrays, single_batch
from regionjax.data.schema import Batch
from regionjax.data.shards import ShardedRows, counts
from regionjax.data.sources import make_source
from regionjax.data.stream import Item, check_layout, row_capacity

if TYPE_CHECKING:
  from regionjax.conversation import Renderer

__all__ = ["Pipeline", "encode_region_arrays", "make_eval_batches", "single_batch"]


@dataclasses.dataclass(frozen=True)
class _Pending:
  """A batch whose images may still be on their way."""

  rows: list[list[Item]]
  decoded: list[Future[DecodedRow]]
  state: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Ready:
  """A finished batch and the streams' state after it."""

  batch: Batch
  meta: Meta
  state: dict[str, Any]


class Pipeline:
  """An endless iterator of `(batch, meta)`.

  `batch` is a `schema.Batch` of this host's `data.rows / hosts` rows as numpy arrays; `meta` lists
  for each row its supervised answers in the order of `answer_ids_bt`, as dicts with `task`,
  `ref_kind`, `source`, `id` and `text`.

  Args:
    config: the run.
    renderer: a `conversation.Renderer` of that config.
    sources: instead of those that `config.data.sources` names, one for each of its entries.
    host: index of this host.
    hosts: how many there are; the global batches don't depend on it.
    rows: which rows of each global batch to give, instead of an equal share of them by `host`.

  Raises:
    ConfigError: rows that the hosts cannot share, or settings that cannot run.
  """

  def __init__(
    self,
    config: Config,
    renderer: Renderer,
    *,
    sources: Sequence[Any] | None = None,
    host: int = 0,
    hosts: int = 1,
    rows: Sequence[int] | None = None,
  ):
    check_layout(config, host, hosts)
    data = config.data
    if sources is None:
      sources = [make_source(source) for source in data.sources]
    self._config = config
    self._renderer = renderer
    self._mixture = Mixture(data.sources, sources, seed=data.seed)
    share = data.rows // hosts
    self._mine = range(host * share, (host + 1) * share) if rows is None else tuple(rows)
    self._assemble = Assembler(config, renderer.tokenizer.pad_id)
    self._state = self._stream().state()
    self._end: weakref.finalize | None = None
    self._queue: queue.Queue[_Ready | BaseException]
    self._held: _Ready | None = None  # taken from the queue, not yet handed out
    self._failure: Exception | None = None

  def __iter__(self) -> Iterator[tuple[Batch, Meta]]:
    return self

  def __next__(self) -> tuple[Batch, Meta]:
    self.peek()
    ready, self._held = self._held, None
    assert ready is not None
    self._state = ready.state
    return ready.batch, ready.meta

  def peek(self) -> None:
    """Returns when the next batch is there; it is not handed out, and the state stays.

    Raises:
      DataError: an example of it cannot be read or written down.
    """
    if self._failure is not None:
      raise self._failure
    if self._end is None:
      self._start()
    if self._held is not None:
      return
    try:
      ready = self._queue.get()
      if isinstance(ready, BaseException):
        raise ready
    except BaseException as error:
      # After Ctrl-C too: a batch taken from the queue but not handed out would be lost otherwise.
      self.close()
      if isinstance(error, Exception):
        self._failure = error
      raise
    self._held = ready

  def get_state(self) -> dict[str, Any]:
    """Position of this host's shards after the last batch handed out; JSON-able.

    Of several hosts' states `shards.merge_states` makes the one that any number of hosts takes up.
    """
    return copy.deepcopy(self._state)

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues after the batch at which `get_state` gave `state`, on any number of hosts.

    Raises:
      DataError: the state is of other settings (the message names them), or of other hosts alone.
    """
    self.close()
    stream = self._stream()
    stream.restore(state)
    self._state = stream.state()
    self._failure = None

  def stats(self, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the rows handed out so far held; see `report.report`.

    Args:
      state: of all hosts; by default this one's, whose shards alone are counted.
    """
    return report(counts(self._state if state is None else state), row_capacity(self._config))

  def close(self) -> None:
    """Ends the thread and the worker processes; iterating again starts them anew."""
    self._held = None
    if self._end is not None:
      self._end()
      self._end = None

  def __enter__(self) -> Pipeline:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _stream(self) -> ShardedRows:
    return ShardedRows(self._mixture, self._renderer, self._config, self._mine)

  def _start(self) -> None:
    stream = self._stream()
    stream.restore(self._state)
    data = self._config.data
    pool = DecodePool(Frame.of(self._config), data.workers)
    # `prefetch` batches are ahead in all: finished ones, or with workers ones being decoded.
    ahead = data.prefetch if data.workers else 0
    self._queue = queue.Queue(1 if data.workers else data.prefetch)
    stop = threading.Event()
    thread = threading.Thread(
      target=_produce,
      args=(stream, pool, self._assemble, ahead, self._queue, stop),
      name="regionjax-data",
      daemon=True,
    )
    # Also runs when the pipeline is dropped and when the program ends, whichever comes first.
    self._end = weakref.finalize(self, _shut_down, stop, self._queue, thread, pool)
    thread.start()


def _produce(
  stream: ShardedRows,
  pool: DecodePool,
  assemble: Assembler,
  ahead: int,
  out: queue.Queue[_Ready | BaseException],
  stop: threading.Event,
) -> None:
  """Body of the background thread; it holds no reference to the Pipeline.

  An error takes the place of its batch, so that all batches before it are handed out first.
  """
  waiting: collections.deque[_Pending | BaseException] = collections.deque()
  while not stop.is_set():
    if not waiting or isinstance(waiting[-1], _Pending):
      try:
        rows = stream.next_rows()
        decoded = []
        for row in rows:
          if stop.is_set():
            return
          decoded.append(pool.submit([decode_job(item) for item in row]))
        waiting.append(_Pending(rows, decoded, stream.state()))
      except BaseException as error:
        waiting.append(error)
    if len(waiting) > ahead or not isinstance(waiting[-1], _Pending):
      ready = _finish(waiting.popleft(), assemble)
      out.put(ready)
      if isinstance(ready, BaseException):
        return


def _finish(pending: _Pending | BaseException, assemble: Assembler) -> _Ready | BaseException:
  if isinstance(pending, BaseException):
    return pending
  try:
    batch = assemble(pending.rows, [result(future) for future in pending.decoded])
  except BaseException as error:
    return error
  return _Ready(batch, [row_meta(row) for row in pending.rows], pending.state)


def _shut_down(
  stop: threading.Event, out: queue.Queue, thread: threading.Thread, pool: DecodePool
) -> None:
  stop.set()
  while thread.is_alive():
    with contextlib.suppress(queue.Empty):  # the thread may be waiting for room
      out.get_nowait()
    thread.join(timeout=0.02)
  pool.shutdown()

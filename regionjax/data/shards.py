"""Global batches of packed rows, made of one or more streams: what each host does of the text.

The rows of every global batch are split into `data.shards` equal runs, and each run is drawn and
packed by a `RowStream` of its own. A host runs the streams whose rows it holds: with one shard all
hosts do the same work over all rows, with as many shards as hosts each does its own. The batches
depend on the number of shards and not on that of hosts, so a run goes on with the same batches on
any number of hosts. One thread writes down one to two thousand examples a second, and 256 chips of
v5e take 1,900 (`launch/benchmark.py --only input --compiled`). A shard holds `data.packing_bins`
rows open, and shards drift apart in an epoch by as much as their examples differ in length.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from regionjax.config import Config, to_dict
from regionjax.data.errors import DataError
from regionjax.data.mixing import Mixture
from regionjax.data.stream import Item, RowStream

if TYPE_CHECKING:
  from regionjax.conversation import Renderer

State = dict[str, Any]


class ShardedRows:
  """Some rows of every global batch, still without pixels.

  Args:
    mixture: where draws come from.
    renderer: encodes an example (see `conversation.Renderer`).
    config: its `data` part says how rows are packed; all that shapes an example's ids is recorded
      in the state.
    rows: which of `config.data.rows`.
  """

  def __init__(self, mixture: Mixture, renderer: Renderer, config: Config, rows: Sequence[int]):
    self._identity = _identity(config, renderer, mixture)
    self._rows = tuple(rows)
    self._size = config.data.rows // config.data.shards
    warned: set[str] = set()
    self._streams = {
      shard: RowStream(mixture, renderer, config, shard=shard, warned=warned)
      for shard in sorted({row // self._size for row in rows})
    }
    self._batches = 0

  def next_rows(self) -> list[list[Item]]:
    """These rows of the next global batch.

    Raises:
      DataError: as `RowStream.next_rows`.
    """
    made = {shard: stream.next_rows() for shard, stream in self._streams.items()}
    self._batches += 1
    return [made[row // self._size][row % self._size] for row in self._rows]

  def state(self) -> State:
    """The position of these shards after the last batch; JSON-able, a copy."""
    return {
      "batches": self._batches,
      "shards": {str(shard): stream.state() for shard, stream in self._streams.items()},
      "stream": json.loads(json.dumps(self._identity)),
    }

  def restore(self, state: Mapping[str, Any]) -> None:
    """Continues from `state`, of these shards or of more.

    Raises:
      DataError: the state is of other settings (the message names them) or lacks a shard.
    """
    ours, theirs = self._identity, dict(state["stream"])
    other = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
    if other:
      changes = "; ".join(f"{k} was {theirs.get(k)!r}, is {ours.get(k)!r}" for k in other)
      raise DataError(
        f"the saved data state belongs to other data settings ({changes}); restore them, or start "
        "the data from the beginning"
      )
    absent = [str(shard) for shard in self._streams if str(shard) not in state["shards"]]
    if absent:
      raise DataError(
        f"the saved data state lacks the shards {', '.join(absent)}; it is that of one host: save "
        "what `merge_states` makes of all hosts'"
      )
    for shard, stream in self._streams.items():
      stream.restore(state["shards"][str(shard)])
    self._batches = int(state["batches"])


def merge_states(states: Iterable[State]) -> State:
  """One state with the shards of all hosts', taken after the same batch."""
  merged: State = {}
  for state in states:
    shards = merged.get("shards", {}) | state["shards"]
    merged = state | {"shards": shards}
  merged["shards"] = dict(sorted(merged["shards"].items(), key=lambda pair: int(pair[0])))
  return merged


def counts(state: Mapping[str, Any]) -> dict[str, int]:
  """The counters of a state's shards, added up, and its `batches`."""
  total: dict[str, int] = {"batches": state["batches"]}
  for shard in state["shards"].values():
    for name, count in shard["counts"].items():
      total[name] = total.get(name, 0) + count
  return total


def _identity(config: Config, renderer: Renderer, mixture: Mixture) -> dict[str, Any]:
  """What must be equal for a saved position to mean the same rows; JSON-able."""
  names = (
    "rows", "tokens_per_row", "images_per_row", "regions_per_row", "packing_bins", "shards", "seed"
  )  # fmt: skip
  identity = {name: getattr(config.data, name) for name in names}
  identity["sources"] = to_dict(config.data.sources)
  identity["source lengths"] = mixture.lengths
  identity["prompt"] = to_dict(config.prompt)
  identity["tokenizer"] = renderer.tokenizer.fingerprint
  identity["region.kind"] = config.model.region.kind
  identity["image_tokens"] = config.model.image_tokens
  # As JSON gives it back: a state from a file compares equal to one that never left memory.
  return json.loads(json.dumps(identity))

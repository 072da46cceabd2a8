"""The text-only half of the pipeline: draw, template, tokenise, pack.

A stream's position is one small value: its next turn to draw, the draw indices that wait in open
rows, and the counters of the report. Nothing else is remembered; what waits in open rows is drawn
and tokenised again when a state is restored. `shards` makes global batches of one or more streams.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from regionjax.config import Config, ConfigError
from regionjax.data.errors import DataError
from regionjax.data.mixing import Draw, Mixture
from regionjax.data.packing import FirstFit, OpenRow, Size
from regionjax.images import crop_transform
from regionjax.regions import RegionError

if TYPE_CHECKING:
  from regionjax.conversation import Encoded, Renderer

log = logging.getLogger(__name__)

# So many draws in a row without one that fits a row: the limits are wrong, not the examples.
HOPELESS = 1000
_64_BITS = 2**64 - 1


@dataclasses.dataclass(frozen=True)
class Item:
  """An example on its way into a row."""

  draw: Draw
  encoded: Encoded

  @property
  def size(self) -> Size:
    e = self.encoded
    return Size(len(e.ids), len(e.image_slots), len(e.region_slots))


class Rejected(Exception):
  """An example that no row can hold or that teaches nothing; `args` are (reason, message)."""


def encode_draw(draw: Draw, renderer: Renderer, config: Config) -> Item:
  """Tokenises a draw so that it fits a row of its own, dropping whole turns where necessary.

  Raises:
    Rejected: it doesn't fit even so ('tokens', 'images', 'regions'), nothing of what is left is
      supervised ('unsupervised'), or the resize rule cuts a region away ('cropped').
    DataError: the example cannot be rendered at all.
  """
  capacity = row_capacity(config)
  try:
    encoded = renderer.encode(draw.example, max_length=capacity.tokens)
  except ValueError as error:
    try:
      renderer.encode(draw.example)
    except ValueError as other:
      raise DataError(f"{draw.label}: {other}") from other
    # It can be written down, so its length was what the first error is about.
    raise Rejected("tokens", f"{draw.label}: {error}") from error
  item = Item(draw, encoded)
  limit = item.size.over(capacity)
  if limit is not None:
    raise Rejected(
      limit,
      f"{draw.label} takes {getattr(item.size, limit)} {limit}, a row holds "
      f"{getattr(capacity, limit)} (data.{limit}_per_row)",
    )
  if not encoded.mask.any():
    raise Rejected("unsupervised", f"{draw.label} has no supervised answer")
  if config.data.resize == "hf":
    _check_crop(item, config)
  return item


def _check_crop(item: Item, config: Config) -> None:
  """Rejects an example with a region in the part of its image that the 'hf' rule cuts away.

  Only for images whose size is known beforehand; others are found out when they are decoded.
  """
  example = item.draw.example
  for r in set(item.encoded.region_slots):
    size = example.images[example.region_images[r]].size
    if size is None:
      continue
    try:
      example.regions[r].transform(crop_transform(size, config.model.vision.image_hw))
    except RegionError as error:
      raise Rejected(
        "cropped",
        f"{item.draw.label}: region {r} lies in what the resize rule 'hf' cuts away of an image of "
        f"{size[0]} x {size[1]} pixels; data.resize=letterbox or chatspot keeps the whole image",
      ) from error


def check_layout(config: Config, host: int, hosts: int) -> None:
  """Refuses numbers that no batch can be made of (ConfigError)."""
  data = config.data
  if hosts < 1 or not 0 <= host < hosts:
    raise ConfigError(f"host {host} of {hosts}: expected 0 <= host < hosts")
  if data.rows % hosts:
    raise ConfigError(
      f"data.rows={data.rows} cannot be shared by {hosts} hosts; make it a multiple of {hosts}"
    )
  if data.shards > 0 and data.rows % data.shards:
    raise ConfigError(
      f"data.rows={data.rows} cannot be split into data.shards={data.shards}; make it a multiple"
    )
  least = {
    "rows": 1, "shards": 1, "tokens_per_row": 2, "images_per_row": 0, "regions_per_row": 0,
    "packing_bins": 1, "workers": 0, "prefetch": 1, "seed": 0,
  }  # fmt: skip
  for name, low in least.items():
    if getattr(data, name) < low:
      raise ConfigError(f"data.{name}={getattr(data, name)}: expected at least {low}")


def row_capacity(config: Config) -> Size:
  """What one row of the batches of this config holds."""
  data = config.data
  return Size(data.tokens_per_row, data.images_per_row, data.regions_per_row)


def draw_index(turn: int, shard: int, shards: int) -> int:
  """Which draw is a shard's next one in its `turn`-th turn; each is one shard's.

  A turn goes over as many draws as there are shards, from another shard on each time. In a fixed
  order a mixture that repeats itself every few draws would give a shard the same sources always,
  and sources of long examples less than their weight, as their shards take more turns for a row.
  """
  if shards == 1:
    return turn
  x = (turn + 1) * 0x9E3779B97F4A7C15 & _64_BITS  # splitmix64
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
  x = (x ^ x >> 27) * 0x94D049BB133111EB & _64_BITS
  return turn * shards + (shard + (x ^ x >> 31)) % shards


class RowStream:
  """The endless rows of one shard of the global batches, still without pixels.

  Args:
    mixture: where draws come from.
    renderer: encodes an example (see `conversation.Renderer`).
    config: its `data` part says how rows are packed.
    shard: which of them.
    warned: kinds of defects that the log names no more; streams may share it.
  """

  def __init__(
    self,
    mixture: Mixture,
    renderer: Renderer,
    config: Config,
    *,
    shard: int = 0,
    warned: set[str] | None = None,
  ):
    self._mixture = mixture
    self._renderer = renderer
    self._config = config
    self._shard, self._shards = shard, config.data.shards
    self._rows = config.data.rows // self._shards
    self._packer: FirstFit[Item] = FirstFit(row_capacity(config), config.data.packing_bins)
    self._turn = 0
    self._counts: collections.Counter[str] = collections.Counter()
    self._warned: set[str] = set() if warned is None else warned

  def next_rows(self) -> list[list[Item]]:
    """The shard's rows of the next global batch.

    Raises:
      DataError: an example cannot be read or rendered, or none of a thousand in a row fits.
    """
    rows: list[list[Item]] = []
    misses = 0
    while len(rows) < self._rows:
      draw = self._mixture[draw_index(self._turn, self._shard, self._shards)]
      self._turn += 1
      try:
        item = encode_draw(draw, self._renderer, self._config)
      except Rejected as rejected:
        misses += 1
        self._reject(rejected, misses)
        continue
      misses = 0
      self._counts["draws." + draw.source] += 1
      asked = sum(t.role == "assistant" and t.supervise for t in draw.example.turns)
      if len(item.encoded.answers) < asked:
        self._counts["truncated"] += 1
        self._warn_once("truncated", f"{draw.label} lost turns that a row had no room for")
      closed = self._packer.add(item, item.size)
      if closed is not None:
        rows.append(closed.items)
        self._count(closed)
    return rows

  def state(self) -> dict[str, Any]:
    """The position after the last rows; JSON-able, a copy."""
    return {
      "turn": self._turn,
      "open": [[item.draw.index for item in row.items] for row in self._packer.open],
      "counts": dict(self._counts),
    }

  def restore(self, state: dict[str, Any]) -> None:
    """Continues from `state`, of a stream with the same settings.

    Raises:
      DataError: the sources give other examples than then.
    """
    rows = []
    for indices in state["open"]:
      try:
        items = [encode_draw(self._mixture[i], self._renderer, self._config) for i in indices]
      except Rejected as rejected:
        raise DataError(
          f"the sources have changed since the data state was saved: {rejected.args[1]}"
        ) from rejected
      rows.append([(item, item.size) for item in items])
    self._packer.restore(rows)
    self._turn = int(state["turn"])
    self._counts = collections.Counter(state["counts"])

  def _count(self, row: OpenRow[Item]) -> None:
    self._counts["rows"] += 1
    self._counts["examples"] += len(row.items)
    self._counts["answers"] += sum(len(item.encoded.answers) for item in row.items)
    self._counts["targets"] += sum(int(item.encoded.mask.sum()) for item in row.items)
    for name, used in row.used._asdict().items():
      self._counts[name] += used

  def _warn_once(self, reason: str, message: str) -> None:
    if reason not in self._warned:
      self._warned.add(reason)
      log.warning("%s; more of this kind are only counted", message)

  def _reject(self, rejected: Rejected, misses: int) -> None:
    reason, message = rejected.args
    self._counts["skipped." + reason] += 1
    self._warn_once(reason, f"skipped: {message}")
    if misses >= HOPELESS:
      raise DataError(
        f"{misses} examples in a row had to be skipped, the last one because {message}"
      )

"""A fixed list of held-out batches, packed like training data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regionjax.config import Config
from regionjax.data.assembly import Assembler, Meta, decode_job, row_meta
from regionjax.data.decode_pool import decode_row
from regionjax.data.errors import DataError
from regionjax.data.mixing import Draw
from regionjax.data.packing import FirstFit
from regionjax.data.rows import Frame
from regionjax.data.schema import Batch
from regionjax.data.stream import Item, Rejected, check_layout, encode_draw, row_capacity

if TYPE_CHECKING:
  from regionjax.conversation import Renderer


def make_eval_batches(
  source: Any,
  renderer: Renderer,
  config: Config,
  n_examples: int,
  *,
  host: int = 0,
  hosts: int = 1,
) -> list[tuple[Batch, Meta]]:
  """The first `n_examples` of a source, packed like training data; always the same batches.

  Args:
    source: held-out examples; fewer than `n_examples` are taken when it is shorter.
    renderer: encodes them.
    config: sizes of the batches.
    n_examples: how many to take.
    host: index of this host.
    hosts: how many there are; each gets its rows of every global batch.

  Returns:
    `(batch, meta)` pairs as `Pipeline` gives them. The last batch is filled up with empty rows.

  Raises:
    DataError: not one of the examples fits a row, or one cannot be decoded.
  """
  check_layout(config, host, hosts)
  packer: FirstFit[Item] = FirstFit(row_capacity(config), config.data.packing_bins)
  rows: list[list[Item]] = []
  last = ""
  for i in range(min(n_examples, len(source))):
    try:
      name = getattr(source, "name", type(source).__name__)
      item = encode_draw(Draw(i, name, source[i]), renderer, config)
    except Rejected as rejected:
      last = rejected.args[1]
      continue
    closed = packer.add(item, item.size)
    if closed is not None:
      rows.append(closed.items)
  rows += [row.items for row in packer.flush()]
  if not rows:
    raise DataError(f"none of {n_examples} examples can be used; {last or 'the source is empty'}")
  size = config.data.rows
  rows += [[] for _ in range(-len(rows) % size)]
  share = size // hosts
  assemble = Assembler(config, renderer.tokenizer.pad_id)
  frame = Frame.of(config)
  out = []
  for start in range(host * share, len(rows), size):
    mine = rows[start : start + share]
    decoded = [decode_row([decode_job(item) for item in row], frame) for row in mine]
    out.append((assemble(mine, decoded), [row_meta(row) for row in mine]))
  return out

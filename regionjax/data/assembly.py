"""From packed rows to the arrays of a batch and the notes that go with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regionjax.config import Config
from regionjax.data.decode_pool import DecodedRow, DecodeJob
from regionjax.data.rows import Frame, fill_slots, slot_arrays, text_arrays
from regionjax.data.schema import Batch
from regionjax.data.stream import Item, row_capacity

Meta = list[list[dict[str, Any]]]


class Assembler:
  """Puts packed rows and their decoded images into the arrays of a batch."""

  def __init__(self, config: Config, pad_id: int):
    self._capacity = row_capacity(config)
    self._frame = Frame.of(config)
    self._pad_id = pad_id

  def __call__(self, rows: Sequence[Sequence[Item]], decoded: Sequence[DecodedRow]) -> Batch:
    room = self._capacity
    batch = text_arrays(
      [[item.encoded for item in row] for row in rows], tokens=room.tokens, pad_id=self._pad_id
    )
    batch |= slot_arrays(len(rows), images=room.images, regions=room.regions, frame=self._frame)
    for b, row in enumerate(decoded):
      fill_slots(batch, b, row.images, row.regions)
    return batch  # type: ignore[return-value]


def decode_job(item: Item) -> DecodeJob:
  """What has to be decoded for an example."""
  example, encoded = item.draw.example, item.encoded
  return DecodeJob(
    label=item.draw.label,
    images=example.images,
    image_slots=tuple(encoded.image_slots),
    regions=example.regions,
    region_images=example.region_images,
    region_slots=tuple(encoded.region_slots),
  )


def row_meta(row: Sequence[Item]) -> list[dict[str, Any]]:
  """One dict per supervised answer of a row: entry j describes answer id j + 1."""
  return [
    {
      "task": task,
      "ref_kind": kind,
      "source": item.draw.source,
      "id": item.draw.example.meta.get("id", str(item.draw.index)),
      "text": text,
    }
    for item in row
    for task, text, kind in item.encoded.answers
  ]

"""Prompts of any lengths -> padded arrays of a few sizes, so that few programs are compiled.

Axes: b rows, k images of a row, t tokens, r region slots of a row, n patches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from regionjax.data.rows import RegionArrays
from regionjax.infer.programs import PromptArrays


class GenerationError(ValueError):
  """A prompt that cannot be run; the message says why."""


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One row: a prompt, or the next piece of one.

  Attributes:
    ids: int32 [T], image and region slots included.
    images: which of the encoded images each image of the row is, in the order of their slots.
    regions: one entry per region slot in `ids`, in order; `box_image_r` indexes `images`. None when
      there is no slot.
  """

  ids: np.ndarray
  images: tuple[int, ...] = ()
  regions: RegionArrays | None = None


def bucket(size: int, smallest: int = 32) -> int:
  """The least of smallest, 2·smallest, 3·smallest, 4·, 6·, 8·, 12·, ... that is >= size.

  Two sizes per doubling: padding wastes a third at most, and a prompt of any length up to 2048
  compiles one of 12 programs.
  """
  power = smallest
  while power < size:
    if power >= 2 * smallest and power * 3 // 2 >= size:
      return power * 3 // 2
    power *= 2
  return power


def power(size: int, smallest: int = 1) -> int:
  """The least of smallest, 2·smallest, 4·smallest, ... that is >= size."""
  while smallest < size:
    smallest *= 2
  return smallest


def pad_prompts(
  prompts: Sequence[Prompt], *, rows: int, patches: int, pad_id: int, region_slot_id: int
) -> PromptArrays:
  """Arrays of a batch.

  Args:
    prompts: at most `rows`; the other rows stay empty.
    rows: B.
    patches: N, of one image.
    pad_id: fills the tokens behind a row's end; any id will do, nothing reads it.
    region_slot_id: the tokenizer's; each such id in a prompt needs an entry of its regions.

  Raises:
    GenerationError: slots and regions of a prompt don't match.
  """
  t = bucket(max(len(p.ids) for p in prompts))
  k = max(1, *(len(p.images) for p in prompts))
  counts = [0 if p.regions is None else len(p.regions.kind_r) for p in prompts]
  r = power(max(counts), 4)
  out = PromptArrays(
    tokens_bt=np.full((rows, t), max(pad_id, 0), np.int32),
    lengths_b=np.zeros(rows, np.int32),
    image_bk=np.zeros((rows, k), np.int32),
    boxes_br4=np.zeros((rows, r, 4), np.float32),
    box_image_br=np.zeros((rows, r), np.int32),
    region_kind_br=np.zeros((rows, r), np.int32),
    region_mask_br=np.zeros((rows, r), bool),
    region_cover_brn=np.zeros((rows, r, patches), np.float32),
  )
  for b, (prompt, count) in enumerate(zip(prompts, counts)):
    out.tokens_bt[b, : len(prompt.ids)] = prompt.ids
    out.lengths_b[b] = len(prompt.ids)
    out.image_bk[b, : len(prompt.images)] = prompt.images
    slots = int(np.sum(np.asarray(prompt.ids) == region_slot_id))
    if slots != count:
      raise GenerationError(f"row {b}: {slots} region slots in its ids but {count} regions")
    if prompt.regions is not None:
      out.boxes_br4[b, :count] = prompt.regions.boxes_r4
      out.box_image_br[b, :count] = prompt.regions.box_image_r
      out.region_kind_br[b, :count] = prompt.regions.kind_r
      out.region_mask_br[b, :count] = True
      out.region_cover_brn[b, :count] = prompt.regions.cover_rn
  return out

"""What each step of the TPU kernels does: block sizes, and the order of stripes and boxes.

A map is held in fast memory for all boxes of its image, one block of channels at a time. It comes
and goes in stripes of rows, so that only one whole copy is ever there: a 128x128 map of 128
channels is 8 MiB in float32, and a second one for the next image would not fit beside it.

The boxes are taken in the order of their images. Every map is then read once and every crop
written once, whatever the order in which the boxes are given.

Axes: B rows, K images of a row, R boxes, H and W cells, P and Q bins, C channels, T steps.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from regionjax.ops.roi_align.sampling import Boxes

LANES = 128  # of a vector register, which has 8 rows of 32 bits
VMEM = 16 * 2**20  # what a kernel gets by default on v5e, v5p and v6e
TEMPORARIES = 2 * 2**20  # of it for the compiler
STRIPE = 2 * 2**20  # a stripe is at most that long: two of them are in flight
DTYPES = (jnp.float32, jnp.bfloat16)
SCALARS = 2**19  # bytes for the schedule and the boxes
STEP = 2**18  # bytes that a v5e's HBM moves in the 0.3 us that the smallest box takes
ROW = 32 * 1024  # cells times channels of one row of a block: half of the registers in float32

IDLE, STRIPE_STEP, BOX_STEP, EMPTY_STEP = range(4)
FIRST = 4  # added to the first step of an image


class Blocks(NamedTuple):
  """How a map is cut: channels of a block, rows of a stripe."""

  channels: int
  rows: int


class Schedule(NamedTuple):
  """One entry per row of the batch and step, int32 [B, T]; the last axis of the grid walks T.

  A step's `stripe` and `box` also say which blocks lie in fast memory then. Steps that need no new
  stripe repeat the last one, and steps without a box name the next one, so that nothing moves.
  """

  action_bt: jax.Array  # IDLE, STRIPE_STEP, BOX_STEP or EMPTY_STEP, plus FIRST
  stripe_bt: jax.Array  # of the stripes of all images of the row, in [0, K * stripes)
  box_bt: jax.Array  # in [0, R)


def tiled_bytes(shape: tuple[int, ...], itemsize: int, *, packed: bool) -> int:
  """Bytes of an array in tiles of 8 rows (of 32 bits if `packed`) and 128 channels."""
  *outer, rows, channels = shape
  tile = 8 * (4 // itemsize if packed else 1)
  return math.prod(outer) * _up(rows, tile) * _up(channels, LANES) * itemsize


def suits(
  shape: tuple[int, ...], dtype: jnp.dtype, *, boxes: int, output_size: tuple[int, int]
) -> bool:
  """Whether the kernels take [B, K, H, W, C] features, both ways, and beat the einsum form.

  They save what that form moves between its two products: about 3 times [P, W, C] per box, see
  below. It stays the better one where that is little (narrow maps of few channels, whose boxes
  cost the kernel 0.3 us each in instructions alone), where channels don't fill whole registers of
  128, where one block of a map is larger than fast memory, and for a batch of thousands of boxes,
  whose schedule outgrows scalar memory.

  Compiled for v5e, not run: MB moved forward in bfloat16 for 14x14 bins, einsum's by XLA's
  analysis, the kernel's by `traffic.py`; GFLOP of the products. One image; with K images in a row
  einsum's first product grows K-fold, the kernel's do not.

    map          boxes   einsum        kernel
    16x16x128       64    19 MB, 0.1     4 MB, 0.1   the kernel gains nothing: einsum
    16x16x1024      64   147 MB, 0.9    30 MB, 0.5
    64x64x1024      64   397 MB, 9.2    38 MB, 2.1
    112x112x256     64   158 MB, 6.5    14 MB, 0.9
    128x128x1024    64   724 MB, 33     63 MB, 4.2
    128x128x1024     8   237 MB, 4.2    37 MB, 0.5

  Args:
    shape: what one device has.
    boxes: R.
  """
  dtype = jnp.dtype(dtype)
  saved = 3 * output_size[0] * shape[3] * shape[4] * dtype.itemsize
  if dtype not in DTYPES or shape[-1] % LANES or boxes == 0 or saved < STEP:
    return False
  return all(
    blocks is not None and scalar_bytes(shape, boxes, blocks) <= SCALARS
    for blocks in (
      forward_blocks(shape, dtype.itemsize, output_size),
      backward_blocks(shape, dtype.itemsize, output_size),
    )
  )


def forward_blocks(
  shape: tuple[int, ...], itemsize: int, output_size: tuple[int, int]
) -> Blocks | None:
  """Blocks for [B, K, H, W, C] features, or None if a map does not fit into fast memory."""
  return _blocks(shape, itemsize, output_size, held=itemsize)


def backward_blocks(
  shape: tuple[int, ...], itemsize: int, output_size: tuple[int, int]
) -> Blocks | None:
  """As `forward_blocks`, for the gradient, which is summed in float32."""
  return _blocks(shape, itemsize, output_size, held=4)


def _blocks(shape, itemsize, output_size, *, held) -> Blocks | None:
  _, _, h, w, c = shape
  widths = [n for n in range(c, 0, -1) if n == c or (c % n == 0 and n % LANES == 0)]
  for channels in widths:
    if w * channels > ROW and channels != widths[-1]:
      continue
    crop = tiled_bytes((*output_size, channels), itemsize, packed=True)
    room = VMEM - TEMPORARIES - 2 * crop - tiled_bytes((h, w, channels), held, packed=True)
    row = tiled_bytes((w, channels), itemsize, packed=True)
    rows = [n for n in range(h, 0, -1) if h % n == 0 and n * row <= min(STRIPE, room // 2)]
    if rows:
      return Blocks(channels, rows[0])
  return None


def scalar_bytes(shape: tuple[int, ...], boxes: int, blocks: Blocks) -> int:
  """Bytes of the schedule and the boxes, which the kernel's scalar unit holds throughout."""
  b, k, h = shape[:3]
  return 4 * b * (3 * (boxes + k * h // blocks.rows) + 4 * boxes)


@functools.partial(jax.jit, static_argnames=("images", "stripes"))
def forward_schedule(boxes: Boxes, *, images: int, stripes: int) -> Schedule:
  """For every image with boxes its stripes, then its boxes; at the end the invalid boxes.

  Images without boxes are not read.
  """
  count_bk, rank_br = _sorted_by_image(boxes, images)
  length_bk = count_bk + stripes * (count_bk > 0)
  image_bt, within_bt, local_bt, t_bt = _walk(length_bk, boxes, stripes)
  load_bt = within_bt & (local_bt < stripes)
  total_b1 = jnp.sum(length_bk, axis=1, keepdims=True)
  valid_b1 = jnp.sum(count_bk, axis=1, keepdims=True)
  before_bt = _take(_before(count_bk), image_bt)
  rank_bt = jnp.where(
    within_bt, before_bt + jnp.maximum(local_bt - stripes, 0), valid_b1 + t_bt - total_b1
  )
  r = boxes.image_br.shape[1]
  tail_bt = jnp.where(rank_bt < r, EMPTY_STEP, IDLE)
  action_bt = jnp.where(load_bt, STRIPE_STEP, jnp.where(within_bt, BOX_STEP, tail_bt))
  # Behind the last box the last stripe that was read stays.
  number_1k = jnp.arange(images, dtype=jnp.int32)[None]
  last_b1 = jnp.max(jnp.where(count_bk > 0, number_1k, 0), axis=1, keepdims=True)
  stripe_bt = jnp.where(
    within_bt,
    image_bt * stripes + jnp.minimum(local_bt, stripes - 1),
    last_b1 * stripes + stripes - 1,
  )
  return Schedule(action_bt, stripe_bt, _box_of_rank(rank_br, jnp.minimum(rank_bt, r - 1)))


@functools.partial(jax.jit, static_argnames=("images", "stripes"))
def backward_schedule(boxes: Boxes, *, images: int, stripes: int) -> Schedule:
  """For every image its boxes, then its stripes, which are written; invalid boxes are not read."""
  count_bk, rank_br = _sorted_by_image(boxes, images)
  image_bt, within_bt, local_bt, _ = _walk(count_bk + stripes, boxes, stripes)
  count_bt = _take(count_bk, image_bt)
  active_bt = jnp.where(local_bt < count_bt, BOX_STEP, STRIPE_STEP)
  action_bt = jnp.where(within_bt, active_bt + FIRST * (local_bt == 0), IDLE)
  stripe_bt = image_bt * stripes + jnp.maximum(local_bt - count_bt, 0)
  stripe_bt = jnp.where(within_bt, stripe_bt, images * stripes - 1)
  rank_bt = _take(_before(count_bk), image_bt) + jnp.minimum(local_bt, count_bt)
  last_b1 = jnp.maximum(jnp.sum(count_bk, axis=1, keepdims=True) - 1, 0)
  return Schedule(action_bt, stripe_bt, _box_of_rank(rank_br, jnp.minimum(rank_bt, last_b1)))


def _walk(length_bk, boxes, stripes):
  """Of every step: its image, whether it has one, its number within the image and in all."""
  b, k = length_bk.shape
  steps = boxes.image_br.shape[1] + k * stripes
  end_bk = jnp.cumsum(length_bk, axis=1)
  t_bt = jnp.broadcast_to(jnp.arange(steps, dtype=jnp.int32)[None], (b, steps))
  past_bt = jnp.sum(end_bk[:, None, :] <= t_bt[:, :, None], axis=-1, dtype=jnp.int32)
  image_bt = jnp.minimum(past_bt, k - 1)
  return image_bt, past_bt < k, t_bt - _take(end_bk - length_bk, image_bt), t_bt


# Comparisons and sums instead of sorts and gathers: on a TPU these few small ones fuse.


def _sorted_by_image(boxes: Boxes, images: int) -> tuple[jax.Array, jax.Array]:
  """Valid boxes of each image [B, K], and each box's place in the order by image [B, R]."""
  key_br = jnp.where(boxes.valid_br, boxes.image_br, images)
  number_r = jnp.arange(key_br.shape[1])
  other_brj, own_brj = key_br[:, None, :], key_br[:, :, None]
  earlier_1rj = (number_r[None, :] < number_r[:, None])[None]
  before_brj = (other_brj < own_brj) | ((other_brj == own_brj) & earlier_1rj)
  same_brk = key_br[:, :, None] == jnp.arange(images, dtype=jnp.int32)[None, None]
  return (
    jnp.sum(same_brk, axis=1, dtype=jnp.int32), jnp.sum(before_brj, axis=-1, dtype=jnp.int32)
  )  # fmt: skip


def _before(count_bk: jax.Array) -> jax.Array:
  return jnp.cumsum(count_bk, axis=1) - count_bk


def _take(x_bk: jax.Array, index_bt: jax.Array) -> jax.Array:
  number_k = jnp.arange(x_bk.shape[1], dtype=jnp.int32)[None, None]
  chosen_btk = jnp.where(index_bt[:, :, None] == number_k, x_bk[:, None, :], 0)
  return jnp.sum(chosen_btk, axis=-1, dtype=jnp.int32)


def _box_of_rank(rank_br: jax.Array, rank_bt: jax.Array) -> jax.Array:
  number_r = jnp.arange(rank_br.shape[1], dtype=jnp.int32)[None, None]
  chosen_btr = jnp.where(rank_bt[:, :, None] == rank_br[:, None, :], number_r, 0)
  return jnp.sum(chosen_btr, axis=-1, dtype=jnp.int32)


def _up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple

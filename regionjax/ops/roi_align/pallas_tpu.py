"""RoIAlign as one TPU kernel that reads every map once and writes every crop once; its transpose.

One grid step takes one box and one block of channels, with the box's map already in fast memory
(see `pallas_schedule.py`). The rule is separable, and each axis goes where it is cheap. A bin has
only 2S rows with weight, so rows are summed by the vector unit, whatever the map's height; the
columns are one small product per row of bins. The weights are computed from the box in registers
and never stored. Sums are float32; columns are multiplied in the features' dtype, float32 exactly.

Axes: B rows, K images of a row, R boxes, H and W cells, P and Q bins, C channels, T steps; z
stripes of all K images of a row, h rows of a stripe.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from regionjax.ops.roi_align import pallas_schedule as plan
from regionjax.ops.roi_align.placement import on_mesh
from regionjax.ops.roi_align.sampling import Boxes, locate

# Most rows of bins that are unrolled: the compiler then overlaps one's sums with another's product.
# Bundles per row, on v5e and forward: 59 against 116 in a loop for a 16x16x1024 map, 101 against
# 145 for 128x128x256.
UNROLLED = 16


class Case(NamedTuple):
  """The static side of one call."""

  shape: tuple[int, int, int, int, int]  # of the features
  dtype: jnp.dtype
  boxes: int
  output_size: tuple[int, int]
  ratio: int
  blocks: plan.Blocks
  interpret: bool

  @property
  def unroll(self) -> int:
    """Rows of bins per turn of the kernel's loop."""
    return 1 if self.interpret or self.output_size[0] > UNROLLED else self.output_size[0]

  @property
  def stripes(self) -> int:
    return self.shape[2] // self.blocks.rows

  @property
  def grid(self) -> tuple[int, int, int]:
    """Rows, blocks of channels, steps."""
    b, k, _, _, c = self.shape
    return b, c // self.blocks.channels, self.boxes + k * self.stripes

  @property
  def cut_shape(self) -> tuple[int, ...]:
    """[B, z, h, W, C]: the features with their rows cut into stripes."""
    b, k, _, w, c = self.shape
    return b, k * self.stripes, self.blocks.rows, w, c


def forward(
  features_bkhwc: jax.Array,
  boxes: Boxes,
  *,
  output_size: tuple[int, int],
  sampling_ratio: int,
  interpret: bool = False,
) -> jax.Array:
  """RoIAlign: [B, R, P, Q, C] in the features' dtype; rows of invalid boxes are zero.

  Args:
    interpret: emulate the kernel with ordinary operations, for tests without a TPU.

  Raises:
    ValueError: the dtype isn't float32 or bfloat16, or a map doesn't fit into fast memory.
  """

  def run(x_bkhwc, boxes):
    case = make_case(
      x_bkhwc.shape, x_bkhwc.dtype, boxes, output_size, sampling_ratio, interpret, forward=True
    )
    schedule = plan.forward_schedule(boxes, images=case.shape[1], stripes=case.stripes)
    call = pl.pallas_call(
      functools.partial(_forward_kernel, case),
      out_shape=jax.ShapeDtypeStruct(
        (*boxes.image_br.shape, *output_size, case.shape[-1]), case.dtype
      ),
      grid_spec=forward_grid(case),
      **_options(case),
    )
    return call(*scalars(schedule, boxes), x_bkhwc.reshape(case.cut_shape))

  return on_mesh(run, features_bkhwc, boxes)


def backward(
  cotangent_brpqc: jax.Array,
  boxes: Boxes,
  features: jax.ShapeDtypeStruct,
  *,
  output_size: tuple[int, int],
  sampling_ratio: int,
  interpret: bool = False,
) -> jax.Array:
  """The transpose of `forward`, the gradient to features [B, K, H, W, C].

  The cotangent of invalid boxes is not read. Raises as `forward`.
  """

  def run(g_brpqc, boxes):
    shape = (g_brpqc.shape[0], *features.shape[1:4], g_brpqc.shape[-1])
    case = make_case(
      shape, features.dtype, boxes, output_size, sampling_ratio, interpret, forward=False
    )
    schedule = plan.backward_schedule(boxes, images=case.shape[1], stripes=case.stripes)
    call = pl.pallas_call(
      functools.partial(_backward_kernel, case),
      out_shape=jax.ShapeDtypeStruct(case.cut_shape, case.dtype),
      grid_spec=backward_grid(case),
      **_options(case),
    )
    return call(*scalars(schedule, boxes), g_brpqc).reshape(case.shape)

  return on_mesh(run, cotangent_brpqc, boxes)


def forward_grid(case: Case) -> pltpu.PrefetchScalarGridSpec:
  """The blocks that each step of `forward` has in fast memory."""
  _, _, h, w, _ = case.shape
  steps, channels = case.grid[2], case.blocks.channels
  return pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=4,
    grid=case.grid,
    in_specs=[pl.BlockSpec((1, 1, case.blocks.rows, w, channels), _stripe_index(steps))],
    out_specs=pl.BlockSpec((1, 1, *case.output_size, channels), _crop_index(steps)),
    scratch_shapes=[pltpu.VMEM((h, w, channels), case.dtype)],
  )


def backward_grid(case: Case) -> pltpu.PrefetchScalarGridSpec:
  """As `forward_grid`, with crops going in and stripes coming out."""
  _, _, h, w, _ = case.shape
  steps, channels = case.grid[2], case.blocks.channels
  return pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=4,
    grid=case.grid,
    in_specs=[pl.BlockSpec((1, 1, *case.output_size, channels), _crop_index(steps))],
    out_specs=pl.BlockSpec((1, 1, case.blocks.rows, w, channels), _stripe_index(steps)),
    scratch_shapes=[pltpu.VMEM((h, w, channels), jnp.float32)],
  )


def _stripe_index(steps):
  return lambda b, c, t, action, stripe, box, xyxy: (b, stripe[b * steps + t], 0, 0, c)


def _crop_index(steps):
  return lambda b, c, t, action, stripe, box, xyxy: (b, box[b * steps + t], 0, 0, c)


def _forward_kernel(case, action_ref, stripe_ref, box_ref, xyxy_ref, stripe, crop, map_hwc):
  (b, t), (p_bins, _), rows = _step(case), case.output_size, case.blocks.rows
  action = action_ref[t]

  @pl.when(action == plan.STRIPE_STEP)
  def _():
    first = (stripe_ref[t] % case.stripes) * rows
    map_hwc[pl.ds(first, rows)] = stripe[0, 0]

  @pl.when(action == plan.EMPTY_STEP)
  def _():
    crop[...] = jnp.zeros_like(crop)

  @pl.when(action == plan.BOX_STEP)
  def _():
    x1, y1, x2, y2 = _corners(xyxy_ref, b * case.boxes + box_ref[t])
    wx_qw = _column_weights(x1, x2, case).astype(case.dtype)

    def row_of_bins(p, _):
      sum_wc = sum(
        map_hwc[y].astype(jnp.float32) * weight for y, weight in _row_taps(y1, y2, p, case)
      )
      crop[0, 0, p] = _product(wx_qw, sum_wc.astype(case.dtype)).astype(case.dtype)

    jax.lax.fori_loop(0, p_bins, row_of_bins, None, unroll=case.unroll)


def _backward_kernel(case, action_ref, stripe_ref, box_ref, xyxy_ref, crop, stripe, sum_hwc):
  (b, t), (p_bins, _), rows = _step(case), case.output_size, case.blocks.rows
  action = action_ref[t]

  @pl.when(action >= plan.FIRST)
  def _():
    sum_hwc[...] = jnp.zeros_like(sum_hwc)

  @pl.when(action % plan.FIRST == plan.BOX_STEP)
  def _():
    x1, y1, x2, y2 = _corners(xyxy_ref, b * case.boxes + box_ref[t])
    wx_wq = _column_weights(x1, x2, case).T.astype(case.dtype)

    def row_of_bins(p, _):
      g_wc = _product(wx_wq, crop[0, 0, p])
      for y, weight in _row_taps(y1, y2, p, case):
        sum_hwc[y] += weight * g_wc

    jax.lax.fori_loop(0, p_bins, row_of_bins, None, unroll=case.unroll)

  @pl.when(action % plan.FIRST == plan.STRIPE_STEP)
  def _():
    first = (stripe_ref[t] % case.stripes) * rows
    stripe[0, 0] = sum_hwc[pl.ds(first, rows)].astype(case.dtype)


def _step(case: Case) -> tuple[jax.Array, jax.Array]:
  """The row of the batch, and the step's place in the flat schedule."""
  b = pl.program_id(0)
  return b, b * case.grid[2] + pl.program_id(2)


def _corners(xyxy_ref, box) -> list[jax.Array]:
  return [xyxy_ref[4 * box + i] for i in range(4)]


def _row_taps(lo, hi, p, case: Case) -> list[tuple[jax.Array, jax.Array]]:
  """The 2S rows that bin `p` reads, and their weights; scalars."""
  h, taps = case.shape[2], []
  for sample in range(case.ratio):
    pos, inside = locate(
      lo, hi, p.astype(jnp.float32), sample, cells=h, bins=case.output_size[0], ratio=case.ratio
    )
    below = pos.astype(jnp.int32)  # the floor: positions are not negative
    above_share = pos - below.astype(jnp.float32)
    share = jnp.where(inside, 1.0 / case.ratio, 0.0)
    taps.append((below, (1.0 - above_share) * share))
    taps.append((jnp.minimum(below + 1, h - 1), above_share * share))
  return taps


def _column_weights(lo, hi, case: Case) -> jax.Array:
  """Bins of a row as weights over the cells: [Q, W] float32."""
  q_bins, w = case.output_size[1], case.shape[3]
  bin_qw = jax.lax.broadcasted_iota(jnp.int32, (q_bins, w), 0).astype(jnp.float32)
  cell_qw = jax.lax.broadcasted_iota(jnp.int32, (q_bins, w), 1).astype(jnp.float32)
  total_qw = jnp.zeros((q_bins, w), jnp.float32)
  for sample in range(case.ratio):
    pos, inside = locate(lo, hi, bin_qw, sample, cells=w, bins=q_bins, ratio=case.ratio)
    total_qw += jnp.where(inside, jnp.maximum(0.0, 1.0 - jnp.abs(pos - cell_qw)), 0.0)
  return total_qw / case.ratio


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  exact = a.dtype == jnp.float32
  precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
  return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def make_case(
  shape, dtype, boxes: Boxes, output_size, ratio: int, interpret: bool = False, *, forward: bool
) -> Case:
  """Raises ValueError where `forward` and `backward` do."""
  if dtype not in plan.DTYPES:
    raise ValueError(
      f"roi_align: implementation='pallas' takes float32 and bfloat16 features, not {dtype}; "
      "convert them, or use 'einsum'"
    )
  choose = plan.forward_blocks if forward else plan.backward_blocks
  blocks = choose(shape, dtype.itemsize, output_size)
  if blocks is None:
    raise ValueError(
      f"roi_align: a {shape[2]}x{shape[3]} map of {dtype} does not fit into the "
      f"{plan.VMEM >> 20} MiB of a TPU core's fast memory that a kernel gets; use "
      "implementation='einsum'"
    )
  return Case(tuple(shape), dtype, boxes.image_br.shape[1], output_size, ratio, blocks, interpret)


def scalars(schedule: plan.Schedule, boxes: Boxes) -> list[jax.Array]:
  """What the kernels take beside the arrays."""
  # Flat, because scalar memory pads the last axis of anything else to 128.
  flat = [x.astype(jnp.int32).reshape(-1) for x in schedule]
  return [*flat, boxes.xyxy_br4.reshape(-1)]


def _options(case: Case) -> dict:
  b, _, _, w, c = case.shape
  p, q = case.output_size
  bins = b * case.boxes * p * c
  parallel, arbitrary = pltpu.PARALLEL, pltpu.ARBITRARY
  return dict(
    name="roi_align",
    interpret=case.interpret,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=(parallel, parallel, arbitrary), vmem_limit_bytes=plan.VMEM
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * bins * w * (2 * case.ratio + q),
      bytes_accessed=(b * case.shape[1] * case.shape[2] * w * c + bins * q) * case.dtype.itemsize,
      transcendentals=0,
    ),
  )

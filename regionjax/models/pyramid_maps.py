"""The maps of GPT4RoI's pyramid, as a function of their weights.

Each hidden state is projected, gets coordinates and is enlarged to its level; then rounds of one
convolution shared by all levels mix every level with its neighbours (arXiv 2307.03601). What is
linear is done on the grid of patches, where it is small: the projection (a 1x1 convolution commutes
with interpolation, whose weights sum to 1), the coordinates (aligned corners keep a ramp a ramp),
and for the larger levels the first round's convolution (see `ops.conv.conv2d_enlarged`). At the
published size that is 1.68 instead of 2.1 TFLOP per image, and the same values.

Axes: B rows, K images of a row, I images, H and W cells, Y and X cells of a larger map, C channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from regionjax.mesh import BATCH_AXES
from regionjax.ops import norms
from regionjax.ops.conv import Enlarged, conv2d, conv2d_enlarged, enlarged_pays
from regionjax.ops.resize import align_corners_matrix, interpolate, resize_align_corners
from regionjax.partition.activations import constrain, mesh_sizes, row_shards

Array = jax.Array

# On a mesh maps are split by channel: RoIAlign and GroupNorm then need no other device's.
MAPS = ("batch", None, None, "tensor")

# PyTorch's defaults, which the original trained with; Flax's own epsilon is 1e-6.
EPSILON = 1e-5

# FLOPs of an image's maps from which images are computed one by one, those without regions not at
# all. 0.5 ms of a v5e: smaller ones gain more from being many.
WORTH_SKIPPING = 1e11


class Sizes(NamedTuple):
  """What is static.

  Attributes:
    grid: patches (per column, per row).
    upsample: the levels' multiples of the grid, finest first.
    groups: of GroupNorm.
    dtype: of the computation (norm statistics and resizing stay float32).
    remat: 'none', or anything else to recompute each round in the backward pass.
  """

  grid: tuple[int, int]
  upsample: tuple[int, ...]
  groups: int
  dtype: jnp.dtype
  remat: str

  @property
  def levels(self) -> list[tuple[int, int]]:
    return [(self.grid[0] * m, self.grid[1] * m) for m in self.upsample]


class MapWeights(NamedTuple):
  """Parameters, float32.

  Attributes:
    inputs: for each level (kernel [1, 1, C + 2, F], bias [F]); the last two inputs are x and y.
    rounds: for each round (kernel [3, 3, F, F], norm's scale [F], norm's bias [F]).
  """

  inputs: tuple[tuple[Array, Array], ...]
  rounds: tuple[tuple[Array, Array, Array], ...]


def neighbours(level: int, count: int) -> tuple[int, int]:
  """The next coarser and the next finer level; at the ends of the pyramid the level itself."""
  return min(level + 1, count - 1), max(level - 1, 0)


def fused_maps(weights: MapWeights, hidden: Sequence[Array], sizes: Sizes) -> list[Array]:
  """Patch tokens on their grid, one [I, h, w, C] per level, to fused levels [I, H_l, W_l, F]."""
  small = [_project(*kernel, x, sizes.dtype) for kernel, x in zip(weights.inputs, hidden)]
  if not weights.rounds:
    return [resize_align_corners(x, size) for x, size in zip(small, sizes.levels)]
  levels = small
  for i, round_weights in enumerate(weights.rounds):
    step = functools.partial(_shuffle, sizes=sizes, first=i == 0)
    if sizes.remat != "none":
      step = jax.checkpoint(step)
    levels = step(round_weights, levels)
  return levels


def _project(kernel_11cf: Array, bias_f: Array, x_ihwc: Array, dtype: jnp.dtype) -> Array:
  """Append x and y in [-1, 1] and convolve 1x1, on the grid of patches: [I, h, w, F]."""
  channels, (height, width) = x_ihwc.shape[-1], x_ihwc.shape[1:3]
  kernel_cf = kernel_11cf[0, 0]
  y_ihwf = jnp.einsum("ihwc,cf->ihwf", x_ihwc.astype(dtype), kernel_cf[:channels].astype(dtype))
  x_wf = jnp.linspace(-1.0, 1.0, width)[:, None] * kernel_cf[channels][None, :]
  y_hf = jnp.linspace(-1.0, 1.0, height)[:, None] * kernel_cf[channels + 1][None, :]
  place_hwf = x_wf[None, :, :] + y_hf[:, None, :] + bias_f[None, None, :]
  return constrain(y_ihwf + place_hwf[None].astype(dtype), *MAPS)


def _shuffle(
  weights: tuple[Array, Array, Array], levels: list[Array], *, sizes: Sizes, first: bool
) -> list[Array]:
  """One round of scale shuffle: every level takes a quarter of its channels from either neighbour.

  Level l keeps its first half; the last quarter of the next coarser one and the third quarter of
  the next finer one are resized to it. All levels read the round's input and share one 3x3
  convolution, GroupNorm and ReLU.

  Args:
    weights: of the round.
    levels: the round's input; in the first round not enlarged yet.
    sizes: of the pyramid.
    first: whether this is the first round.
  """
  kernel, scale, bias = weights
  if first:  # it is cut into input channels there: gathered whole, not each cut for itself
    kernel = constrain(kernel, None, None, None, "tensor")
  out = []
  for l in range(len(levels)):
    y_ihwc = _first_mix(kernel, levels, l, sizes) if first else _mix(kernel, levels, l)
    y_ihwc = constrain(y_ihwc, *MAPS)
    y_ihwc = norms.group_norm(y_ihwc, scale, bias, groups=sizes.groups, eps=EPSILON)
    out.append(constrain(jax.nn.relu(y_ihwc), *MAPS))
  return out


def _shares(width: int, level: int, count: int) -> list[tuple[int, slice]]:
  """Which channels of which levels a level's convolution reads, in its order."""
  coarser, finer = neighbours(level, count)
  half, three_quarters = width // 2, width // 4 * 3
  return [
    (level, slice(0, half)), (coarser, slice(three_quarters, None)),
    (finer, slice(half, three_quarters)),
  ]  # fmt: skip


def _mix(kernel: Array, levels: list[Array], level: int) -> Array:
  size = levels[level].shape[1:3]
  shares = _shares(levels[0].shape[-1], level, len(levels))
  parts = [resize_align_corners(levels[m][..., channels], size) for m, channels in shares]
  return conv2d(constrain(jnp.concatenate(parts, axis=-1), "batch"), kernel)


def _first_mix(kernel: Array, small: list[Array], level: int, sizes: Sizes) -> Array:
  """`_mix` of the enlarged levels, from what they are enlarged from."""
  target = sizes.levels[level]
  parts = []
  for m, channels in _shares(small[0].shape[-1], level, len(small)):
    # Enlarged to its own level, then resized to this one.
    matrices = [
      align_corners_matrix(between, after) @ align_corners_matrix(before, between)
      for before, between, after in zip(sizes.grid, sizes.levels[m], target)
    ]
    parts.append(Enlarged(constrain(small[m][..., channels], "batch"), *matrices))
  sources = [part.x_bhwc.shape[1:] for part in parts]
  if enlarged_pays(sources, target, kernel.shape[-1]):
    return conv2d_enlarged(parts, kernel)
  return conv2d(jnp.concatenate([interpolate(*part) for part in parts], axis=-1), kernel)


def maps_where_used(
  weights: MapWeights, hidden: Sequence[Array], used_bk: Array, sizes: Sizes
) -> list[Array]:
  """`fused_maps` of the images that are used, zeros for the others, which cost nothing.

  For where `skipping_pays`.

  Images run one after the other, each behind a condition, and on a mesh every device goes through
  its own rows. The backward pass computes an image's maps anew (with all that is kept inside them),
  so that memory holds the inside of one image only, however many there are.

  Args:
    weights: the parameters; on a mesh they are gathered once and their gradients added up once.
    hidden: one [B, K, h, w, C] per level.
    used_bk: bool, which images some region refers to.
    sizes: of the pyramid.

  Returns:
    One [B, K, H_l, W_l, F] per level.
  """
  inner = sizes._replace(remat="none")

  def local(weights: MapWeights, hidden: list[Array], used_bk: Array) -> list[Array]:
    b, k = used_bk.shape

    def compute(images: list[Array]) -> list[Array]:
      return [y[0] for y in fused_maps(weights, [x[None] for x in images], inner)]

    def skip(images: list[Array]) -> list[Array]:
      return [jnp.zeros(y.shape, y.dtype) for y in jax.eval_shape(compute, images)]

    # Twice checkpointed: outside, so that the loop keeps an image's inputs only and not what a
    # condition hands on (copies of the weights among it); inside, so that an unused image's
    # condition has nothing to hand on.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def image(images: list[Array], used: Array) -> list[Array]:
      return jax.lax.cond(used, jax.checkpoint(compute), skip, images)

    flat = [x.reshape(b * k, *x.shape[2:]) for x in hidden]
    with jax.named_scope("images_one_by_one"):
      _, out = jax.lax.scan(lambda _, xs: (None, image(*xs)), None, (flat, used_bk.reshape(-1)))
    return [y.reshape(b, k, *y.shape[1:]) for y in out]

  if row_shards(len(used_bk)) == 1:
    return local(weights, list(hidden), used_bk)
  rows = PartitionSpec(BATCH_AXES)
  return jax.shard_map(
    local,
    in_specs=(PartitionSpec(), rows, rows),
    out_specs=rows,
    axis_names=set(BATCH_AXES),
    check_vma=False,
  )(weights, list(hidden), used_bk)


def skipping_pays(width: int, rounds: int, sizes: Sizes, rows: int) -> bool:
  """Whether `maps_where_used` is the better way for a batch of `rows`.

  Not without remat, which it implies, not where the mesh can't split the rows, and not where the
  devices of different rows would talk inside an image: with channels split over `tensor` the
  compiler exchanges among all devices at once, and one whose image is unused waits forever.
  """
  flops = 18.0 * width**2 * rounds * sum(h * w for h, w in sizes.levels)
  mesh = mesh_sizes()
  splits = math.prod(mesh.get(axis, 1) for axis in BATCH_AXES)
  apart = splits == 1 or (rows % splits == 0 and mesh["tensor"] == 1)
  return sizes.remat != "none" and flops >= WORTH_SKIPPING and apart

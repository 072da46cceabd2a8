"""The light region encoder: pooled patch features and an MLP.

A region is described by what stands in the bins of its enclosing box (RoIAlign: where things are),
by the mean of the patches it covers (which pixels are meant: a mask differs from its box), and by
its coordinates and kind. Points, boxes and masks take the same path: a point is a box without
area, its cover is the bilinear weights of that point, and its bins read a window around it.

Axes: B rows, K images of a row, R regions, N patches, H and W patches per column and row, C
channels, D the decoder's width.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from regionjax.config import RegionConfig
from regionjax.models.leaves import Kernel, Scale
from regionjax.ops import mlp, norms
from regionjax.ops.roi_align import roi_align
from regionjax.partition.activations import constrain

KINDS = 4  # 0 padding, 1 point, 2 box, 3 mask: the values of Batch.region_kind_br
POINT = 1
EPSILON = 1e-5


def cover_mean(patches_bknc: jax.Array, cover_brn: jax.Array, image_br: jax.Array) -> jax.Array:
  """Mean of an image's patches weighted by how much of each a region covers.

  Args:
    patches_bknc: [B, K, N, C].
    cover_brn: [B, R, N], not negative; need not sum to 1.
    image_br: [B, R] int32, the image of each region.

  Returns:
    [B, R, C] in the patches' dtype; zeros where nothing is covered.
  """
  k = patches_bknc.shape[1]
  total_br1 = jnp.sum(cover_brn, axis=-1, keepdims=True)
  weight_brn = cover_brn / jnp.where(total_br1 > 0, total_br1, 1.0)
  owner_brk = jax.nn.one_hot(image_br, k, dtype=weight_brn.dtype)
  weight_brkn = owner_brk[..., None] * weight_brn[:, :, None, :]
  return jnp.einsum("brkn,bknc->brc", weight_brkn.astype(patches_bknc.dtype), patches_bknc)


def bin_boxes(boxes_br4: jax.Array, kind_br: jax.Array, point_window: float) -> jax.Array:
  """The boxes whose bins are read, [B, R, 4]: around a point a window, else the region's own box.

  Args:
    boxes_br4: normalised xyxy.
    kind_br: int32, 1 point.
    point_window: side of a point's window, share of the image's sides.
  """
  half = point_window / 2
  around_4 = jnp.array([-half, -half, half, half], boxes_br4.dtype)
  return boxes_br4 + jnp.where((kind_br == POINT)[..., None], around_4, 0.0)


Weights = tuple[jax.Array, jax.Array | None]


def _two_layers(x: jax.Array, hidden: Weights, output: Weights) -> jax.Array:
  hidden_brf = jax.nn.relu(mlp.linear(x, *hidden))
  return mlp.linear(constrain(hidden_brf, "batch", None, "tensor"), *output)


class PoolEncoder(nn.Module):
  """RoIAlign bins and the mean of the covered patches, through one hidden layer.

  Attributes:
    config: `layers` (several hidden states are normalised and concatenated), `width` of the hidden
      layer, `output_size`, `sampling_ratio`, `position_width`, `point_window`.
    in_width: C, the vision encoder's channels.
    out_width: D.
    grid: patches (per column, per row).
    dtype: of the computation; parameters are float32.
    remat: unused, there is nothing worth recomputing.
  """

  config: RegionConfig
  in_width: int
  out_width: int
  grid: tuple[int, int]
  dtype: jnp.dtype = jnp.float32
  remat: str = "none"

  def setup(self) -> None:
    c = self.config
    channels = self.in_width * len(c.layers)
    self.norms = [
      Scale(self.in_width, use_bias=True, name=f"norm_{i}") for i in range(len(c.layers))
    ]
    # The output layers start at the decoder's embedding scale, so that a slot begins as one more
    # token among others; ReLU because its cost on a CPU is a third of GELU's.
    self.hidden = Kernel((channels * (c.output_size**2 + 1), c.width), use_bias=True)
    self.output = Kernel((c.width, self.out_width), use_bias=True, stddev=0.02)
    self.position_hidden = Kernel((4 + KINDS, c.position_width), use_bias=True)
    self.position_output = Kernel((c.position_width, self.out_width), use_bias=True, stddev=0.02)

  def maps(self, hidden: Sequence[jax.Array], used_bk: jax.Array | None = None) -> jax.Array:
    """Hidden states, each [B, K, N, C], normalised and concatenated: [B, K, N, C * layers].

    It costs next to nothing, for images that no region lies in (`used_bk` false) too.
    """
    del used_bk
    normed = [
      norms.layer_norm(x.astype(self.dtype), *scale(), eps=EPSILON)
      for scale, x in zip(self.norms, hidden)
    ]
    return constrain(jnp.concatenate(normed, axis=-1), "batch")

  def read(
    self,
    maps: jax.Array,
    boxes_br4: jax.Array,
    box_image_br: jax.Array,
    region_kind_br: jax.Array,
    region_mask_br: jax.Array,
    region_cover_brn: jax.Array,
  ) -> jax.Array:
    """One vector per region: [B, R, D], zeros where `region_mask_br` is false.

    Args:
      maps: what `maps` gave, [B, K, N, C].
      boxes_br4: float32 normalised xyxy; a point is a box without area.
      box_image_br: int32, the image of each region.
      region_kind_br: int32, 1 point, 2 box, 3 mask.
      region_mask_br: bool, which regions exist.
      region_cover_brn: float32 in [0, 1], share of each patch that is covered.
    """
    c = self.config
    b, k, _, channels = maps.shape
    r = boxes_br4.shape[1]
    valid_br = region_mask_br & jnp.all(jnp.isfinite(boxes_br4), axis=-1)
    mask_br1 = valid_br[..., None]
    boxes_br4 = jnp.where(mask_br1, boxes_br4, 0.0)
    bins_brpqc = roi_align(
      maps.reshape(b, k, *self.grid, channels),
      bin_boxes(boxes_br4, region_kind_br, c.point_window),
      output_size=c.output_size,
      sampling_ratio=c.sampling_ratio,
      box_image=box_image_br,
      valid=valid_br,
    )
    mean_brc = cover_mean(maps, jnp.where(mask_br1, region_cover_brn, 0.0), box_image_br)
    x_brx = jnp.concatenate([bins_brpqc.reshape(b, r, -1), mean_brc], axis=-1)
    kind_brk = jax.nn.one_hot(region_kind_br, KINDS, dtype=jnp.float32)
    place_brp = jnp.concatenate([boxes_br4, kind_brk], axis=-1).astype(self.dtype)
    x_brd = _two_layers(x_brx, self.hidden(), self.output())
    x_brd += _two_layers(place_brp, self.position_hidden(), self.position_output())
    return constrain(jnp.where(mask_br1, x_brd, jnp.zeros_like(x_brd)), "batch")

  def __call__(
    self,
    hidden: Sequence[jax.Array],
    boxes_br4: jax.Array,
    box_image_br: jax.Array,
    region_kind_br: jax.Array,
    region_mask_br: jax.Array,
    region_cover_brn: jax.Array,
  ) -> jax.Array:
    """`read(maps(hidden), ...)`: [B, R, D]."""
    return self.read(
      self.maps(hidden), boxes_br4, box_image_br, region_kind_br, region_mask_br, region_cover_brn
    )

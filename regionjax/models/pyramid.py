"""GPT4RoI's region encoder: a feature pyramid over four hidden states, RoIAlign on every level.

The maps follow the original exactly (arXiv 2307.03601 and its published weights): upsample each
hidden state, append coordinates, mix neighbouring scales in rounds of one shared convolution, crop
every level to a fixed size, sum, flatten, add a position vector. What the original fixed in its
code is configuration here: widths, grid, number of levels and their sizes, crop size, rounds.

Axes: B rows, K images of a row, I = B*K images, N patches, R regions, H and W cells, P and Q bins,
C channels, T token width, D the decoder's width.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from regionjax.config import RegionConfig
from regionjax.models.leaves import ConvKernel, Kernel, Scale
from regionjax.models.pyramid_maps import (
  EPSILON,
  MapWeights,
  Sizes,
  fused_maps,
  maps_where_used,
  skipping_pays,
)
from regionjax.ops import mlp, norms
from regionjax.ops.conv import conv2d
from regionjax.ops.roi_align import roi_align
from regionjax.partition.activations import constrain


class InputConv(nn.Module):
  """A 1x1 convolution's weights, behind C channels and two coordinates.

  Attributes:
    channels: C.
    features: output width.
  """

  channels: int
  features: int

  @nn.compact
  def __call__(self) -> tuple[jax.Array, jax.Array]:
    """(kernel [1, 1, C + 2, F], bias [F])."""
    # torch's default convolution: uniform with bound 1/sqrt(fan_in), kernel and bias alike.
    uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    bound = (self.channels + 2) ** -0.5
    kernel = self.param("kernel", uniform, (1, 1, self.channels + 2, self.features))
    bias = self.param(
      "bias", lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound),
      (self.features,),
    )  # fmt: skip
    return kernel, bias


class ShuffleRound(nn.Module):
  """The weights of one round of scale shuffle: its convolution's and its norm's.

  Attributes:
    width: channels of the maps.
  """

  width: int

  @nn.compact
  def __call__(self) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(kernel [3, 3, F, F], scale [F], bias [F])."""
    kernel, _ = ConvKernel((3, self.width, self.width), use_bias=False, name="conv")()
    return kernel, *Scale(self.width, use_bias=True, name="norm")()


class PyramidEncoder(nn.Module):
  """The pyramid, the crops and the region token.

  Attributes:
    config: every size of the encoder; `layers` and `upsample` name the levels, finest first.
    in_width: C, the vision encoder's channels.
    out_width: D.
    grid: patches (per column, per row); need not be square.
    dtype: of the computation (norm statistics, resizing and RoI weights stay float32).
    remat: 'none', or anything else to recompute the maps in the backward pass.
  """

  config: RegionConfig
  in_width: int
  out_width: int
  grid: tuple[int, int]
  dtype: jnp.dtype = jnp.float32
  remat: str = "none"

  def setup(self) -> None:
    c = self.config
    if len(c.layers) != len(c.upsample):
      raise ValueError(
        f"region.layers has {len(c.layers)} entries and region.upsample {len(c.upsample)}: "
        "give one multiple of the grid per hidden state"
      )
    if c.width % 4 or c.width % c.groups:
      raise ValueError(
        f"region.width={c.width} must be a multiple of 4 and of region.groups={c.groups}"
      )
    if min(self.grid) < 2:
      raise ValueError(
        f"a grid of {self.grid[0]}x{self.grid[1]} patches: the pyramid lays x and y from edge to "
        "edge and needs two on each side (vision.image_size / vision.patch_size)"
      )
    self.sizes = Sizes(self.grid, c.upsample, c.groups, self.dtype, self.remat)
    self.input_convs = [
      InputConv(self.in_width, c.width, name=f"input_conv_{l}") for l in range(len(c.upsample))
    ]
    self.rounds = [ShuffleRound(c.width, name=f"round_{i}") for i in range(c.rounds)]
    self.crop_convs = [
      ConvKernel((3, c.width, c.width), stddev=0.01, name=f"crop_conv_{l}")
      for l in range(len(c.layers))
    ]

    def dense(before: int, after: int) -> Kernel:
      return Kernel((before, after), use_bias=True, stddev=0.02)

    self.flatten = dense(c.output_size**2 * c.width, c.token_width)
    self.position_0 = dense(4, c.position_width)
    self.position_1 = dense(c.position_width, c.token_width)
    self.position_norm_0 = Scale(c.position_width, use_bias=True)
    self.position_norm_1 = Scale(c.token_width, use_bias=True)
    self.output = dense(c.token_width, self.out_width)

  def maps(self, hidden: Sequence[jax.Array], used_bk: jax.Array | None = None) -> list[jax.Array]:
    """Hidden states, each [B, K, N, C], to fused levels [B, K, H_l, W_l, width], finest first.

    Args:
      hidden: one array per level.
      used_bk: bool, the images that regions will be read from, where that is known: the others'
        maps are then unspecified, and not computed where that pays (see `pyramid_maps`).
    """
    b, k = hidden[0].shape[:2]
    weights = MapWeights(
      tuple(conv() for conv in self.input_convs), tuple(shuffle() for shuffle in self.rounds)
    )
    grids = [x.reshape(b, k, *self.grid, x.shape[-1]) for x in hidden]
    c = self.config
    if used_bk is not None and skipping_pays(c.width, c.rounds, self.sizes, b):
      return maps_where_used(weights, grids, used_bk, self.sizes)
    levels = fused_maps(weights, [x.reshape(b * k, *x.shape[2:]) for x in grids], self.sizes)
    return [x.reshape(b, k, *x.shape[1:]) for x in levels]

  def crop_tokens(
    self, maps: list[jax.Array], boxes_br4: jax.Array, box_image_br: jax.Array, valid_br: jax.Array
  ) -> jax.Array:
    """The crops of all levels, convolved, summed and flattened: [B, R, T], without positions."""
    c = self.config
    b, r = boxes_br4.shape[:2]
    sum_xpqc = 0.0
    for level_bkhwc, conv in zip(maps, self.crop_convs):
      crop_brpqc = roi_align(
        level_bkhwc,
        boxes_br4,
        output_size=c.output_size,
        sampling_ratio=c.sampling_ratio,
        box_image=box_image_br,
        valid=valid_br,
      )
      crop_brpqc = constrain(crop_brpqc, "batch", None, None, None, "tensor")
      sum_xpqc += conv2d(crop_brpqc.reshape(b * r, *crop_brpqc.shape[2:]), *conv())
    crops_brx = jax.nn.relu(constrain(sum_xpqc, "batch")).reshape(b, r, -1)
    return constrain(mlp.linear(crops_brx, *self.flatten()), "batch", None, "tensor")

  def read(
    self,
    maps: list[jax.Array],
    boxes_br4: jax.Array,
    box_image_br: jax.Array,
    region_kind_br: jax.Array,
    region_mask_br: jax.Array,
    region_cover_brn: jax.Array,
  ) -> jax.Array:
    """One vector per region: [B, R, D], zeros where `region_mask_br` is false.

    The original knows boxes only: kind and cover are taken for the interface's sake and not read.

    Args:
      maps: what `maps` gave.
      boxes_br4: float32 normalised xyxy.
      box_image_br: int32, the image of each region.
      region_kind_br: int32, not read.
      region_mask_br: bool, which regions exist.
      region_cover_brn: not read.
    """
    del region_kind_br, region_cover_brn
    valid_br = region_mask_br & jnp.all(jnp.isfinite(boxes_br4), axis=-1)
    boxes_br4 = jnp.where(valid_br[..., None], boxes_br4, 0.0)
    tokens_brt = self.crop_tokens(maps, boxes_br4, box_image_br, valid_br)
    place_brt = boxes_br4.astype(self.dtype)
    for kernel, norm in (
      (self.position_0, self.position_norm_0), (self.position_1, self.position_norm_1)
    ):  # fmt: skip
      place_brt = jax.nn.relu(mlp.linear(place_brt, *kernel()))
      place_brt = norms.layer_norm(place_brt, *norm(), eps=EPSILON)
    out_brd = mlp.linear(tokens_brt + place_brt, *self.output())
    return constrain(jnp.where(valid_br[..., None], out_brd, jnp.zeros_like(out_brd)), "batch")

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

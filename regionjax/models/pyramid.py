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
from regionjax.ops import mlp, norms
from regionjax.ops.conv import conv2d
from regionjax.ops.resize import resize_align_corners
from regionjax.ops.roi_align import roi_align

# PyTorch's defaults, which the original trained with; Flax's own epsilon is 1e-6.
EPSILON = 1e-5


class CoordConv(nn.Module):
  """Upsample, append x and y in [-1, 1], convolve 1x1: in an order that costs 1/64 as much.

  A 1x1 convolution commutes with bilinear interpolation (whose weights sum to 1), so the features
  are projected on the patch grid and only then upsampled: for the 128x128 level of a 16x16 grid
  that is 0.5 instead of 34 GFLOP. The coordinates' share is added at full size.
  """

  channels: int
  features: int
  size_hw: tuple[int, int]
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_ihwc: jax.Array) -> jax.Array:
    channels = self.channels
    # torch's default convolution: uniform with bound 1/sqrt(fan_in), kernel and bias alike.
    uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    bound = (channels + 2) ** -0.5
    kernel = self.param("kernel", uniform, (1, 1, channels + 2, self.features))
    bias = self.param(
      "bias", lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound),
      (self.features,),
    )  # fmt: skip
    kernel_cf = kernel[0, 0].astype(self.dtype)
    y_ihwf = jnp.einsum("ihwc,cf->ihwf", x_ihwc.astype(self.dtype), kernel_cf[:channels])
    y_ihwf = resize_align_corners(y_ihwf, self.size_hw)
    height, width = self.size_hw
    x_wf = jnp.linspace(-1.0, 1.0, width)[:, None] * kernel[0, 0, channels][None, :]
    y_hf = jnp.linspace(-1.0, 1.0, height)[:, None] * kernel[0, 0, channels + 1][None, :]
    place_hwf = x_wf[None, :, :] + y_hf[:, None, :] + bias[None, None, :]
    return y_ihwf + place_hwf[None].astype(self.dtype)


class ShuffleRound(nn.Module):
  """One round of scale shuffle: every level takes a quarter of its channels from either neighbour.

  Level l keeps its first half; the third quarter of the next finer level and the last quarter of
  the next coarser one are resized to it (at the ends of the pyramid the level is its own
  neighbour). All levels read the round's input and share one 3x3 convolution, GroupNorm and ReLU.
  """

  width: int
  groups: int

  @nn.compact
  def __call__(self, levels: list[jax.Array]) -> list[jax.Array]:
    kernel, _ = ConvKernel((3, self.width, self.width), use_bias=False, name="conv")()
    scale, bias = Scale(self.width, use_bias=True, name="norm")()
    half, three_quarters = self.width // 2, self.width // 4 * 3
    out = []
    for l, own_ihwc in enumerate(levels):
      size_hw = own_ihwc.shape[1:3]
      coarser = levels[min(l + 1, len(levels) - 1)][..., three_quarters:]
      finer = levels[max(l - 1, 0)][..., half:three_quarters]
      mixed_ihwc = jnp.concatenate(
        [
          own_ihwc[..., :half],
          resize_align_corners(coarser, size_hw),
          resize_align_corners(finer, size_hw),
        ],
        axis=-1,
      )
      y_ihwc = conv2d(mixed_ihwc, kernel)
      y_ihwc = norms.group_norm(y_ihwc, scale, bias, groups=self.groups, eps=EPSILON)
      out.append(jax.nn.relu(y_ihwc))
    return out


class PyramidEncoder(nn.Module):
  """The pyramid, the crops and the region token.

  Attributes:
    config: every size of the encoder; `layers` and `upsample` name the levels, finest first.
    in_width: C, the vision encoder's channels.
    out_width: D.
    grid: patches (per column, per row); need not be square.
    dtype: of the computation (norm statistics, resizing and RoI weights stay float32).
    remat: 'none', or anything else to recompute the shuffle rounds in the backward pass.
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
    gh, gw = self.grid
    round_type = ShuffleRound if self.remat == "none" else nn.remat(ShuffleRound)
    self.input_convs = [
      CoordConv(self.in_width, c.width, (gh * m, gw * m), self.dtype, name=f"input_conv_{l}")
      for l, m in enumerate(c.upsample)
    ]
    self.rounds = [round_type(c.width, c.groups, name=f"round_{i}") for i in range(c.rounds)]
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

  def maps(self, hidden: Sequence[jax.Array]) -> list[jax.Array]:
    """Hidden states, each [B, K, N, C], to fused levels [B, K, H_l, W_l, width], finest first."""
    b, k = hidden[0].shape[:2]
    levels = [
      conv(x.reshape(b * k, *self.grid, x.shape[-1])) for conv, x in zip(self.input_convs, hidden)
    ]
    for shuffle in self.rounds:
      levels = shuffle(levels)
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
      sum_xpqc += conv2d(crop_brpqc.reshape(b * r, *crop_brpqc.shape[2:]), *conv())
    return mlp.linear(jax.nn.relu(sum_xpqc).reshape(b, r, -1), *self.flatten())

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
    return jnp.where(valid_br[..., None], out_brd, jnp.zeros_like(out_brd))

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

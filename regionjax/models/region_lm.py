"""The whole model: vision encoder, connector, region encoder, splice, decoder.

Axes: b rows, k images of a row, h w pixels, n patches of an image, c ViT channels, r region slots
of a row, t tokens, d decoder channels, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from regionjax.config import ConfigError, ConnectorConfig, ModelConfig
from regionjax.models.decoder import Cache, Decoder
from regionjax.models.leaves import Kernel
from regionjax.models.region_encoders import make_region_encoder
from regionjax.models.vit import VisionTransformer
from regionjax.ops import mlp, tokens
from regionjax.partition.activations import constrain

Array = jax.Array


class ImageFeatures(NamedTuple):
  """What is computed once per image and reused over turns and regions.

  Attributes:
    tokens_bknd: [B, K, N, D] image tokens (N after merging); None without images.
    maps: what the region encoder reads; None without images or without region features.
  """

  tokens_bknd: Array | None
  maps: Any


class Connector(nn.Module):
  """ViT channels to decoder channels: one linear map, or two with a GELU between (LLaVA-1.5).

  Attributes:
    config: kind, and how many patches share a token.
    out_width: D, the decoder's channels.
  """

  config: ConnectorConfig
  out_width: int

  @nn.compact
  def __call__(self, x_bkhwc: Array) -> Array:
    """[B, K, H, W, C] to [B, K, H * W / merge^2, D]."""
    x_bknc = tokens.merge_patches(x_bkhwc, self.config.merge)
    c, d = x_bknc.shape[-1], self.out_width
    if self.config.kind == "linear":
      return mlp.linear(x_bknc, *Kernel((c, d), use_bias=True, name="linear")())
    if self.config.kind != "mlp":
      raise ConfigError(f"connector.kind={self.config.kind!r}: expected linear or mlp")
    x_bknd = mlp.linear(x_bknc, *Kernel((c, d), use_bias=True, name="linear1")())
    x_bknd = constrain(mlp.activation("gelu")(x_bknd), "batch", None, None, "tensor")
    return mlp.linear(x_bknd, *Kernel((d, d), use_bias=True, name="linear2")())


def region_layers(config: ModelConfig) -> tuple[int, ...]:
  """Indices into the ViT's hidden states that the region encoder reads, all counted from 0.

  Raises:
    ConfigError: an index that the ViT does not have.
  """
  if config.region.features is None:
    return ()
  count = config.vision.layers + 1
  for layer in config.region.layers:
    if not -count <= layer < count:
      raise ConfigError(
        f"region.layers holds {layer}, but the vision encoder has hidden states 0 to {count - 1}"
      )
  return tuple(layer % count for layer in config.region.layers)


def images_used(box_image_br: Array, region_mask_br: Array, images: int) -> Array:
  """Which of a row's images some region lies in: bool [B, K].

  Args:
    box_image_br: int32, the image of each region.
    region_mask_br: bool, which regions exist.
    images: K.
  """
  lies_brk = box_image_br[:, :, None] == jnp.arange(images)[None, None, :]
  return jnp.any(lies_brk & region_mask_br[:, :, None], axis=1)


def vision_depth(config: ModelConfig) -> int:
  """Vision blocks that something reads: for the image tokens or for the regions."""
  return max(config.vision.blocks_used, *region_layers(config), 0)


class RegionLM(nn.Module):
  """Tokens, images and regions to logits; a pure function of (params, batch).

  Attributes:
    config: sizes, kinds, compute dtype, remat policy.
    image_slot_id: the tokenizer's id of an image patch's slot, -1 if it has none.
    region_slot_id: the tokenizer's id of a region's slot, -1 if it has none.
  """

  config: ModelConfig
  image_slot_id: int = -1
  region_slot_id: int = -1

  def setup(self) -> None:
    cfg = self.config
    dtype = jnp.dtype(cfg.compute_dtype)
    run = dict(dtype=dtype, scan_layers=cfg.scan_layers, remat=cfg.remat)
    self.vision = VisionTransformer(cfg.vision, depth=vision_depth(cfg), **run)
    self.connector = Connector(cfg.connector, cfg.decoder.width)
    self.regions = make_region_encoder(cfg)
    self.decoder = Decoder(cfg.decoder, **run)

  def __call__(self, batch: Mapping[str, Array]) -> Array:
    """Logits of a packed batch, [B, T, V] f32.

    Args:
      batch: the arrays of `data.schema.Batch`; targets, weights and answer ids are not read.
    """
    return self.logits(self.hidden(batch))

  def logits(self, x_btd: Array) -> Array:
    """The output layer alone, [B, T, D] to [B, T, V] f32; see `params.head_params`."""
    return self.decoder.logits(x_btd)

  def hidden(self, batch: Mapping[str, Array]) -> Array:
    """What the output layer reads of a packed batch, [B, T, D]."""
    images_bkhwc = batch["images_bkhwc"]
    used_bk = images_used(batch["box_image_br"], batch["region_mask_br"], images_bkhwc.shape[1])
    features = self.encode_images(images_bkhwc, used_bk)
    regions_brd = self.encode_regions(
      features.maps,
      batch["boxes_br4"],
      batch["box_image_br"],
      batch["region_kind_br"],
      batch["region_mask_br"],
      batch["region_cover_brn"],
    )
    x_btd = self.splice(batch["tokens_bt"], features.tokens_bknd, regions_brd)
    x_btd, _ = self.decoder(
      x_btd, positions_bt=batch["positions_bt"], segment_ids_bt=batch["segment_ids_bt"]
    )
    return x_btd

  def encode_images(self, images_bkhwc: Array, used_bk: Array | None = None) -> ImageFeatures:
    """Everything that depends on the images alone.

    Args:
      images_bkhwc: [B, K, H, W, 3] normalised; K may be 0.
      used_bk: bool, the images that regions will be read from, where that is known already: maps of
        the others need not be computed.

    Returns:
      Image tokens after the connector, and the maps that regions are read from.

    Raises:
      ValueError: images of another size than the config's, in a model with region features.
    """
    b, k = images_bkhwc.shape[:2]
    if k == 0:
      return ImageFeatures(None, None)
    if self.regions is not None and images_bkhwc.shape[2:4] != self.config.vision.image_hw:
      raise ValueError(
        f"images of {images_bkhwc.shape[2]}x{images_bkhwc.shape[3]} pixels (height x width), but "
        f"the region encoder was made for {self.config.vision.image_size}: resize the images, or "
        "the model with models.params.resize_images"
      )
    hidden = self.vision(images_bkhwc.reshape(b * k, *images_bkhwc.shape[2:]))

    def patches(layer: int) -> Array:
      x = hidden[layer][:, 1:]
      return x.reshape(b, k, *x.shape[1:])

    last_bknc = patches(self.config.vision.blocks_used)
    patch = self.config.vision.patch_size
    grid = (images_bkhwc.shape[2] // patch, images_bkhwc.shape[3] // patch)
    tokens_bknd = self.connector(last_bknc.reshape(b, k, *grid, last_bknc.shape[-1]))
    tokens_bknd = constrain(tokens_bknd, "batch")
    maps = None
    if self.regions is not None:
      maps = self.regions.maps([patches(layer) for layer in region_layers(self.config)], used_bk)
    return ImageFeatures(tokens_bknd, maps)

  def encode_regions(
    self,
    maps: Any,
    boxes_br4: Array,
    box_image_br: Array,
    region_kind_br: Array,
    region_mask_br: Array,
    region_cover_brn: Array,
  ) -> Array | None:
    """Region features [B, R, D], zeros where the mask is False; None when the model has none."""
    if self.regions is None or maps is None:
      return None
    return self.regions.read(
      maps, boxes_br4, box_image_br, region_kind_br, region_mask_br, region_cover_brn
    )

  def splice(
    self, tokens_bt: Array, image_tokens_bknd: Array | None, regions_brd: Array | None
  ) -> Array:
    """Token embeddings with the slots filled, in order of appearance.

    Args:
      tokens_bt: [B, T] int32.
      image_tokens_bknd: [B, K, N, D]; the row's images in the order of their slots. None or K = 0
        leaves the slots' own embeddings.
      regions_brd: [B, R, D]; likewise.

    Returns:
      [B, T, D] in the compute dtype.
    """
    x_btd = self.decoder.embed(tokens_bt)
    if image_tokens_bknd is not None:
      b, k, n, d = image_tokens_bknd.shape
      flat_bmd = image_tokens_bknd.reshape(b, k * n, d)
      x_btd = tokens.fill_slots(x_btd, tokens_bt == self.image_slot_id, flat_bmd)
    if regions_brd is not None:
      x_btd = tokens.fill_slots(x_btd, tokens_bt == self.region_slot_id, regions_brd)
    return constrain(x_btd, "batch")

  def decode(
    self,
    x_btd: Array,
    positions_bt: Array,
    segment_ids_bt: Array,
    cache: Cache | None = None,
    *,
    logits_at_b: Array | None = None,
  ) -> tuple[Array, Cache | None]:
    """Spliced embeddings to logits, with or without a cache (see `Decoder.__call__`).

    Args:
      x_btd: [B, T, D].
      positions_bt: [B, T] int32.
      segment_ids_bt: [B, T] int32, 0 is padding.
      cache: what came before.
      logits_at_b: [B] int32; when given, only this token of each row gets logits: a prefill wants
        the last one, and logits of a whole prompt cost T times as much.

    Returns:
      (logits [B, T, V] or [B, 1, V] f32, cache).
    """
    x_btd, cache = self.decoder(
      x_btd, positions_bt=positions_bt, segment_ids_bt=segment_ids_bt, cache=cache
    )
    if logits_at_b is not None:
      x_btd = jnp.take_along_axis(x_btd, logits_at_b[:, None, None], axis=1)
    return self.decoder.logits(x_btd), cache

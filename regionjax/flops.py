"""Model FLOPs of one example, by formula: what MFU and scaling laws divide by.

Counted are multiplications and additions of matrix products and convolutions, two per pair.
Causal attention counts half the square. Norms, softmax, activations, recomputation (remat) and
padding are not counted. Resizing and RoIAlign are counted as the separable products they are
written as, and so is the pyramid's first round, whose convolutions mostly run on the small grid of
patches (1.68 TFLOP per image at the published size; 2.1 in the original's order). A 3x3
convolution counts 9 products, also where Winograd's way makes do with 2.25 (on a CPU).

A forward pass costs a product once. Training adds one more for the gradient of its weights, where
they are trained, and one for the gradient of its input, where something before it is trained: 6
FLOPs per weight and token in all where everything trains, 2 in a frozen vision encoder, 4 in a
frozen decoder behind a trained connector or with LoRA (whose own weights cost 6).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax

from regionjax.config import ConfigError, DecoderConfig, ModelConfig, RegionConfig
from regionjax.models.pyramid_maps import neighbours
from regionjax.ops.conv import enlarged_flops, enlarged_pays


class Work(NamedTuple):
  """Forward FLOPs of a part, by what training adds to them.

  Attributes:
    first: products of weights with what comes from the part before.
    inner: products of weights with activations made by this part's own weights.
    fixed: products of those activations with constants (resizing, RoIAlign).
    paired: products of such activations with each other (attention).
  """

  first: float = 0.0
  inner: float = 0.0
  fixed: float = 0.0
  paired: float = 0.0

  @property
  def forward(self) -> float:
    return sum(self)

  def training(self, *, trained: bool, upstream: bool) -> float:
    """FLOPs of the forward and backward pass.

    Args:
      trained: whether the part's weights are.
      upstream: whether anything that feeds the part is.
    """
    through = trained or upstream
    return (
      self.first * (1 + trained + upstream)
      + self.inner * (1 + trained + through)
      + self.fixed * (1 + through)
      + self.paired * (1 + 2 * through)
    )


def flops_per_example(
  config: ModelConfig,
  *,
  tokens: float,
  images: float,
  regions: float,
  region_images: float | None = None,
  training: bool = True,
  trainable: Sequence[str] | None = None,
) -> float:
  """FLOPs of one example: forward, or forward and backward.

  Args:
    config: the model.
    tokens: in the decoder, image and region slots included; a mean over examples may be fractional.
    images: in the example.
    regions: region slots filled with features; without effect when the model has no such features.
    region_images: images that some region lies in; the pyramid's maps of the others need not be
      computed. None takes all of them.
    training: whether to count the backward pass.
    trainable: regexes on whole parameter paths ('connector/.*'), as in `TrainConfig.trainable`;
      None means that everything is trained.

  Raises:
    ConfigError: a malformed regex.
  """
  parts = flops_by_part(
    config, tokens=tokens, images=images, regions=regions, region_images=region_images,
    training=training, trainable=trainable,
  )  # fmt: skip
  return sum(parts.values())


def flops_by_part(
  config: ModelConfig,
  *,
  tokens: float,
  images: float,
  regions: float,
  region_images: float | None = None,
  training: bool = True,
  trainable: Sequence[str] | None = None,
) -> dict[str, float]:
  """As `flops_per_example`, by part.

  Parts: 'vision', 'connector', 'regions', 'decoder', 'lora' (the low-rank updates in the decoder;
  0 without them) and 'head'.
  """
  work = {
    "vision": _scaled(_vision(config), images),
    "connector": _scaled(_connector(config), images),
    "regions": _regions(config, images if region_images is None else region_images, regions),
    "decoder": _decoder(config.decoder, tokens),
    "lora": Work(inner=2.0 * tokens * _lora_weights(config.decoder)),
    "head": Work(first=2.0 * tokens * config.decoder.width * config.decoder.vocab_size),
  }
  if not training:
    return {part: w.forward for part, w in work.items()}
  trained = _trained_parts(config, tuple(trainable or (".*",)))
  seen = "vision" in trained
  features = seen or "connector" in trained or "regions" in trained or "embed" in trained
  # A gradient that reaches an update in one layer has passed the frozen maps of all layers above.
  inside = features or "decoder" in trained or "lora" in trained
  upstream = {
    "vision": False,
    "connector": seen,
    "regions": seen,
    "decoder": inside,
    "lora": inside,
    "head": inside,
  }
  return {
    part: w.training(trained=part in trained, upstream=upstream[part]) for part, w in work.items()
  }


def _scaled(work: Work, factor: float) -> Work:
  return Work(*(factor * value for value in work))


def _vision(config: ModelConfig) -> Work:
  """One image through the blocks that run."""
  from regionjax.models.region_lm import vision_depth

  v = config.vision
  depth, n = vision_depth(config), v.tokens + 1
  h, w = v.image_hw
  embed = [  # the stem's convolutions and the patches' linear map, in order
    2.0 * (h // 2**i) * (w // 2**i) * 9 * before * after
    for i, (before, after) in enumerate(zip((3, *v.stem), v.stem), start=1)
  ]
  embed.append(2.0 * v.tokens * (v.stem[-1] if v.stem else 3 * v.patch_size**2) * v.width)
  return Work(
    first=embed[0],
    inner=sum(embed[1:]) + 2.0 * n * depth * (4 * v.width**2 + 2 * v.width * v.mlp_width),
    paired=4.0 * n**2 * depth * v.width,
  )


def _connector(config: ModelConfig) -> Work:
  """One image."""
  n, d = config.image_tokens, config.decoder.width
  c = config.vision.width * config.connector.merge**2
  return Work(first=2.0 * n * c * d, inner=2.0 * n * d * d * (config.connector.kind == "mlp"))


def _regions(config: ModelConfig, images: float, regions: float) -> Work:
  kind = config.region.features
  if kind == "pool":
    return _scaled(_pool_region(config), regions)
  if kind == "pyramid":
    per_image, per_region = _pyramid_image(config), _scaled(_pyramid_region(config), regions)
    return Work(*(a + b for a, b in zip(_scaled(per_image, images), per_region)))
  return Work()


def _pool_region(config: ModelConfig) -> Work:
  r, d = config.region, config.decoder.width
  gh, gw = config.vision.grid
  channels = config.vision.width * len(r.layers)
  pooled = channels * (r.output_size**2 + 1)  # the bins, and the mean of the covered patches
  return Work(
    # The norm in front of the hidden layer is trained with it: its input gradient is needed.
    inner=2.0 * (pooled * r.width + r.width * d + r.position_width * d),
    first=2.0 * 8 * r.position_width,  # 4 coordinates and 4 kinds
    fixed=2.0 * gh * gw * channels + _roi_align(r, gh, gw, channels),
  )


def _roi_align(r: RegionConfig, height: int, width: int, channels: int) -> float:
  p = r.output_size
  return 2.0 * p * width * channels * (height + p)


def _resize(source: tuple[int, int], target: tuple[int, int], channels: int) -> float:
  """Both axes as dense products, the one that shrinks most (or grows least) first."""
  (h, w), (th, tw) = source, target
  rows_first = 2.0 * channels * (h * th * w * (h != th) + th * w * tw * (w != tw))
  columns_first = 2.0 * channels * (h * w * tw * (w != tw) + h * th * tw * (h != th))
  return rows_first if th / h <= tw / w else columns_first


def _levels(config: ModelConfig) -> list[tuple[int, int]]:
  gh, gw = config.vision.grid
  return [(gh * m, gw * m) for m in config.region.upsample]


def _pyramid_image(config: ModelConfig) -> Work:
  r, levels = config.region, _levels(config)
  cells = sum(h * w for h, w in levels)
  quarter = r.width // 4
  shuffles = 0.0
  for l, size in enumerate(levels):
    for m in neighbours(l, len(levels)):
      shuffles += _resize(levels[m], size, quarter)
  later = max(r.rounds - 1, 0)
  inner, fixed = _first_round(config) if r.rounds else (0.0, 0.0)
  if not r.rounds:
    fixed = sum(_resize(config.vision.grid, size, r.width) for size in levels)
  return Work(
    first=2.0 * len(levels) * config.vision.tokens * config.vision.width * r.width,
    inner=inner + 2.0 * 9 * later * r.width**2 * cells,
    fixed=fixed + later * shuffles,
  )


def _first_round(config: ModelConfig) -> tuple[float, float]:
  """Products with weights and with constants, as `models.pyramid_maps` computes that round."""
  r, grid, levels = config.region, config.vision.grid, _levels(config)
  products = constants = 0.0
  for l, size in enumerate(levels):
    shares = zip((l, *neighbours(l, len(levels))), (r.width // 2, r.width // 4, r.width // 4))
    sources = [(m, (*grid, channels)) for m, channels in shares]
    if enlarged_pays([source for _, source in sources], size, r.width):
      with_weights, enlarging = enlarged_flops([source for _, source in sources], size, r.width)
      products += with_weights
      constants += enlarging
      continue
    products += 2.0 * 9 * r.width**2 * size[0] * size[1]
    for m, (h, w, channels) in sources:
      if not grid == levels[m] == size:
        # Both axes also where the size is the same: then it was enlarged and shrunk again.
        constants += 2.0 * channels * (h * size[0] * w + size[0] * w * size[1])
  return products, constants


def _pyramid_region(config: ModelConfig) -> Work:
  r, levels, bins = config.region, _levels(config), config.region.output_size**2
  position = r.position_width * r.token_width
  return Work(
    first=2.0 * 4 * r.position_width,
    inner=2.0 * 9 * r.width**2 * bins * len(levels)
    + 2.0 * (bins * r.width * r.token_width + position + r.token_width * config.decoder.width),
    fixed=sum(_roi_align(r, h, w, r.width) for h, w in levels),
  )


def _decoder(d: DecoderConfig, tokens: float) -> Work:
  weights = sum(fan_in * fan_out for fan_in, fan_out in _maps(d).values())
  return Work(
    inner=2.0 * tokens * d.layers * weights,
    paired=4.0 * (tokens**2 / 2) * d.layers * d.heads * d.head_dim,
  )


def _maps(d: DecoderConfig) -> dict[str, tuple[int, int]]:
  """Input and output width of a layer's linear maps, by name."""
  queries, keys, hidden = d.heads * d.head_dim, d.kv_heads * d.head_dim, d.mlp_width
  return {
    "q": (d.width, queries), "k": (d.width, keys), "v": (d.width, keys), "o": (queries, d.width),
    "gate": (d.width, hidden), "up": (d.width, hidden), "down": (hidden, d.width),
  }  # fmt: skip


def _lora_weights(d: DecoderConfig) -> int:
  """Weights of all low-rank updates."""
  sides = sum(sum(widths) for name, widths in _maps(d).items() if d.lora.adapts(name))
  return d.layers * d.lora.rank * sides


@functools.lru_cache(maxsize=32)
def _trained_parts(config: ModelConfig, patterns: tuple[str, ...]) -> frozenset[str]:
  """Parts of `flops_by_part`, and 'embed', that have a path which some pattern matches."""
  if ".*" in patterns:
    return frozenset(("vision", "connector", "regions", "embed", "decoder", "lora", "head"))
  from regionjax.models.lora import LEAVES
  from regionjax.models.params import param_shapes

  try:
    compiled = [re.compile(pattern) for pattern in patterns]
  except re.error as error:
    raise ConfigError(f"trainable={patterns}: not a regex ({error})") from error
  parts: set[str] = set()
  for keys, _ in jax.tree_util.tree_flatten_with_path(param_shapes(config))[0]:
    names = [key.key for key in keys]
    if any(c.fullmatch("/".join(names)) for c in compiled):
      part = names[0]
      if part == "decoder" and names[1] in ("embed", "head"):
        part = names[1]
      elif names[-1] in LEAVES:
        part = "lora"
      parts.add(part)
  if config.decoder.tie_embeddings and "embed" in parts:
    parts.add("head")
  return frozenset(parts)

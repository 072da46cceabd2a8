"""A model that two CPU cores train from scratch, and the family of sizes around it.

  regionjax train configs/tiny.py --workdir runs/tiny
  regionjax train configs/tiny.py:scale=0.5,region=text,seed=1 --workdir runs/small-text

Arguments: `scale` multiplies every width (0.25, 0.5, 1, 2, 4; depth grows by its cube root),
`region` is one of regionjax.config.REGION_KINDS, `seed` seeds the initialisation and the data,
`steps` is the length of the run. The learning rate falls as 1/sqrt(scale).
"""

import dataclasses

from ml_collections import ConfigDict

from regionjax.config import (
  Config,
  ConfigError,
  DataConfig,
  DecoderConfig,
  ModelConfig,
  PromptConfig,
  SourceConfig,
  TrainConfig,
  VisionConfig,
  to_dict,
)
from regionjax.config_files import parse_arg


def model(scale: float, region: str) -> ModelConfig:
  """The tiny preset with its widths multiplied by `scale`, by more or fewer heads as a rule."""
  if not 0 < scale <= 16:
    raise ConfigError(f"scale={scale}: expected a factor between 0 and 16, e.g. 0.5")
  base = ModelConfig.tiny(region)
  if scale == 1:
    return base

  def scaled(value: float) -> int:
    return max(8, round(value * scale / 8) * 8)

  def depth(value: int) -> int:
    return max(1, round(value * scale ** (1 / 3)))

  def heads_of(count: int) -> int:
    return max(1, round(count * scale))

  vision, decoder, encoder = base.vision, base.decoder, base.region
  seeing, heads = heads_of(vision.heads), heads_of(decoder.heads)
  head_dim = scaled(decoder.width / heads)
  layers = depth(vision.layers)
  if encoder.features:
    encoder = dataclasses.replace(
      encoder,
      layers=tuple(round(k * layers / vision.layers) for k in encoder.layers),
      width=scaled(encoder.width),
      position_width=scaled(encoder.position_width),
      token_width=scaled(encoder.token_width),
    )
  return dataclasses.replace(
    base,
    name=f"tiny_x{scale:g}",
    vision=VisionConfig.tiny(
      width=seeing * scaled(vision.width / seeing),
      layers=layers,
      heads=seeing,
      mlp_width=scaled(vision.mlp_width),
      stem=tuple(scaled(channels) for channels in vision.stem),
    ),
    decoder=DecoderConfig.tiny(
      width=heads * head_dim,
      layers=depth(decoder.layers),
      heads=heads,
      kv_heads=heads,
      head_dim=head_dim,
      mlp_width=scaled(decoder.mlp_width),
    ),
    region=encoder,
  )


def data(region: str, seed: int) -> DataConfig:
  """One scene and its dialogue a row; a row is as long as the way of naming regions needs.

  Coordinates as text make a dialogue about 2.5 times as long as slots do.
  """
  written = region.endswith("text")
  return DataConfig(
    sources=(SourceConfig("scenes", args={"seed": seed, "turns": (8, 12)}),),
    rows=16,
    tokens_per_row=512 if written else 192,
    images_per_row=1,
    regions_per_row=20,
    packing_bins=16,
    seed=seed,
  )


def get_config(arg: str | None = None) -> ConfigDict:
  options = parse_arg(arg, {"scale": 1.0, "region": "pool", "seed": 0, "steps": 1000})
  config = Config(
    name=f"tiny_x{options.scale:g}_{options.region.replace('+', '_')}_s{options.seed}",
    model=model(options.scale, options.region),
    prompt=PromptConfig(template="plain", mention="slot", coordinates="unit2", max_vertices=5),
    data=data(options.region, options.seed),
    train=TrainConfig(
      steps=options.steps, seed=options.seed, learning_rate=1e-3 / options.scale**0.5
    ),
  )
  return ConfigDict(to_dict(config))

"""Region tuning of LLaVA-1.5: it learns to read regions from features, on boxes of yours.

  regionjax convert --from hf-llava llava-1.5-7b-hf --to runs/llava
  regionjax train configs/llava_regions.py:annotations=boxes.json,images=photos --workdir runs/one
  regionjax train configs/llava_regions.py:stage=2,start=runs/one/release,annotations=... \\
      --workdir runs/two
  regionjax chat photos/cat.jpg --box 40,30,210,180 --checkpoint runs/two/release

As in GPT4RoI, stage 1 trains the region encoder alone and stage 2 everything but the vision tower.

Arguments: `base` is the converted LLaVA, `start` the release to go on from (default: the base);
`region` is pool or pyramid (GPT4RoI's, 299 M parameters for the 7B model); `annotations` and
`images` are a COCO-format file and its folder; `steps`, `rows` (packed rows of 2,048 tokens in the
global batch), `seed`.

Images are squeezed to LLaVA's square, not cropped to it as its own processor does: a crop would cut
regions away.
"""

import dataclasses

from ml_collections import ConfigDict

from regionjax.config import (
  Config,
  ConfigError,
  DataConfig,
  ModelConfig,
  RegionConfig,
  SourceConfig,
  TrainConfig,
  to_dict,
)
from regionjax.config_files import parse_arg
from regionjax.tokenizer import load_tokenizer
from regionjax.weights import release

SLOT = ("<bbox>",)  # takes one of the rows that pad LLaVA's token tables
TRAINABLE = {1: ("regions/.*",), 2: ("regions/.*", "connector/.*", "decoder/.*")}


def model_with_regions(base: ModelConfig, region: str, tokens: int) -> ModelConfig:
  """LLaVA with a region encoder that reads the hidden states up to the image tokens' own."""
  if region not in ("pool", "pyramid"):
    raise ConfigError(f"region={region}: expected pool or pyramid")
  used = base.vision.blocks_used
  levels = (3, 2, 1, 0) if region == "pyramid" else (0,)
  layers = tuple(max(used - 3 * i, 0) for i in levels)
  decoder = dataclasses.replace(base.decoder, vocab_size=max(base.decoder.vocab_size, tokens))
  config = RegionConfig(kind=region, layers=layers)
  if region == "pool":
    config = dataclasses.replace(config, output_size=7, width=2 * base.vision.width)
  return dataclasses.replace(base, region=config, decoder=decoder, remat="full")


def get_config(arg: str | None = None) -> ConfigDict:
  options = parse_arg(
    arg,
    {
      "base": "runs/llava", "start": "", "stage": 1, "region": "pyramid", "annotations": "",
      "images": "", "steps": 2000, "rows": 8, "seed": 0,
    },
  )  # fmt: skip
  if options.stage not in TRAINABLE:
    raise ConfigError(f"stage={options.stage}: expected 1 or 2")
  if not (options.annotations and options.images):
    raise ConfigError(
      "configs/llava_regions.py needs a file and its folder: "
      "configs/llava_regions.py:annotations=boxes.json,images=photos"
    )
  base = release.load_config(release.find(options.base))
  tokenizer = load_tokenizer(options.base, SLOT)
  model = model_with_regions(base.model, options.region, tokenizer.vocab_size)
  files = {"annotations": options.annotations, "images": options.images}
  config = Config(
    name=f"llava_{options.region}_stage{options.stage}",
    model=model,
    prompt=dataclasses.replace(
      base.prompt, tokenizer=options.base, added_tokens=SLOT, mention="name+slot",
    ),
    data=DataConfig(
      sources=(SourceConfig("coco", args=files),),
      resize="chatspot",
      rows=options.rows,
      tokens_per_row=model.decoder.max_length,
      images_per_row=max(1, model.decoder.max_length // (model.image_tokens + 64)),
      regions_per_row=48,
      seed=options.seed,
    ),
    train=TrainConfig(
      steps=options.steps,
      seed=options.seed,
      trainable=TRAINABLE[options.stage],
      init_from=options.start or options.base,
      learning_rate=1e-3 if options.stage == 1 else 2e-5,
      warmup_steps=min(100, options.steps // 10),
      save_every=500,
      eval_every=500,
    ),
  )  # fmt: skip
  return ConfigDict(to_dict(config))

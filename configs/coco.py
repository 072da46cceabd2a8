"""From a trained model to your own boxes: any COCO-format file and its folder of images.

  regionjax train configs/coco.py:annotations=boxes.json,images=photos --workdir runs/mine
  regionjax chat photos/cat.jpg --box 40,30,210,180 --ask "What is <region1>?" \\
      --checkpoint runs/mine/release

Arguments: `annotations` and `images`; `text` is category, caption or auto (the caption where a box
has one); `strict=true` makes every defect of the file an error instead of a count in a report;
`init` is the release to start from (the model that ships with the package); `steps`.
"""

import dataclasses

from ml_collections import ConfigDict

from regionjax.config import ConfigError, SourceConfig, TrainConfig, to_dict
from regionjax.config_files import parse_arg
from regionjax.weights import release


def get_config(arg: str | None = None) -> ConfigDict:
  options = parse_arg(
    arg,
    {
      "annotations": "", "images": "", "text": "auto", "strict": False, "init": "tiny",
      "steps": 200, "seed": 0,
    },
  )  # fmt: skip
  if not (options.annotations and options.images):
    raise ConfigError(
      "configs/coco.py needs a file and its folder: "
      "configs/coco.py:annotations=boxes.json,images=photos"
    )
  base = release.load_config(release.find(options.init))
  source = SourceConfig(
    "coco",
    args={
      "annotations": options.annotations,
      "images": options.images,
      "text": options.text,
      "strict": options.strict,
    },
  )
  config = dataclasses.replace(
    base,
    name="coco",
    # Captions are longer than scenes' answers: half as many rows, twice as long.
    data=dataclasses.replace(
      base.data, sources=(source,), seed=options.seed, rows=8, tokens_per_row=384,
      images_per_row=2, regions_per_row=24,
    ),
    train=TrainConfig(
      steps=options.steps, seed=options.seed, init_from=options.init, learning_rate=3e-3,
      warmup_steps=10, eval_every=50, eval_examples=64, save_every=100,
    ),
  )  # fmt: skip
  return ConfigDict(to_dict(config))

"""GPT4RoI-13B: a region is one token, made of RoI features from four levels of a pyramid.

  regionjax compile configs/gpt4roi_13b.py:stage2 --topology v5p:4x4x4 --rows-per-chip 2
  regionjax train configs/gpt4roi_13b.py:stage1 --workdir runs/one
  regionjax train configs/gpt4roi_13b.py:stage2,start=runs/one/release --workdir runs/two

Stage 1 trains the region encoder alone, stage 2 everything but the vision tower. `compile` needs
nothing on disk; `train` reads the data sets of `regionjax.config.recipes` and a start.

Arguments, behind the stage: `tokenizer` is a folder with LLaMA's vocabulary, `start` the release to
start from (by default the same folder), `data` the folder of the data sets, `rows` the packed rows
of 2,048 tokens in the global batch, `seed`.
"""

from ml_collections import ConfigDict

from regionjax.config import Config, recipes, to_dict
from regionjax.config_files import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
  stage, _, rest = (arg or "stage2").partition(",")
  folder = "runs/gpt4roi_13b-start"
  options = parse_arg(
    rest, {"tokenizer": folder, "start": folder, "data": "data", "rows": 128, "seed": 0}
  )
  config = recipes.with_stage(
    Config.gpt4roi_13b(options.tokenizer), recipes.GPT4ROI, stage,
    data=options.data, start=options.start, rows=options.rows, seed=options.seed,
  )  # fmt: skip
  return ConfigDict(to_dict(config))

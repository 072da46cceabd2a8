"""ChatSpot-7B: a region is its coordinates, written into the prompt as text.

  regionjax compile configs/chatspot_7b.py:stage2 --topology v5e:8x8 --rows-per-chip 2
  regionjax train configs/chatspot_7b.py:stage1 --workdir runs/one
  regionjax train configs/chatspot_7b.py:stage2,start=runs/one/release --workdir runs/two

Stage 1 trains the connector alone, stage 2 the language model too. `compile` needs nothing on disk;
`train` reads the data sets of `regionjax.config.recipes` and a start. ChatSpot's own dialogues
about regions (RegionChat) were never published.

Arguments, behind the stage: `tokenizer` is a folder with LLaMA's vocabulary, `start` the release to
start from (by default the same folder), `data` the folder of the data sets, `rows` the packed rows
of 2,048 tokens in the global batch, `seed`.
"""

from ml_collections import ConfigDict

from regionjax.config import Config, recipes, to_dict
from regionjax.config_files import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
  stage, _, rest = (arg or "stage2").partition(",")
  folder = "runs/chatspot_7b-start"
  options = parse_arg(
    rest, {"tokenizer": folder, "start": folder, "data": "data", "rows": 128, "seed": 0}
  )
  config = recipes.with_stage(
    Config.chatspot_7b(options.tokenizer), recipes.CHATSPOT, stage,
    data=options.data, start=options.start, rows=options.rows, seed=options.seed,
  )  # fmt: skip
  return ConfigDict(to_dict(config))

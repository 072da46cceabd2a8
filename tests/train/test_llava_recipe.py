"""configs/llava_regions.py: region tuning from a converted LLaVA, both stages, on photographs."""

import json
from pathlib import Path

import numpy as np
import pytest
from hf_folders import write_llava

import regionjax
from regionjax.cli import main
from regionjax.regions import Region
from regionjax.weights import release

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT / "tests" / "data" / "photos"
RECIPE = ROOT / "configs" / "llava_regions.py"
SMALL = (
  "--data.tokens_per_row=256", "--data.images_per_row=2", "--data.regions_per_row=8",
  "--train.eval_every=0", "--train.log_every=1", "--data.prefetch=1",
)  # fmt: skip
# GPT4RoI's encoder at a size for a test.
PYRAMID = (
  "--model.region.width=16", "--model.region.groups=4", "--model.region.output_size=3",
  "--model.region.position_width=8", "--model.region.token_width=16",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  folder = tmp_path_factory.mktemp("llava")
  write_llava(folder / "hf")
  command = ["convert", "--from", "hf-llava", str(folder / "hf"), "--to", str(folder / "base")]
  assert main(command) == 0
  return folder / "base"


def train(folder, base, *, stage, start=""):
  files = f"annotations={PHOTOS / 'annotations.json'},images={PHOTOS}"
  spec = f"{RECIPE}:base={base},stage={stage},start={start},rows=2,steps=3,{files}"
  assert main(["train", spec, *SMALL, *PYRAMID, "--workdir", str(folder)]) == 0
  return folder / "release"


@pytest.mark.slow
def test_both_stages_train_what_they_say(base, tmp_path):
  first = train(tmp_path / "one", base, stage=1)
  second = train(tmp_path / "two", base, stage=2, start=first)
  before, one, two = (release.flatten(release.load(f)[1]) for f in (base, first, second))
  moved = {
    name: {path.split("/")[0] for path in new if path in old and not equal(old[path], new[path])}
    for name, old, new in (("one", before, one), ("two", one, two))
  }
  assert moved == {"one": set(), "two": {"regions", "connector", "decoder"}}
  assert {path.split("/")[0] for path in one.keys() - before.keys()} == {"regions"}
  losses = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").open()]
  assert all(np.isfinite(row["loss"]) for row in losses if row["kind"] == "train")
  chat = regionjax.load(second)
  photo = sorted(PHOTOS.glob("*.jpg"))[0]
  box = Region.box(0.2, 0.2, 0.6, 0.7)
  assert chat.ask(str(photo), "What is <region1>?", [box], max_new_tokens=4).ids


def equal(a, b):
  """Up to the release's bfloat16."""
  return np.array_equal(np.asarray(a, b.dtype), b)


def test_what_the_recipe_needs(base, capsys):
  assert main(["train", f"{RECIPE}:base={base}", "--workdir", "unused"]) == 2
  assert "needs a file and its folder" in capsys.readouterr().err
  spec = f"{RECIPE}:base={base},region=text,annotations=a,images=b"
  assert main(["train", spec, "--workdir", "unused"]) == 2
  assert "expected pool or pyramid" in capsys.readouterr().err

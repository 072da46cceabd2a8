"""The comparison's table and picture from runs whose figures are known."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compare():
  path = ROOT / "launch" / "compare_regions.py"
  spec = importlib.util.spec_from_file_location("compare_regions", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def write_run(folder: Path, accuracy: float) -> Path:
  """A finished run of 20 steps with one evaluation at step 10 and one at the end."""
  folder.mkdir(parents=True)
  rows = [
    {"kind": "train", "step": s, "loss": 1.0, "examples": 16 * s, "flops": 1e9 * s}
    for s in (1, 10, 20)
  ]
  rows += [
    {
      "kind": "eval", "step": step, "loss": 1.0, "accuracy": value, "by_task": {"name": value},
      "by_reference": {"box": value, "none": 0.0},
    }
    for step, value in ((10, accuracy / 2), (20, accuracy))
  ]  # fmt: skip
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  summary = {
    "accuracy": {
      "accuracy": accuracy, "by_task": {"name": accuracy}, "by_reference": {"box": accuracy},
    },
    "examples": 320, "flops": 2e10, "parameters": {"total": 1000},
  }  # fmt: skip
  (folder / "summary.json").write_text(json.dumps(summary))
  return folder


def test_finished_runs_become_a_table_and_a_picture_without_training_again(compare, tmp_path):
  for kind, base in (("pool", 0.8), ("none", 0.2)):
    for seed in range(2):
      write_run(tmp_path / f"{kind}-s{seed}", base + 0.1 * seed)
  assert compare.main(["--out", str(tmp_path), "--seeds", "2", "--kinds", "pool", "none"]) == 0
  table = (tmp_path / "table.md").read_text()
  assert "| **all questions** | 85.0 ± 7.1 | 25.0 ± 7.1 |" in table
  assert "| asked by box | 85.0 ± 7.1 | 25.0 ± 7.1 |" in table
  cells = json.loads((tmp_path / "results.json").read_text())
  curves = cells["pool"][0]["curves"]
  assert set(curves) == {"all", "name", "by box", "by none"}
  assert curves["by box"] == [[160.0, 1e10, 0.4], [320.0, 2e10, 0.8]]
  for name in ("curves.png", "tasks-1.png"):
    assert min(Image.open(tmp_path / name).size) > 300

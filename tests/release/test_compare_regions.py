"""The comparison of the two papers' ideas at its full size: 15 runs of 8 minutes, resumable.

pytest -m release tests/release/test_compare_regions.py -s 2>&1 | tee tests/release/compare.log
"""

import importlib.util
import json
import warnings
from pathlib import Path

import pytest
from PIL import Image

from regionjax.data.scenes_dialogue import TASKS

ROOT = Path(__file__).parents[2]
KINDS = ("pyramid", "pool", "text", "pool+text", "none")
REFERENCES = ("box", "mask", "none", "point", "polygon")


@pytest.mark.release
def test_the_comparison_is_complete():
  """Every run, row and picture is there; what the figures say is a finding, not a requirement."""
  out = ROOT / "runs" / "compare"  # kept, so that a run that was stopped goes on
  script = ROOT / "launch" / "compare_regions.py"
  spec = importlib.util.spec_from_file_location("compare_regions", script)
  compare = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(compare)
  # In this process, so that Ctrl-C finds who lets the run at hand save.
  assert compare.main(["--minutes", "8", "--seeds", "3", "--out", str(out)]) == 0
  text = (out / "table.md").read_text()
  print("\n" + text)
  for kind in KINDS:
    for seed in range(3):
      summary = json.loads((out / f"{kind.replace('+', '_')}-s{seed}" / "summary.json").read_text())
      assert summary["config"]["model"]["region"]["kind"] == kind
      assert summary["seeds"] == {"train": seed, "data": seed}
  lines = [line for line in text.splitlines() if line.startswith("|")]
  rows = {
    label: cells for label, *cells in ([c.strip() for c in l.split("|")[1:-1]] for l in lines)
  }
  assert rows[""] == ["n", *KINDS]
  measured = ["**all questions**", *TASKS, *(f"asked by {kind}" for kind in REFERENCES)]
  assert set(measured) < set(rows)
  for name in measured:
    n, *cells = rows[name]
    assert int(n) > 0
    assert len(cells) == len(KINDS) and "nan" not in " ".join(cells), (name, cells)
  for name in ("curves.png", "tasks-1.png", "tasks-2.png"):
    assert min(Image.open(out / name).size) > 300

  *ways, none = (float(cell.split("±")[0]) for cell in rows["**all questions**"][1:])
  for kind, value in zip(KINDS, ways):
    if value <= none:
      warnings.warn(f"{kind} ({value} %) does not beat none ({none} %)", stacklevel=1)

"""The comparison of the two papers' ideas at its full size: 15 runs of 8 minutes, resumable.

pytest -m release tests/release/test_compare_regions.py -s 2>&1 | tee tests/release/compare.log
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.release
def test_every_way_of_pointing_beats_none():
  out = ROOT / "runs" / "compare"  # kept, so that a run that was stopped goes on
  script = ROOT / "launch" / "compare_regions.py"
  subprocess.run(
    [sys.executable, str(script), "--minutes", "8", "--seeds", "3", "--out", str(out)], check=True
  )
  row = next(
    line for line in (out / "table.md").read_text().splitlines() if "all questions" in line
  )
  *ways, none = (float(cell.split("±")[0]) for cell in row.split("|")[2:-1])
  assert min(ways) > none

"""From scratch to 90 % on names and attributes within an hour on two cores.

  pytest -m release tests/release/test_tiny_hour.py -s 2>&1 | tee tests/release/tiny_hour.log

Wants a machine with nothing else to do. A run that was stopped goes on.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def regionjax(*words: str) -> None:
  """In a process of its own: how memory is kept is settled before jax starts its threads."""
  subprocess.run([sys.executable, "-m", "regionjax", *words], cwd=ROOT, check=True)


@pytest.mark.release
def test_an_hour_of_training_names_and_describes_unseen_objects(tmp_path):
  workdir, table = ROOT / "runs" / "hour", tmp_path / "results.json"
  regionjax(
    "train", "configs/tiny.py", "--workdir", str(workdir), "--train.stop_after_minutes=58",
    "--train.steps=1000000", "--train.eval_every=1000",
  )  # fmt: skip
  regionjax(
    "evaluate", "--checkpoint", str(workdir / "release"), "--tasks", "name,attribute",
    "-n", "2000", "--json", str(table),
  )  # fmt: skip
  results = json.loads(table.read_text())
  rows = {row["name"]: row for row in (*results["tasks"], *results["references"])}
  assert set(rows) == {"name", "attribute", "box", "point", "polygon", "mask"}
  assert all(row["accuracy"] >= 0.9 for row in rows.values()), rows

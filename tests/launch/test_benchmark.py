"""The benchmark runs, writes its table, and says what is not installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "benchmark.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=900
  )


def test_unknown_case_is_refused():
  result = run("--only", "vit,vae")
  assert result.returncode == 2
  assert "unknown vae; known: roi_align, vit, decoder, region_module" in result.stderr


@pytest.mark.slow
def test_without_an_opponent_ours_is_still_timed(tmp_path):
  empty = tmp_path / "python"
  empty.write_text("#!/bin/sh\nexit 1\n")
  empty.chmod(0o755)
  table = tmp_path / "table.json"
  result = run(
    "--only", "roi_align", "--rounds", "1", "--json", str(table), "--torchvision-python", str(empty)
  )
  assert result.returncode == 0, result.stderr
  assert f"absent: torch does not run in {empty}" in result.stdout
  rows = json.loads(table.read_text())["rows"]
  assert [r["step"] for r in rows] == ["forward", "forward+backward"] * 3
  assert all(r["ours_ms"] > 0 and r["ratio"] is None for r in rows)

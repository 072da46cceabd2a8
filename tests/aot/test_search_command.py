"""`regionjax compile --search` with the real compiler: minutes, so on a model of few operations."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from regionjax import cli
from regionjax.aot import analysis, search
from regionjax.chips import CHIPS
from regionjax.models.leaves import REMAT_POLICIES

ROOT = Path(__file__).parents[2]
CONFIG = """\
import dataclasses
from mesh_cases import eight_heads
from ml_collections import ConfigDict
from regionjax.config import RegionConfig, to_dict

def get_config(arg=None):
  config = eight_heads()
  decoder = dataclasses.replace(config.model.decoder, layers=8, max_length=512)
  model = dataclasses.replace(
    config.model, region=RegionConfig(kind="text"), decoder=decoder, compute_dtype="bfloat16"
  )
  data = dataclasses.replace(config.data, tokens_per_row=256)
  return ConfigDict(to_dict(dataclasses.replace(config, model=model, data=data)))
"""


@pytest.fixture
def words(tmp_path):
  path = tmp_path / "wide.py"
  path.write_text(CONFIG)
  out = str(tmp_path / "out")
  return ["compile", str(path), "--topology", "v5e:2x2", "--search", "--out", out]


@pytest.mark.release
def test_the_largest_batch_is_found_and_not_compiled_twice(words, tmp_path, capsys, monkeypatch):
  chosen = [search.Candidate("full", 1, 4, 1), search.Candidate("none", 1, 4, 1)]
  monkeypatch.setattr(search, "candidates", lambda chips, *, remats: iter(chosen))
  small = dataclasses.replace(CHIPS["v5e"], memory=32e6)  # one row takes about 20 MB
  monkeypatch.setitem(CHIPS, "v5e", small)
  assert cli.main(words) == 0
  first = capsys.readouterr()
  lines = re.findall(
    r"\[\d/2\] remat=(\w+) .* (\d+) rows: ([\d.]+) GiB, (fits|too large)", first.err
  )
  largest = {}
  for remat in ("full", "none"):
    rows = {int(n): verdict for name, n, _, verdict in lines if name == remat}
    largest[remat] = max(n for n, verdict in rows.items() if verdict == "fits")
    assert rows[largest[remat] + 1] == "too large"
    assert all((verdict == "fits") == (n <= largest[remat]) for n, verdict in rows.items())
  assert min(largest.values()) > 1 and max(largest.values()) < search.MAX_ROWS
  table = [line.split() for line in first.out.splitlines() if line.startswith("  remat=")]
  assert {row[0]: int(row[4]) for row in table} == {f"remat={k}": v for k, v in largest.items()}
  assert len(list((tmp_path / "out" / "search").glob("*.json"))) == len(lines)

  def never(*args, **kwargs):
    raise AssertionError("compiled again")

  monkeypatch.setattr(analysis, "measure", never)
  assert cli.main(words) == 0
  assert capsys.readouterr().err.count("(known)") == len(lines)


@pytest.mark.release
def test_ctrl_c_keeps_what_was_compiled(words, tmp_path):
  paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
  environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-m", "regionjax", *words]
  with subprocess.Popen(
    command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  ) as process:
    first = next(line for line in process.stderr if line.startswith("["))
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
  assert process.returncode == 130, rest
  assert f"[1/{2 * len(REMAT_POLICIES)}]" in first and "1 rows" in first
  assert "interrupted; what was compiled is in" in rest and "Traceback" not in rest
  assert len(list((tmp_path / "out" / "search").glob("*.json"))) == 1

import dataclasses
import json
from pathlib import Path

import pytest
from mesh_cases import eight_heads

from regionjax import cli
from regionjax.aot import analysis, command, programs, report, topology
from regionjax.config import RegionConfig
from regionjax.config_files import load_config
from regionjax.flops import flops_per_example

ROOT = Path(__file__).parents[2]
CONFIG = """\
from mesh_cases import eight_heads
from ml_collections import ConfigDict
from regionjax.config import to_dict

def get_config(arg=None):
  return ConfigDict(to_dict(eight_heads()))
"""


@pytest.fixture
def config_file(tmp_path):
  path = tmp_path / "eight.py"
  path.write_text(CONFIG)
  return str(path)


@pytest.fixture(scope="module")
def measured(chips):
  """A training step of a model that reads coordinates, parameters split over four chips."""
  config = eight_heads()
  model = dataclasses.replace(config.model, region=RegionConfig(kind="text"))
  config = dataclasses.replace(config, model=model)
  program = programs.train(config, chips("v5e:2x2", data=1, fsdp=4))
  kept = []
  report_ = analysis.measure(program, topology.parse("v5e:2x2"), keep=kept)
  return report_, config, kept[0].as_text()


@pytest.mark.slow
def test_a_tiny_config_end_to_end(config_file, tmp_path, capsys):
  out = tmp_path / "out"
  words = ["compile", config_file, "--topology", "v5e:2x2", "--mesh", "fsdp=4", "--out", str(out)]
  assert cli.main([*words, "--rows-per-chip", "2", "--text", "--model.remat=full"]) == 0
  shown = capsys.readouterr().out
  assert "eight train on v5e:2x2, fsdp=4" in shown and "fits: 0." in shown
  stem = "eight_train_v5e-2x2_fsdp4_8rows_remat-full"
  assert sorted(p.name for p in out.iterdir()) == [
    f"{stem}.hlo.txt", f"{stem}.json", f"{stem}.png"
  ]  # fmt: skip
  values = json.loads((out / f"{stem}.json").read_text())
  assert values["rows"] == 8 and values["rows_per_chip"] == 2
  assert (out / f"{stem}.png").read_bytes().startswith(b"\x89PNG")


SCHEMA = {
  "schema": int, "config": str, "program": str, "topology": dict, "mesh": dict, "rows": int,
  "rows_per_chip": float, "row": dict, "tokens": int, "remat": str, "accumulate": int,
  "trainable": list, "versions": dict, "warnings": list, "trace_seconds": float,
  "compile_seconds": float, "compile_cpu_seconds": float, "flops": dict, "memory": dict,
  "fits": bool, "hbm_bytes": float,
  "collectives": list, "fsdp": dict, "loops": dict, "time": dict, "mfu": float,
  "mfu_serial": float, "tokens_per_second_per_chip": float,
}  # fmt: skip


def test_the_schema_of_a_report(measured):
  values = json.loads(json.dumps(measured[0].values))
  assert {key: type(value) for key, value in values.items()} == SCHEMA
  assert values["schema"] == report.SCHEMA
  assert set(values["time"]) == {
    "compute", "hbm", "kernels", "ici", "dcn", "step", "serial", "bottleneck", "compiler",
  }  # fmt: skip
  assert set(values["memory"]) >= {"usable", "arguments", "temporaries", "peak", "parts"}
  assert set(values["memory"]["parts"]) == {"trainable", "frozen", "optimiser", "batch"}
  for row in values["collectives"]:
    assert {"kind", "axes", "times", "bytes", "traffic", "ici_seconds", "dcn_seconds"} <= set(row)


def test_what_a_report_says_adds_up(measured):
  found, config, _ = measured
  data = config.data
  row = flops_per_example(
    config.model, tokens=data.tokens_per_row, images=data.images_per_row,
    regions=data.regions_per_row,
  )  # fmt: skip
  assert found["flops"]["model"] == pytest.approx(row * data.rows)
  assert found["flops"]["hardware_over_jaxpr"] == pytest.approx(1, abs=analysis.TOLERANCE)
  memory = found["memory"]
  assert sum(memory["parts"].values()) + memory["padding"] == memory["arguments"]
  assert memory["padding"] >= 0
  assert memory["peak"] == pytest.approx(
    memory["arguments"] + memory["temporaries"] + memory["outputs"] - memory["aliased"]
    + memory["code"]
  )  # fmt: skip
  assert found.fits and found["versions"] == topology.versions("tpu")
  assert all("fsdp" in row["axes"] for row in found["collectives"])


def test_parameters_are_gathered_at_most_twice(measured):
  fsdp = measured[0]["fsdp"]
  assert 0 < fsdp["gathers_most"] <= 2
  assert fsdp["gathers_most_of"].startswith("state.trainable")


@pytest.mark.slow
def test_a_program_that_is_too_large(chips):
  config = eight_heads()
  decoder = dataclasses.replace(
    config.model.decoder, layers=40, width=4096, heads=32, kv_heads=32, head_dim=128,
    mlp_width=16384,
  )  # fmt: skip
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder))
  machine = topology.parse("v5e:2x2")
  found = analysis.measure(programs.train(config, chips("v5e:2x2", data=1, fsdp=4)), machine)
  assert not found.fits and found["memory"]["peak"] > machine.chip.memory
  assert "DOES NOT FIT" in found.table()


def test_decoding(config_file, capsys):
  words = ["compile", config_file, "--topology", "v5e:2x2", "--mesh", "tensor=4"]
  assert cli.main([*words, "--program", "decode", "--rows", "2", "--length", "64"]) == 0
  shown = capsys.readouterr().out
  assert "eight decode on v5e:2x2, tensor=4" in shown and "cache" in shown


def test_the_picture_of_one_that_does_not_fit(tmp_path, measured):
  values = dict(measured[0].values)
  del values["time"]
  values["memory"] = {"usable": 10.0, "peak": 20.0, "parts": {"trainable": 20.0}}
  report.picture(report.Report(values | {"fits": False}), tmp_path / "a.png")
  assert (tmp_path / "a.png").stat().st_size > 5000


@pytest.mark.parametrize(
  "words, says",
  [
    (["--rows-per-chip", "0.3"], "1.2 rows"),
    (["--data.rows=6"], "multiple of 4"),
    (["--mesh", "fsdp=3"], "doesn't fit 4 devices"),
    (["--text"], "--out DIR"),
    (["--search", "--mesh", "fsdp=4"], "--search chooses"),
    (["--search", "--program", "decode"], "training step"),
  ],
)
def test_settings_that_do_not_go_together(words, says, config_file, capsys):
  if not any("mesh" in word for word in words):
    words = ["--train.mesh.fsdp=4", "--train.mesh.data=1", *words]
  assert cli.main(["compile", config_file, "--topology", "v5e:2x2", *words]) == 2
  assert says in capsys.readouterr().err


@pytest.mark.parametrize(
  "text, slices, expected",
  [
    (None, 1, (1, -1, 1)),
    (None, 2, (2, -1, 1)),
    ("fsdp=4", 1, (1, 4, 1)),
    ("fsdp=2", 2, (4, 2, 1)),
    ("tensor=2,fsdp=-1", 2, (2, -1, 2)),
    ("data=2,fsdp=2", 2, (4, 2, 1)),
  ],
)
def test_the_mesh_over_slices(text, slices, expected):
  config = load_config(f"{ROOT}/configs/gpt4roi_7b.py:stage2")
  mesh = command._meshed(config, topology.parse("v5e:2x2", slices), text).train.mesh
  assert (mesh.data, mesh.fsdp, mesh.tensor) == expected and mesh.slices == slices

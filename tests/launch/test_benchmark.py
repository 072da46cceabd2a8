"""The benchmark runs, writes its table, says what is not installed; its twin is a twin."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from regionjax.config import DecoderConfig, ModelConfig, RegionConfig, VisionConfig
from regionjax.models.region_encoders import make_region_encoder
from regionjax.ops.roi_align.reference import roi_align_reference

SCRIPT = Path(__file__).parents[2] / "launch" / "benchmark.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=900
  )


def test_unknown_case_is_refused():
  result = run("--only", "vit,vae")
  assert result.returncode == 2
  assert (
    "unknown vae; known: roi_align, vit, decoder, region_module, training, input" in result.stderr
  )


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


@pytest.mark.slow
def test_a_training_step_is_timed_against_torch_and_profiled(tmp_path):
  table = tmp_path / "table.json"
  result = run("--only", "training", "--rounds", "1", "--json", str(table))
  assert result.returncode == 0, result.stderr
  rows = json.loads(table.read_text())["rows"]
  assert [r["size"].split(", ")[-1] for r in rows] == ["float32", "bfloat16"]
  assert all(r["ratio"] > 0 and 15e6 < r["parameters"] < 25e6 for r in rows), rows
  for low, high in (row["ratio_quartiles"] for row in rows):
    assert 0 < low <= high
  tables = result.stdout.split("where our step's time goes")[1:]
  assert len(tables) == 2
  for table in tables:
    shares = {n: float(x) for n, x in re.findall(r"^ +(\S.*?)  +([\d.]+)%$", table, re.MULTILINE)}
    assert shares["decoder: maps, norms, MLP"] > shares["decoder: attention"] > 2
    assert shares["matrix products"] > 20 and shares["optimiser"] > 0.5
    assert shares["vision encoder"] > 2 and shares["output layer and loss"] > 0.5
    assert shares.get("unnamed", 0) + shares.get("other", 0) < 4


@pytest.mark.slow
def test_photographs_are_counted_per_core_and_against_a_pod(tmp_path):
  compiled = tmp_path / "compiled.json"
  pod = dict(
    config="big", rows=16, row=dict(images=10), time=dict(step=2.0),
    topology=dict(name="v5e:2x2", chips=4),
  )  # fmt: skip
  compiled.write_text(json.dumps(pod))
  table = tmp_path / "table.json"
  result = run(
    "--only", "input", "--rounds", "1", "--json", str(table), "--compiled", str(compiled)
  )
  assert result.returncode == 0, result.stderr
  rows = json.loads(table.read_text())["rows"]
  assert [r["step"] for r in rows] == ["jpeg", "arrayrecord", "text"] * 2
  assert all(r["ours_ms"] > 0 for r in rows) and rows[0]["ratio"] > 0 and rows[1]["ratio"] is None
  assert "160 images in a step of 2.00 s are 80/s, 20.0/s a chip" in result.stdout
  rate = 1e3 * rows[0]["images"] / rows[0]["ours_ms"]
  assert f"{80 / rate:.2f} of 112 for decoding with 4 chips" in result.stdout
  text = 1e3 * rows[2]["images"] / rows[2]["ours_ms"]
  told = f"{80 / text:.2f} of its one thread with data.shards=1; with a shard a host"
  assert f"{told} {80 / text:.3f} with 4 chips" in result.stdout


@pytest.mark.slow
def test_vit_and_decoder_are_timed_against_transformers(tmp_path):
  table = tmp_path / "table.json"
  result = run("--only", "vit,decoder", "--rounds", "1", "--json", str(table))
  assert result.returncode == 0, result.stderr
  rows = json.loads(table.read_text())["rows"]
  assert [(r["case"], r["step"]) for r in rows] == [
    ("vit", "forward"), ("decoder", "prefill"), ("decoder", "prefill+decode"),
  ]  # fmt: skip
  for row in rows:
    assert row["ours_ms"] > 0 and row["theirs_ms"] > 0 and row["ratio"] > 0, row
    assert row["against"].startswith("transformers ")
  _, prompt, whole = rows
  assert prompt["ours_ms"] < whole["ours_ms"] and prompt["theirs_ms"] < whole["theirs_ms"]


def scalar_roi_align(x, boxes, *, bins, ratio):
  """torchvision's rule without torchvision, in torch's layout."""
  out = []
  for index, *box in boxes.numpy():
    map_hwc = x[int(index)].permute(1, 2, 0).numpy()
    box_14 = np.array([box], np.float32) / map_hwc.shape[0]
    out += list(
      roi_align_reference(map_hwc, box_14, output_size=(bins, bins), sampling_ratio=ratio)
    )
  return torch.from_numpy(np.stack(out).astype(np.float32)).permute(0, 3, 1, 2)


def to_torch(params, c: RegionConfig) -> dict:
  """Our region module's parameters under the twin's names, in torch's layouts."""

  def layer(to, ours):
    kernel = np.asarray(ours.get("kernel", ours.get("scale")))
    axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[kernel.ndim]
    state[f"{to}.weight"] = kernel.transpose(axes)
    if "bias" in ours:
      state[f"{to}.bias"] = np.asarray(ours["bias"])

  state: dict = {}
  for l in range(len(c.layers)):
    layer(f"inputs.{l}", params[f"input_conv_{l}"])
    layer(f"crops.{l}", params[f"crop_conv_{l}"])
  for r in range(c.rounds):
    layer(f"rounds.{r}.0", params[f"round_{r}"]["conv"])
    layer(f"rounds.{r}.1", params[f"round_{r}"]["norm"])
  for at, name in (
    (0, "position_0"),
    (2, "position_norm_0"),
    (3, "position_1"),
    (5, "position_norm_1"),
  ):
    layer(f"position.{at}", params[name])
  layer("output", params["output"])
  layer("flatten", params["flatten"])
  bins, out = c.output_size, c.token_width
  kernel = np.asarray(params["flatten"]["kernel"]).reshape(bins, bins, c.width, out)
  state["flatten.weight"] = kernel.transpose(3, 2, 0, 1).reshape(out, -1)  # torch: C before H, W
  return {name: torch.from_numpy(np.array(value, np.float32)) for name, value in state.items()}


def test_the_region_twin_computes_what_our_module_does():
  spec = importlib.util.spec_from_file_location(
    "benchmark_torch", SCRIPT.with_name("benchmark_torch.py")
  )
  twin = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(twin)
  c = RegionConfig(width=16, output_size=3, rounds=2, groups=4, position_width=8, token_width=20)
  grid, channels, out = 4, 12, 24
  rng = np.random.default_rng(0)
  hidden = [rng.standard_normal((1, grid**2, channels), dtype=np.float32) for _ in c.layers]
  boxes = np.array([[0.1, 0.2, 0.7, 0.9], [0, 0, 1, 1], [0.5, 0.4, 0.6, 0.6]], np.float32)
  zeros = jnp.zeros((1, 3), jnp.int32)
  args = (jnp.asarray(boxes)[None], zeros, zeros + 2, zeros == 0, jnp.zeros((1, 3, grid**2)))
  vision = VisionConfig(image_size=8 * grid, patch_size=8, width=channels, heads=1)
  decoder = DecoderConfig.tiny(width=out)
  config = ModelConfig(vision=vision, region=c, decoder=decoder, compute_dtype="float32")
  encoder = make_region_encoder(config)
  ours = [jnp.asarray(x)[None] for x in hidden]
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), ours, *args)["params"]
  params = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)
  expected = np.asarray(jax.jit(encoder.apply)({"params": params}, ours, *args))[0]

  model = twin.RegionModule(
    channels=channels, width=c.width, out=out, grid=grid, upsample=c.upsample, rounds=c.rounds,
    groups=c.groups, bins=c.output_size, ratio=c.sampling_ratio, position=c.position_width,
    token=c.token_width,
  )  # fmt: skip
  model.load_state_dict(to_torch(params, c))  # strict: every parameter has its counterpart
  model.roi_align = scalar_roi_align
  indexed = np.concatenate([np.zeros((3, 1), np.float32), boxes], axis=1)
  with torch.inference_mode():
    theirs = model([torch.from_numpy(x) for x in hidden], torch.from_numpy(indexed)).numpy()
  assert np.max(np.abs(theirs - expected)) < 1e-4 * np.max(np.abs(expected))

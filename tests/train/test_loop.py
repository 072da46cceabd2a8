"""Whole runs of the micro model on scenes: resume, stops, stages, what a run leaves behind."""

import dataclasses
import gzip
import json
import re
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from train_cases import TIMES, Watched, checkpoint, rows_without_times, run, with_train

from regionjax.config import ConfigError, RegionConfig, SourceConfig
from regionjax.mesh import make_mesh
from regionjax.ops.tokens import resize_positions
from regionjax.tokenizer import load_tokenizer
from regionjax.train import workdir as workdirs
from regionjax.train.initial import starting_params
from regionjax.train.lines import read_rows
from regionjax.train.metrics import read_metrics
from regionjax.train.start import create_state, model_functions, start
from regionjax.train.state import flatten_paths
from regionjax.weights import release

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT / "tests" / "data" / "photos"

pytestmark = pytest.mark.usefixtures("compile_once", "no_matmul_timing")


def by_place(arrays):
  """{"['trainable']['a']['b']": leaf} -> {('trainable', 'a', 'b'): leaf}."""
  return {tuple(re.findall(r"\['(\w+)'\]", key)): leaf for key, leaf in arrays.items()}


def tensorboard_scalars(folder):
  """{(name, step): value} of all event files: records of length, checksum, event, checksum."""
  found = {}
  for path in folder.iterdir():
    data, at = path.read_bytes(), 0
    while at < len(data):
      (size,) = struct.unpack_from("<Q", data, at)
      event = Event.FromString(data[at + 12 : at + 12 + size])
      found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
      at += 16 + size
  return found


def start_from(config, folder):
  """What `starting_params` takes from a release for a config, and what it says."""
  config = with_train(config, init_from=str(folder))
  tokenizer = load_tokenizer("tiny")
  said = []
  shapes = jax.eval_shape(model_functions(config, tokenizer)[1], jax.random.key(0))
  return starting_params(config, shapes, tokenizer, log=said.append), said


def test_a_stopped_run_says_how_to_go_on(runs):
  assert not runs["stopped"].finished
  assert runs["stopped"].exit_code == 130
  step = runs["stopped"].step
  assert step == 9, "metrics of step 8 are read while step 9 runs, which is finished"
  assert runs["at_stop"][-1] == step
  assert (
    f"stopped at step {step}, saved; to go on:\n  regionjax train X --workdir Y" in runs["text"]
  )


def test_a_resumed_run_equals_a_straight_one_bit_by_bit(runs):
  assert runs["straight"].finished and runs["resumed"].finished
  folder = runs["folder"]
  arrays, record = checkpoint(folder / "straight", 12)
  again, record_again = checkpoint(folder / "parts", 12)
  assert arrays.keys() == again.keys() and len(arrays) > 60
  for path in arrays:
    assert arrays[path].tobytes() == again[path].tobytes(), path
  assert record["checksum"] == record_again["checksum"]
  assert record["data"] == record_again["data"]
  for ledger in (record["ledger"], record_again["ledger"]):
    for part in (ledger, ledger["evaluation"]):
      for name in TIMES:
        part.pop(name, None)
  assert record["ledger"] == record_again["ledger"]
  assert rows_without_times(folder / "straight") == rows_without_times(folder / "parts")
  weights = [
    (folder / n / "release" / "model.safetensors").read_bytes() for n in ("straight", "parts")
  ]
  assert weights[0] == weights[1]


def test_what_a_run_logs(runs):
  rows = read_metrics(runs["folder"] / "straight" / "metrics.jsonl")
  train = [row for row in rows if row["kind"] == "train"]
  evals = [row for row in rows if row["kind"] == "eval"]
  assert [row["step"] for row in train] == [1, 2, 4, 6, 8, 10, 12]
  assert [row["step"] for row in evals] == [6, 12]
  assert train[-1]["loss"] < train[0]["loss"]
  assert train[-1]["tokens_per_second"] > 0 and 0 <= train[-1]["data_wait"] <= 1
  assert evals[0]["answers"] == 6
  assert set(evals[0]["by_reference"]) <= {"none", "mixed", "box", "point", "polygon", "mask"}
  shown = tensorboard_scalars(runs["folder"] / "straight" / "tensorboard")
  for row in train:
    assert shown["train/loss", row["step"]] == pytest.approx(row["loss"], rel=1e-6)
  for row in evals:
    assert shown["eval/loss", row["step"]] == pytest.approx(row["loss"], rel=1e-6)
    assert shown["eval/accuracy", row["step"]] == pytest.approx(row["accuracy"], rel=1e-6)


def test_the_progress_line(runs):
  lines = [line for line in runs["text"].splitlines() if line.startswith("step 8/12")]
  rows = read_metrics(runs["folder"] / "parts" / "metrics.jsonl")
  (loss,) = (row["loss"] for row in rows if row["kind"] == "train" and row["step"] == 8)
  (line,) = lines
  number, time = r"\d+(\.\d+)?(e[+-]\d+)?[kMG]?", r"\d+(:\d\d)+"
  form = rf"loss {loss:.4f}  {number} tok/s  {number} ex/s  MFU \d+%  ETA {time}"
  assert re.fullmatch(f"step 8/12  67%  {form}", line), line
  assert re.search(r"^step 6: evaluation loss \d+\.\d{4}, exact match ", runs["text"], re.M)


def test_what_a_run_leaves_behind(runs):
  workdir, config = runs["folder"] / "straight", runs["config"]
  summary = json.loads((workdir / "summary.json").read_text())
  assert summary == runs["straight"].summary
  parts = summary["parameters"]
  assert parts["total"] == sum(parts[p] for p in ("vision", "connector", "regions", "decoder"))
  assert summary["steps"] == 12 and summary["flops"] > 0
  assert summary["tokens"]["image"] == summary["images"] * config.model.image_tokens
  assert summary["tokens"]["llm"] > summary["tokens"]["image"] + summary["tokens"]["region"]
  assert summary["versions"]["jax"] == jax.__version__
  assert summary["seeds"] == {"train": config.train.seed, "data": config.data.seed}
  rows = read_metrics(workdir / "metrics.jsonl")
  train = [row for row in rows if row["kind"] == "train"]
  evals = [row for row in rows if row["kind"] == "eval"]
  best = min(evals, key=lambda row: row["loss"])
  assert summary["loss"] == {
    "train": train[-1]["loss"],
    "evaluation": evals[-1]["loss"],
    "best": {"step": best["step"], "loss": best["loss"]},
  }
  if (ROOT / ".git").exists():
    assert re.fullmatch("[0-9a-f]{40}", summary["git"]["hash"])
    assert isinstance(summary["git"]["changed"], bool)
  else:
    assert summary["git"] is None
  assert summary["data"]["rows"] == 12 * config.data.rows and summary["data"]["sources"] == []
  assert (workdir / "curves.png").read_bytes()[:4] == b"\x89PNG"
  assert (workdir / "release" / "README.md").read_text().startswith("# micro\n")
  saved, params, _ = release.load(workdir / "release")
  assert saved == config
  arrays, _ = checkpoint(workdir, 12)
  for path, leaf in flatten_paths(params).items():
    key = "['trainable']" + "".join(f"['{part}']" for part in path.split("/"))
    np.testing.assert_array_equal(leaf, arrays[key].astype(leaf.dtype), err_msg=path)


def test_what_became_of_the_time(runs):
  """The run in two parts: 9 steps, then 3 more."""
  found = json.loads((runs["folder"] / "parts" / "summary.json").read_text())["goodput"]
  assert found["attempts"] == 2 and found["seconds"]["lost"] == 0
  for kind in ("init", "compile", "step", "checkpoint", "evaluation"):
    assert found["seconds"][kind] > 0, kind
  assert sum(found["seconds"].values()) == pytest.approx(found["wall_seconds"])
  assert found["goodput"] == found["seconds"]["step"] / found["wall_seconds"]
  rows = read_rows(runs["folder"] / "parts" / "goodput.jsonl")
  assert [row["step"] for row in rows if row["attempt"] == 1][-1] == 9
  assert next(row["step"] for row in rows if row["attempt"] == 2) == 9
  assert rows[-1]["end"] - rows[0]["end"] >= sum(sum(r["seconds"].values()) for r in rows[1:]) - 0.1
  assert re.search(r"^goodput \d+% of \d+:\d\d \(.*compile \d+%", runs["resumed_text"], re.M)


def traced_steps(folder):
  """Numbers of the steps that a profile has marks of, and names in it."""
  (path,) = folder.rglob("*.trace.json.gz")
  events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
  marks = [event["args"] for event in events if event.get("name") == "train"]
  return sorted({int(args["step_num"]) for args in marks}), {e.get("name", "") for e in events}


@pytest.mark.slow
def test_a_profile_of_some_steps(runs, tmp_path):
  reports = Watched()
  config = with_train(runs["config"], steps=8, eval_every=0, save_every=0)
  run(config, tmp_path, reports, profile=(4, 6))
  steps, names = traced_steps(tmp_path / "profile")
  assert steps == [4, 5, 6]
  assert any("dot" in name for name in names), "what the device did"
  assert f"profile of steps 4 to 6 in {tmp_path / 'profile'}; " in reports.text.getvalue()
  reports = Watched()
  run(config, tmp_path, reports, profile=(4, 6))
  assert "--profile 4:6: none of these steps came; the run is at step 8" in reports.text.getvalue()


def test_a_finished_run_stays_finished(runs):
  reports = Watched()
  outcome = run(runs["config"], runs["folder"] / "straight", reports)
  assert outcome.finished and outcome.step == 12
  assert "done: 12 steps" in reports.text.getvalue()


def test_training_can_start_from_a_release(runs, micro):
  folder = runs["folder"] / "straight" / "release"
  given, said = start_from(micro, folder)
  theirs = flatten_paths(release.load(folder)[1])
  assert flatten_paths(given).keys() == theirs.keys() and said == []
  model = micro.model
  without = dataclasses.replace(model, region=dataclasses.replace(model.region, kind="text"))
  given, said = start_from(dataclasses.replace(micro, model=without), folder)
  assert set(given) == {"vision", "connector", "decoder"}
  assert said == [f"train.init_from={folder}: of the release not used: regions/.*"]
  pyramid = dataclasses.replace(
    RegionConfig.tiny("pyramid"), layers=(1, 1, 1, 1), width=16, position_width=16
  )
  given, said = start_from(
    dataclasses.replace(micro, model=dataclasses.replace(model, region=pyramid)), folder
  )
  assert set(given) == {"vision", "connector", "decoder"}
  assert said[0].endswith("not in the release, starts fresh: regions/.*") and len(said) == 2
  wider = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, mlp_width=64))
  with pytest.raises(ConfigError) as caught:
    start_from(dataclasses.replace(micro, model=wider), folder)
  listed = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]]
  assert listed == [f"decoder/layers/{name}/kernel" for name in ("down", "gate", "up")]


def test_a_release_starts_training_on_images_of_another_size(runs, micro, tmp_path):
  def sized(height, width):
    vision = dataclasses.replace(micro.model.vision, image_size=(height, width))
    return dataclasses.replace(micro, model=dataclasses.replace(micro.model, vision=vision))

  square = runs["folder"] / "straight" / "release"
  given, said = start_from(sized(64, 32), square)
  theirs = release.load(square)[1]
  expected = resize_positions(theirs["vision"]["positions"], (2, 2), (4, 2))
  np.testing.assert_array_equal(given["vision"]["positions"], expected)
  assert said == [
    f"train.init_from={square}: vision/positions resampled from 2x2 patches (images of 32x32 "
    "pixels) to 4x2 (64x32)"
  ]
  theirs, flat = flatten_paths(theirs), flatten_paths(given)
  assert flat.keys() == theirs.keys()
  for path in flat.keys() - {"vision/positions"}:
    np.testing.assert_array_equal(flat[path], theirs[path], err_msg=path)

  tall = release.save(tmp_path / "tall", sized(64, 32), given, load_tokenizer("tiny"), "")
  again, said = start_from(sized(32, 64), tall)  # as many patches, elsewhere
  expected = resize_positions(given["vision"]["positions"], (4, 2), (2, 4))
  np.testing.assert_array_equal(again["vision"]["positions"], expected)
  assert len(said) == 1 and "from 4x2 patches" in said[0]


@pytest.mark.slow
def test_training_in_stages(micro, tmp_path):
  """First the region encoder alone, then all of the model from what that gave."""
  config = with_train(micro, trainable=("regions/.*",), steps=3, eval_every=0, save_every=0)
  key = jax.random.key(config.train.seed)
  fresh = flatten_paths(create_state(config, load_tokenizer("tiny"), key).params)
  run(config, tmp_path / "one")
  saved = by_place(checkpoint(tmp_path / "one", 3)[0])
  frozen = {"/".join(place[1:]): leaf for place, leaf in saved.items() if place[0] == "frozen"}
  assert {path.split("/")[0] for path in frozen} == {"vision", "connector", "decoder"}
  for path, leaf in frozen.items():
    assert leaf.tobytes() == np.asarray(fresh[path]).tobytes(), path
  trained = {"/".join(place[1:]): leaf for place, leaf in saved.items() if place[0] == "trainable"}
  assert trained.keys() | frozen.keys() == fresh.keys()
  moved = [path for path, leaf in trained.items() if not np.array_equal(leaf, fresh[path])]
  assert len(moved) > len(trained) / 2
  moments = [place for place in saved if {"mu", "nu"} & set(place)]
  assert len(moments) == 2 * len(trained) and all("regions" in place for place in moments)

  folder = tmp_path / "one" / "release"
  given = flatten_paths(release.load(folder)[1])
  for path, leaf in (trained | frozen).items():
    np.testing.assert_array_equal(given[path], leaf.astype(given[path].dtype), err_msg=path)
  config = with_train(micro, init_from=str(folder), eval_every=0)
  workdirs.register(tmp_path / "two", config)
  # Killed in its first write: no checkpoint, so that the release is where it starts.
  (tmp_path / "two" / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir(parents=True)
  begun = start(config, tmp_path / "two", mesh=make_mesh(devices=jax.devices()[:1]))
  assert not begun.state.frozen
  for path, leaf in flatten_paths(begun.state.trainable).items():
    np.testing.assert_array_equal(leaf, given[path].astype(np.float32), err_msg=path)
  begun.close()
  assert run(config, tmp_path / "two").finished
  saved = by_place(checkpoint(tmp_path / "two", 12)[0])
  for part in ("vision", "connector", "regions", "decoder"):
    ours = {place: leaf for place, leaf in saved.items() if place[:2] == ("trainable", part)}
    assert any((leaf != given["/".join(place[1:])]).any() for place, leaf in ours.items()), part


def test_a_time_limit_ends_the_schedule(micro, tmp_path):
  train = dataclasses.replace(micro.train, stop_after_minutes=1e-4, eval_every=0)
  outcome = run(dataclasses.replace(micro, train=train), tmp_path)
  assert outcome.finished
  assert 0 <= outcome.step < 12
  assert outcome.summary["time_limited"] is True
  assert "not reproducible" in (tmp_path / "release" / "README.md").read_text()


def test_what_is_wrong_with_a_file_of_boxes_is_reported(micro, tmp_path):
  data = json.loads((PHOTOS / "annotations.json").read_text())
  boxes = len(data["annotations"])
  data["images"].append({"id": 99, "file_name": "gone.jpg", "width": 60, "height": 40})
  data["annotations"].append(data["annotations"][0] | {"id": 999, "bbox": [5, 5, 0, 10]})
  annotations = tmp_path / "boxes.json"
  annotations.write_text(json.dumps(data))
  args = {"annotations": str(annotations), "images": str(PHOTOS), "max_regions": 3}
  sources = (SourceConfig("coco", args=args),)
  config = dataclasses.replace(micro, data=dataclasses.replace(micro.data, sources=sources))
  reports = Watched()
  run(with_train(config, eval_every=0, save_every=0), tmp_path / "run", reports)
  (told,) = json.loads((tmp_path / "run" / "summary.json").read_text())["data"]["sources"]
  table = told.pop("text")
  assert told.pop("examples") >= 8
  assert told == {
    "name": "coco",
    "used": {"images": 8, "boxes": boxes},
    "counts": {"missing image": 1, "zero-area box": 1},
    "defects": 2,
  }
  assert reports.text.getvalue().count(table) == 1
  assert "gone.jpg" in table and "annotation 999" in table

"""From the shipped checkpoint to someone's own photographs and labels."""

import json
from pathlib import Path

import numpy as np
import pytest

import regionjax
from regionjax import cli
from regionjax.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT / "tests" / "data" / "photos"


@pytest.mark.slow
def test_photographs_halve_the_loss_in_fifty_steps_and_chat_learns_their_labels(tmp_path, capsys):
  workdir = tmp_path / "run"
  where = f"annotations={PHOTOS / 'annotations.json'},images={PHOTOS}"
  code = cli.main([
    "train", f"{ROOT / 'configs' / 'coco.py'}:{where},steps=50",
    "--train.log_every=10", "--train.eval_every=0", "--workdir", str(workdir),
  ])  # fmt: skip
  assert code == 0
  losses = [
    row["loss"] for row in read_metrics(workdir / "metrics.jsonl") if row["kind"] == "train"
  ]
  assert losses[-1] <= losses[0] / 2, losses

  data = json.loads((PHOTOS / "annotations.json").read_text())
  labels = {c["id"]: c["name"] for c in data["categories"]}
  chat = regionjax.load(workdir / "release")
  answers = []
  for image in data["images"]:
    for box in (a for a in data["annotations"] if a["image_id"] == image["id"]):
      x, y, w, h = box["bbox"]
      region = regionjax.Region.box(
        x, y, x + w, y + h, size=(image["width"], image["height"]), outside="clip"
      )
      answer = chat.ask(PHOTOS / image["file_name"], "What is <region1>?", [region])
      answers.append((image, box, labels[box["category_id"]], answer.text))
  assert np.mean([text in labels.values() for *_, text in answers]) > 0.5, answers
  right = [a for a in answers if a[2] == a[3]]
  assert len(right) > len(answers) / 3, answers  # one answer for all: 4 of 30

  image, box, label, _ = right[0]
  x, y, w, h = box["bbox"]
  capsys.readouterr()
  code = cli.main([
    "chat", str(PHOTOS / image["file_name"]), "--box", f"{x},{y},{x + w},{y + h}",
    "--outside", "clip", "--ask", "What is <region1>?",
    "--checkpoint", str(workdir / "release"),
  ])  # fmt: skip
  assert code == 0
  assert label in capsys.readouterr().out

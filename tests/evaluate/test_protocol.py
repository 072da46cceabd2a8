"""Evaluation end to end: an oracle, a model that ignores regions, and a random one."""

import json

import pytest

from regionjax import cli
from regionjax.data.schema import SLOT
from regionjax.evaluate import protocol
from regionjax.evaluate.scenes import scenes_questions
from regionjax.infer.engine import Generation


@pytest.fixture(scope="module")
def questions():
  return scenes_questions(120)


def pretend(monkeypatch, answer):
  """Replaces the model by `answer(example, shown)`; `shown`: whether it sees the regions."""

  def answer_examples(engine, frame, renderer, examples, load, **settings):
    shown = renderer.model.region.kind != "none"
    out = []
    for example in examples:
      text = answer(example, shown)
      ids = (*renderer.tokenizer.encode_text(text), renderer.tokenizer.eos_id)
      out.append(Generation(ids, text, "stop"))
    return out

  monkeypatch.setattr(protocol, "answer_examples", answer_examples)


def right(example) -> str:
  def box(match):
    return "[" + ", ".join(f"{v:.2f}" for v in example.regions[int(match[2])].box_xyxy) + "]"

  return SLOT.sub(box, example.turns[-1].text)


def test_an_oracle_is_always_right(chat, questions, monkeypatch):
  pretend(monkeypatch, lambda example, shown: right(example) if shown else "star")
  report = protocol.evaluate(chat, questions, title="oracle")
  assert report.total.correct == report.total.total == len(questions)
  assert report.total.reads_regions
  named = [o for o in report.outcomes if o.question.reference != "none"]
  assert all(o.blanked_text == "star" for o in named)
  assert all(o.blanked_text is None for o in report.outcomes if o not in named)


def test_one_that_ignores_regions_is_found_out(chat, questions, monkeypatch):
  """As right without the regions as with them: it cannot be reading them."""
  pretend(monkeypatch, lambda example, shown: right(example))
  report = protocol.evaluate(chat, questions, title="cheat")
  assert report.total.accuracy == 1
  assert report.total.blanked == 1
  assert report.total.reads_regions is False
  assert "reads its regions: NO" in report.table()


def test_progress_reaches_the_end(chat, questions, monkeypatch):
  seen = []
  few = questions[:6]

  def answer_examples(engine, frame, renderer, examples, load, *, progress, **settings):
    progress(len(examples))
    return [Generation((renderer.tokenizer.eos_id,), "", "stop")] * len(examples)

  monkeypatch.setattr(protocol, "answer_examples", answer_examples)
  protocol.evaluate(chat, few, title="", progress=lambda *state: seen.append(state))
  assert seen[-1][0] == seen[-1][1] >= 6


def test_the_command(chat, tmp_path, monkeypatch, capsys):
  """The real engine on a dozen questions; json and chart are written."""
  monkeypatch.setattr("regionjax.infer.chat.load", lambda path, base=None, mesh=None: chat)
  out, chart = tmp_path / "result.json", tmp_path / "chart.png"
  words = ["-n", "8", "--tasks", "name,count", "--json", str(out), "--chart", str(chart)]
  assert cli.main(["evaluate", *words]) == 0
  printed = capsys.readouterr().out
  assert "small on scenes, test split, seed 1" in printed
  values = json.loads(out.read_text())
  assert {row["name"] for row in values["tasks"]} == {"name", "count"}
  assert values["total"]["total"] == 8
  assert chart.exists()


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["-n", "0"], "at least one question"),
    (["--tasks", "name,nme"], "expected some of name"),
    (["--source", "coco"], "needs --annotations"),
    (["--annotations", "a.json"], "belongs to --source coco"),
    (["--checkpoint", "nowhere"], "no release at 'nowhere'"),
    (["--json", "/no/such/folder/a.json"], "there is no folder"),
    (["--source", "coco", "--annotations", "none.json", "--images", "."], "none.json"),
  ],
)
def test_bad_input_exits_with_2(words, message, capsys):
  assert cli.main(["evaluate", *words]) == 2
  assert message in capsys.readouterr().err

"""Counting, the verdict on blanking, the table and the chart."""

import json

import pytest
from PIL import Image

from regionjax.data.schema import Example, Turn
from regionjax.evaluate.accuracy import Question
from regionjax.evaluate.intervals import wilson
from regionjax.evaluate.report import Outcome, Report, bar_chart, make_row

ASKED = Example(turns=(Turn("user", "What?"), Turn("assistant", "star", supervise=True)))


def outcome(right, blanked=None, *, task="name", reference="box", chance=0.25, answer="star"):
  question = Question(
    ASKED, task, reference=reference, accepted=(answer,), region_dependent=chance is not None,
    object_chance=chance,
  )  # fmt: skip
  return Outcome(question, "x", right, "y", blanked)


OUTCOMES = (
  *(outcome(k < 9, k < 2) for k in range(10)),
  *(outcome(k < 3, k < 1, task="attribute", reference="mask", chance=0.5) for k in range(4)),
  *(outcome(k < 1, task="count", reference="none", chance=None, answer=str(k)) for k in range(2)),
)


def test_rows():
  report = Report("title", OUTCOMES, 1.0)
  attribute, count, name = report.tasks
  assert (name.name, name.total, name.correct, name.accuracy) == ("name", 10, 9, 0.9)
  assert (name.blanked, name.random_object) == (0.2, 0.25)
  assert name.blanked_ratio == pytest.approx(0.8)
  assert name.reads_regions
  assert (attribute.blanked, attribute.random_object) == (0.25, 0.5)
  assert (count.total, count.blanked, count.random_object, count.blanked_ratio) == (
    2, None, None, None,
  )  # fmt: skip
  assert count.chance == 0.5
  assert [row.name for row in report.references] == ["box", "mask"]
  total = report.total
  assert (total.total, total.correct, total.dependent) == (16, 13, 14)
  assert total.blanked == pytest.approx(3 / 14)
  assert total.random_object == pytest.approx((10 * 0.25 + 4 * 0.5) / 14)


def test_a_model_that_guesses_does_not_read_its_regions():
  """Neither one that is as good without regions, nor one that is bad with and without."""
  same = make_row("same", [outcome(k < 9, k < 9) for k in range(10)])
  assert same.blanked_ratio == pytest.approx(3.6)
  assert same.reads_regions is False
  bad = make_row("bad", [outcome(k < 2, False) for k in range(10)])
  assert bad.blanked_ratio == 0
  assert bad.reads_regions is False


def test_unknown_chances_give_no_verdict():
  question = Question(ASKED, "name", accepted=("star",), region_dependent=True)
  row = make_row("name", [Outcome(question, "x", True, "y", False)])
  assert (row.blanked, row.random_object, row.blanked_ratio, row.reads_regions) == (
    0, None, None, None,
  )  # fmt: skip


def test_table():
  table = Report("what was asked", OUTCOMES, 1.0).table()
  lines = table.splitlines()
  assert lines[0] == "what was asked"
  name = next(line for line in lines if line.startswith("name "))
  low, high = wilson(9, 10)
  assert name.split() == [
    "name", "10", "90.0", f"{100 * low:.0f}-{100 * high:.0f}", "100.0", "20.0", "25.0", "0.80",
  ]  # fmt: skip
  count = next(line for line in lines if line.startswith("count "))
  assert count.split()[-3:] == ["-", "-", "-"]
  assert "blanked / random object = 0.67; reads its regions: yes" in table
  assert max(map(len, lines)) <= 100


def test_json_is_complete():
  values = json.loads(json.dumps(Report("title", OUTCOMES, 1.5).to_json()))
  assert values["seconds"] == 1.5
  assert len(values["answers"]) == 16
  assert values["answers"][0]["blanked_right"] is True
  assert values["total"]["reads_regions"] is True
  assert {"accuracy", "low", "high", "chance"} <= set(values["tasks"][0])


def test_chart(tmp_path):
  bar_chart(Report("title", OUTCOMES), tmp_path / "chart.png")
  picture = Image.open(tmp_path / "chart.png").convert("RGB")
  assert picture.size[0] >= 600
  colours = {colour for _, colour in picture.getcolors(1 << 20)}
  assert {(31, 119, 180), (255, 127, 14), (148, 103, 189)} <= colours  # three kinds of bars

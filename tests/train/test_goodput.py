"""What a run's time went into: measured, written down, added up over attempts."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from regionjax.train.goodput import KINDS, Goodput, in_words, read_report, report
from regionjax.train.lines import read_rows


@pytest.fixture
def clock(monkeypatch):
  """A list whose one number is the time."""
  now = [100.0]
  monkeypatch.setattr("time.monotonic", lambda: now[0])
  monkeypatch.setattr("time.time", lambda: 1e9 + now[0])
  return now


def test_every_second_belongs_to_one_kind(clock, tmp_path):
  with Goodput() as goodput:
    clock[0] += 5
    goodput.begin(0, tmp_path)
    with goodput.measure("data"):
      clock[0] += 1
    with goodput.measure("evaluation"):
      clock[0] += 2
      with goodput.measure("step"):
        clock[0] += 3
      clock[0] += 4
    clock[0] += 0.5
    goodput.flush(1)
    clock[0] += 0.25
  first, *rows = read_rows(tmp_path / "goodput.jsonl")
  assert first == {"attempt": 1, "step": 0, "end": 1e9 + 105, "seconds": {"init": 5}}
  assert rows[0]["seconds"] == {"data": 1, "evaluation": 6, "step": 3, "other": 0.5}
  assert rows[1] == {"attempt": 1, "step": 1, "end": 1e9 + 115.75, "seconds": {"other": 0.25}}
  assert sum(goodput.seconds.values()) == 15.75


def test_compiling_is_taken_out_of_whatever_it_happens_in(clock):
  compiled = "/jax/core/compile/backend_compile_duration"
  with Goodput() as goodput:
    goodput.begin(0, None)
    with goodput.measure("step"):
      clock[0] += 1
      jax.monitoring.record_event_duration_secs(compiled, 0.5)  # inside of the next one
      clock[0] += 2
      jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_trace_duration", 2.75)
      clock[0] += 4
      jax.monitoring.record_event_duration_secs("/jax/something/else", 3)
    goodput.flush(1)
    assert goodput.seconds["compile"] == 2.75 and goodput.seconds["step"] == 4.25
  jax.monitoring.record_event_duration_secs(compiled, 1)
  goodput.flush(1)
  assert goodput.seconds["compile"] == 2.75, "it no longer listens"


def test_jax_tells_what_it_compiles():
  with Goodput() as goodput:
    goodput.begin(0, None)
    with goodput.measure("step"):
      jax.jit(lambda x: jnp.cumsum(x) * 1.2345)(jnp.ones(7))
    goodput.flush(1)
    assert goodput.seconds["compile"] > 0
    assert goodput.seconds["step"] < 2 * goodput.seconds["compile"]


def row(attempt, at, end, **seconds):
  return {"attempt": attempt, "step": at, "end": end, "seconds": seconds}


def test_steps_that_were_lost_are_no_good():
  """Killed behind step 6, gone on from 4; killed again, gone on from 4 again; stopped at 8."""
  rows = [
    row(1, 0, 10.0, init=10.0), row(1, 4, 14.0, step=4.0), row(1, 6, 16.0, step=2.0),
    row(2, 4, 30.0, init=4.0), row(2, 5, 31.0, step=1.0),
    row(3, 4, 45.0, init=3.0, compile=2.0), row(3, 8, 51.0, step=4.0, data=1.0, checkpoint=1.0),
  ]  # fmt: skip
  found = report(rows)
  assert found["seconds"]["step"] == 8 and found["seconds"]["lost"] == 3
  assert found["wall_seconds"] == 32 and found["goodput"] == 8 / 32
  assert found["attempts"] == 3
  assert found["away_seconds"] == (26 - 16) + (40 - 31)
  assert set(found["seconds"]) == {*KINDS, "lost"}
  assert in_words(found) == (
    "goodput 25% of 0:32 (init 53%, lost 9%, compile 6%, data 3%, checkpoint 3%)"
  )


def test_nothing_was_recorded(tmp_path):
  assert read_report(tmp_path) is None


def test_a_row_at_which_the_process_was_killed_is_left_out(clock, tmp_path):
  for attempt in itertools.count(1):
    with Goodput() as goodput:
      clock[0] += 1
      goodput.begin(0, tmp_path)
    if attempt == 2:
      break
    with (tmp_path / "goodput.jsonl").open("a") as file:
      file.write('{"attempt": 1, "st')
  rows = read_rows(tmp_path / "goodput.jsonl")
  assert [(row["attempt"], row["seconds"]) for row in rows] == [
    (1, {"init": 1}), (1, {}), (2, {"init": 1}), (2, {}),
  ]  # fmt: skip
  assert read_report(tmp_path)["attempts"] == 2

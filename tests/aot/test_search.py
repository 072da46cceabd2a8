import pytest

from regionjax.aot import search
from regionjax.aot.report import Report


def compiler(base, per_row, usable=16.0):
  """Reports of programs that take base + per_row * rows, and the list of what was compiled."""
  tried = []

  def compile_rows(candidate, rows):
    tried.append(rows)
    peak = base + per_row * rows
    return Report({
      "fits": peak <= usable, "memory": {"peak": peak, "usable": usable}, "mfu": 0.5,
      "tokens_per_second_per_chip": 100.0 * rows,
    })  # fmt: skip

  return compile_rows, tried


CANDIDATE = search.Candidate("full", 1, 64, 1)


@pytest.mark.parametrize(
  "base, per_row, rows, most",
  [(5, 3, 3, 4), (5, 2.5, 4, 4), (15, 2, 0, 1), (15, 1, 1, 2), (0, 0.1, 64, 4), (7, 0.5, 18, 5)],
)
def test_the_largest_batch_in_few_compilations(base, per_row, rows, most):
  compile_rows, tried = compiler(base, per_row)
  found = search.largest(CANDIDATE, compile_rows)
  assert found.rows == rows
  assert len(tried) == len(set(tried)) <= most
  assert found.report.fits == (rows > 0)
  assert found.tried == tuple(tried)


def test_memory_that_is_not_a_line():
  """Steps of four rows: the line misleads, the search still ends at the right number."""

  def compile_rows(candidate, rows):
    peak = 4 + 2 * -(-rows // 4)
    return Report({"fits": peak <= 9, "memory": {"peak": peak, "usable": 9.0}})

  assert search.largest(CANDIDATE, compile_rows, limit=40).rows == 8


@pytest.mark.parametrize("step", [3, 5, 7, 16])
def test_memory_in_steps_takes_few_compilations(step):
  tried = []

  def compile_rows(candidate, rows):
    tried.append(rows)
    peak = 4 + 2 * -(-rows // step)
    return Report({"fits": peak <= 9, "memory": {"peak": peak, "usable": 9.0}})

  assert search.largest(CANDIDATE, compile_rows, limit=64).rows == 2 * step
  assert len(tried) == len(set(tried)) <= 14


def test_a_second_row_that_takes_no_memory_is_no_reason_to_jump():
  peaks = {1: 19.6, 2: 18.9, 3: 21.7}
  tried = []

  def compile_rows(candidate, rows):
    tried.append(rows)
    peak = peaks.get(rows, 10.0 + 4 * rows)
    return Report({"fits": peak <= 30, "memory": {"peak": peak, "usable": 30.0}})

  assert search.largest(CANDIDATE, compile_rows).rows == 5
  assert max(tried) <= 2 * search.FARTHEST


def test_memory_that_is_not_told_where_it_does_not_fit():
  def compile_rows(candidate, rows):
    fits = rows <= 37
    return Report({"fits": fits, "memory": {"peak": 3.0 if fits else 0.0, "usable": 9.0}})

  assert search.largest(CANDIDATE, compile_rows).rows == 37


def test_candidates_fill_a_slice():
  found = list(search.candidates(64, remats=("none", "full"), tensors=(1, 4, 3)))
  assert {(c.remat, c.fsdp, c.tensor) for c in found} == {
    ("none", 64, 1), ("none", 16, 4), ("full", 64, 1), ("full", 16, 4),
  }  # fmt: skip


def test_the_table_has_the_fastest_first():
  found = [
    search.largest(search.Candidate(name, 1, 8, 1), compiler(base, 2)[0])
    for name, base in (("none", 15), ("full", 3), ("dots", 9))
  ]
  lines = search.table(found).splitlines()
  assert [line.split()[0] for line in lines[1:]] == ["remat=full", "remat=dots", "remat=none"]
  assert lines[1].split()[4:] == ["6", "0.00", "600", "50.0%"]

"""The largest batch that fits, over remat policies and shapes of the mesh.

A compilation of a large model takes minutes, so few are made: memory grows linearly with the rows
of a chip, two compilations give the line, and the row count that it allows is then compiled itself.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

from regionjax.aot.report import Report

MAX_ROWS = 64
# A guess is at most so many times what is known to fit. Of small batches the compiler may need less
# memory for two rows than for one, and what is far too large takes it longest.
FARTHEST = 8


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One way to run a config: remat policy and the mesh's axes inside a slice.

  Attributes:
    remat: a policy of the model's.
    data, fsdp, tensor: sizes.
  """

  remat: str
  data: int
  fsdp: int
  tensor: int

  def __str__(self) -> str:
    return f"remat={self.remat} data={self.data} fsdp={self.fsdp} tensor={self.tensor}"


@dataclasses.dataclass(frozen=True)
class Found:
  """The largest batch of a candidate.

  Attributes:
    candidate: which.
    rows: per part of the batch; 0 where not even one fits.
    report: of that many rows, or of one where none fits.
    tried: row counts that were compiled.
  """

  candidate: Candidate
  rows: int
  report: Report
  tried: tuple[int, ...]


def candidates(
  chips: int, *, remats: Sequence[str], tensors: Sequence[int] = (1, 4), datas: Sequence[int] = (1,)
) -> Iterator[Candidate]:
  """Meshes of one slice with every policy; what `data` and `tensor` leave is `fsdp`'s."""
  for remat, tensor, data in itertools.product(remats, tensors, datas):
    if chips % (tensor * data) == 0:
      yield Candidate(remat, data, chips // (tensor * data), tensor)


def largest(
  candidate: Candidate, compile_rows: Callable[[Candidate, int], Report], *, limit: int = MAX_ROWS
) -> Found:
  """The largest number of rows that fits.

  Args:
    candidate: remat policy and mesh.
    compile_rows: compiles the candidate with so many rows per part of the batch.
    limit: rows that are not exceeded.
  """
  reports: dict[int, Report] = {}

  def fits(rows: int) -> bool:
    reports[rows] = compile_rows(candidate, rows)
    return reports[rows].fits

  best, over = 0, limit + 1
  if fits(1):
    best = 1
    if limit > 1 and fits(2):
      best, halve = 2, False
      while best + 1 < over:
        guess = (best + over) // 2 if halve else min(_line(reports, best), FARTHEST * best)
        guess = min(max(guess, best + 1), over - 1)
        if fits(guess):
          best = guess
        else:
          over = guess
        # Every second guess halves, once one was wrong: where memory is no line it still ends soon.
        halve = over <= limit and not halve
  return Found(candidate, best, reports[max(best, 1)], tuple(reports))


def _line(reports: dict[int, Report], best: int) -> int:
  """Rows that a line through the memory of two reports leaves room for.

  One is the largest that fits. The other is the smallest that doesn't, where the compiler said by
  how much, or else the smallest of all: what the compiler makes of one row more is no line.
  """
  peak = {rows: report["memory"]["peak"] for rows, report in reports.items()}
  over = min((rows for rows in reports if rows > best and peak[rows]), default=None)
  other = over or min(reports)
  slope = (peak[other] - peak[best]) / (other - best)
  if slope <= 0:
    return MAX_ROWS
  return int(best + (reports[best]["memory"]["usable"] - peak[best]) / slope)


def table(found: Sequence[Found]) -> str:
  """The candidates, most tokens a second first; those that don't fit last."""

  def pace(f: Found) -> float:
    return f.report["tokens_per_second_per_chip"] if f.rows else 0.0

  lines = [f"  {'candidate':<48}{'rows':>5}{'peak GiB':>10}{'tokens/s/chip':>15}{'MFU':>8}"]
  for f in sorted(found, key=pace, reverse=True):
    peak = f.report["memory"]["peak"] / 2**30
    mfu = f"{f.report['mfu']:.1%}" if f.rows else "-"
    lines.append(f"  {f.candidate!s:<48}{f.rows:>5}{peak:>10.2f}{pace(f):>15.0f}{mfu:>8}")
  return "\n".join(lines)

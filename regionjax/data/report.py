"""What became of the examples: how full the rows are and what was left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regionjax.data.packing import Size


def report(counts: Mapping[str, int], capacity: Size) -> dict[str, Any]:
  """Figures from counters.

  Args:
    counts: those of `shards.counts`.
    capacity: what a row holds.

  Returns:
    rows, batches, examples, answers, targets (supervised tokens) and truncated (examples that lost
    turns) as counts; examples_per_row; `waste`, for tokens, images and regions the share of slots
    that were padding (0 where a row has none); `skipped`, reason -> count; `draws`, source ->
    examples taken from it.
  """
  rows = counts.get("rows", 0)
  waste = {
    name: 1 - counts.get(name, 0) / (rows * room) if rows and room else 0.0
    for name, room in capacity._asdict().items()
  }
  plain = ("rows", "batches", "examples", "answers", "targets", "truncated")
  return {
    **{name: counts.get(name, 0) for name in plain},
    "examples_per_row": counts.get("examples", 0) / rows if rows else 0.0,
    "waste": waste,
    "skipped": _group(counts, "skipped."),
    "draws": _group(counts, "draws."),
  }


def _group(counts: Mapping[str, int], prefix: str) -> dict[str, int]:
  return {k.removeprefix(prefix): v for k, v in sorted(counts.items()) if k.startswith(prefix)}

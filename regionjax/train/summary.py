"""`summary.json`: one run as one record, which is what a scaling study reads."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from regionjax.config import Config, to_dict
from regionjax.train.ledger import Ledger
from regionjax.train.state import TrainState, flatten_paths

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")


def summarize(
  config: Config,
  state: TrainState,
  ledger: Ledger,
  *,
  devices: Sequence[Any],
  data: Mapping[str, Any] | None = None,
  peak: float | None = None,
  command: str = "",
  goodput: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """The record of a run so far.

  Args:
    config: the run.
    state: its parameters are counted.
    ledger: counts, clock, losses.
    devices: what it ran on.
    data: the pipeline's `stats()`, and as `sources` what `source_reports` gives.
    peak: FLOP/s that the devices can do at best, if known.
    command: how it was started.
    goodput: what became of its time (see `train.goodput`), if that was recorded.

  Returns:
    JSON-able. `flops` are those of the model (see `regionjax.flops`): what recomputation and
    padding cost is not in them.
  """
  totals, evaluation = ledger.totals, ledger.evaluation or {}
  return {
    "name": config.name,
    "steps": ledger.step,
    "parameters": parameters(state),
    "tokens": {
      "llm": totals["tokens"],  # every position of the decoder that isn't padding
      "image": totals["images"] * config.model.image_tokens,  # of those, slots of images
      "region": totals["regions"] if config.model.region.features else 0,  # and region slots
      "supervised": totals["supervised"],
    },
    "examples": totals["examples"],
    "images": totals["images"],
    "flops": totals["flops"],
    "mfu": totals["flops"] / (ledger.elapsed * peak) if peak and ledger.elapsed else None,
    "peak_flops_per_second": peak,
    "wall_seconds": ledger.elapsed,
    "goodput": goodput,
    "loss": {
      "train": (ledger.train or {}).get("loss"),
      "evaluation": evaluation.get("loss"),
      "best": ledger.best,
    },
    "accuracy": {
      key: evaluation.get(key) for key in ("accuracy", "answers", "by_task", "by_reference")
    },
    "seeds": {"train": config.train.seed, "data": config.data.seed},
    "data": data,
    "time_limited": config.train.stop_after_minutes > 0,
    "command": command,
    "git": git_state(),
    "device": {
      "kind": devices[0].device_kind,
      "count": len(devices),
      "host_cores": os.cpu_count(),
      "processes": jax.process_count(),
    },
    "versions": versions(),
    "config": to_dict(config),
  }


def parameters(state: TrainState) -> dict[str, Any]:
  """Parameters by part, in all, trainable, and without the tables of token embeddings."""
  flat = flatten_paths(state.params)
  parts: dict[str, int] = {}
  for path, leaf in flat.items():
    part = path.split("/")[0]
    parts[part] = parts.get(part, 0) + leaf.size
  total = sum(parts.values())
  # The output matrix counts as a table only where it is one and the same (Chinchilla's way).
  table = sum(leaf.size for path, leaf in flat.items() if path.endswith("/embedding"))
  return parts | {
    "total": total,
    "trainable": sum(leaf.size for leaf in jax.tree.leaves(state.trainable)),
    "non_embedding": total - table,
  }


def source_reports(sources: Sequence[Any]) -> list[dict[str, Any]]:
  """What was used of the files behind sources, and what was left out or mended, by reason.

  Args:
    sources: those without a `report` (see `sources.coco`) have nothing to say and are left out.

  Returns:
    JSON-able, one entry for each report: `name` and `examples` of the source; `used` and `counts`
    as numbers; `defects`, how many records are faulty; and `text`, the table for people.
  """
  return [
    {
      "name": source.name,
      "examples": len(source),
      "used": dict(source.report.used),
      "counts": dict(source.report.counts),
      "defects": source.report.defects,
      "text": str(source.report),
    }
    for source in sources
    if hasattr(source, "report")
  ]


def git_state() -> dict[str, Any] | None:
  """Commit and whether files differ from it; None where the package isn't in a repository.

  What launch/ copies to other hosts is in none; it says the commit in `REGIONJAX_COMMIT`.
  """
  staged = os.environ.get("REGIONJAX_COMMIT")
  if staged:
    return {"hash": staged, "changed": False}
  folder = Path(__file__).parents[1]

  def git(*words: str) -> str:
    done = subprocess.run(
      ["git", *words], cwd=folder, capture_output=True, text=True, timeout=20, check=True
    )
    return done.stdout.strip()

  try:
    return {"hash": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "."))}
  except (OSError, subprocess.SubprocessError):
    return None


def versions() -> dict[str, str]:
  """Versions of what the result depends on."""
  found = {"python": platform.python_version()}
  for name in ("regionjax", *PACKAGES):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def write_summary(path: Path, summary: dict[str, Any]) -> None:
  """Writes the record, whole or not at all."""
  part = path.with_name(path.name + ".part")
  part.write_text(json.dumps(summary, indent=2) + "\n")
  part.replace(path)

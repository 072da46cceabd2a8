"""Runs a compiled program on the machine it was compiled for, and says what it takes there."""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax

from regionjax.aot.programs import Program
from regionjax.aot.roofline import mfu
from regionjax.aot.topology import Topology


def seconds(program: Program, compiled: Any, runs: int) -> list[float]:
  """Seconds of each of `runs` executions, one after the other, behind a first that isn't counted.

  Args:
    program: on a mesh of devices that can run.
    compiled: the executable of it.
    runs: at least 1.
  """
  args, taken = program.make(), []
  for i in range(runs + 1):
    jax.block_until_ready(args)
    start = time.perf_counter()
    result = jax.block_until_ready(compiled(*args))
    if i:
      taken.append((time.perf_counter() - start) / program.steps)
    args = program.follow(args, result)
    del result
  return taken


def measured(program: Program, topology: Topology, taken: list[float]) -> dict[str, Any]:
  """The `measured` part of a report: seconds, MFU, and bytes at the worst moment so far."""
  median = statistics.median(taken)
  peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in program.mesh.local_devices]
  return {
    "runs": len(taken), "seconds": median, "least": min(taken), "most": max(taken),
    "mfu": mfu(program.model_flops, topology, median), "peak_bytes": max(peaks),
    "tokens_per_second_per_chip": program.tokens / median / topology.chips,
  }  # fmt: skip

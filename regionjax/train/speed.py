"""How fast a device could be, so that a run can say what share of that it reaches (MFU)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Peak dense bf16 FLOP/s of one device, by the start of jax's device_kind: makers' data sheets.
PEAK = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5p": 459e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "NVIDIA H200": 989e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100": 989e12,
  "NVIDIA A100": 312e12,
}


def peak_flops(devices: Sequence[Any], *, size: int = 2048) -> float | None:
  """FLOP/s that all devices together can do at best; None where that isn't known.

  CPUs have no useful data sheet: there a float32 matrix product of `size` is timed (2048: about a
  third of a second on two cores, at the rate of larger ones). Fake CPU devices share the cores, so
  their number doesn't count.
  """
  device = devices[0]
  if device.platform == "cpu":
    return _measure(device, size)
  for kind, peak in PEAK.items():
    if device.device_kind.startswith(kind):
      return peak * len(devices)
  return None


def _measure(device: Any, size: int) -> float:
  x = jax.device_put(jnp.ones((size, size), jnp.float32), device)
  multiply = jax.jit(jnp.matmul)
  multiply(x, x).block_until_ready()
  best = float("inf")
  for _ in range(3):  # other programs may hold the cores: the best of three
    start = time.perf_counter()
    multiply(x, x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best

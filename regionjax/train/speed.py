"""How fast a device could be, so that a run can say what share of that it reaches (MFU)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from regionjax.chips import peak_flops_of


def peak_flops(devices: Sequence[Any], *, size: int = 2048) -> float | None:
  """FLOP/s that all devices together can do at best; None where that isn't known.

  CPUs have no useful data sheet: there a float32 matrix product of `size` is timed (2048: about a
  third of a second on two cores, at the rate of larger ones). Fake CPU devices share the cores, so
  their number doesn't count.
  """
  device = devices[0]
  if device.platform == "cpu":
    return _measure(device, size)
  peak = peak_flops_of(device.device_kind)
  return peak and peak * len(devices)


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

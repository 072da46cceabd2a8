"""Accelerators with their figures: what to compile for, and what share of its peak a run reaches.

Figures are the vendors' (cloud.google.com/tpu/docs, NVIDIA's data sheets), except the usable memory
of TPUs, which is what their compiler grants a program. Bandwidths are bytes a second in one
direction.
"""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """A chip and its links.

  Attributes:
    name: as in a topology's name.
    platform: of its compiler.
    memory: bytes that one program may use.
    memory_bandwidth: of that memory.
    flops: peak of matrix products, bf16 with f32 sums.
    link_bandwidth: of one link to a neighbour (TPU), or of the chip's way into the switch (GPU).
    network_bandwidth: a chip's share of its host's network cards.
    kinds: how jax's `device_kind` may begin on such a chip.
    clock: cycles a second, as its peak and its matrix units' size have it; 0 if not needed.
    dims: axes of the torus; 0 is a switch that joins all chips of a slice.
    wrap: an axis whose length is a multiple of this is a ring, others are lines.
  """

  name: str
  platform: str
  memory: float
  memory_bandwidth: float
  flops: float
  link_bandwidth: float
  network_bandwidth: float
  kinds: tuple[str, ...]
  clock: float = 0.0
  dims: int = 0
  wrap: int = 0


# Network: 6.4 Tb/s, 25.6 Tb/s per pod of 256 chips (v5e, v6e), 50 Gb/s per chip (v5p).
V5E = Chip(
  "v5e", "tpu", memory=15.75 * GIB, memory_bandwidth=8.19e11, flops=1.97e14, link_bandwidth=4.5e10,
  network_bandwidth=3.125e9, kinds=("TPU v5 lite", "TPU v5e"), clock=1.5e9, dims=2, wrap=16,
)  # fmt: skip
V5P = Chip(
  "v5p", "tpu", memory=95.73 * GIB, memory_bandwidth=2.765e12, flops=4.59e14, link_bandwidth=9e10,
  network_bandwidth=6.25e9, kinds=("TPU v5p", "TPU v5"), clock=1.75e9, dims=3, wrap=4,
)  # fmt: skip
V6E = Chip(
  "v6e", "tpu", memory=31.24 * GIB, memory_bandwidth=1.6e12, flops=9.18e14, link_bandwidth=9e10,
  network_bandwidth=1.25e10, kinds=("TPU v6 lite", "TPU v6e"), clock=1.75e9, dims=2, wrap=16,
)  # fmt: skip
H100 = Chip(
  "h100", "cuda", memory=84929347584, memory_bandwidth=3.35e12, flops=9.89e14,
  link_bandwidth=4.5e11, network_bandwidth=5e10, kinds=("NVIDIA H100",),
)  # fmt: skip
CHIPS = {chip.name: chip for chip in (V5E, V5P, V6E, H100)}

# Peaks of others by how `device_kind` begins: enough for a run to say what share it reaches.
OTHER_PEAKS = {
  "TPU v4": 2.75e14,
  "NVIDIA GH200": 9.89e14,
  "NVIDIA H200": 9.89e14,
  "NVIDIA H100 NVL": 8.35e14,
  "NVIDIA H100 PCIe": 7.56e14,
  "NVIDIA A100": 3.12e14,
}


def chip_of(device_kind: str) -> Chip | None:
  """The chip that jax calls so; None for one that isn't in `CHIPS`."""
  return _of(device_kind)[0]


def peak_flops_of(device_kind: str) -> float | None:
  """Dense bf16 FLOP/s of one such device at best; None where that isn't known."""
  return _of(device_kind)[1]


def _of(device_kind: str) -> tuple[Chip | None, float | None]:
  """The entry whose name of the device is the longest: an H100 PCIe is no H100."""
  known = [(kind, chip, chip.flops) for chip in CHIPS.values() for kind in chip.kinds]
  known += [(kind, None, peak) for kind, peak in OTHER_PEAKS.items()]
  found = [entry for entry in known if device_kind.startswith(entry[0])]
  return max(found, key=lambda entry: len(entry[0]))[1:] if found else (None, None)

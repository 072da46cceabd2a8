"""From counts to seconds: what each part of a machine would need at its peak, and which needs most.

This is a bound, not a prediction of what is lost in between. A kernel takes the longer of its
arithmetic and its memory traffic; one after the other they are the chip's own time. Communication
runs beside them over the links, and with several slices over the network: the step takes at least
the longest of the three, and at most their sum.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from regionjax.aot.collectives import Collective
from regionjax.aot.hlo_costs import Kernel
from regionjax.aot.topology import Topology
from regionjax.chips import Chip

Place = tuple[int, tuple[int, ...]]  # slice, position in its torus


@dataclasses.dataclass(frozen=True)
class Times:
  """Seconds of one step.

  Attributes:
    compute: matrix units at their peak.
    memory: HBM at its peak.
    kernels: the longer of both, kernel by kernel.
    links: inside a slice.
    network: between slices.
    expected: the chip's own time as a TPU's compiler estimates it, communication left out; it
      knows of pipeline stalls and vector work, which the bounds above leave out. 0 where it has
      none.
  """

  compute: float
  memory: float
  kernels: float
  links: float
  network: float
  expected: float = 0.0

  @property
  def step(self) -> float:
    """At least: everything that can overlap does."""
    return max(self.kernels, self.memory, self.links, self.network)

  @property
  def serial(self) -> float:
    """At most, of these: nothing overlaps."""
    return max(self.kernels, self.memory) + self.links + self.network

  @property
  def bottleneck(self) -> str:
    """'compute', 'HBM', 'ICI' or 'DCN' (on GPUs: NVLink, InfiniBand): what needs longest."""
    own = {"compute": self.compute, "HBM": self.memory}
    first = max(own, key=own.__getitem__)
    parts = {first: max(self.kernels, self.memory), "ICI": self.links, "DCN": self.network}
    return max(parts, key=parts.__getitem__)


def times(
  topology: Topology,
  places: Sequence[Place],
  kernels: Iterable[Kernel],
  collectives: Iterable[Collective],
) -> Times:
  """Seconds of one step on every chip.

  Args:
    topology: the machine.
    places: of the devices in the mesh's order.
    kernels: of one device.
    collectives: of one device.
  """
  chip = topology.chip
  compute = memory = own = cycles = 0.0
  for k in kernels:
    arithmetic, traffic = k.flops / chip.flops, k.bytes / chip.memory_bandwidth
    compute += k.times * arithmetic
    memory += k.times * traffic
    if k.waits:
      own += k.times * max(arithmetic, traffic)
      cycles += k.times * k.cycles
  links = network = 0.0
  for c in collectives:
    inside, between = seconds(topology, places, c)
    links += c.times * inside
    network += c.times * between
  expected = cycles / chip.clock if chip.clock else 0.0
  return Times(compute, memory, own, links, network, expected)


def seconds(
  topology: Topology, places: Sequence[Place], collective: Collective
) -> tuple[float, float]:
  """(on links, on the network) of one run of a collective.

  Over several slices it is two: among the devices of a slice, then each with its like in the other
  slices for the share that it holds.
  """
  groups = ([places[d] for d in group] for group in collective.groups)
  group = max(groups, key=lambda group: len({s for s, _ in group}))  # pairs may differ
  slices = len({s for s, _ in group})
  inner = [position for s, position in group if s == group[0][0]]
  inside = between = 0.0
  if len(inner) > 1:
    part = dataclasses.replace(collective, groups=np.zeros((1, len(inner)), int))
    inside = part.traffic / bandwidth(topology.chip, topology.shape, inner)
  if slices > 1:
    part = dataclasses.replace(collective, groups=np.zeros((1, slices), int))
    between = part.traffic / len(inner) / topology.chip.network_bandwidth
  return inside, between


def bandwidth(chip: Chip, shape: Sequence[int], positions: Sequence[Sequence[int]]) -> float:
  """Bytes a second that each device of a group can pass on to the others, one collective at a time.

  Every axis of the torus that the group spans adds a link, two where it is a ring. Devices that
  stand apart share their links with the groups between them.
  """
  if not chip.dims:
    return chip.link_bandwidth
  total = 0.0
  for axis, length in enumerate(shape):
    at = sorted({p[axis] for p in positions})
    if len(at) == 1:
      continue
    gap = min(b - a for a, b in itertools.pairwise(at))
    ring = length % chip.wrap == 0 and at[-1] - at[0] + gap == length
    total += chip.link_bandwidth * (2 if ring else 1) / gap
  return total or math.inf


def mfu(model_flops: float, topology: Topology, step_seconds: float) -> float:
  """Share of the peak that the model's own FLOPs (over all chips) are, at this pace."""
  return model_flops / (step_seconds * topology.chips * topology.chip.flops)

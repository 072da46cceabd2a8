import numpy as np
import pytest

from regionjax.aot import roofline, topology
from regionjax.aot.collectives import Collective
from regionjax.aot.hlo_costs import Kernel
from regionjax.chips import CHIPS

V5E, V5P, H100 = (CHIPS[name] for name in ("v5e", "v5p", "h100"))
LINK = V5E.link_bandwidth


def line(n, gap=1):
  return [(i * gap, 0) for i in range(n)]


@pytest.mark.parametrize(
  "shape, positions, links",
  [
    ((8, 8), line(8), 1),  # a line: what comes from one end passes every link once
    ((16, 16), line(16), 2),  # a ring
    ((16, 16), line(8), 1),  # half of one
    ((16, 16), line(4, gap=4), 2 / 4),  # four groups share the ring
    ((8, 8), [(i, j) for i in range(8) for j in range(8)], 2),
    ((16, 16), [(i, j) for i in range(16) for j in range(16)], 4),
  ],
)
def test_bandwidth_of_groups_on_a_torus(shape, positions, links):
  assert roofline.bandwidth(V5E, shape, positions) == pytest.approx(links * LINK)


def test_bandwidth_of_a_cube_and_of_a_switch():
  cube = [(i, j, k) for i in range(4) for j in range(4) for k in range(4)]
  assert roofline.bandwidth(V5P, (4, 4, 4), cube) == 6 * V5P.link_bandwidth
  assert roofline.bandwidth(H100, (8,), [()] * 8) == H100.link_bandwidth


def collective(kind, groups, bytes_=1000, times=1.0):
  return Collective(
    kind=kind, name="c", op_name="", times=times, bytes=bytes_, elements=bytes_,
    groups=np.array(groups),
  )  # fmt: skip


def test_seconds_inside_a_slice():
  places = [(0, (i, 0)) for i in range(4)]
  found = roofline.seconds(topology.parse("v5e:4x1"), places, collective("all-gather", [range(4)]))
  assert found == pytest.approx((1000 * 3 / 4 / LINK, 0))


def test_seconds_between_slices():
  """Two slices of two: each chip exchanges its half with its like, over its share of the cards."""
  places = [(s, (i, 0)) for s in range(2) for i in range(2)]
  machine = topology.parse("v5e:2x1", 2)
  whole = roofline.seconds(machine, places, collective("all-reduce", [range(4)]))
  assert whole == pytest.approx((2 * 1000 / 2 / LINK, 2 * 500 / 2 / V5E.network_bandwidth))
  across = roofline.seconds(machine, places, collective("all-reduce", [[0, 2], [1, 3]]))
  assert across == pytest.approx((0, 2 * 1000 / 2 / V5E.network_bandwidth))
  step = roofline.seconds(machine, places, collective("collective-permute", [[0, 1], [1, 2]]))
  assert step == pytest.approx((0, 1000 / V5E.network_bandwidth))


def kernel(flops, bytes_, times=1.0, waits=True):
  return Kernel("k", "", times, flops, bytes_, cycles=3e8, waits=waits)


def test_a_step_takes_at_least_its_slowest_part():
  machine = topology.parse("v5e:2x2")
  places = [(0, (i % 2, i // 2)) for i in range(4)]
  second_of_flops, second_of_bytes = V5E.flops, V5E.memory_bandwidth
  kernels = [
    kernel(second_of_flops, 0.5 * second_of_bytes, times=2),  # 1 s each, bound by arithmetic
    kernel(0.1 * second_of_flops, 0.4 * second_of_bytes),  # 0.4 s, bound by memory
    kernel(0, 0.3 * second_of_bytes, waits=False),  # beside others
  ]
  talk = [collective("all-gather", [range(4)], bytes_=2 * LINK * 4 / 3 * 0.5)]
  times = roofline.times(machine, places, kernels, talk)
  assert times.compute == pytest.approx(2.1)
  assert times.memory == pytest.approx(1.7)
  assert times.kernels == times.step == pytest.approx(2.4)
  assert times.links == pytest.approx(0.5) and times.network == 0
  assert times.serial == pytest.approx(2.9)
  assert times.bottleneck == "compute"
  assert times.expected == pytest.approx(3 * 3e8 / V5E.clock)
  assert roofline.mfu(2.4 * 4 * 0.5 * V5E.flops, machine, times.step) == pytest.approx(0.5)


@pytest.mark.parametrize(
  "kernels, share, expected",
  [
    ([kernel(0.2 * V5E.flops, 0.5 * V5E.memory_bandwidth)], 0.1, "HBM"),
    ([kernel(0.2 * V5E.flops, 0)], 0.3, "ICI"),
  ],
)
def test_bottlenecks(kernels, share, expected):
  places = [(0, (i, 0)) for i in range(4)]
  talk = [collective("all-gather", [range(4)], bytes_=LINK * 4 / 3, times=share)]
  assert roofline.times(topology.parse("v5e:4x1"), places, kernels, talk).bottleneck == expected


def test_the_network_as_bottleneck():
  places = [(s, (0, 0)) for s in range(2)]
  talk = [collective("all-reduce", [[0, 1]], bytes_=V5E.network_bandwidth)]
  times = roofline.times(topology.parse("v5e:1x1", 2), places, [kernel(0.5 * V5E.flops, 0)], talk)
  assert (times.bottleneck, times.network) == ("DCN", pytest.approx(1.0))

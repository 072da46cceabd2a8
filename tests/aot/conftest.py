"""Programs for chips that nobody has: compiled by libtpu, read by the package."""

import functools
import types

import aot_cases
import jax
import pytest

from regionjax import mesh as meshes
from regionjax.aot import hlo, hlo_costs, hlo_loops, topology
from regionjax.aot.collectives import collectives


@functools.cache
def _devices(name, slices):
  topology.use_cpu()
  return topology.parse(name, slices).devices()


@pytest.fixture(scope="session")
def chips():
  """(topology's name, axes of the mesh) -> a mesh of its abstract devices."""

  def make(name, *, slices=1, **axes):
    return meshes.make_mesh(devices=_devices(name, slices), slices=slices, **axes)

  return make


@pytest.fixture(scope="session")
def read():
  """(HLO text, assumed trips, devices of the mesh) -> everything that is read from it."""

  def make(text, assumed_trips=None, devices=None):
    module = hlo.parse(text)
    runs = hlo_loops.Executions(
      module, lambda c: hlo_costs.computation_flops(module, c), assumed_trips=assumed_trips
    )
    kernels = list(hlo_costs.kernels(module, runs))
    return types.SimpleNamespace(
      module=module,
      runs=runs,
      kernels=kernels,
      flops=sum(k.times * k.flops for k in kernels),
      talk=collectives(module, runs, devices=devices),
    )

  return make


@pytest.fixture(scope="session")
def compiled_step(chips):
  """(topology's name, axes of the mesh) -> `aot_cases.step` compiled for it."""

  @functools.cache
  def compile_for(name, **axes):
    args = aot_cases.step_args(chips(name, **axes))
    jitted = jax.jit(aot_cases.step, donate_argnums=0, out_shardings=args[0].sharding)
    return jitted.lower(*args).compile()

  return compile_for

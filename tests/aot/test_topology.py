import importlib.util

import pytest

from regionjax.aot import topology
from regionjax.aot.errors import AotError
from regionjax.chips import CHIPS


@pytest.mark.parametrize(
  "name, slices, chips",
  [("v5e:8x8", 1, 64), ("v5e:2x4", 1, 8), ("v5p:4x4x4", 2, 128), ("h100:8", 2, 16)],
)
def test_names(name, slices, chips):
  found = topology.parse(name, slices)
  assert (found.name, found.chips, found.slices) == (name, chips, slices)


@pytest.mark.parametrize(
  "name, says",
  [
    ("v5p-128", "expected CHIP:SHAPE"),
    ("v9:8x8", "v5e, v5p, v6e, h100"),
    ("v5p:8x8", "3 sizes, as in v5p:4x4x4"),
    ("v5e:4x4x4", "2 sizes"),
    ("h100:4x4", "a number of chips"),
    ("h100:24", "h100:8 --slices 3"),
    ("v5e:0x4", "2 sizes"),
  ],
)
def test_names_that_are_none(name, says):
  with pytest.raises(AotError, match=says):
    topology.parse(name)
  with pytest.raises(AotError, match="--slices 0"):
    topology.parse("v5e:8x8", 0)


def test_devices_of_two_slices():
  topology.use_cpu()
  devices = topology.parse("v5e:2x2", 2).devices()
  assert [p[0] for p in topology.places(devices)] == [0] * 4 + [1] * 4
  assert {p[1][:2] for p in topology.places(devices)} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_a_shape_that_does_not_exist():
  topology.use_cpu()
  with pytest.raises(AotError, match="refuses v5e:3x5"):
    topology.parse("v5e:3x5").devices()


def test_usable_memory_is_what_the_compiler_grants(chips):
  """It refuses a program that asks for more, and says how much there is."""
  import jax
  import jax.numpy as jnp
  from jax.sharding import NamedSharding, PartitionSpec

  lie = NamedSharding(chips("v5e:2x2"), PartitionSpec())
  x = jax.ShapeDtypeStruct((20 * 2**30 // 4,), jnp.float32, sharding=lie)
  with pytest.raises(jax.errors.JaxRuntimeError, match=r"15\.75G"):
    jax.jit(lambda x: x + 1).lower(x).compile()
  assert CHIPS["v5e"].memory == 15.75 * 2**30


def test_versions_and_the_one_that_jax_pins():
  found = topology.versions("tpu")
  assert found["libtpu_pinned"].endswith(".*")
  assert set(found) == {"jax", "jaxlib", "libtpu", "libtpu_pinned"}
  assert topology.version_warning(found) == ""
  other = found | {"libtpu": "0.0.1.2"}
  assert found["libtpu_pinned"] in topology.version_warning(other)
  assert topology.version_warning({"libtpu": "0.0.421", "libtpu_pinned": "0.0.42.*"})


@pytest.mark.parametrize(
  "name, says", [("v5e:2x2", "libtpu=="), ("h100:8", r"regionjax\[cuda12\]")]
)
def test_a_compiler_that_is_not_installed(name, says, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(AotError, match=says):
    topology.parse(name).devices()

import dataclasses

import jax
import numpy as np
import pytest

from regionjax.config import Config, ConfigError, MeshConfig
from regionjax.config_files import apply_overrides
from regionjax.mesh import (
  AXES,
  batch_sharding,
  from_config,
  make_mesh,
  own_rows,
  parse_mesh,
  put_batch,
  row_shards,
)


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device of a topology: two slices of 2 x 2 chips each, say."""

  id: int
  slice_index: int
  coords: tuple[int, int, int]
  core_on_chip: int = 0
  process_index: int = 0
  platform: str = "tpu"
  device_kind: str = "TPU v5 lite"


def chips(slices=2, side=2):
  """Chips as a topology lists them, which need not be slice by slice."""
  cells = [(x, y) for x in range(side) for y in range(side)]
  listed = [(cell, s) for cell in cells for s in range(slices)]
  return [Chip(i, s, (x, y, 0)) for i, ((x, y), s) in enumerate(listed)]


def test_all_devices_share_the_rows():
  mesh = make_mesh()
  assert mesh.axis_names == AXES
  assert row_shards(mesh) == jax.device_count() == mesh.shape["data"]
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
  "sizes", [dict(data=3), dict(data=-1, fsdp=-1), dict(fsdp=0), dict(tensor=7)]
)
def test_sizes_that_do_not_fit_are_refused(sizes):
  with pytest.raises(ConfigError, match="doesn't fit 1 devices"):
    make_mesh(**sizes, devices=jax.devices()[:1])


@pytest.mark.parametrize(
  "sizes", [dict(fsdp=4), dict(fsdp=2, tensor=2), dict(fsdp=2), dict(tensor=4), dict()]
)
def test_only_the_data_axis_crosses_slices(sizes):
  mesh = make_mesh(**sizes, slices=2, devices=chips())
  data = mesh.shape["data"]
  for index, block in enumerate(mesh.devices):
    assert {chip.slice_index for chip in block.flat} == {index * 2 // data}
  assert len(set(mesh.devices.flat)) == 8


def test_slices_must_be_those_of_the_devices():
  with pytest.raises(ConfigError, match=r"slices=1, but the devices form 2 \(of 4, 4 devices\)"):
    make_mesh(fsdp=8, devices=chips())
  with pytest.raises(ConfigError, match="slices=3, but the devices form 2"):
    make_mesh(slices=3, devices=chips())
  with pytest.raises(ConfigError, match="data=1, which 2 slices can't share"):
    make_mesh(fsdp=8, slices=2, devices=chips())
  with pytest.raises(ConfigError, match="expected at least 1"):
    make_mesh(slices=0, devices=chips())


def test_a_batch_becomes_global_arrays():
  mesh = make_mesh(devices=jax.devices()[:1])
  batch = put_batch({"x": np.arange(6).reshape(3, 2)}, mesh)
  assert batch["x"].sharding == batch_sharding(mesh)
  np.testing.assert_array_equal(batch["x"], np.arange(6).reshape(3, 2))
  assert own_rows(mesh, 3) == [0, 1, 2]


def test_a_run_names_its_mesh():
  config = apply_overrides(Config(), ["--train.mesh.fsdp=1", "--train.mesh.data=1"])
  assert config.train.mesh == MeshConfig(data=1, fsdp=1, tensor=1, slices=1)
  mesh = from_config(config.train.mesh, devices=jax.devices()[:1])
  assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}


def test_a_mesh_on_the_command_line():
  assert parse_mesh("fsdp=2, tensor=4") == MeshConfig(fsdp=2, tensor=4)
  for text in ("tensor", "tensor=x", "heads=8", "8"):
    with pytest.raises(ConfigError, match="expected axes and sizes"):
      parse_mesh(text)

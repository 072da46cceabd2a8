import jax
import numpy as np
import pytest

from regionjax.config import ConfigError
from regionjax.mesh import AXES, batch_sharding, make_mesh, put_batch, row_shards


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


def test_a_batch_becomes_global_arrays():
  mesh = make_mesh(devices=jax.devices()[:1])
  batch = put_batch({"x": np.arange(6).reshape(3, 2)}, mesh)
  assert batch["x"].sharding == batch_sharding(mesh)
  np.testing.assert_array_equal(batch["x"], np.arange(6).reshape(3, 2))

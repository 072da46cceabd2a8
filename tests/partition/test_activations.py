import jax
import jax.numpy as jnp
import numpy as np

from regionjax.mesh import make_mesh
from regionjax.partition import constrain, row_shards


def test_without_a_mesh_nothing_is_added():
  x = jnp.ones((2, 3))
  assert constrain(x, "batch", "tensor") is x
  assert row_shards(8) == 1


def test_on_one_device_nothing_is_added():
  with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
    text = jax.jit(lambda x: constrain(x, "batch", "tensor") + 1).lower(np.ones((2, 3))).as_text()
  assert "sharding_constraint" not in text

"""A step whose FLOPs and communication are known, for programs that nobody runs."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

LAYERS, WIDTH, ROWS = 6, 512, 64
# Of all rows: forward, recomputed, and the gradients of weights and of inputs.
STEP_FLOPS = 4 * LAYERS * 2 * ROWS * WIDTH**2


def step(w_ldd, x_bd):
  """One descent step of six tanh layers, each recomputed in the backward pass."""

  def loss(w_ldd):
    def layer(x_bd, w_dd):
      return jnp.tanh(jnp.dot(x_bd, w_dd, precision="default")), None

    return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x_bd, w_ldd)[0] ** 2)

  return w_ldd - 0.1 * jax.grad(loss)(w_ldd)


def step_args(mesh):
  """Abstract weights split over `fsdp` and rows over both batch axes."""
  weights = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
  rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
  return (
    jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32, sharding=weights),
    jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=rows),
  )

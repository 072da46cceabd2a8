"""Packed training attention compiled for TPUs that aren't there."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from regionjax.aot import topology
from regionjax.mesh import BATCH_AXES, make_mesh
from regionjax.ops.attention import attend_packed

TOKENS = 1536  # no head is as wide as a quarter of it
KERNELS = ["splash_mha_dkv_segmented", "splash_mha_dq_segmented", "splash_mha_fwd_segmented"]


def devices(name):
  topology.use_cpu()
  return topology.parse(name).devices()


def gradients(q, k, v, ids):
  def loss(*qkv):
    return jnp.sum(attend_packed(*qkv, ids).astype(jnp.float32) ** 2)

  return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)


def specs(by_head, by_row, *, heads, kv_heads, width, dtype):
  def shape(n):
    return jax.ShapeDtypeStruct((4, n, TOKENS, width), dtype, sharding=by_head)

  ids = jax.ShapeDtypeStruct((4, TOKENS), jnp.int32, sharding=by_row)
  return shape(heads), shape(kv_heads), shape(kv_heads), ids


def kernels(text) -> list[str]:
  """Names of the Pallas kernels that a program calls."""
  calls = re.findall(r"%(\w+?)_(?:no_)?residuals\S* = .*custom-call\(", text)
  assert text.count('custom_call_target="tpu_custom_call"') == len(calls)
  return sorted(calls)


def squares(text) -> list[str]:
  """Types of arrays in which two axes are the row's tokens, or a quarter of them and more."""
  return re.findall(rf"\w+\[[\d,]*(?:{TOKENS}|{TOKENS // 4}),(?:{TOKENS}|{TOKENS // 4})\]", text)


@pytest.mark.parametrize(
  "name, width, dtype",
  [
    ("v5e:2x2", 128, jnp.bfloat16),
    ("v5e:2x2", 64, jnp.float32),
    ("v5p:2x2x1", 128, jnp.bfloat16),
    ("v6e:2x2", 128, jnp.bfloat16),
    pytest.param("v5e:2x2", 256, jnp.float32, marks=pytest.mark.slow),
    pytest.param("v5e:2x2", 80, jnp.bfloat16, marks=pytest.mark.slow),
    pytest.param("v5e:2x2", 8, jnp.bfloat16, marks=pytest.mark.slow),
  ],
)
def test_attention_is_three_kernels_and_no_square(name, width, dtype):
  one = SingleDeviceSharding(devices(name)[0])
  args = specs(one, one, heads=4, kv_heads=2, width=width, dtype=dtype)
  text = jax.jit(gradients).lower(*args).compile().as_text()
  assert kernels(text) == KERNELS
  assert squares(text) == []


def test_on_a_mesh_of_chips():
  mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=devices("v5e:2x2"))
  heads = NamedSharding(mesh, PartitionSpec(BATCH_AXES, "tensor"))
  rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
  args = specs(heads, rows, heads=4, kv_heads=2, width=128, dtype=jnp.bfloat16)
  text = jax.jit(gradients).lower(*args).compile().as_text()
  assert kernels(text) == KERNELS
  assert squares(text) == []
  assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", text)


def test_other_lengths_take_the_xla_form():
  """The check for squares above does find them."""
  one = SingleDeviceSharding(devices("v5e:2x2")[0])
  q, k, v, ids = specs(one, one, heads=2, kv_heads=2, width=128, dtype=jnp.bfloat16)

  def odd(q, k, v, ids):
    return attend_packed(q, k, v, ids, implementation="xla")

  text = jax.jit(odd).lower(q, k, v, ids).compile().as_text()
  assert kernels(text) == [] and squares(text)

"""A decoder's kernels on an fsdp-only mesh: gathered as few times as there are passes over them."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from mesh_cases import eight_heads

from regionjax import mesh as meshes
from regionjax import partition
from regionjax.aot.collectives import gathers_per_parameter
from regionjax.config import DecoderConfig
from regionjax.models.decoder import Decoder

CHIPS, TOKENS = 16, 128
KERNELS = {"q", "k", "v", "o", "gate", "up", "down"}


def gradients(mesh, remat):
  """(the compiled gradients of three layers, path of a kernel -> elements that a chip lacks)."""
  config = DecoderConfig(
    vocab_size=256, width=1024, layers=3, heads=8, kv_heads=8, head_dim=128, mlp_width=2816,
    max_length=TOKENS,
  )  # fmt: skip
  decoder = Decoder(config, dtype=jnp.bfloat16, remat=remat)
  rows = meshes.batch_sharding(mesh)
  ids = jax.ShapeDtypeStruct((2 * CHIPS, TOKENS), jnp.int32, sharding=rows)
  x = jax.ShapeDtypeStruct((2 * CHIPS, TOKENS, config.width), jnp.bfloat16, sharding=rows)

  def run(params, x, ids):
    return decoder.apply({"params": params}, x, positions_bt=ids, segment_ids_bt=ids)[0]

  def loss(params, x, ids):
    return jnp.sum(run(params, x, ids).astype(jnp.float32) ** 2)

  tiny = jnp.zeros((1, 8, config.width)), jnp.zeros((1, 8), jnp.int32)
  params = jax.eval_shape(
    lambda: decoder.init(jax.random.key(0), tiny[0], positions_bt=tiny[1], segment_ids_bt=tiny[1])
  )["params"]
  params = {name: params[name] for name in ("layers", "norm")}
  model = dataclasses.replace(eight_heads().model, decoder=config)
  lies = partition.shardings(model, {"decoder": params}, mesh)["decoder"]
  params = jax.tree.map(
    lambda a, lie: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=lie), params, lies
  )
  with jax.set_mesh(mesh):
    compiled = jax.jit(jax.grad(loss), out_shardings=lies).lower(params, x, ids).compile()
  missing = {
    f"params['layers']['{name}']['kernel']": params["layers"][name]["kernel"].size
    * (CHIPS - 1) // CHIPS
    for name in KERNELS
  }  # fmt: skip
  return compiled, missing


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "none"])
def test_kernels_are_gathered_twice_and_their_gradients_scattered_once(remat, chips, read):
  """Without recomputation too: gathered kernels are not kept, all layers' would be the model."""
  mesh = chips("v5e:4x4", data=1, fsdp=CHIPS)
  compiled, missing = gradients(mesh, remat)
  talk = read(compiled.as_text()).talk
  kernels = sum(missing.values()) * CHIPS // (CHIPS - 1)
  moved = {
    kind: sum(c.times * c.elements for c in talk if c.kind == kind)
    for kind in ("all-gather", "reduce-scatter")
  }
  assert moved == {"all-gather": 2 * kernels, "reduce-scatter": kernels}
  # Without recomputation the backward pass gathers a copy that the forward pass kept in bf16.
  each = 2.0 if remat == "full" else 1.0
  assert gathers_per_parameter(talk, missing) == pytest.approx(dict.fromkeys(missing, each))

"""FLOPs and bytes of splash attention's kernels, in the jaxpr and in the compiled program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from regionjax.aot import splash_costs
from regionjax.aot.jaxpr_flops import flops
from regionjax.mesh import BATCH_AXES
from regionjax.ops.attention import attend_packed, splash


@pytest.mark.parametrize("tokens", [128, 640, 2048])
def test_the_share_is_what_the_kernels_table_says(tokens):
  kernel = splash._kernel((1, 2, tokens, 8), save=True, interpret=True)
  blocks = tokens // splash.block_size(tokens)
  for info in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info):
    assert info.block_mask.shape == (1, blocks, blocks)
    run = np.count_nonzero(np.asarray(info.block_mask)) / blocks**2
    assert splash_costs.causal_share(blocks, blocks) == run
  assert splash_costs.causal_share(4, 2) == 6 / 8
  assert splash_costs.causal_share(2, 4) == 6 / 8


def test_jaxpr_and_program_agree(chips, read):
  """Two rows of 1,024 tokens on each of two chips: 3 of 4 blocks, 2 + 3 + 4 products of a pair."""
  mesh = chips("v5e:2x2", data=1, fsdp=2, tensor=2)
  by_head = NamedSharding(mesh, PartitionSpec(BATCH_AXES, "tensor"))
  by_row = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
  b, n, k, t, h = 4, 4, 2, 1024, 128
  q, kv = (jax.ShapeDtypeStruct((b, m, t, h), jnp.bfloat16, sharding=by_head) for m in (n, k))
  ids = jax.ShapeDtypeStruct((b, t), jnp.int32, sharding=by_row)

  def program(q, k, v, g, ids):
    out, pullback = jax.vjp(lambda *qkv: attend_packed(*qkv, ids), q, k, v)
    return out, pullback(g)

  args = (q, kv, kv, q, ids)
  product = 2 * b * n * t * t * h * 3 / 4
  with jax.set_mesh(mesh):
    asked = flops(program, *args, platform="tpu")
    # The XLA form reads 5/8 of the keys and computes its scores once more.
    assert flops(program, *args, platform="cuda") == pytest.approx(7 * product * (5 / 8) / (3 / 4))
    compiled = jax.jit(program).lower(*args).compile()
  assert asked == 9 * product + 2 * b * n * t * h  # the result times its gradient, summed per query
  result = read(compiled.as_text())
  assert abs(result.flops * 4 / asked - 1) < 0.03
  calls = {
    splash_costs.kernel(i.name): (i, computation)
    for computation in result.module.computations.values()
    for i in computation
    if splash_costs.flops(i, computation) is not None
  }
  assert sorted(calls) == ["dkv", "dq", "fwd"]
  assert all("pallas_call" in i.op_name for i, _ in calls.values())
  assert {kind: splash_costs.flops(*call) * 4 / product for kind, call in calls.items()} == {
    "fwd": 2, "dq": 3, "dkv": 4,
  }  # fmt: skip


CALL = """\
HloModule m

ENTRY %main (t: s8[1,2,2]) -> bf16[1,4,1024,128] {
  %t = s8[1,2,2]{2,1,0} parameter(0)
  %m = s8[1,2,2]{2,1,0:S(1)} parameter(1)
  %q = bf16[1,4,1024,128]{3,2,1,0} parameter(2)
  %k = bf16[1,2,1024,128]{3,2,1,0} parameter(3)
  %v = bf16[1,2,1024,128]{3,2,1,0:S(1)} parameter(4)
  %rows = s32[1,1024,128]{2,1,0} parameter(5)
  %columns = s32[1,8,1024]{2,1,0} parameter(6)
  %positions = s32[1024,128]{1,0} parameter(7)
  %splash_mha_fwd_segmented_no_residuals.1 = (f32[1,512,128]{2,1,0}, bf16[1,4,1024,128]{3,2,1,0}) custom-call(%t, %m, %q, %k, %v, %rows, %columns, %positions), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/attend/pallas_call"}
  ROOT %out = bf16[1,4,1024,128]{3,2,1,0} get-tuple-element(%splash_mha_fwd_segmented_no_residuals.1), index=1
}
"""  # noqa: E501


def test_blocks_are_fetched_as_often_as_the_grid_comes_to_them(read):
  """3 of 4 pairs of blocks: each of 4 heads fetches 3 blocks of 512 keys, and all queries once."""
  result = read(CALL)
  (kernel,) = result.kernels
  assert kernel.op_name == "jit(f)/attend/pallas_call"  # printed behind two line breaks
  assert kernel.flops == 2 * 2 * 4 * 1024 * 1024 * 128 * 3 / 4
  mib = 2**20
  read_once = 4 + mib  # one table; q
  keys = 4 * 3 * 512 * 128 * 2  # values lie on the chip already
  ids = 4 * (mib // 2) + 4 * 3 * 512 * 8 * 4
  positions = 4 * (mib // 2)
  written = 512 * 128 * 4 + mib
  assert kernel.bytes == read_once + keys + ids + positions + written

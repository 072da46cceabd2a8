import functools

import aot_cases
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from regionjax.aot import hlo, hlo_costs
from regionjax.aot.errors import AotError
from regionjax.aot.jaxpr_flops import flops, window_pairs


def convolution(x, kernel, *, stride=1):
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def gradients(x, kernel):
  return jax.grad(lambda x, k: jnp.sum(convolution(x, k, stride=2) ** 2), argnums=(0, 1))(x, kernel)


# Of fewer images the TPU's compiler cuts each into overlapping strips: more work than asked for.
X, KERNEL = (32, 16, 16, 128), (3, 3, 128, 256)
FORWARD = 2 * 32 * 16 * 16 * 9 * 128 * 256
STRIDED = 2 * 32 * 8 * 8 * 9 * 128 * 256
CASES = {
  "matmul": (jnp.matmul, ((64, 128), (128, 256)), 2 * 64 * 128 * 256),
  "batched": (jnp.matmul, ((6, 64, 128), (6, 128, 256)), 6 * 2 * 64 * 128 * 256),
  "heads": (
    functools.partial(jnp.einsum, "bkxh,bksh->bkxs"), ((2, 3, 64, 128), (2, 3, 96, 128)),
    2 * 3 * 2 * 64 * 96 * 128,
  ),
  "one query": (  # no matrix product on a TPU, but multiplied and summed
    functools.partial(jnp.einsum, "bkxh,bksh->bkxs"), ((8, 4, 1, 128), (8, 4, 512, 128)),
    2 * 8 * 4 * 512 * 128,
  ),
  "weighted values": (
    functools.partial(jnp.einsum, "bkxs,bksh->bkxh"), ((8, 4, 1, 512), (8, 4, 512, 128)),
    2 * 8 * 4 * 512 * 128,
  ),
  "convolution": (convolution, (X, KERNEL), FORWARD),
  "strided": (functools.partial(convolution, stride=2), (X, KERNEL), STRIDED),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_flops_agree_with_the_formula_and_the_trace(name, chips, read):
  function, shapes, expected = CASES[name]
  lie = NamedSharding(chips("v5e:2x2"), PartitionSpec())
  args = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=lie) for s in shapes]
  assert flops(function, *args) == expected
  assert read(jax.jit(function).lower(*args).compile().as_text()).flops == expected


def test_gradients_of_a_strided_convolution(chips, read):
  """The holes that the stride leaves in the dilated output gradient aren't multiplied."""
  lie = NamedSharding(chips("v5e:2x2"), PartitionSpec())
  args = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=lie) for s in (X, KERNEL)]
  asked = flops(gradients, *args)
  # Forward and the kernel's gradient in full; the input's misses what its own edge cuts off.
  assert 2.8 * STRIDED < asked <= 3 * STRIDED
  assert read(jax.jit(gradients).lower(*args).compile().as_text()).flops == pytest.approx(
    asked, rel=0.03
  )


@pytest.mark.parametrize("side, share", [(2, 4 / 9), (3, 1.0)])
def test_maps_smaller_than_the_window_lose_their_padding(side, share, chips, read):
  """libtpu makes a map of two cells the window: only pairs inside it are left, 4 of 9."""
  lie = NamedSharding(chips("v5e:2x2"), PartitionSpec())
  args = [
    jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=lie) for s in ((32, side, side, 128), KERNEL)
  ]
  asked = flops(convolution, *args)
  assert asked == 2 * 32 * side**2 * 9 * 128 * 256
  assert read(jax.jit(convolution).lower(*args).compile().as_text()).flops == asked * share


def test_window_pairs():
  plain = dict(stride=1, low=1, lhs_dilate=1, rhs_dilate=1)
  assert window_pairs(16, 3, 16, **plain) == 48
  # A batch of 8 written as a window, as TPU programs do: each output meets its own input.
  assert window_pairs(8, 8, 8, stride=7, low=0, lhs_dilate=8, rhs_dilate=1) == 8
  # Heads that only the weights have: each meets the one cell of the input, the rest is padding.
  assert window_pairs(1, 8, 8, stride=1, low=7, lhs_dilate=1, rhs_dilate=1) == 8
  # Transposed stride 2: every other position hits a hole.
  assert window_pairs(4, 2, 7, stride=1, low=0, lhs_dilate=2, rhs_dilate=1) == 7


def test_flops_of_calls_branches_and_kernels():
  x = jnp.zeros((8, 8))
  product = 2 * 8**3
  assert flops(jax.checkpoint(jax.jit(lambda x: x @ x)), x) == product
  assert flops(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x), x) == (
    2 * product
  )
  loop = functools.partial(jax.lax.while_loop, lambda x: x[0, 0] > 0, lambda x: x @ x)
  assert flops(loop, x, assumed_trips=3) == 3 * product
  with pytest.raises(AotError, match="say how many"):
    flops(loop, x)
  assert flops(lambda x: (x @ x, x)[1], x) == 0  # nothing reads it

  from jax.experimental import pallas as pl

  def kernel(x_ref, y_ref):
    y_ref[...] = x_ref[...] @ x_ref[...]

  blocks = pl.BlockSpec((8, 8), lambda i: (0, 0))
  shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)
  call = pl.pallas_call(kernel, grid=(5,), in_specs=[blocks], out_specs=blocks, out_shape=shape)
  assert flops(call, x) == 5 * product


def test_flops_inside_shard_map_are_those_of_all_devices(chips):
  mesh = chips("v5e:2x2", data=4)
  rows = PartitionSpec("data")
  mapped = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=rows, out_specs=rows)
  x = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=NamedSharding(mesh, rows))
  assert flops(mapped, x) == 4 * 2 * 8 * 8 * 16


def test_a_step_on_four_chips(read, compiled_step):
  result = read(compiled_step("v5e:2x2", data=1, fsdp=4).as_text())
  assert result.flops * 4 == aot_cases.STEP_FLOPS
  assert set(result.runs.trips.values()) == {aot_cases.LAYERS}


TEXT = """\
HloModule m

%read (p.0: f32[100,128], p.1: s32[]) -> f32[1,128] {
  %p.0 = f32[100,128]{1,0} parameter(0)
  %p.1 = s32[]{:S(6)} parameter(1)
  %zero = s32[] constant(0)
  ROOT %cut = f32[1,128]{1,0} dynamic-slice(%p.0, %p.1, %zero), dynamic_slice_sizes={1,128}
}

%write (q.0: f32[100,128], q.1: f32[1,128], q.2: s32[]) -> f32[100,128] {
  %q.0 = f32[100,128]{1,0} parameter(0)
  %q.1 = f32[1,128]{1,0} parameter(1)
  %q.2 = s32[]{:S(6)} parameter(2)
  %none = s32[] constant(0)
  ROOT %put = f32[100,128]{1,0} dynamic-update-slice(%q.0, %q.1, %q.2, %none)
}

ENTRY %main (x: f32[100,128], i: s32[]) -> f32[100,128] {
  %x = f32[100,128]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %row = f32[1,128]{1,0} fusion(%x, %i), kind=kLoop, calls=%read
  %chip = f32[1,128]{1,0:S(1)} copy(%row)
  %view = f32[100,128]{1,0} bitcast(%x)
  %fetch = ((f32[100,128]{1,0}), f32[10,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%view), slice={[0:10]}
  %fetched = f32[10,128]{1,0:S(1)} slice-done(%fetch)
  %doubled = f32[10,128]{1,0} add(%fetched, %fetched)
  ROOT %out = f32[100,128]{1,0} fusion(%x, %row, %i), kind=kLoop, calls=%write
}
"""  # noqa: E501


def test_bytes_of_slices_updates_and_what_is_on_the_chip(read):
  row, bytes_of = 128 * 4, {k.name: k.bytes for k in read(TEXT).kernels}
  assert bytes_of["row"] == 2 * row  # a slice is read, not the operand
  assert bytes_of["chip"] == row  # its result is not in HBM
  assert bytes_of["fetch"] == 10 * row
  assert bytes_of["doubled"] == 10 * row  # operands on the chip
  assert bytes_of["out"] == 2 * row  # written in place
  assert "view" not in bytes_of
  assert {k.name: k.waits for k in read(TEXT).kernels}["fetch"] is False


CALLS = """\
HloModule m

ENTRY %main (a: bf16[64,32], b: bf16[32,16], x: f32[2,8,8,4], k: f32[3,3,4,16]) -> f32[64,16] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  %x = f32[2,8,8,4]{3,2,1,0} parameter(2)
  %k = f32[3,3,4,16]{3,2,1,0} parameter(3)
  %gemm = (f32[64,16]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %conv = (f32[2,8,8,16]{3,2,1,0}, u8[0]{0}) custom-call(%x, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convForward"
  %mosaic = f32[64,16]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUw=","cost_estimate":{"flops":1234,"transcendentals":0,"bytes_accessed":99}}}
  ROOT %r = f32[64,16]{1,0} get-tuple-element(%gemm), index=0
}
"""  # noqa: E501


def test_flops_of_library_calls():
  module = hlo.parse(CALLS)
  main = module.computations["main"]
  found = {i.name: hlo_costs.instruction_flops(i, main) for i in main}
  assert found["gemm"] == 2 * 64 * 32 * 16
  assert found["conv"] == 2 * 2 * 8 * 8 * 9 * 4 * 16
  assert found["mosaic"] == 1234


SCATTERED = """\
HloModule scattered, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %b.1 = f32[] bitcast(%b)
}

%fused (cache: f32[64,1024], at: s32[2,1], new: f32[2,1024]) -> f32[64,1024] {
  %cache = f32[64,1024]{1,0} parameter(0)
  %at = s32[2,1]{1,0} parameter(1)
  %new = f32[2,1024]{1,0} parameter(2)
  ROOT %scatter.1 = f32[64,1024]{1,0} scatter(%cache, %at, %new), update_window_dims={1}, inserted_window_dims={0}, scatter_dims_to_operand_dims={0}, index_vector_dim=1, to_apply=%add
}

ENTRY %main (cache: f32[64,1024], at: s32[2,1], new: f32[2,1024]) -> f32[64,1024] {
  %cache = f32[64,1024]{1,0} parameter(0)
  %at = s32[2,1]{1,0} parameter(1)
  %new = f32[2,1024]{1,0} parameter(2)
  %alone = f32[64,1024]{1,0} scatter(%cache, %at, %new), update_window_dims={1}, inserted_window_dims={0}, scatter_dims_to_operand_dims={0}, index_vector_dim=1, to_apply=%add
  ROOT %within = f32[64,1024]{1,0} fusion(%alone, %at, %new), kind=kInput, calls=%fused
}
"""  # noqa: E501


def test_what_is_scattered_into_an_array_is_written_in_place(read):
  """As a GPU appends to its cache: rows are read and written, not the array."""
  moved = {k.name: k.bytes for k in read(SCATTERED).kernels}
  assert moved == {"alone": 2 * 2 * 4096, "within": 2 * 2 * 4096 + 2 * 4}


SLICED = """\
HloModule sliced, is_scheduled=true

%fused (stack: f32[32,1024], at: s32[]) -> f32[1,1024] {
  %stack = f32[32,1024]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %one = f32[1,1024]{1,0} dynamic-slice(%stack, %at, %zero), dynamic_slice_sizes={1,1024}
}

ENTRY %main (stack: f32[32,1024], at: s32[]) -> f32[1,1024] {
  %stack = f32[32,1024]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %begun = ((f32[32,1024]{1,0}, s32[]), f32[1,1024]{1,0}, u32[]) fusion-start(%stack, %at), kind=kLoop, calls=%fused
  ROOT %done = f32[1,1024]{1,0} fusion-done(%begun)
}
"""  # noqa: E501


def test_a_fusion_that_runs_beside_others_reads_what_it_slices(read):
  """As a GPU fetches a layer's parameters from their stack."""
  assert {k.name: (k.bytes, k.waits) for k in read(SLICED).kernels} == {
    "begun": (2 * 4096 + 4, False)
  }


@pytest.mark.parametrize("target, products", [("", 2), ("Backward", 5)])
def test_flops_of_cudnn_attention(target, products, read):
  shape = "bf16[2,256,4,64]{3,2,1,0}"
  names = "abcd"
  given = "\n".join(f"  %{n} = {shape} parameter({i})" for i, n in enumerate(names))
  text = (
    "HloModule attention, is_scheduled=true\n\n"
    f"ENTRY %main ({', '.join(f'{n}: bf16[2,256,4,64]' for n in names)}) -> bf16[2,256,4,64] {{\n"
    f"{given}\n"
    f"  %run = ({shape}, u8[0]{{0}}) custom-call(%a, %b, %c, %d), "
    f'custom_call_target="__cudnn$fmhaScaleBiasSoftmax{target}"\n'
    f"  ROOT %out = {shape} get-tuple-element(%run), index=0\n}}\n"
  )
  assert read(text).flops == products * 2 * 2 * 4 * 256 * 256 * 64 / 2


def test_flops_of_cudnn_attention_agree_with_the_trace(monkeypatch):
  """jax can't trace it where there is no GPU, unless it is told that there is cuDNN."""
  from jax._src.cudnn import fused_attention_stablehlo as library

  from regionjax.ops.attention import cudnn

  monkeypatch.setattr(library, "check_cudnn_version", lambda: 91900)
  q = jax.ShapeDtypeStruct((2, 4, 256, 64), jnp.bfloat16)
  ids = jax.ShapeDtypeStruct((2, 256), jnp.int32)
  one = 2 * 2 * 4 * 256 * 256 * 64 / 2
  assert flops(cudnn.forward, q, q, q, ids) == 2 * one
  out, rest = q, jax.ShapeDtypeStruct((2, 4, 256), jnp.float32)
  assert flops(cudnn.backward, q, q, q, ids, out, rest, q) == (2 + 5) * one

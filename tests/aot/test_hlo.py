import numpy as np
import pytest

from regionjax.aot import hlo
from regionjax.aot.errors import AotError

TEXT = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%fused (p.0: bf16[4,128], p.1: s32[]) -> bf16[1,128] {
  %p.0 = bf16[4,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %cut = bf16[1,128]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%p.0, %p.1, %zero), dynamic_slice_sizes={1,128}
}

ENTRY %main (x: bf16[4,128], i: s32[]) -> (bf16[1,128], s32[]) {
  %x = bf16[4,128]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="state.w['a']"}
  %i = s32[]{:T(128)S(6)} parameter(1), metadata={op_name="i"}
  %start = ((bf16[4,128]{1,0:T(8,128)(2,1)}), bf16[2,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:2], [0:128]}
  %done = bf16[2,128]{1,0:T(8,128)(2,1)S(1)} slice-done(%start)
  %f = bf16[1,128]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %i), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/a(b)/slice" stack_frame_id=3}
  ROOT %out = (bf16[1,128]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/s32[]{:T(128)S(6)}) tuple(%f, %i)
}
"""  # noqa: E501


def test_computations_and_instructions():
  module = hlo.parse(TEXT)
  assert (module.entry, module.partitions) == ("main", 4)
  assert list(module.computations) == ["fused", "main"]
  main = module.computations["main"]
  assert main.root == "out"
  fusion = main.instructions["f"]
  assert (fusion.opcode, fusion.operands, fusion.called) == ("fusion", ["x", "i"], ["fused"])
  assert fusion.op_name == "jit(step)/a(b)/slice"
  assert main.instructions["x"].op_name == "state.w['a']"
  assert [i.name for i in main.users["x"]] == ["start", "f"]
  assert [(c.name, i.name) for c, i in module.callers["fused"]] == [("main", "f")]
  cut = module.computations["fused"].instructions["cut"]
  assert cut.integers("dynamic_slice_sizes") == [1, 128]
  assert cut.attribute("calls") == ""


def test_types_with_layouts_tuples_and_memory_spaces():
  main = hlo.parse(TEXT).computations["main"]
  assert main.instructions["x"].leaves == (hlo.Leaf("bf16", (4, 128), hlo.HBM),)
  assert main.instructions["x"].leaves[0].bytes == 4 * 128 * 2
  assert main.instructions["start"].leaves == (
    hlo.Leaf("bf16", (4, 128)), hlo.Leaf("bf16", (2, 128), 1), hlo.Leaf("s32", (), 2),
  )  # fmt: skip
  assert main.instructions["out"].leaves[1] == hlo.Leaf("s32", (), 6)
  assert hlo.Leaf("s4", (3,)).bytes == 2 and hlo.Leaf("pred", ()).bytes == 1
  assert hlo.Leaf("f8e4m3fn", (5,)).bytes == 5
  with pytest.raises(AotError, match="unknown element type 'x7'"):
    _ = hlo.Leaf("x7", (3,)).bytes


def test_text_that_is_none():
  with pytest.raises(AotError, match="no ENTRY"):
    hlo.parse("stablehlo.module {}\n")


def groups(attributes, opcode="all-gather"):
  line = f"  %a = f32[2]{{0}} {opcode}(%b), {attributes}, use_global_device_ids=true"
  text = f"ENTRY %m (b: f32[1]) -> f32[2] {{\n{line}\n}}\n"
  i = hlo.parse(text).computations["m"].instructions["a"]
  return hlo.replica_groups(i, 8).tolist()


@pytest.mark.parametrize(
  "attributes, expected",
  [
    ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
    ("replica_groups={}", [list(range(8))]),
    ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
    (
      "replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}",
      [[0, 1], [2, 3]],
    ),
    ("replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
  ],
)
def test_replica_groups_in_every_notation(attributes, expected):
  assert groups(attributes) == expected


def test_pairs_of_a_permutation():
  pairs = groups("source_target_pairs={{0,1},{1,2}}", "collective-permute")
  assert np.array_equal(pairs, [[0, 1], [1, 2]])


def test_groups_in_no_known_notation():
  with pytest.raises(AotError, match="unknown notation"):
    groups("replica_groups=everyone")
  with pytest.raises(AotError, match="unequal"):
    groups("replica_groups={{0,1},{2}}")

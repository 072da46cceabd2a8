import aot_cases
import numpy as np
import pytest

from regionjax.aot.collectives import Collective, gathers_per_parameter

AXES = {"fsdp only": {"data": 1, "fsdp": 4}, "both": {"data": 2, "fsdp": 2}}
LAYER = aot_cases.WIDTH**2


def summed(talk, mesh):
  """(kind, axes) -> (bytes, elements) of one step."""
  found = {}
  for c in talk:
    bytes_, elements = found.get((c.kind, c.axes(mesh)), (0, 0))
    found[c.kind, c.axes(mesh)] = (bytes_ + c.times * c.bytes, elements + c.times * c.elements)
  return found


def test_weights_are_gathered_twice_and_gradients_scattered_once(read, compiled_step):
  talk = read(compiled_step("v5e:2x2", **AXES["fsdp only"]).as_text()).talk
  found = summed(talk, {"data": 1, "fsdp": 4, "tensor": 1})
  everything = aot_cases.LAYERS * LAYER
  assert found[("all-gather", ("fsdp",))] == (2 * everything * 2, 2 * everything)  # bf16
  assert found[("reduce-scatter", ("fsdp",))] == (everything * 4, everything)  # f32
  assert sum(elements for _, elements in found.values()) == 3 * everything
  assert gathers_per_parameter(talk, {"w_ldd": everything * 3 // 4}) == {"w_ldd": 2.0}


def test_a_gather_in_two_stages_is_one():
  """Four shares of 10: first pairs, then the pairs' halves between them."""

  def stage(elements, groups):
    return Collective("all-gather", "g", "", 1.0, elements, elements, np.array(groups), "w")

  stages = [stage(20, [[0, 1], [2, 3]]), stage(40, [[0, 2], [1, 3]])]
  assert gathers_per_parameter(stages, {"w": 30}) == {"w": 1.0}
  assert gathers_per_parameter([stage(40, [[0, 1, 2, 3]])] * 3, {"w": 30}) == {"w": 3.0}
  assert gathers_per_parameter(stages, {"w": 0}) == {}  # on every device


def test_replicas_add_a_reduction_over_data(read, compiled_step):
  talk = read(compiled_step("v5e:2x2", **AXES["both"]).as_text()).talk
  found = summed(talk, {"data": 2, "fsdp": 2, "tensor": 1})
  everything = aot_cases.LAYERS * LAYER
  assert found[("all-gather", ("fsdp",))] == (2 * everything * 2, 2 * everything)
  assert found[("reduce-scatter", ("fsdp",))] == (everything * 4, everything)
  assert found[("all-reduce", ("data",))] == (everything * 4 // 2, everything // 2)


TEXT = """\
HloModule m, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%begin (g: bf16[64]) -> (bf16[64], bf16[256]) {
  %g = bf16[64]{0} parameter(0)
  %all-gather.1 = bf16[256]{0} all-gather(%g), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="4"}
  ROOT %go = (bf16[64]{0}, bf16[256]{0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%meanwhile (h: bf16[64], to: bf16[256]) -> (bf16[64], bf16[256]) {
  %h = bf16[64]{0} parameter(0)
  %to = bf16[256]{0} parameter(1)
  %all-gather.2 = bf16[256]{0} all-gather(%h), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="4"}
  ROOT %both = (bf16[64]{0}, bf16[256]{0}) tuple(%h, %all-gather.2)
}

%end (e: bf16[64], ready: bf16[256]) -> bf16[256] {
  %e = bf16[64]{0} parameter(0)
  %ready = bf16[256]{0} parameter(1)
  %all-gather.3 = bf16[256]{0} all-gather(%e), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="4"}
  ROOT %wait = bf16[256]{0} custom-call(%e, %ready, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%slice (s: f32[256], at: s32[]) -> f32[64] {
  %s = f32[256]{0} parameter(0)
  %at = s32[] parameter(1)
  ROOT %own = f32[64]{0} dynamic-slice(%s, %at), dynamic_slice_sizes={64}
}

ENTRY %main (w: f32[64], y: f32[256], z: f32[256], at: s32[]) -> (bf16[256], f32[64], f32[256]) {
  %w = f32[64]{0} parameter(0), metadata={op_name="state.w"}
  %y = f32[256]{0} parameter(1)
  %z = f32[256]{0} parameter(2)
  %at.1 = s32[] parameter(3)
  %fetch = ((f32[64]{0}), f32[32]{0:S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:32]}
  %fetched = f32[32]{0:S(1)} slice-done(%fetch)
  %joined = f32[64]{0:S(1)} custom-call(%fetched, %fetched), custom_call_target="ConcatBitcast"
  %half = bf16[64]{0} convert(%joined)
  %start = (bf16[64]{0}, bf16[256]{0}) fusion(%half), kind=kCustom, calls=%begin
  %start.0 = bf16[64]{0} get-tuple-element(%start), index=0
  %start.1 = bf16[256]{0} get-tuple-element(%start), index=1
  %middle = (bf16[64]{0}, bf16[256]{0}) fusion(%start.0, %start.1), kind=kCustom, calls=%meanwhile
  %middle.0 = bf16[64]{0} get-tuple-element(%middle), index=0
  %middle.1 = bf16[256]{0} get-tuple-element(%middle), index=1
  %done = bf16[256]{0} fusion(%middle.0, %middle.1), kind=kCustom, calls=%end
  %all-reduce.1 = f32[256]{0} all-reduce(%y), channel_id=2, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add
  %bits = f32[256]{0} bitcast(%all-reduce.1)
  %mine = f32[64]{0} fusion(%bits, %at.1), kind=kLoop, calls=%slice
  %all-reduce.2 = f32[256]{0} all-reduce(%z), channel_id=3, replica_groups={{0,1},{2,3}}, use_global_device_ids=true, to_apply=%add
  %shift = f32[256]{0} collective-permute(%z), channel_id=4, source_target_pairs={{0,1},{1,2},{2,3}}
  %alone = f32[256]{0} all-reduce(%z), channel_id=5, replica_groups={{0},{1},{2},{3}}, use_global_device_ids=true, to_apply=%add
  %more = bf16[512]{0} all-gather(%done), channel_id=7, replica_groups={{0,2},{1,3}}, dimensions={0}, use_global_device_ids=true
  %begun = (f32[64]{0}, f32[256]{0}) all-gather-start(%w), channel_id=6, replica_groups=[1,4]<=[4], dimensions={0}, use_global_device_ids=true
  %gathered = f32[256]{0} all-gather-done(%begun)
  ROOT %out = (bf16[256]{0}, f32[64]{0}, f32[256]{0}) tuple(%done, %mine, %all-reduce.2)
}
"""  # noqa: E501


def test_each_collective_once_and_by_what_it_does(read):
  talk = {c.name: c for c in read(TEXT).talk}
  assert {name: (c.kind, c.times, c.bytes) for name, c in talk.items()} == {
    "all-gather.1": ("all-gather", 1, 512),  # shown three times
    "all-reduce.1": ("reduce-scatter", 1, 1024),  # only sliced
    "all-reduce.2": ("all-reduce", 1, 1024),
    "shift": ("collective-permute", 1, 1024),
    "more": ("all-gather", 1, 1024),  # goes on with what another has gathered
    "begun": ("all-gather", 1, 1024),
  }
  assert {talk[name].parameter for name in ("all-gather.1", "more", "begun")} == {"state.w"}


def test_bytes_of_an_asynchronous_collective_count_at_its_start(read):
  bytes_of = {k.name: k.bytes for k in read(TEXT).kernels}
  assert (bytes_of["start"], bytes_of["middle"], bytes_of["done"]) == (128 + 512, 0, 0)


def test_traffic_of_ring_algorithms(read):
  sent = {c.name: c.traffic for c in read(TEXT).talk}
  assert sent == {
    "all-gather.1": 384, "all-reduce.1": 768, "all-reduce.2": 1024, "shift": 1024, "begun": 768,
    "more": 512,
  }  # fmt: skip


@pytest.mark.parametrize("shape, axes", [((2, 2, 1), ("fsdp",)), ((2, 1, 2), ("tensor",))])
def test_axes_that_a_group_spans(read, shape, axes):
  mesh = dict(zip(("data", "fsdp", "tensor"), shape))
  talk = {c.name: c.axes(mesh) for c in read(TEXT).talk}
  assert talk["all-reduce.2"] == axes
  assert talk["all-reduce.1"] == tuple(name for name, size in mesh.items() if size > 1)


def test_an_all_reduce_that_is_also_returned_stays_one(read):
  text = TEXT.replace("tuple(%done, %mine, %all-reduce.2)", "tuple(%done, %mine, %all-reduce.1)")
  assert {c.name: c.kind for c in read(text).talk}["all-reduce.1"] == "all-reduce"


def test_two_slices_exchange_gradients_alone(read, compiled_step):
  """What crosses the network is the reduction over data, of the share that each chip holds."""
  text = compiled_step("v5e:2x2", slices=2, data=2, fsdp=4).as_text()
  mesh = {"data": 2, "fsdp": 4, "tensor": 1}
  found = summed(read(text, devices=8).talk, mesh)
  everything = aot_cases.LAYERS * LAYER
  assert found[("all-reduce", ("data",))] == (everything * 4 // 4, everything // 4)
  assert found[("all-gather", ("fsdp",))] == (2 * everything * 2, 2 * everything)
  assert found[("reduce-scatter", ("fsdp",))] == (everything * 4, everything)
  across = [c for c in read(text, devices=8).talk if "data" in c.axes(mesh)]
  assert all(c.groups.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]] for c in across)


GATHERS = """\
HloModule m, num_partitions=4

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%place (zeros: bf16[256], share: f32[64], at: s32[]) -> bf16[256] {
  %zeros = bf16[256]{0} parameter(0)
  %share = f32[64]{0} parameter(1)
  %at = s32[] parameter(2)
  %half = bf16[64]{0} convert(%share)
  ROOT %put = bf16[256]{0} dynamic-update-slice(%zeros, %half, %at)
}

%keep (zeros.1: bf16[256], share.1: f32[64], at.2: s32[]) -> (bf16[64], bf16[256]) {
  %zeros.1 = bf16[256]{0} parameter(0)
  %share.1 = f32[64]{0} parameter(1)
  %at.2 = s32[] parameter(2)
  %half.1 = bf16[64]{0} convert(%share.1)
  %put.1 = bf16[256]{0} dynamic-update-slice(%zeros.1, %half.1, %at.2)
  ROOT %kept = (bf16[64]{0}, bf16[256]{0}) tuple(%half.1, %put.1)
}

ENTRY %main (u: f32[64], w: bf16[64], at: s32[]) -> (bf16[256], bf16[256], bf16[256]) {
  %u = f32[64]{0} parameter(0), metadata={op_name="state.u"}
  %w = bf16[64]{0} parameter(1), metadata={op_name="state.w"}
  %at.1 = s32[] parameter(2)
  %zero = bf16[] constant(0)
  %nothing = bf16[256]{0} broadcast(%zero), dimensions={}
  %one = bf16[256]{0} fusion(%nothing, %u, %at.1), kind=kLoop, calls=%place
  %other = bf16[256]{0} dynamic-update-slice(%nothing, %w, %at.1)
  %both = (bf16[256]{0}, bf16[256]{0}) all-reduce(%one, %other), channel_id=1, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add
  %both.0 = bf16[256]{0} get-tuple-element(%both), index=0
  %both.1 = bf16[256]{0} get-tuple-element(%both), index=1
  %onto = bf16[256]{0} dynamic-update-slice(%both.0, %w, %at.1)
  %real = bf16[256]{0} all-reduce(%onto), channel_id=2, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add
  %pair = (bf16[64]{0}, bf16[256]{0}) fusion(%nothing, %u, %at.1), kind=kLoop, calls=%keep
  %pair.1 = bf16[256]{0} get-tuple-element(%pair), index=1
  %moving = (bf16[256]{0}, bf16[256]{0:S(1)}, u32[]) copy-start(%other)
  %moved = bf16[256]{0} copy-done(%moving)
  %mixed = (bf16[256]{0}, bf16[256]{0}, bf16[256]{0}) all-reduce(%pair.1, %moved, %real), channel_id=3, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add
  ROOT %out = (bf16[256]{0}, bf16[256]{0}, bf16[256]{0}) tuple(%both.0, %both.1, %real)
}
"""  # noqa: E501


def test_a_sum_of_parts_in_zeros_is_a_gather_of_each(read):
  """As libtpu gathers small parameters; it sends what an all-reduce sends."""
  talk = {(c.name, c.parameter): c for c in read(GATHERS).talk}
  assert {key: (c.kind, c.bytes, c.traffic) for key, c in talk.items()} == {
    ("both", "state.u"): ("all-gather", 512, 768),
    ("both", "state.w"): ("all-gather", 512, 768),
    ("real", ""): ("all-reduce", 512, 768),
    # The third array is a sum of its own.
    ("mixed", "state.u"): ("all-gather", 512, 768),
    ("mixed", "state.w"): ("all-gather", 512, 768),
    ("mixed", ""): ("all-reduce", 512, 768),
  }
  found = gathers_per_parameter(list(talk.values()), {"state.u": 192, "state.w": 192})
  assert found == {"state.u": 2.0, "state.w": 2.0}

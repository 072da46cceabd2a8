import jax
import jax.numpy as jnp
import pytest

from regionjax.aot.errors import AotError

HEAD = "HloModule m, num_partitions=1\n\n"


def loop(*, condition, start="0", extra="", body=None):
  """A loop over (counter, bound, matrix) that squares the matrix, and the program around it."""
  body = body or "%one = s32[] constant(1)\n  %next = s32[] add(%i.b, %one)"
  return f"""{HEAD}%body (s: (s32[], s32[], f32[4,4])) -> (s32[], s32[], f32[4,4]) {{
  %s = (s32[], s32[], f32[4,4]{{1,0}}) parameter(0)
  %i.b = s32[] get-tuple-element(%s), index=0
  %n.b = s32[] get-tuple-element(%s), index=1
  %x.b = f32[4,4]{{1,0}} get-tuple-element(%s), index=2
  {body}
  %y = f32[4,4]{{1,0}} dot(%x.b, %x.b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %t = (s32[], s32[], f32[4,4]{{1,0}}) tuple(%next, %n.b, %y)
}}

%test (c: (s32[], s32[], f32[4,4])) -> pred[] {{
  %c = (s32[], s32[], f32[4,4]{{1,0}}) parameter(0)
  %i.c = s32[] get-tuple-element(%c), index=0
  %n.c = s32[] get-tuple-element(%c), index=1
  %x.c = f32[4,4]{{1,0}} get-tuple-element(%c), index=2
  {condition}
}}

ENTRY %main (x: f32[4,4], k: s32[]) -> f32[4,4] {{
  %x = f32[4,4]{{1,0}} parameter(0)
  %k = s32[] parameter(1)
  %zero = s32[] constant({start})
  %bound = s32[] constant(7)
  %init = (s32[], s32[], f32[4,4]{{1,0}}) tuple(%zero, %bound, %x)
  %w = (s32[], s32[], f32[4,4]{{1,0}}) while(%init), condition=%test, body=%body{extra}
  ROOT %r = f32[4,4]{{1,0}} get-tuple-element(%w), index=2
}}
"""


ONCE = 2 * 4**3


@pytest.mark.parametrize(
  "options, trips",
  [
    (dict(condition="%m = s32[] constant(5)\n  ROOT %l = pred[] compare(%i.c, %m), direction=LT"),
     5),
    (dict(condition="ROOT %l = pred[] compare(%i.c, %n.c), direction=LT"), 7),
    (dict(condition="ROOT %l = pred[] compare(%i.c, %n.c), direction=LE", start="3"), 5),
    (
      dict(
        condition="%m = s32[] constant(2)\n  ROOT %l = pred[] compare(%i.c, %m), direction=GT",
        start="12", body="%step = s32[] constant(3)\n  %next = s32[] subtract(%i.b, %step)",
      ),
      4,
    ),
    (
      dict(
        condition="%copy.1 = s32[] copy(%i.c)\n  %l = pred[] compare(%copy.1, %n.c), direction=GE\n"
        "  ROOT %not.1 = pred[] not(%l)"
      ),
      7,
    ),
    (
      dict(
        condition="ROOT %l = pred[] compare(%i.c, %n.c), direction=LT",
        extra=', backend_config={"known_trip_count":{"n":"9"}}',
      ),
      9,
    ),
    (dict(condition="ROOT %l = pred[] compare(%i.c, %n.c), direction=LT", start="8"), 0),
  ],
)  # fmt: skip
def test_trips_of_a_loop(read, options, trips):
  result = read(loop(**options))
  assert result.runs.trips == {"w": trips}
  assert result.flops == trips * ONCE


def test_a_loop_that_depends_on_data(read):
  text = loop(
    condition="%z = f32[] constant(0)\n  %e = f32[] reduce(%x.c, %z), dimensions={0,1}, "
    "to_apply=%add\n  %hot = pred[] compare(%e, %z), direction=GT\n"
    "  %l = pred[] compare(%i.c, %n.c), direction=LT\n  ROOT %and.1 = pred[] and(%hot, %l)"
  )
  with pytest.raises(AotError, match=r"loop w .* say how many"):
    read(text)
  result = read(text, assumed_trips=3)
  assert result.flops == 3 * ONCE and result.runs.assumed == ["w"]


def test_an_endless_loop(read, monkeypatch):
  from regionjax.aot import hlo_loops

  monkeypatch.setattr(hlo_loops, "MAX_TRIPS", 50)
  text = loop(condition="ROOT %l = pred[] compare(%i.c, %n.c), direction=NE", start="8")
  with pytest.raises(AotError, match="more than 50"):
    read(text)


def test_the_costliest_branch_counts(read):
  text = f"""{HEAD}%idle (a: f32[4,4]) -> f32[4,4] {{
  ROOT %a = f32[4,4]{{1,0}} parameter(0)
}}

%busy (b: f32[4,4]) -> f32[4,4] {{
  %b = f32[4,4]{{1,0}} parameter(0)
  ROOT %d = f32[4,4]{{1,0}} dot(%b, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}

ENTRY %main (p: pred[], x: f32[4,4]) -> f32[4,4] {{
  %p = pred[] parameter(0)
  %x = f32[4,4]{{1,0}} parameter(1)
  ROOT %c = f32[4,4]{{1,0}} conditional(%p, %x, %x), BRANCHES
}}
"""
  for branches in (
    "true_computation=%idle, false_computation=%busy", "branch_computations={%busy, %idle}"
  ):  # fmt: skip
    result = read(text.replace("BRANCHES", branches))
    assert result.flops == ONCE
    assert "idle" not in result.runs.count


def nested(x, w):
  def outer(x, _):
    inner, _ = jax.lax.scan(lambda y, _: (jnp.tanh(y @ w), None), x, None, length=3)
    return inner, None

  return jax.lax.scan(outer, x, None, length=5)[0]


NESTED = 5 * 3 * 2 * 16 * 128 * 128


def test_nested_scans_on_the_cpu(read):
  args = jnp.zeros((16, 128)), jnp.zeros((128, 128))
  assert read(jax.jit(nested).lower(*args).compile().as_text()).flops == NESTED


def test_nested_scans_on_a_tpu(read, chips):
  sharding = jax.sharding.NamedSharding(chips("v5e:2x2"), jax.sharding.PartitionSpec())
  args = (jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=sharding) for s in ((16, 128), (128, 128)))
  text = jax.jit(nested).lower(*args).compile().as_text()
  assert "known_trip_count" not in text
  assert read(text).flops == NESTED

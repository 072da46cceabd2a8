"""A profile's times go to the parts of the model that they belong to, names or none."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "benchmark_profile.py"

# A loop over two layers whose bfloat16 inputs XLA converts outside of it, without a name.
TEXT = """HloModule jit_step

%converting (p: bf16[2,4]) -> f32[2,4] {
  %p = bf16[2,4]{1,0} parameter(0)
  ROOT %c = f32[2,4]{1,0} convert(%p)
}

%adding (p.1: f32[2,4]) -> f32[2,4] {
  %p.1 = f32[2,4]{1,0} parameter(0)
  ROOT %a = f32[2,4]{1,0} add(%p.1, %p.1), metadata={op_name="jit(step)/optimizer/add"}
}

%body (b: (f32[2,4], f32[2,4])) -> (f32[2,4], f32[2,4]) {
  %b = (f32[2,4]{1,0}, f32[2,4]{1,0}) parameter(0)
  %b0 = f32[2,4]{1,0} get-tuple-element(%b), index=0
  %b1 = f32[2,4]{1,0} get-tuple-element(%b), index=1
  %inner = f32[2,4]{1,0} copy(%b1)
  %score = f32[2,4]{1,0} dot(%inner, %b1), metadata={op_name="step/decoder/attention/dot_general"}
  %map = f32[2,4]{1,0} dot(%b0, %b0), metadata={op_name="step/decoder/dot_general"}
  ROOT %out = (f32[2,4]{1,0}, f32[2,4]{1,0}) tuple(%map, %score)
}

%condition (d: (f32[2,4], f32[2,4])) -> pred[] {
  %d = (f32[2,4]{1,0}, f32[2,4]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x: bf16[2,4], y: bf16[2,4]) -> f32[2,4] {
  %x = bf16[2,4]{1,0} parameter(0)
  %y = bf16[2,4]{1,0} parameter(1)
  %for_maps = f32[2,4]{1,0} fusion(%x), kind=kLoop, calls=%converting
  %for_scores = f32[2,4]{1,0} fusion(%y), kind=kLoop, calls=%converting
  %start = (f32[2,4]{1,0}, f32[2,4]{1,0}) tuple(%for_maps, %for_scores)
  %loop = (f32[2,4]{1,0}, f32[2,4]{1,0}) while(%start), condition=%condition, body=%body
  %after = f32[2,4]{1,0} get-tuple-element(%loop), index=1
  %saved = f32[2,4]{1,0} copy(%after)
  ROOT %new = f32[2,4]{1,0} fusion(%saved), kind=kLoop, calls=%adding
}
"""


@pytest.fixture(scope="module")
def script():
  spec = importlib.util.spec_from_file_location("benchmark_profile", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_what_has_no_name_counts_for_what_it_is_joined_to(script):
  times = dict(for_maps=1, for_scores=2, inner=4, score=8, map=16, new=32, loop=1000, gone=1000)
  found = script.attribute(times, TEXT)
  assert {name: share * 63 for name, share in found.parts} == pytest.approx(
    {
      "decoder: attention": 2 + 4 + 8,
      "decoder: maps, norms, MLP": 1 + 16,
      "optimiser": 32,
    }
  )
  assert {name: share * 63 for name, share in found.kinds} == pytest.approx(
    {
      "matrix products": 24, "elementwise": 32, "conversions of dtype": 3,
      "copies, slices, fills": 4,
    }
  )  # fmt: skip
  assert found.parts[0][0] == "optimiser"  # largest first


def test_a_program_that_did_not_run_is_an_error(script):
  with pytest.raises(RuntimeError, match="saw no instruction"):
    script.attribute({"elsewhere": 3.0}, TEXT)


def test_the_profiler_sees_a_program_that_runs(script):
  def f(x):
    with jax.named_scope("optimizer"):
      return (x @ x) / 300

  compiled = jax.jit(f).lower(jnp.ones((300, 300))).compile()
  x = jnp.ones((300, 300))
  found = script.profile(lambda: compiled(x).block_until_ready(), compiled.as_text(), steps=2)
  assert dict(found.parts)["optimiser"] == pytest.approx(1)
  assert dict(found.kinds)["matrix products"] > 0

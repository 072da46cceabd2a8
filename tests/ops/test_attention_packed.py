"""Packed training attention: splash, emulated, is the XLA form, and no implementation leaks."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_cases import run_source

from regionjax.ops.attention import attend_packed, cudnn, splash

TOKENS = 256
LENGTHS = ([100, 70, 50, 36], [128, 128, 0, 0])  # segments 1, 2, 3 and padding


def segments():
  return np.stack([np.repeat([1, 2, 3, 0], n) for n in LENGTHS]).astype(np.int32)


def draw(kv_heads, dtype=jnp.float32, seed=0, channels=8):
  """q, k, v and a gradient of the result."""
  rng = np.random.default_rng(seed)
  heads = (4, kv_heads, kv_heads, 4)
  return tuple(jnp.asarray(rng.standard_normal((2, n, TOKENS, channels)), dtype) for n in heads)


@functools.cache
def both_ways(implementation):
  """A jitted (q, k, v, gradient of the result, segment ids) -> result and gradients of q, k, v."""

  def program(q, k, v, g, ids):
    attend = functools.partial(attend_packed, implementation=implementation)
    out, pullback = jax.vjp(lambda *qkv: attend(*qkv, ids), q, k, v)
    return out, *pullback(g)

  return jax.jit(program)


@pytest.fixture(autouse=True)
def four_blocks(monkeypatch):
  """Two by two, one of them hidden by causality."""
  monkeypatch.setattr(splash, "MAX_BLOCK", 128)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_splash_is_the_xla_form(kv_heads):
  args = (*draw(kv_heads), segments())
  for ours, theirs in zip(both_ways("splash")(*args), both_ways("xla")(*args)):
    assert ours.dtype == theirs.dtype
    assert float(jnp.abs(ours - theirs).max() / jnp.abs(theirs).max()) < 1e-5


@pytest.mark.slow
def test_splash_in_bfloat16_has_an_f32_softmax():
  args = draw(2, jnp.bfloat16)
  exact = both_ways("xla")(*(a.astype(jnp.float32) for a in args), segments())
  for ours, theirs in zip(both_ways("splash")(*args, segments()), exact):
    assert ours.dtype == jnp.bfloat16
    assert float(jnp.abs(ours - theirs).max() / jnp.abs(theirs).max()) < 0.02


def leaks(run, used_ids, *, true_ids, **drawn):
  """What crosses from one segment of `true_ids` to another when attention is given `used_ids`.

  Other tokens in one segment must leave the results of the others bitwise as they were, and the
  results of one segment must have gradients of exactly zero for the others' q, k and v.
  """
  q, k, v, g = draw(2, **drawn)
  others = draw(2, seed=1, **drawn)
  before = run(q, k, v, g, used_ids)[0]
  found = []
  for segment in (0, 1, 2, 3):
    inside = jnp.asarray(true_ids == segment)[:, None, :, None]
    changed = [jnp.where(inside, 30 * o, a) for a, o in zip((q, k, v), others)]
    after = run(*changed, g, used_ids)[0]
    if not bool(jnp.all(inside | (before == after))):
      found.append(f"results see segment {segment}")
    assert not bool(jnp.all(before == after))
    for name, grad in zip("qkv", run(q, k, v, jnp.where(inside, g, 0), used_ids)[1:]):
      assert bool(jnp.any(grad))
      if bool(jnp.any(jnp.where(inside, 0, grad))):
        found.append(f"{name} gets a gradient from segment {segment}")
  return found


@pytest.mark.parametrize("implementation", ["xla", "splash", None])
def test_no_segment_sees_another(implementation):
  run, ids = both_ways(implementation), segments()
  assert leaks(run, ids, true_ids=ids) == []


@pytest.mark.parametrize("implementation", ["xla", "splash"])
@pytest.mark.parametrize(
  "mistake, signs",
  [
    (np.ones_like, ["results see segment 1", "results see segment 2", "k gets a gradient"]),
    (lambda ids: np.roll(ids, 1, axis=1), ["results see segment 1", "v gets a gradient"]),
    (lambda ids: np.maximum(ids, 1), ["results see segment 1", "gradient from segment 0"]),
  ],
)
def test_the_test_above_sees_wrong_segment_ids(implementation, mistake, signs):
  """No segments at all, a segment that starts a token late, padding that passes for segment 1."""
  found = leaks(both_ways(implementation), mistake(segments()), true_ids=segments())
  for sign in signs:
    assert any(sign in leak for leak in found), (sign, found)


def test_the_test_above_sees_a_kernel_that_is_not_told(monkeypatch):
  """The ids reach the kernel through one pair; half of it wrong is enough to leak."""
  library = splash._library()
  whole = library.SegmentIds
  monkeypatch.setattr(library, "SegmentIds", lambda q, kv: whole(q, jnp.where(kv == 3, 2, kv)))
  both_ways.cache_clear()
  found = leaks(both_ways("splash"), segments(), true_ids=segments())
  both_ways.cache_clear()
  assert any("segment 3" in leak for leak in found), found


def test_what_splash_takes_and_its_blocks(monkeypatch):
  takes = splash.takes
  assert takes((1, 2, 128, 8), jnp.bfloat16) and takes((1, 2, 2048, 128), jnp.float32)
  for shape in ((1, 2, 100, 64), (1, 2, 0, 64), (1, 2, 128, 12), (1, 2, 128, 264)):
    assert not takes(shape, jnp.float32)
  assert not takes((1, 2, 128, 64), jnp.float16)
  monkeypatch.undo()
  assert [splash.block_size(t) for t in (128, 640, 1152, 2048, 8192)] == [128, 128, 384, 512, 512]


def test_what_cudnn_takes():
  assert cudnn.takes((1, 2, 64, 8), jnp.bfloat16) and cudnn.takes((1, 2, 2048, 128), jnp.float16)
  for shape in ((1, 2, 100, 64), (1, 2, 0, 64), (1, 2, 128, 12), (1, 2, 128, 136)):
    assert not cudnn.takes(shape, jnp.bfloat16)
  assert not cudnn.takes((1, 2, 128, 64), jnp.float32)


@pytest.mark.parametrize(
  "device, there",
  [
    (dict(platform="gpu", compute_capability="9.0"), True),
    (dict(platform="gpu", compute_capability="7.5"), False),
    (dict(platform="gpu", compute_capability="gfx942"), False),
    (dict(platform="tpu"), False),
  ],
)
def test_where_cudnn_is_available(device, there, monkeypatch):
  monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(**device)])
  assert cudnn.available() is there


BF16 = dict(dtype=jnp.bfloat16, channels=64)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cudnn_is_the_xla_form(kv_heads):
  args = draw(kv_heads, **BF16)
  exact = both_ways("xla")(*(a.astype(jnp.float32) for a in args), segments())
  for ours, theirs in zip(both_ways("cudnn")(*args, segments()), exact):
    assert ours.dtype == jnp.bfloat16
    assert float(jnp.abs(ours - theirs).max() / jnp.abs(theirs).max()) < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["cudnn", None])
def test_on_a_gpu_no_segment_sees_another(implementation):
  run, ids = both_ways(implementation), segments()
  assert "fmha" in run.lower(*draw(2, **BF16), ids).compile().as_text()
  assert leaks(run, ids, true_ids=ids, **BF16) == []


@pytest.mark.gpu
def test_on_a_gpu_wrong_segment_ids_are_seen():
  found = leaks(both_ways("cudnn"), np.maximum(segments(), 1), true_ids=segments(), **BF16)
  assert any("results see segment 1" in leak for leak in found), found


def test_errors_say_what_was_given():
  q = jnp.zeros((1, 2, 100, 8))
  ids = jnp.ones((1, 100), jnp.int32)
  with pytest.raises(ValueError, match=r"float32\[1, 2, 100, 8\].*multiples of 128"):
    attend_packed(q, q, q, ids, implementation="splash")
  with pytest.raises(ValueError, match=r"cudnn doesn't take float32\[1, 2, 100, 8\].*bfloat16"):
    attend_packed(q, q, q, ids, implementation="cudnn")
  if not cudnn.available():
    q16, ids16 = jnp.zeros((1, 2, 64, 8), jnp.bfloat16), jnp.ones((1, 64), jnp.int32)
    with pytest.raises(ValueError, match=r"needs an NVIDIA GPU of compute capability 8\.0"):
      attend_packed(q16, q16, q16, ids16, implementation="cudnn")
  with pytest.raises(ValueError, match="'flash', expected None or one of 'xla', 'splash', 'cudnn'"):
    attend_packed(q, q, q, ids, implementation="flash")


EIGHT = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from regionjax.mesh import BATCH_AXES, make_mesh
from regionjax.ops.attention import attend_packed
rng = np.random.default_rng(0)
lengths = ([50, 60, 18], [128, 0, 0], [1, 100, 27], [60, 60, 8])
ids = np.stack([np.repeat([1, 2, 0], n) for n in lengths])
def draw(kv_heads):
  return [rng.standard_normal((4, n, 128, 8), dtype=np.float32) for n in (4, kv_heads, kv_heads, 4)]
def both(implementation):
  def program(q, k, v, g, ids):
    attend = lambda *qkv: attend_packed(*qkv, ids, implementation=implementation)
    out, pullback = jax.vjp(attend, q, k, v)
    return out, *pullback(g)
  return jax.jit(program)
mesh = make_mesh(data=2, fsdp=2, tensor=2)
heads = NamedSharding(mesh, PartitionSpec(BATCH_AXES, "tensor"))
rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
args = draw(2)
expected = both("xla")(*args, ids)
placed = [jax.device_put(a, heads) for a in args] + [jax.device_put(ids, rows)]
with jax.set_mesh(mesh):
  actual = both("splash")(*placed)
for a, e in zip(actual, expected):
  assert a.sharding.is_equivalent_to(heads, 4), a.sharding
  np.testing.assert_allclose(a, e, atol=1e-5)
# Three rows, and one key head: neither is split.
odd = [a[:3] for a in (*draw(1), ids)]
with jax.set_mesh(mesh):
  for a, e in zip(both("splash")(*odd), both("xla")(*odd)):
    np.testing.assert_allclose(a, e, atol=1e-5)
"""


def test_eight_devices_equal_one():
  run_source(EIGHT)

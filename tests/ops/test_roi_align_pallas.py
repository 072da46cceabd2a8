"""The TPU kernels of RoIAlign, emulated: cut into blocks, their schedule, traffic, and the choice.

That they equal the oracles is in test_roi_align.py, for maps of one block.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from regionjax.ops.roi_align import api, einsum, pallas_schedule, pallas_tpu, traffic
from regionjax.ops.roi_align.sampling import Boxes

STAGES = ((16, 16, 1024), (32, 32, 1024), (64, 64, 1024), (112, 112, 256), (128, 128, 1024))


def random_boxes(rng, b, r, k) -> Boxes:
  """Some of them outside, empty, inverted or invalid; image 0 has none, the order is random."""
  xyxy = rng.uniform(-0.3, 1.3, (b, r, 4)).astype(np.float32)
  xyxy[:, 0] = 0.4
  image = rng.integers(1, k, (b, r)) if k > 1 else np.zeros((b, r), np.int64)
  valid = rng.uniform(size=(b, r)) < 0.8
  return Boxes(jnp.asarray(xyxy), jnp.asarray(image, jnp.int32), jnp.asarray(valid))


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_blocks_and_stripes_equal_einsum(dtype, tolerance, monkeypatch):
  """Three blocks of channels, four stripes of rows, in both directions."""
  monkeypatch.setattr(pallas_schedule, "ROW", 6 * 128)
  monkeypatch.setattr(pallas_schedule, "STRIPE", 3 * 16 * 128 * 2)
  rng = np.random.default_rng(0)
  b, k, h, w, c, r = 2, 3, 12, 6, 384, 7
  boxes = random_boxes(rng, b, r, k)
  x = jnp.asarray(rng.standard_normal((b, k, h, w, c)), dtype)
  g = jnp.asarray(rng.standard_normal((b, r, 3, 2, c)), dtype)
  kw = dict(output_size=(3, 2), sampling_ratio=2)
  blocks = pallas_schedule.forward_blocks(x.shape, dtype.dtype.itemsize, (3, 2))
  assert blocks == (128, 3)
  crops = pallas_tpu.forward(x, boxes, interpret=True, **kw)
  unread = jnp.where(boxes.valid_br[:, :, None, None, None], g, jnp.nan)
  grad = pallas_tpu.backward(unread, boxes, x, interpret=True, **kw)
  keep = np.asarray(boxes.valid_br)[:, :, None, None, None]
  exact = dict(kw, output_size=(3, 2))
  expected = np.where(keep, einsum.forward(x.astype(jnp.float32), boxes, **exact), 0)
  g32 = jnp.where(keep, g.astype(jnp.float32), 0)
  transposed = einsum.backward(g32, boxes, x.astype(jnp.float32), **exact)
  for actual, wanted in ((crops, expected), (grad, transposed)):
    assert actual.dtype == dtype
    wanted = np.asarray(wanted)
    assert (
      np.max(np.abs(np.asarray(actual, np.float32) - wanted)) < tolerance * np.abs(wanted).max()
    )
  assert np.all(np.asarray(crops, np.float32)[~np.asarray(boxes.valid_br)] == 0)
  assert np.all(np.asarray(grad, np.float32)[:, 0] == 0)


def walk(schedule, b):
  action, stripe, box = (np.asarray(x)[b] for x in schedule)
  return list(zip((action % pallas_schedule.FIRST).tolist(), stripe.tolist(), box.tolist()))


@pytest.mark.parametrize("k, stripes, valid", [(1, 1, 1.0), (4, 2, 0.7), (3, 4, 0.0)])
def test_schedules_move_every_stripe_once_and_take_every_box_once(k, stripes, valid):
  rng = np.random.default_rng(k)
  b, r = 3, 9
  boxes = random_boxes(rng, b, r, k)
  boxes = boxes._replace(valid_br=jnp.asarray(rng.uniform(size=(b, r)) < valid))
  ok, image = np.asarray(boxes.valid_br), np.asarray(boxes.image_br)
  ahead = pallas_schedule.forward_schedule(boxes, images=k, stripes=stripes)
  back = pallas_schedule.backward_schedule(boxes, images=k, stripes=stripes)
  for i in range(b):
    held, done = [], []
    for action, stripe, box in walk(ahead, i):
      if action == pallas_schedule.STRIPE_STEP:
        held.append(stripe)
      elif action == pallas_schedule.BOX_STEP:
        own = [image[i, box] * stripes + s for s in range(stripes)]
        assert ok[i, box] and held[-stripes:] == own
        done.append(box)
      elif action == pallas_schedule.EMPTY_STEP:
        assert not ok[i, box]
        done.append(box)
    assert sorted(done) == list(range(r)) and len(set(held)) == len(held)
    assert {s // stripes for s in held} == set(image[i][ok[i]])

    summed, written = [], []
    for action, stripe, box in walk(back, i):
      if action == pallas_schedule.BOX_STEP:
        assert ok[i, box] and stripe == image[i, box] * stripes
        assert stripe not in written
        summed.append(box)
      elif action == pallas_schedule.STRIPE_STEP:
        written.append(stripe)
    assert written == list(range(k * stripes))
    assert sorted(summed) == np.flatnonzero(ok[i]).tolist()


@pytest.mark.parametrize("dtype", pallas_schedule.DTYPES)
@pytest.mark.parametrize("shape", STAGES)
def test_maps_fit_into_fast_memory(shape, dtype):
  h, w, c = shape
  item = jnp.dtype(dtype).itemsize
  for choose, held in (
    (pallas_schedule.forward_blocks, item), (pallas_schedule.backward_blocks, 4)
  ):  # fmt: skip
    channels, rows = choose((1, 7, h, w, c), item, (14, 14))
    assert c % channels == 0 and channels % 128 == 0 and h % rows == 0
    moving = 2 * (rows * w * item + 14 * 16 * item) * channels
    assert h * w * channels * held + moving <= 14 * 2**20


def test_maps_that_do_not_fit():
  huge = (1, 1, 512, 512, 256)
  assert pallas_schedule.forward_blocks(huge, 2, (14, 14)) is None
  assert not pallas_schedule.suits(huge, jnp.bfloat16, boxes=4, output_size=(14, 14))
  x = jnp.zeros(huge, jnp.bfloat16)
  boxes = Boxes(jnp.zeros((1, 4, 4)), jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool))
  with pytest.raises(ValueError, match=r"512x512 map of bfloat16 does not fit.*einsum"):
    pallas_tpu.forward(x, boxes, output_size=(14, 14), sampling_ratio=2, interpret=True)
  with pytest.raises(ValueError, match="float16"):
    half = jnp.zeros((1, 1, 8, 8, 128), jnp.float16)
    pallas_tpu.forward(half, boxes, output_size=(14, 14), sampling_ratio=2, interpret=True)


@pytest.mark.parametrize("direction", traffic.DIRECTIONS)
@pytest.mark.parametrize("dtype", pallas_schedule.DTYPES)
@pytest.mark.parametrize("shape", STAGES)
def test_traffic_is_near_the_minimum(shape, dtype, direction):
  h, w, c = shape
  rng = np.random.default_rng(0)
  for boxes in (8, 64):
    one = np.zeros((1, boxes), np.int32)
    several = rng.integers(0, 7, (2, boxes))  # in no order
    some = rng.uniform(size=(2, boxes)) < 0.9
    for k, image, valid in ((1, one, None), (7, several, some)):
      moved = traffic.roi_align_traffic(
        (len(image), k, h, w, c), image, valid_br=valid, direction=direction, dtype=dtype
      )
      assert 1.0 <= moved.ratio <= 1.5, moved


def test_moved_blocks():
  table = np.array([0, 0, 2, 2, 0])
  grid = (3, 5)
  assert traffic.moved_blocks(grid, lambda i, j, table: (i, 0), [table]) == 3
  assert traffic.moved_blocks(grid, lambda i, j, table: (0, j), [table]) == 15
  assert traffic.moved_blocks(grid, lambda i, j, table: (0, table[j]), [table]) == 7
  assert traffic.moved_blocks(grid, lambda i, j, table: (0, 0), [table]) == 1


def test_choice_on_a_tpu():
  def chosen(shape, dtype=jnp.bfloat16, boxes=8, implementation=None):
    return api._choose(jnp.zeros(shape, dtype), boxes, (14, 14), 2, implementation)

  assert chosen((1, 1, 16, 16, 1024)).tpu == "pallas"
  assert chosen((1, 1, 16, 16, 1024)).other == "einsum"
  assert chosen((1, 1, 16, 16, 960)).tpu == "einsum"  # not whole registers
  assert chosen((1, 1, 16, 16, 128)).tpu == "einsum"  # nothing to gain
  assert chosen((1, 1, 16, 16, 1024), jnp.float16).tpu == "einsum"
  assert chosen((1, 1, 16, 16, 1024), boxes=0).tpu == "einsum"
  many = functools.partial(
    pallas_schedule.suits, dtype=jnp.bfloat16, boxes=64, output_size=(14, 14)
  )
  assert many((64, 1, 16, 16, 1024)) and not many((512, 1, 16, 16, 1024))  # scalar memory
  assert set(chosen((1, 1, 16, 16, 96), implementation="pallas")) == {"pallas"}

"""RoIAlign: a scalar oracle, torchvision's figures, invariances, gradients, padding, errors."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regionjax.ops.roi_align import api, roi_align
from regionjax.ops.roi_align.reference import roi_align_reference

IMPLEMENTATIONS = (None, "einsum", "gather", "pallas")
TORCHVISION = Path(__file__).parents[1] / "data" / "roi_align_torchvision.npz"

# None is one of the others: the tests of agreement with the oracles run it too. Pallas is emulated.
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def relative(a, b) -> float:
  return float(np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(b)))


def random_boxes(rng, n: int) -> np.ndarray:
  """Boxes of every sort: inside, crossing borders, outside, empty, thin, inverted, on the edges."""
  centre = rng.uniform(-0.2, 1.2, (n, 2))
  size = rng.exponential(0.35, (n, 2))
  boxes = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
  sort = np.arange(n) % 10
  inside = np.sort(rng.uniform(0, 1, (n, 2, 2)), axis=1).reshape(n, 4)
  boxes[sort < 4] = inside[sort < 4]
  boxes[sort == 4] = np.round(inside[sort == 4] * 8) / 8  # on cell borders
  boxes[sort == 5, 2:] = boxes[sort == 5, :2]  # points
  boxes[sort == 6, 3] = boxes[sort == 6, 1]  # lines
  boxes[sort == 7] = boxes[sort == 7][:, [2, 3, 0, 1]]  # inverted
  boxes[sort == 8] += rng.choice([-2.0, 2.0], ((sort == 8).sum(), 1))  # far outside
  return boxes.astype(np.float32)


@functools.cache
def oracle_case(case: int):
  height, width, output_size, ratio, n = (
    (16, 16, (4, 4), 2, 1200),
    (7, 23, (3, 5), 1, 500),
    (9, 12, (2, 2), 3, 300),
    (1, 1, (2, 2), 2, 50),
    (64, 48, (14, 14), 2, 20),
  )[case]
  rng = np.random.default_rng(case)
  features = rng.standard_normal((height, width, 5), dtype=np.float32)
  boxes = random_boxes(rng, n)
  expected = roi_align_reference(features, boxes, output_size=output_size, sampling_ratio=ratio)
  return features, boxes, output_size, ratio, expected


@implementations
@pytest.mark.parametrize("case", range(5))  # 2,070 boxes
def test_equals_the_scalar_oracle(case, implementation):
  features, boxes, output_size, ratio, expected = oracle_case(case)
  actual = roi_align(
    jnp.asarray(features)[None],
    jnp.asarray(boxes)[None],
    output_size=output_size,
    sampling_ratio=ratio,
    implementation=implementation,
  )
  assert actual.shape == (1, *expected.shape)
  assert relative(actual[0], expected) < 1e-5


@implementations
def test_equals_torchvision(implementation):
  """Forward and gradient of torchvision 0.29.1.

  The figures come from this command, run where torchvision is installed:

    python tests/data/make_roi_align_torchvision.py tests/data/roi_align_torchvision.npz
  """
  with np.load(TORCHVISION) as z:
    for name in ("square", "wide"):
      size, ratio = tuple(z[f"{name}_size"]), int(z[f"{name}_ratio"])

      def f(x, name=name, size=size, ratio=ratio):
        return roi_align(
          x,
          z[f"{name}_boxes"],
          output_size=(int(size[0]), int(size[1])),
          sampling_ratio=ratio,
          implementation=implementation,
        )

      out, transpose = jax.vjp(f, jnp.asarray(z[f"{name}_features"]))
      assert relative(out, z[f"{name}_out"]) < 1e-5
      assert relative(transpose(jnp.asarray(z[f"{name}_cotangent"]))[0], z[f"{name}_grad"]) < 1e-5


@both
def test_gradient_is_the_transpose_of_the_oracle(implementation):
  rng = np.random.default_rng(0)
  h, w, c, boxes = 6, 5, 3, random_boxes(rng, 40)
  # The oracle on one-hot maps is the matrix of the operation.
  one_hot = np.eye(h * w, dtype=np.float32).reshape(h, w, h * w)
  matrix = roi_align_reference(one_hot, boxes, output_size=(3, 2), sampling_ratio=2)
  g = rng.standard_normal((40, 3, 2, c), dtype=np.float32)
  expected = np.einsum("rpqn,rpqc->nc", matrix, g).reshape(h, w, c)

  def loss(x):
    out = roi_align(
      x, boxes[None], output_size=(3, 2), sampling_ratio=2, implementation=implementation
    )
    return jnp.sum(out * g[None])

  assert relative(jax.grad(loss)(jnp.zeros((1, h, w, c)))[0], expected) < 1e-5


@both
def test_images_of_a_row_equal_separate_rows(implementation):
  rng = np.random.default_rng(1)
  features = jnp.asarray(rng.standard_normal((2, 3, 9, 8, 4), dtype=np.float32))
  boxes = random_boxes(rng, 14).reshape(2, 7, 4)
  image = jnp.asarray(rng.integers(0, 3, (2, 7)))
  kw = dict(output_size=3, sampling_ratio=1, implementation=implementation)

  def together(x):
    return roi_align(x, boxes, box_image=image, **kw)

  def one_by_one(x):
    own = jnp.take_along_axis(x, image[:, :, None, None, None], axis=1)
    out = roi_align(own.reshape(14, 9, 8, 4), boxes.reshape(14, 1, 4), **kw)
    return out.reshape(2, 7, 3, 3, 4)

  a, a_t = jax.vjp(together, features)
  b, b_t = jax.vjp(one_by_one, features)
  assert relative(a, b) < 1e-5
  g = jnp.asarray(rng.standard_normal(a.shape, dtype=np.float32))
  assert relative(a_t(g)[0], b_t(g)[0]) < 1e-5


@implementations
def test_invalid_rows_are_zero_and_send_no_gradient(implementation):
  rng = np.random.default_rng(2)
  features = jnp.asarray(rng.standard_normal((1, 2, 8, 8, 4), dtype=np.float32))
  good = [0.1, 0.2, 0.7, 0.9]
  bad = [[np.nan] * 4, [0.1, np.inf, 0.7, 0.9], [np.nan, 0, 1, 1], good, good, good]
  boxes = np.array([[good, *bad]], np.float32)
  valid = jnp.array([[True, True, True, True, False, True, True]])
  image = jnp.array([[1, 0, 0, 0, 0, -1, 2]])  # images -1 and 2 do not exist

  def f(x, boxes, image, valid):
    return roi_align(
      x, boxes, output_size=2, sampling_ratio=1, box_image=image, valid=valid,
      implementation=implementation,
    )  # fmt: skip

  out, transpose = jax.vjp(lambda x: f(x, boxes, image, valid), features)
  assert np.all(np.asarray(out[:, 1:]) == 0) and np.all(np.asarray(out[:, 0]) != 0)
  alone = f(features, boxes[:, :1], image[:, :1], valid[:, :1])
  assert jnp.array_equal(out[:, :1], alone)
  grad = np.asarray(transpose(jnp.ones_like(out).at[:, 1:].set(jnp.nan))[0])
  assert np.all(np.isfinite(grad)) and np.all(grad[:, 0] == 0)
  assert abs(grad.sum() - 2 * 2 * 4) < 1e-4  # an inner box's bins are means: weights sum to 1


@implementations
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_invalid_rows_are_zero_whatever_the_features(implementation, poison):
  rng = np.random.default_rng(5)
  clean = rng.standard_normal((1, 2, 6, 6, 3), dtype=np.float32)
  features = clean.copy()
  features[0, 0, 0, 0] = poison  # the cell that invalid boxes are pointed at
  features[0, 1, 3, 3] = poison
  box = [0.1, 0.2, 0.9, 0.8]
  boxes = np.array([[[0, 0, 0.5, 0.5], box, box, [np.nan] * 4]], np.float32)
  valid, image = jnp.array([[False, False, True, True]]), jnp.array([[0, 1, 2, 0]])

  def run(x):
    return roi_align(
      x, boxes, output_size=2, sampling_ratio=2, box_image=image, valid=valid,
      implementation=implementation,
    )  # fmt: skip

  out, transpose = jax.vjp(run, jnp.asarray(features))
  assert np.all(np.asarray(out) == 0)
  assert np.all(np.asarray(transpose(jnp.full_like(out, jnp.nan))[0]) == 0)


def test_gather_reads_no_other_image():
  """The docstring's other half: einsum multiplies the other images of a row by zero."""
  features = np.ones((1, 2, 6, 6, 3), np.float32)
  features[0, 1] = np.nan
  boxes, image = jnp.array([[[0.1, 0.2, 0.9, 0.8]] * 2]), jnp.array([[0, 1]])
  out = roi_align(
    features, boxes, output_size=2, sampling_ratio=2, box_image=image, implementation="gather"
  )
  np.testing.assert_allclose(out[0, 0], 1.0, rtol=1e-6)
  assert np.all(np.isnan(out[0, 1]))


@both
def test_constants_ramps_shifts_and_huge_boxes(implementation):
  run = functools.partial(roi_align, output_size=4, sampling_ratio=2, implementation=implementation)
  inner = jnp.array([[[0.25, 0.25, 0.75, 0.5], [0.3, 0.3, 0.3, 0.3]]])
  np.testing.assert_allclose(run(jnp.full((1, 16, 16, 2), 3.0), inner), 3.0, rtol=1e-6)
  # A ramp in x reads the bins' centres, in cells: (x * 16 - 1/2).
  ramp = jnp.broadcast_to(jnp.arange(16.0)[None, None, :, None], (1, 16, 16, 1))
  centres = (0.25 + 0.5 * (np.arange(4) + 0.5) / 4) * 16 - 0.5
  np.testing.assert_allclose(run(ramp, inner)[0, 0, :, :, 0], np.tile(centres, (4, 1)), rtol=1e-6)
  x = jnp.asarray(np.random.default_rng(3).standard_normal((1, 16, 16, 2), dtype=np.float32))
  shifted = run(jnp.roll(x, (2, 3), (1, 2)), inner + jnp.array([3, 2, 3, 2])[None, None] / 16)
  assert relative(shifted, run(x, inner)) < 1e-5
  far = jnp.array([[[2.0, 2.0, 3.0, 3.0], [-1e30, -1e30, 1e30, 1e30], [3e38, -3e38, -3e38, 3e38]]])
  assert np.all(np.asarray(run(x, far)) == 0)


@both
def test_under_vmap_and_in_bfloat16(implementation):
  rng = np.random.default_rng(4)
  x = jnp.asarray(rng.standard_normal((2, 10, 10, 8), dtype=np.float32))
  boxes = jnp.asarray(random_boxes(rng, 12).reshape(2, 6, 4))
  run = functools.partial(roi_align, output_size=3, sampling_ratio=1, implementation=implementation)
  expected = run(x, boxes)
  mapped = jax.vmap(lambda x, b: run(x[None], b[None])[0])(x, boxes)
  assert relative(mapped, expected) < 1e-6
  half_x = x.astype(jnp.bfloat16)
  half = run(half_x, boxes)
  assert half.dtype == jnp.bfloat16 and relative(half.astype(jnp.float32), expected) < 2e-2
  gradient = jax.grad(lambda x: jnp.sum(run(x, boxes)).astype(jnp.float32))
  assert jax.eval_shape(gradient, half_x).dtype == jnp.bfloat16


def test_boxes_get_no_gradient():
  x = jnp.ones((1, 4, 4, 1)) * jnp.arange(4.0)[None, None, :, None]
  boxes = jnp.array([[[0.1, 0.1, 0.6, 0.6]]])
  grad = jax.grad(lambda b: jnp.sum(roi_align(x, b, output_size=2, sampling_ratio=2)))(boxes)
  assert np.all(np.asarray(grad) == 0)


def test_no_boxes():
  out, transpose = jax.vjp(
    lambda x: roi_align(x, jnp.zeros((2, 0, 4)), output_size=2, sampling_ratio=2),
    jnp.ones((2, 4, 4, 3)),
  )
  assert out.shape == (2, 0, 2, 2, 3)
  assert np.all(np.asarray(transpose(out)[0]) == 0)


def test_choice_by_shape():
  def chosen(shape, output_size, ratio):
    return api._fastest_on_cpu(shape, output_size=output_size, sampling_ratio=ratio)

  # The figures behind these are in the comments of einsum.py, gather.py and api.py.
  assert chosen((1, 1, 16, 16, 1024), (14, 14), 2) == ("gather", "einsum")
  assert chosen((1, 1, 112, 112, 256), (14, 14), 2) == ("gather", "gather")
  assert chosen((1, 1, 16, 16, 1024), (14, 14), 4) == ("einsum", "einsum")


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(features=jnp.zeros((4, 4, 3))), r"\[B, H, W, C\]"),
    (dict(features=jnp.zeros((1, 4, 4, 3), jnp.int32)), "float"),
    (dict(boxes=jnp.zeros((2, 3, 4))), r"expected \[1, R, 4\]"),
    (dict(valid=jnp.ones((1, 2), bool)), r"valid has shape \(1, 2\)"),
    (dict(features=jnp.zeros((1, 2, 4, 4, 3))), "box_image"),
    (dict(sampling_ratio=0), "at least 1"),
    (dict(implementation="cuda"), "'einsum', 'gather'"),
  ],
)
def test_bad_arguments(change, message):
  good = dict(
    features=jnp.zeros((1, 4, 4, 3)), boxes=jnp.zeros((1, 3, 4)), output_size=2, sampling_ratio=2
  )
  with pytest.raises(ValueError, match=message):
    roi_align(**(good | change))

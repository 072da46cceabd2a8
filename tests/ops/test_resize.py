"""Aligned-corner resizing: torch's figures, exactness on linear maps, dtypes."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from regionjax.ops.resize import align_corners_matrix, resize_align_corners

SIZES = [
  ((4, 5), (9, 7)),
  ((9, 7), (4, 5)),
  ((16, 8), (16, 8)),
  ((3, 12), (6, 6)),
  ((5, 5), (1, 2)),
]
SIZES += [((1, 4), (3, 8))]


@pytest.mark.parametrize("source, target", SIZES)
def test_equals_torch(source, target):
  x = np.random.default_rng(0).standard_normal((2, *source, 3), dtype=np.float32)
  expected = torch.nn.functional.interpolate(
    torch.from_numpy(x.transpose(0, 3, 1, 2)), size=target, mode="bilinear", align_corners=True
  )
  expected = expected.numpy().transpose(0, 2, 3, 1)
  actual = resize_align_corners(jnp.asarray(x), target)
  assert actual.shape == expected.shape
  assert np.max(np.abs(actual - expected)) < 1e-5 * np.max(np.abs(expected))


def test_corners_stay_and_linear_maps_stay_linear():
  y, x = np.meshgrid(np.linspace(0, 1, 5), np.linspace(-2, 2, 6), indexing="ij")
  ramp = jnp.asarray((3 * y + x)[None, :, :, None], jnp.float32)
  out = np.asarray(resize_align_corners(ramp, (11, 13)))[0, :, :, 0]
  y, x = np.meshgrid(np.linspace(0, 1, 11), np.linspace(-2, 2, 13), indexing="ij")
  np.testing.assert_allclose(out, 3 * y + x, atol=1e-5)


def test_matrix_rows_sum_to_one():
  for source, target in ((16, 128), (128, 16), (7, 1), (1, 7)):
    np.testing.assert_allclose(align_corners_matrix(source, target).sum(1), 1.0, atol=1e-6)


def test_bfloat16_in_and_out_with_float32_inside():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, 6, 4)), jnp.bfloat16)
  out = resize_align_corners(x, (11, 11))
  assert out.dtype == jnp.bfloat16
  exact = resize_align_corners(x.astype(jnp.float32), (11, 11))
  assert jnp.array_equal(out, exact.astype(jnp.bfloat16))


def test_bad_arguments():
  with pytest.raises(ValueError, match=r"\[B, H, W, C\]"):
    resize_align_corners(jnp.zeros((4, 4, 3)), (2, 2))
  with pytest.raises(ValueError, match="at least 1"):
    resize_align_corners(jnp.zeros((1, 4, 4, 3)), (0, 2))

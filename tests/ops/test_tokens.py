"""Patches, resampled position tables and slot filling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from regionjax.ops import tokens


def test_patches_are_row_major_and_keep_pixel_order():
  images = np.random.default_rng(0).normal(size=(2, 6, 4, 3)).astype(np.float32)
  patches = tokens.patchify(jnp.asarray(images), 2)
  assert patches.shape == (2, 6, 12)
  for n in range(6):
    y, x = divmod(n, 2)
    want = images[1, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].reshape(-1)
    np.testing.assert_array_equal(patches[1, n], want)


def test_an_image_that_patches_do_not_tile_is_refused():
  with pytest.raises(ValueError, match=r"5x4.*multiples of the patch size 2.*4x4"):
    tokens.patchify(jnp.zeros((1, 5, 4, 3)), 2)


@pytest.mark.parametrize("size, new", [(4, 7), (7, 4), (16, 24), (5, 1), (1, 3), (3, 3)])
def test_cubic_matrix_is_torchs_bicubic(size, new):
  x = torch.randn(1, 1, size, 1, generator=torch.Generator().manual_seed(0))
  theirs = torch.nn.functional.interpolate(x, (new, 1), mode="bicubic", align_corners=False)
  ours = tokens.cubic_matrix(size, new) @ x[0, 0].numpy()
  np.testing.assert_allclose(ours, theirs[0, 0].numpy(), atol=1e-5)
  np.testing.assert_allclose(tokens.cubic_matrix(size, new).sum(1), 1.0, atol=1e-6)


def test_resize_positions_keeps_the_class_row_and_its_own_grid():
  table = jnp.asarray(np.random.default_rng(0).normal(size=(1 + 6, 4)), jnp.float32)
  assert tokens.resize_positions(table, (2, 3), (2, 3)) is table
  out = tokens.resize_positions(table, (2, 3), (4, 2))
  assert out.shape == (9, 4)
  np.testing.assert_array_equal(out[0], table[0])
  flat = jnp.concatenate([table[:1], jnp.ones((6, 4))])
  np.testing.assert_allclose(tokens.resize_positions(flat, (2, 3), (5, 5))[1:], 1.0, atol=1e-6)


def test_merged_patches_are_squares_side_by_side():
  x = jnp.arange(2 * 1 * 4 * 6 * 2, dtype=jnp.float32).reshape(2, 1, 4, 6, 2)
  merged = np.asarray(tokens.merge_patches(x, 2))
  assert merged.shape == (2, 1, 6, 8)
  square = np.asarray(x)[1, 0, 2:4, 4:6]  # second row of squares, third of its columns
  np.testing.assert_array_equal(merged[1, 0, 5], square.reshape(-1))
  np.testing.assert_array_equal(tokens.merge_patches(x, 1), x.reshape(2, 1, 24, 2))
  with pytest.raises(ValueError, match=r"4x6 patches.* can't be merged 4 by 4"):
    tokens.merge_patches(x, 4)


def by_hand(x, slots, features):
  out = np.array(x)
  for b in range(len(x)):
    for k, t in enumerate(np.flatnonzero(slots[b])):
      out[b, t] = features[b, k]
  return out


def test_the_kth_slot_of_a_row_gets_its_kth_feature():
  rng = np.random.default_rng(0)
  x, features = rng.normal(size=(4, 9, 3)), rng.normal(size=(4, 5, 3))
  slots = rng.random((4, 9)) < 0.4
  slots[0] = False
  slots[1] = np.arange(9) < 5
  ours = jax.jit(tokens.fill_slots)(
    jnp.asarray(x, jnp.float32), jnp.asarray(slots), jnp.asarray(features, jnp.float32)
  )
  np.testing.assert_allclose(ours, by_hand(x, slots, features), rtol=1e-6)


def test_gradients_reach_used_features_and_unfilled_tokens_only():
  x, features = jnp.ones((1, 4, 2)), jnp.ones((1, 3, 2))
  slots = jnp.asarray([[False, True, False, True]])
  dx, df = jax.grad(lambda *a: tokens.fill_slots(a[0], slots, a[1]).sum(), argnums=(0, 1))(
    x, features
  )
  assert dx[0, :, 0].tolist() == [1, 0, 1, 0]
  assert df[0, :, 0].tolist() == [1, 1, 0]


def test_no_features_leave_the_tokens():
  x = jnp.ones((2, 3, 4))
  assert tokens.fill_slots(x, jnp.ones((2, 3), bool), jnp.zeros((2, 0, 4))) is x

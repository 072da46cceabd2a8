"""Pixels to patch tokens, and features into the slots of a token row.

Axes: b rows, t tokens, m features of a row (all its images' patches, or its regions), d channels,
n patches, p pixels of a patch times 3, c ViT channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def patchify(images_bhwc: Array, patch_size: int) -> Array:
  """Cuts images into patches, row by row; the values of a patch are in (y, x, channel) order.

  Args:
    images_bhwc: [B, H, W, 3].
    patch_size: pixels per side.

  Returns:
    [B, (H/P)*(W/P), P*P*3] in the images' dtype.

  Raises:
    ValueError: a side that is no multiple of the patch size.
  """
  b, h, w, c = images_bhwc.shape
  if h % patch_size or w % patch_size:
    raise ValueError(
      f"image of {h}x{w} pixels (height x width): both must be multiples of the patch size "
      f"{patch_size}; resize the image, e.g. to "
      f"{max(h // patch_size, 1) * patch_size}x{max(w // patch_size, 1) * patch_size}"
    )
  gh, gw = h // patch_size, w // patch_size
  patches = images_bhwc.reshape(b, gh, patch_size, gw, patch_size, c)
  return patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, gh * gw, patch_size * patch_size * c)


def merge_patches(x_bkhwc: Array, merge: int) -> Array:
  """Squares of `merge` x `merge` patches side by side in one token's channels, row by row.

  Args:
    x_bkhwc: [B, K, H, W, C], H and W multiples of `merge`.
    merge: side of a square; 1 only flattens.

  Returns:
    [B, K, H * W / merge^2, merge^2 * C]; a token's channels are in (y, x, channel) order.

  Raises:
    ValueError: a side that is no multiple of `merge`.
  """
  b, k, h, w, c = x_bkhwc.shape
  if h % merge or w % merge:
    raise ValueError(
      f"{h}x{w} patches (height x width) can't be merged {merge} by {merge}: both sides must be "
      "multiples; change the image size, or connector.merge"
    )
  x = x_bkhwc.reshape(b, k, h // merge, merge, w // merge, merge, c)
  x = x.transpose(0, 1, 2, 4, 3, 5, 6)
  return x.reshape(b, k, (h // merge) * (w // merge), merge * merge * c)


def cubic_matrix(size: int, new_size: int) -> np.ndarray:
  """One axis of torch's bicubic resize (align_corners=False, a = -0.75, no antialias).

  Args:
    size: samples given.
    new_size: samples wanted.

  Returns:
    [new_size, size] f32; each row sums to 1. Samples outside repeat the border's.
  """
  a = -0.75
  centre = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
  first = np.floor(centre).astype(int)
  matrix = np.zeros((new_size, size))
  for tap in range(-1, 3):
    r = np.abs(centre - (first + tap))
    near = (a + 2) * r**3 - (a + 3) * r**2 + 1
    far = a * (r**3 - 5 * r**2 + 8 * r - 4)
    weight = np.where(r <= 1, near, np.where(r < 2, far, 0.0))
    np.add.at(matrix, (np.arange(new_size), np.clip(first + tap, 0, size - 1)), weight)
  return matrix.astype(np.float32)


def resize_positions(table_nc: Array, grid: tuple[int, int], new_grid: tuple[int, int]) -> Array:
  """Position embeddings of a patch grid, resampled for another grid; the class row is kept.

  Agrees with `interpolate_pos_encoding` of transformers' CLIP, non-square grids included.

  Args:
    table_nc: [1 + gh*gw, C], the class token's row first.
    grid: (gh, gw) of the table.
    new_grid: (gh, gw) wanted.

  Returns:
    [1 + new_gh*new_gw, C] in the table's dtype; the table itself when the grids are equal.
  """
  if grid == new_grid:
    return table_nc
  cells = table_nc[1:].astype(jnp.float32).reshape(*grid, -1)
  vertical, horizontal = (cubic_matrix(a, b) for a, b in zip(grid, new_grid))
  cells = jnp.einsum("yh,xw,hwc->yxc", vertical, horizontal, cells)
  cells = cells.reshape(-1, cells.shape[-1]).astype(table_nc.dtype)
  return jnp.concatenate([table_nc[:1], cells])


def fill_slots(x_btd: Array, slots_bt: Array, features_bmd: Array) -> Array:
  """Puts a row's features, in order, into its slots: the k-th slot gets feature k.

  Static shapes for any number of slots per row: the index is a running count of the slots.

  Args:
    x_btd: [B, T, D] token embeddings.
    slots_bt: [B, T] bool.
    features_bmd: [B, M, D], cast to x's dtype. A slot past the M-th repeats the last feature; the
      input pipeline refuses such rows.

  Returns:
    [B, T, D] in x's dtype. With M = 0, x itself.
  """
  m = features_bmd.shape[1]
  if m == 0:
    return x_btd
  index_bt = jnp.clip(jnp.cumsum(slots_bt, axis=1) - 1, 0, m - 1)
  picked_btd = jnp.take_along_axis(features_bmd.astype(x_btd.dtype), index_bt[:, :, None], axis=1)
  return jnp.where(slots_bt[:, :, None], picked_btd, x_btd)

"""Batches of no data, for programs that are only timed.

Time doesn't depend on the values of parameters, but it does on a batch: images without regions are
skipped by the pyramid, and text without supervised tokens by the output layer. So here everything
is there.
"""

from __future__ import annotations

import jax
import numpy as np


def made_up_batch(
  shapes: dict[str, jax.ShapeDtypeStruct],
  *,
  vocab: int,
  image_slot_id: int,
  region_slot_id: int,
  supervised: int | None = None,
) -> dict[str, np.ndarray]:
  """A batch in which every row is one example with all its images and regions.

  Rows begin with their images' slots; behind them every place that regions need holds a region's
  slot, evenly spread, and the rest is text.

  Args:
    shapes: from `models.params.batch_shapes`.
    vocab: ids of text are drawn below it.
    image_slot_id: of the tokenizer.
    region_slot_id: of the tokenizer.
    supervised: tokens at a row's end that are; None: all behind the images.

  Returns:
    Host arrays of these shapes and dtypes, the same in every call.

  Raises:
    ValueError: images and regions take more places than a row has.
  """
  rng = np.random.default_rng(0)
  batch = {name: np.zeros(s.shape, s.dtype) for name, s in shapes.items()}
  (b, t), (_, k), (_, r, patches) = (
    batch[name].shape for name in ("tokens_bt", "image_mask_bk", "region_cover_brn")
  )
  room = t - k * patches
  if room < r:
    raise ValueError(
      f"{k} images of {patches} tokens and {r} regions take {k * patches + r} places, and a row "
      f"has {t}: raise data.tokens_per_row, or lower images_per_row"
    )
  first = max(image_slot_id, region_slot_id) + 1
  tokens = rng.integers(first, vocab, (b, t))
  tokens[:, : k * patches] = image_slot_id
  if r:
    tokens[:, k * patches + np.arange(r) * room // r] = region_slot_id
  weights = np.zeros((b, t))
  weights[:, t - 1 - (room if supervised is None else supervised) : t - 1] = 1
  corner = rng.random((b, r, 2)) * 0.5
  given = dict(
    tokens_bt=tokens, targets_bt=np.roll(tokens, -1, axis=1), loss_weights_bt=weights,
    segment_ids_bt=np.ones((b, t)), positions_bt=np.tile(np.arange(t), (b, 1)),
    images_bkhwc=rng.standard_normal(batch["images_bkhwc"].shape, dtype=np.float32),
    image_mask_bk=np.ones((b, k)),
    boxes_br4=np.concatenate([corner, corner + 0.1 + 0.4 * rng.random((b, r, 2))], axis=-1),
    box_image_br=np.tile(np.arange(r) * k // max(r, 1), (b, 1)),
    region_kind_br=np.full((b, r), 2), region_mask_br=np.ones((b, r)),
    region_cover_brn=np.full((b, r, patches), 0.25),
  )  # fmt: skip
  for name, value in given.items():
    batch[name] = np.asarray(value, batch[name].dtype)
  return batch

"""Arrays of a batch out of encoded examples, regions and decoded images.

Axis legend: B rows, T tokens, K images of a row, R region slots of a row, N patches of an image.

The rules that training, evaluation and inference share:

- position t predicts token t + 1 of its own segment: `targets_bt[:, t]`, its loss weight and its
  answer id belong to that next token, and a segment's last position predicts nothing;
- images and region slots stand in a row in the order of their slot tokens;
- a region is expressed in the frame of the resized image that the model sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from regionjax.config import Config
from regionjax.data.errors import DataError
from regionjax.data.schema import Batch, Example
from regionjax.images import ImageTransform, preprocess
from regionjax.regions import Region

if TYPE_CHECKING:
  from regionjax.conversation import Encoded


@dataclasses.dataclass(frozen=True)
class Frame:
  """How pixels become the model's input: the part of a config that a decode process needs."""

  rule: str
  image_hw: tuple[int, int]
  grid: tuple[int, int]
  mean: tuple[float, ...]
  std: tuple[float, ...]

  @classmethod
  def of(cls, config: Config) -> Frame:
    v = config.model.vision
    return cls(config.data.resize, v.image_hw, v.grid, tuple(v.mean), tuple(v.std))

  def prepare(self, image_u8: np.ndarray) -> tuple[np.ndarray, ImageTransform]:
    """uint8 [h,w,3] -> normalised float32 [H,W,3] and the transform of its regions."""
    return preprocess(image_u8, rule=self.rule, size_hw=self.image_hw, mean=self.mean, std=self.std)


@dataclasses.dataclass(frozen=True)
class RegionArrays:
  """The region slots of some examples; R is their number, without padding.

  Attributes:
    boxes_r4: float32, xyxy in [0,1] of the resized image.
    box_image_r: int32, index into the row's images.
    kind_r: int32, 1 point, 2 box, 3 polygon, mask or scribble.
    cover_rn: float32 in [0,1], share of each patch covered (bilinear weights for a point).
  """

  boxes_r4: np.ndarray
  box_image_r: np.ndarray
  kind_r: np.ndarray
  cover_rn: np.ndarray


def encode_region_arrays(
  regions: Sequence[Region],
  region_slots: Sequence[int],
  region_images: Sequence[int],
  transforms: Sequence[ImageTransform] | Mapping[int, ImageTransform],
  grid: tuple[int, int],
  *,
  image_slots: Sequence[int] | None = None,
) -> RegionArrays:
  """What the region encoder reads, for every region slot of one example.

  Args:
    regions: the example's regions, in xy of their original images.
    region_slots: index into `regions` of each slot, in order; a region may have several slots.
    region_images: for each region, the index of its image in the example.
    transforms: for each image of the example (each that has a slot), how its region coordinates
      move with resizing.
    grid: patches per column and row (h, w).
    image_slots: which image of the example each image of the row shows, in order; by default image
      k is the row's image k. A region is read from the first slot of its image.

  Returns:
    One entry per slot.

  Raises:
    DataError: a region's image has no slot.
  """
  slots = list(range(len(transforms)) if image_slots is None else image_slots)
  patches = grid[0] * grid[1]
  n = len(region_slots)
  out = RegionArrays(
    np.zeros((n, 4), np.float32),
    np.zeros(n, np.int32),
    np.zeros(n, np.int32),
    np.zeros((n, patches), np.float32),
  )
  first: dict[int, int] = {}
  for j, r in enumerate(region_slots):
    if r in first:  # a mention again: same arrays, rasterised once
      for array in (out.boxes_r4, out.box_image_r, out.kind_r, out.cover_rn):
        array[j] = array[first[r]]
      continue
    first[r] = j
    image = region_images[r]
    if image not in slots:
      raise DataError(
        f"region {r} lies in image {image}, which the text doesn't show (it shows images {slots})"
      )
    region = regions[r].transform(transforms[image])
    out.boxes_r4[j] = region.box_xyxy
    out.box_image_r[j] = slots.index(image)
    out.kind_r[j] = region.kind_id
    out.cover_rn[j] = region.cover(grid)
  return out


def concat_regions(
  parts: Sequence[tuple[RegionArrays, int]], grid: tuple[int, int]
) -> RegionArrays:
  """Region slots of a whole row out of those of its examples.

  Args:
    parts: each example's arrays and its number of image slots, in order.
    grid: patches per column and row, for a row without any region.
  """
  empty = encode_region_arrays((), (), (), (), grid)
  arrays, shift = [empty], 0
  for part, images in parts:
    arrays.append(dataclasses.replace(part, box_image_r=part.box_image_r + np.int32(shift)))
    shift += images
  names = [field.name for field in dataclasses.fields(RegionArrays)]
  return RegionArrays(*(np.concatenate([getattr(a, name) for a in arrays]) for name in names))


def text_arrays(
  rows: Sequence[Sequence[Encoded]], *, tokens: int, pad_id: int
) -> dict[str, np.ndarray]:
  """The five token arrays of a batch [B,T]; each row is the concatenation of its examples."""
  shape = (len(rows), tokens)
  out = {
    "tokens_bt": np.full(shape, pad_id, np.int32),
    "targets_bt": np.full(shape, pad_id, np.int32),
    "loss_weights_bt": np.zeros(shape, np.float32),
    "segment_ids_bt": np.zeros(shape, np.int32),
    "positions_bt": np.zeros(shape, np.int32),
    "answer_ids_bt": np.zeros(shape, np.int32),
  }
  for b, row in enumerate(rows):
    start, answers = 0, 0
    for segment, encoded in enumerate(row, 1):
      n = len(encoded.ids)
      here, before_last = slice(start, start + n), slice(start, start + n - 1)
      out["tokens_bt"][b, here] = encoded.ids
      out["targets_bt"][b, before_last] = encoded.ids[1:]
      out["loss_weights_bt"][b, before_last] = encoded.mask[1:]
      out["segment_ids_bt"][b, here] = segment
      out["positions_bt"][b, here] = np.arange(n)
      ids = encoded.answer_ids[1:]
      out["answer_ids_bt"][b, before_last] = np.where(ids > 0, ids + answers, 0)
      start += n
      answers += len(encoded.answers)
  return out


def slot_arrays(rows: int, *, images: int, regions: int, frame: Frame) -> dict[str, np.ndarray]:
  """Empty image and region arrays of a batch [B,K,...] and [B,R,...]."""
  h, w = frame.image_hw
  return {
    "images_bkhwc": np.zeros((rows, images, h, w, 3), np.float32),
    "image_mask_bk": np.zeros((rows, images), bool),
    "boxes_br4": np.zeros((rows, regions, 4), np.float32),
    "box_image_br": np.zeros((rows, regions), np.int32),
    "region_kind_br": np.zeros((rows, regions), np.int32),
    "region_mask_br": np.zeros((rows, regions), bool),
    "region_cover_brn": np.zeros((rows, regions, frame.grid[0] * frame.grid[1]), np.float32),
  }


def fill_slots(
  out: dict[str, np.ndarray], row: int, images: Sequence[np.ndarray], regions: RegionArrays
) -> None:
  """Writes the images [H,W,3] and region slots of row `row` into the arrays of a batch."""
  for slot, image in enumerate(images):
    out["images_bkhwc"][row, slot] = image
  out["image_mask_bk"][row, : len(images)] = True
  r = slice(0, len(regions.kind_r))
  out["boxes_br4"][row, r] = regions.boxes_r4
  out["box_image_br"][row, r] = regions.box_image_r
  out["region_kind_br"][row, r] = regions.kind_r
  out["region_mask_br"][row, r] = True
  out["region_cover_brn"][row, r] = regions.cover_rn


def single_batch(
  encoded: Encoded,
  example: Example,
  images: Sequence[np.ndarray],
  config: Config,
  *,
  tokens: int | None = None,
  image_slots: int | None = None,
  region_slots: int | None = None,
  pad_id: int = 0,
) -> Batch:
  """One example as a batch of one row.

  Args:
    encoded: its ids, for training or as a prompt.
    example: regions and which image each lies in.
    images: the decoded image of each entry of `example.images`, uint8 [h,w,3].
    config: resize rule and the model's image size.
    tokens: length of the row; by default just what is needed. Likewise
    image_slots: images of the row, and
    region_slots: region slots of the row.
    pad_id: token of unused positions (their segment is 0).

  Raises:
    DataError: the example does not fit, or the number of images is wrong.
  """
  if len(images) != len(example.images):
    raise DataError(f"{len(images)} images given for an example of {len(example.images)}")
  need = {
    "tokens": (len(encoded.ids), tokens),
    "image_slots": (len(encoded.image_slots), image_slots),
    "region_slots": (len(encoded.region_slots), region_slots),
  }
  for name, (have, room) in need.items():
    if room is not None and have > room:
      raise DataError(f"the example takes {have} {name} but the row was given {room}")
  sizes = {name: have if room is None else room for name, (have, room) in need.items()}
  frame = Frame.of(config)
  prepared = [frame.prepare(image) for image in images]
  regions = encode_region_arrays(
    example.regions,
    encoded.region_slots,
    example.region_images,
    [transform for _, transform in prepared],
    frame.grid,
    image_slots=encoded.image_slots,
  )
  batch = text_arrays([[encoded]], tokens=sizes["tokens"], pad_id=pad_id)
  batch |= slot_arrays(1, images=sizes["image_slots"], regions=sizes["region_slots"], frame=frame)
  fill_slots(batch, 0, [prepared[k][0] for k in encoded.image_slots], regions)
  return batch  # type: ignore[return-value]

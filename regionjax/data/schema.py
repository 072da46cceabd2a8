"""What flows from a source to the model: Example, and the arrays of a packed Batch.

An Example is text and references only: no tokens, no pixels. In its texts `{region:k}` stands for
`regions[k]` and `{image:k}` for `images[k]` (0-based). A text without any `{image:k}` gets all
images before its first turn.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np

from regionjax.regions import Region

SLOT = re.compile(r"\{(region|image):(\d+)\}")


@dataclasses.dataclass(frozen=True)
class ImageRef:
  """Where an image's pixels come from, without the pixels.

  `kind` names a decoder: 'file' (key is a path), 'record' (key is 'FILE#NUMBER', an encoded image
  in an ArrayRecord file) or 'scene' (key is 'split/seed/index').
  `size` is (width, height) in pixels when known, else None.
  """

  kind: str
  key: str
  size: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Turn:
  """One utterance. `role` is 'user', 'assistant' or 'system'."""

  role: str
  text: str
  supervise: bool = False  # assistant turns only: whether the loss counts this answer
  task: str = ""  # what the answer is scored as, e.g. 'name'; '' falls back to meta['task']


@dataclasses.dataclass(frozen=True)
class Example:
  """One conversation about some images and regions of them.

  Attributes:
    images: references, 0..n.
    regions: regions in normalised xy of their own image.
    region_images: for each region, the index of its image in `images`.
    turns: the conversation.
    choices: options of a multiple-choice question, in order ((A), (B), ...); else empty.
    answer: index of the right choice, or None.
    references: accepted answers of the last assistant turn (captions may have several).
    meta: task, source, id and whatever else an evaluator needs; never read by the model.
  """

  images: tuple[ImageRef, ...] = ()
  regions: tuple[Region, ...] = ()
  region_images: tuple[int, ...] = ()
  turns: tuple[Turn, ...] = ()
  choices: tuple[str, ...] = ()
  answer: int | None = None
  references: tuple[str, ...] = ()
  meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    if len(self.region_images) != len(self.regions):
      raise ValueError(
        f"example {self.meta.get('id', '?')}: {len(self.regions)} regions but "
        f"{len(self.region_images)} region_images; each region needs its image's index"
      )
    for k in self.region_images:
      if not 0 <= k < len(self.images):
        raise ValueError(
          f"example {self.meta.get('id', '?')}: a region names image {k}, "
          f"but there are {len(self.images)} images"
        )
    limits = {"region": len(self.regions), "image": len(self.images)}
    for turn in self.turns:
      if turn.role not in ("user", "assistant", "system"):
        raise ValueError(f"turn role {turn.role!r}: expected user, assistant or system")
      for kind, index in SLOT.findall(turn.text):
        if int(index) >= limits[kind]:
          raise ValueError(
            f"example {self.meta.get('id', '?')}: text mentions {{{kind}:{index}}} "
            f"but there are {limits[kind]} {kind}s"
          )
    if self.answer is not None and not 0 <= self.answer < len(self.choices):
      raise ValueError(f"answer {self.answer} is not one of {len(self.choices)} choices")


class Batch(TypedDict):
  """A packed batch. B rows, T tokens, K images, R region slots, N patches of one image.

  Region slots are in the order in which their slot tokens stand in the row, images likewise.
  """

  tokens_bt: np.ndarray  # int32; a slot holds the id of <im_patch> or of the region token
  targets_bt: np.ndarray  # int32; the next token inside the same segment
  loss_weights_bt: np.ndarray  # float32; weight of predicting targets_bt here
  segment_ids_bt: np.ndarray  # int32; 1, 2, ... per packed example, 0 is padding
  positions_bt: np.ndarray  # int32; restart at 0 in each segment
  answer_ids_bt: np.ndarray  # int32; 1, 2, ... per supervised answer, at its targets; else 0
  images_bkhwc: np.ndarray  # float32, normalised
  image_mask_bk: np.ndarray  # bool
  boxes_br4: np.ndarray  # float32, xyxy in [0,1] of the resized image; a point has no area
  box_image_br: np.ndarray  # int32, index into the row's images
  region_kind_br: np.ndarray  # int32: 0 padding, 1 point, 2 box, 3 mask (polygon, mask, scribble)
  region_mask_br: np.ndarray  # bool
  region_cover_brn: np.ndarray  # float32 in [0,1], share of each patch (row-major) that is covered

"""GPT4RoI's region module in torch, for a check: what the paper describes, on the source's tensors.

transformers lacks it. Sizes that the original fixed stand here as they are in it; only widths come
from the tensors. One image; this module imports torch.

Axes: n boxes, c channels, h w cells, p q bins, d the decoder's channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from regionjax.weights.check_oracle import Read

SCALES = (8, 4, 2, 1)  # of the patch grid, finest level first
ROUNDS, GROUPS, SAMPLES = 5, 64, 2
FUSE, ROI = "model.spi_module.mlvl_fuse.", "model.spi_module.roi_align."


def region_maps(read: Read, hidden: Sequence[np.ndarray], select: int) -> list[torch.Tensor]:
  """The four fused levels [1, C, H, W], finest first.

  Args:
    read: of the published tensors.
    hidden: every hidden state [1, 1+N, C] of the vision tower.
    select: the one that becomes the image tokens; the others are every third before it.
  """
  four = list(hidden[select::-3])[::-1][-4:]
  levels = []
  for l, (x_1nc, scale) in enumerate(zip(four, SCALES)):
    grid = int((x_1nc.shape[1] - 1) ** 0.5)
    x_1chw = torch.tensor(x_1nc[:, 1:]).transpose(1, 2).unflatten(2, (grid, grid))
    x_1chw = _resize(x_1chw, grid * scale)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, grid * scale)] * 2, indexing="ij")
    x_1chw = torch.cat([x_1chw, x[None, None], y[None, None]], dim=1)
    key = f"{FUSE}input_conv.{l}."
    levels.append(F.conv2d(x_1chw, read(f"{key}weight"), read(f"{key}bias")))
  for r in range(ROUNDS):
    key = f"{FUSE}fuse_convs.{r}."
    kernel, scale, bias = (read(key + n) for n in ("conv.weight", "gn.weight", "gn.bias"))
    mixed = [_shuffle(levels, l) for l in range(len(levels))]
    levels = [
      F.relu(F.group_norm(F.conv2d(x_1chw, kernel, padding=1), GROUPS, scale, bias))
      for x_1chw in mixed
    ]
  return levels


def region_tokens(read: Read, levels: Sequence[torch.Tensor], boxes_n4: np.ndarray) -> np.ndarray:
  """[N, D]: crops of all levels, convolved, summed, flattened, with the box's position added.

  Args:
    read: of the published tensors.
    levels: of `region_maps`.
    boxes_n4: float32 normalised xyxy.
  """

  def linear(x: torch.Tensor, name: str) -> torch.Tensor:
    return F.linear(x, read(f"{ROI}{name}.weight"), read(f"{ROI}{name}.bias"))

  flat = read(f"{ROI}flatten_linear.weight")
  boxes = torch.tensor(boxes_n4)
  total = 0.0
  for l, level_1chw in enumerate(levels):
    bins = int((flat.shape[1] / level_1chw.shape[1]) ** 0.5)
    crops = torch.stack([_crop(level_1chw[0], box, bins) for box in boxes])
    kernel, bias = read(f"{ROI}pconvs.{l}.weight"), read(f"{ROI}pconvs.{l}.bias")
    total = total + F.conv2d(crops, kernel, bias, padding=1)
  tokens = F.linear(F.relu(total).flatten(1), flat, read(f"{ROI}flatten_linear.bias"))
  place = boxes
  for first, norm in ((0, 2), (3, 5)):
    place = F.relu(linear(place, f"pos_embedd.{first}"))
    scale, bias = (read(f"{ROI}pos_embedd.{norm}.{n}") for n in ("weight", "bias"))
    place = F.layer_norm(place, scale.shape, scale, bias)
  return linear(tokens + place, "updims").numpy()


def _resize(x_1chw: torch.Tensor, size: int) -> torch.Tensor:
  return F.interpolate(x_1chw, size=(size, size), mode="bilinear", align_corners=True)


def _shuffle(levels: Sequence[torch.Tensor], l: int) -> torch.Tensor:
  """Half a level's channels, a quarter of the coarser one's, a quarter of the finer one's."""
  width, size = levels[l].shape[1:3]
  half, last = width // 2, width * 3 // 4
  coarser, finer = levels[min(l + 1, len(levels) - 1)], levels[max(l - 1, 0)]
  parts = (levels[l][:, :half], _resize(coarser[:, last:], size))
  return torch.cat([*parts, _resize(finer[:, half:last], size)], dim=1)


def _crop(level_chw: torch.Tensor, box_4: torch.Tensor, bins: int) -> torch.Tensor:
  """RoIAlign of one box, gathered sample by sample: [C, bins, bins]."""
  size, count = level_chw.shape[-1], bins * SAMPLES

  def around(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Per sample of an axis: the cells before and behind it, and their weights."""
    at = low * size - 0.5 + (high - low) * size * (torch.arange(count) + 0.5) / count
    inside = (at >= -1) & (at <= size)  # further out a sample is 0
    at = at.clamp(0, size - 1)
    before = at.floor().long()
    share = at - before
    return before, (before + 1).clamp(max=size - 1), (1 - share) * inside, share * inside

  x0, x1, wx0, wx1 = around(box_4[0], box_4[2])
  y0, y1, wy0, wy1 = around(box_4[1], box_4[3])
  total = torch.zeros(len(level_chw), count, count)
  for y, wy in ((y0, wy0), (y1, wy1)):
    for x, wx in ((x0, wx0), (x1, wx1)):
      total += level_chw[:, y[:, None], x[None, :]] * wy[:, None] * wx[None, :]
  return total.reshape(-1, bins, SAMPLES, bins, SAMPLES).mean(dim=(2, 4))

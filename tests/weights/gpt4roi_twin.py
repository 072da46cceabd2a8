"""GPT4RoI in torch, written from its description: the oracle of the end-to-end tests.

Its modules are named as in the published checkpoint, so that `state_dict()` gives the published
keys in the published layout. `SpiModule` is what the original added; `Twin` joins it to the CLIP
and the LLaMA of transformers. One image and one prompt at a time, in float32.

Axes: n boxes, c channels, h w cells, t tokens, d the decoder's channels, v vocabulary.
"""

import re
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

GRID = 16  # patches per side, of images with 224 pixels
LEVELS = (128, 64, 32, 16)  # sides of the pyramid's maps, finest first
ROUNDS, GROUPS, BINS, SAMPLES = 5, 64, 14, 2
# Ids of the added tokens.
PATCH, BBOX, IM_START, IM_END = 32001, 32002, 32004, 32005
IDS = {"<im_patch>": PATCH, "<bbox>": BBOX, "<im_start>": IM_START, "<im_end>": IM_END}


def resize(x_1chw: torch.Tensor, size: int) -> torch.Tensor:
  return F.interpolate(x_1chw, size=(size, size), mode="bilinear", align_corners=True)


class Block(nn.Module):
  """The convolution of a round, shared by its levels."""

  def __init__(self, width: int):
    super().__init__()
    self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
    self.gn = nn.GroupNorm(GROUPS, width)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return F.relu(self.gn(self.conv(x)))


class Fuse(nn.Module):
  """Four hidden states to four maps that have seen each other."""

  def __init__(self, channels: int, width: int):
    super().__init__()
    self.input_conv = nn.ModuleList(nn.Conv2d(channels + 2, width, 1) for _ in LEVELS)
    self.fuse_convs = nn.ModuleList(Block(width) for _ in range(ROUNDS))

  def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    levels = []
    for x_1chw, size, conv in zip(maps, LEVELS, self.input_conv):
      ramp = torch.linspace(-1, 1, size)
      places = torch.stack((ramp[None, :].expand(size, size), ramp[:, None].expand(size, size)))
      levels.append(conv(torch.cat((resize(x_1chw, size), places[None]), dim=1)))
    for block in self.fuse_convs:
      levels = [block(self.mix(levels, i)) for i in range(len(levels))]
    return levels

  @staticmethod
  def mix(levels: list[torch.Tensor], i: int) -> torch.Tensor:
    """Half of the level itself, a quarter of the coarser and a quarter of the finer one."""
    quarter, size = levels[i].shape[1] // 4, levels[i].shape[-1]
    own = levels[i][:, : 2 * quarter]
    coarser = levels[min(i + 1, len(levels) - 1)][:, 3 * quarter :]
    finer = levels[max(i - 1, 0)][:, 2 * quarter : 3 * quarter]
    return torch.cat((own, resize(coarser, size), resize(finer, size)), dim=1)


def roi_align(map_chw: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
  """One normalised box out of a square map, point by point: [C, BINS, BINS]."""
  size = map_chw.shape[-1]

  def corners(low: torch.Tensor, high: torch.Tensor):
    """Of the sample points of one axis: the cells around them, the second's share, validity."""
    start, stop = low * size - 0.5, high * size - 0.5
    steps = (torch.arange(BINS * SAMPLES) + 0.5) / (BINS * SAMPLES)
    at = start + (stop - start) * steps
    inside = (at >= -1) & (at <= size)
    at = at.clamp(0, size - 1)
    first = at.floor().long()
    return first, (first + 1).clamp(max=size - 1), at - first, inside

  x0, x1, x_share, x_inside = corners(box[0], box[2])
  y0, y1, y_share, y_inside = corners(box[1], box[3])

  def row(y: torch.Tensor) -> torch.Tensor:
    return map_chw[:, y][:, :, x0] * (1 - x_share) + map_chw[:, y][:, :, x1] * x_share

  points = row(y0) * (1 - y_share)[:, None] + row(y1) * y_share[:, None]
  points = points * (y_inside[:, None] & x_inside[None, :])
  return points.reshape(-1, BINS, SAMPLES, BINS, SAMPLES).mean(dim=(2, 4))


class Roi(nn.Module):
  """Boxes out of all levels to one vector each."""

  def __init__(self, width: int, position: int, token: int, out: int):
    super().__init__()
    self.pconvs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in LEVELS)
    self.pos_embedd = nn.Sequential(
      nn.Linear(4, position), nn.ReLU(), nn.LayerNorm(position),
      nn.Linear(position, token), nn.ReLU(), nn.LayerNorm(token),
    )  # fmt: skip
    self.flatten_linear = nn.Linear(width * BINS * BINS, token)
    self.updims = nn.Linear(token, out)

  def forward(self, levels: Sequence[torch.Tensor], boxes_n4: torch.Tensor) -> torch.Tensor:
    crops = [torch.stack([roi_align(level[0], box) for box in boxes_n4]) for level in levels]
    summed = sum(conv(crop_nchw) for conv, crop_nchw in zip(self.pconvs, crops))
    token = self.flatten_linear(F.relu(summed).flatten(1))
    return self.updims(token + self.pos_embedd(boxes_n4))


class SpiModule(nn.Module):
  """The region module: four maps [1, C, 16, 16] and boxes [N, 4] to [N, D]."""

  def __init__(self, *, channels: int, width: int, position: int, token: int, out: int):
    super().__init__()
    self.mlvl_fuse = Fuse(channels, width)
    self.roi_align = Roi(width, position, token, out)

  def forward(self, maps: Sequence[torch.Tensor], boxes_n4: torch.Tensor) -> torch.Tensor:
    return self.roi_align(self.mlvl_fuse(maps), boxes_n4)


class Twin(nn.Module):
  """The whole system.

  Attributes:
    clip: a CLIPVisionModel of transformers.
    llama: a LlamaForCausalLM of transformers with rows for the added tokens.
  """

  def __init__(self, clip: nn.Module, llama: nn.Module, *, width: int, position: int, token: int):
    super().__init__()
    self.clip, self.llama = clip, llama
    channels, out = clip.config.hidden_size, llama.config.hidden_size
    self.mm_projector = nn.Linear(channels, out)
    self.spi_module = SpiModule(
      channels=channels, width=width, position=position, token=token, out=out
    )

  def state(self) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors by published name: all but the vision tower."""
    added = {
      f"model.{name}": value
      for name, value in self.state_dict().items()
      if name.startswith(("mm_projector.", "spi_module."))
    }
    return {**self.llama.state_dict(), **added}

  def see(
    self, pixels_1chw: torch.Tensor, boxes_n4: torch.Tensor
  ) -> tuple[torch.Tensor, torch.Tensor]:
    """(image tokens [256, D], region tokens [N, D])."""
    hidden = self.clip(pixels_1chw, output_hidden_states=True).hidden_states
    four = list(hidden[-2::-3])[::-1][-4:]
    maps = [h[:, 1:].transpose(1, 2).unflatten(2, (GRID, GRID)) for h in four]
    return self.mm_projector(hidden[-2][0, 1:]), self.spi_module(maps, boxes_n4)

  def splice(self, ids: Sequence[int], image_d: torch.Tensor, regions_d: torch.Tensor):
    """The prompt as the decoder reads it, [1, T, D]."""
    ids_t = torch.tensor(ids)
    start = ids.index(IM_START) + 1
    stop = start + len(image_d)
    assert ids[stop] == IM_END and (ids_t == BBOX).sum() == len(regions_d)
    x_td = self.llama.get_input_embeddings()(ids_t).clone()
    x_td[start:stop] = image_d
    x_td[ids_t == BBOX] = regions_d
    return x_td[None]

  def greedy(self, x_1td: torch.Tensor, count: int) -> list[int]:
    """The most probable tokens; the two slots are not among them, and nothing stops it."""
    out, cache = [], None
    for _ in range(count):
      step = self.llama(inputs_embeds=x_1td, past_key_values=cache, use_cache=True)
      logits_v, cache = step.logits[0, -1], step.past_key_values
      logits_v[[PATCH, BBOX]] = -torch.inf
      out.append(int(logits_v.argmax()))
      x_1td = self.llama.get_input_embeddings()(torch.tensor([[out[-1]]]))
    return out


def encode_slowly(text: str, sentencepiece) -> list[int]:
  """A prompt's ids by the slow rule: added tokens cut it, blanks around them go."""
  text = text.replace("<image>", f"<im_start>{'<im_patch>' * GRID**2}<im_end>")
  pieces = re.split(f"\\s*({'|'.join(IDS)})\\s*", text)
  return [1] + [
    i for piece in pieces if piece for i in ([IDS[piece]] if piece in IDS else sentencepiece(piece))
  ]

"""The PyTorch side of `benchmark.py`: runs in its own process, perhaps in another environment.

Reads one JSON object per line, answers each with one:

  {"make": NAME, ...sizes}  ->  {"ok": true, "steps": [NAME], ...facts} or {"absent": why}
  {"run": NAME}             ->  {"seconds": x, "cpu_seconds": y}

jax isn't imported here, nor torch in `benchmark.py`: neither library's threads disturb the other.
The device is the first argument, 'cpu' or 'cuda'.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

Step = Callable[[], object]


def make_roi_align(*, side: int, channels: int, boxes: list, bins: int, ratio: int) -> dict:
  """torchvision's RoIAlign on the same features and boxes as ours."""
  import torchvision

  rng = np.random.default_rng(0)
  x_hwc = rng.standard_normal((side, side, channels), dtype=np.float32)
  x = torch.tensor(np.ascontiguousarray(x_hwc.transpose(2, 0, 1)))[None].requires_grad_()
  pixels = torch.tensor(boxes) * side
  args = ([pixels], (bins, bins), 1.0, ratio, True)

  def forward():
    with torch.no_grad():
      return torchvision.ops.roi_align(x, *args)

  def forward_backward():
    x.grad = None
    out = torchvision.ops.roi_align(x, *args)
    out.backward(torch.ones_like(out))

  mean_abs = forward().abs().mean().item()
  return dict(
    forward=forward,
    forward_backward=forward_backward,
    facts=dict(against=f"torchvision {torchvision.__version__}", mean_abs=mean_abs),
  )


def make_vit(*, image: int, patch: int, width: int, layers: int, heads: int, mlp: int) -> dict:
  """Hugging Face's CLIP vision tower, all hidden states returned."""
  import transformers

  config = transformers.CLIPVisionConfig(
    image_size=image, patch_size=patch, hidden_size=width, num_hidden_layers=layers,
    num_attention_heads=heads, intermediate_size=mlp,
  )  # fmt: skip
  model = transformers.CLIPVisionModel(config).eval()
  pixels = torch.randn(1, 3, image, image)

  def forward():
    with torch.inference_mode():
      return model(pixels, output_hidden_states=True)

  return dict(forward=forward, facts=hugging_face(transformers, model))


def make_decoder(
  *, vocab: int, width: int, layers: int, heads: int, kv_heads: int, mlp: int, prompt: int,
  new: int, rows: int, dtype: str,
) -> dict:  # fmt: skip
  """Hugging Face's LLaMA: the prompt alone, and `generate`, greedy, with its default cache."""
  import transformers

  config = transformers.LlamaConfig(
    vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
    num_key_value_heads=kv_heads, intermediate_size=mlp, tie_word_embeddings=width < 4096,
  )  # fmt: skip
  torch.set_default_dtype(getattr(torch, dtype))
  try:
    model = transformers.LlamaForCausalLM(config).eval()
  finally:
    torch.set_default_dtype(torch.float32)
  ids = torch.randint(0, vocab, (1, prompt)).expand(rows, -1)

  def prefill():
    with torch.inference_mode():
      return model(ids, use_cache=True, logits_to_keep=1)

  def generate():
    with torch.inference_mode():
      out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new,
        max_new_tokens=new, pad_token_id=0,
      )  # fmt: skip
    assert out.shape[1] == prompt + new

  facts = hugging_face(transformers, model)
  return dict(prefill=prefill, prefill_decode=generate, facts=facts)


def hugging_face(transformers, model: nn.Module) -> dict:
  against = f"transformers {transformers.__version__}, torch {torch.__version__}"
  return dict(against=against, parameters=sum(p.numel() for p in model.parameters()))


def torchvision_roi_align(x: torch.Tensor, boxes: torch.Tensor, *, bins: int, ratio: int):
  """[B, C, H, W] and [R, 5] boxes (image, xyxy in cells) to [R, C, bins, bins]."""
  import torchvision

  return torchvision.ops.roi_align(x, boxes, bins, 1.0, ratio, aligned=True)


class RegionModule(nn.Module):
  """A twin of our pyramid: same maps, same sizes, written the way PyTorch code is."""

  roi_align = staticmethod(torchvision_roi_align)

  def __init__(
    self, *, channels, width, out, grid, upsample, rounds, groups, bins, ratio, position, token
  ):
    super().__init__()
    self.sides = [grid * m for m in upsample]
    self.grid, self.bins, self.ratio, self.width = grid, bins, ratio, width
    levels = range(len(upsample))
    self.inputs = nn.ModuleList(nn.Conv2d(channels + 2, width, 1) for _ in levels)
    self.rounds = nn.ModuleList(
      nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(groups, width), nn.ReLU()
      )
      for _ in range(rounds)
    )
    self.crops = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in levels)
    self.flatten = nn.Linear(width * bins * bins, token)
    self.position = nn.Sequential(
      nn.Linear(4, position), nn.ReLU(), nn.LayerNorm(position),
      nn.Linear(position, token), nn.ReLU(), nn.LayerNorm(token),
    )  # fmt: skip
    self.output = nn.Linear(token, out)

  def forward(self, hidden: list[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
    """Four [B, N, C] hidden states and [R, 5] boxes (image, normalised xyxy) to [R, out]."""
    maps = [self.level(l, x) for l, x in enumerate(hidden)]
    for block in self.rounds:
      maps = [block(self.mix(maps, l)) for l in range(len(maps))]
    total = sum(conv(self.crop(x, boxes)) for conv, x in zip(self.crops, maps))
    tokens = self.flatten(F.relu(total).flatten(1))
    return self.output(tokens + self.position(boxes[:, 1:]))

  def level(self, l: int, x: torch.Tensor) -> torch.Tensor:
    side = self.sides[l]
    x = resize(x.transpose(1, 2).unflatten(2, (self.grid, self.grid)), side)
    line = torch.linspace(-1, 1, side)
    row, column = torch.meshgrid(line, line, indexing="ij")
    place = torch.stack([column, row])[None].expand(len(x), -1, -1, -1)
    return self.inputs[l](torch.cat([x, place], 1))

  def mix(self, maps: list[torch.Tensor], l: int) -> torch.Tensor:
    half, three_quarters = self.width // 2, self.width // 4 * 3
    coarser, finer = maps[min(l + 1, len(maps) - 1)], maps[max(l - 1, 0)]
    side = self.sides[l]
    parts = [
      maps[l][:, :half],
      resize(coarser[:, three_quarters:], side),
      resize(finer[:, half:three_quarters], side),
    ]
    return torch.cat(parts, 1)

  def crop(self, x: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    scale = torch.tensor([1.0, *[x.shape[-1]] * 4])
    return self.roi_align(x, boxes * scale, bins=self.bins, ratio=self.ratio)


def resize(x: torch.Tensor, side: int) -> torch.Tensor:
  if x.shape[-1] == side:
    return x
  return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=True)


def make_region_module(*, boxes: list, **sizes) -> dict:
  import torchvision

  model = RegionModule(**sizes).eval()
  hidden = [torch.randn(1, sizes["grid"] ** 2, sizes["channels"]) for _ in sizes["upsample"]]
  indexed = torch.cat([torch.zeros(len(boxes), 1), torch.tensor(boxes)], 1)

  def forward():
    with torch.inference_mode():
      return model(hidden, indexed)

  against = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
  parameters = sum(p.numel() for p in model.parameters())
  return dict(forward=forward, facts=dict(against=against, parameters=parameters))


class RegionVLM(nn.Module):
  """A small CLIP tower, region tokens and image tokens in a small LLaMA, of our model's sizes."""

  def __init__(self, sizes: dict):
    super().__init__()
    import transformers

    s = self.sizes = types.SimpleNamespace(**sizes)
    clip = transformers.CLIPVisionConfig(
      image_size=s.image, patch_size=s.patch, hidden_size=s.vision_width,
      num_hidden_layers=s.vision_layers, num_attention_heads=s.vision_heads,
      intermediate_size=s.vision_mlp,
    )  # fmt: skip
    llama = transformers.LlamaConfig(
      vocab_size=s.vocab, hidden_size=s.width, num_hidden_layers=s.layers,
      num_attention_heads=s.heads, num_key_value_heads=s.heads, intermediate_size=s.mlp,
      max_position_embeddings=s.tokens, tie_word_embeddings=False,
    )  # fmt: skip
    self.vision = transformers.CLIPVisionModel(clip)
    self.decoder = transformers.LlamaForCausalLM(llama)
    self.connector = nn.Linear(s.vision_width, s.width)
    self.norm = nn.LayerNorm(s.vision_width)
    self.hidden = nn.Linear(s.vision_width * (s.bins**2 + 1), s.region_width)
    self.output = nn.Linear(s.region_width, s.width)
    self.position = nn.Sequential(
      nn.Linear(8, s.position_width), nn.ReLU(), nn.Linear(s.position_width, s.width)
    )

  def forward(self, batch: types.SimpleNamespace) -> torch.Tensor:
    """The mean loss of [B, T] labels, -100 where nothing is supervised."""
    patches = self.vision(batch.images).last_hidden_state[:, 1:]
    x = self.decoder.get_input_embeddings()(batch.tokens).clone()
    x[batch.image_slots] = self.connector(patches).flatten(0, 1).to(x.dtype)
    x[batch.region_slots] = self.regions(patches, batch).flatten(0, 1).to(x.dtype)
    return self.decoder(inputs_embeds=x, labels=batch.labels, use_cache=False).loss

  def regions(self, patches: torch.Tensor, batch: types.SimpleNamespace) -> torch.Tensor:
    """[B, N, C] and [B, R, 4] boxes to [B, R, D]: sampled bins, and the covered patches' mean."""
    b, n = patches.shape[:2]
    r, grid, samples = batch.boxes.shape[1], int(n**0.5), self.sizes.bins * self.sizes.ratio
    patches = self.norm(patches)
    steps = (torch.arange(samples) + 0.5) / samples
    low, high = batch.boxes[..., :2], batch.boxes[..., 2:]
    at = low[:, :, None] + (high - low)[:, :, None] * steps[:, None]  # [B, R, samples, xy]
    shape = (b, r, samples, samples)
    points = torch.stack(
      [at[:, :, None, :, 0].expand(shape), at[:, :, :, None, 1].expand(shape)], -1
    )
    maps = patches.transpose(1, 2).unflatten(2, (grid, grid))
    points = points.flatten(1, 2).to(maps.dtype) * 2 - 1
    read = F.grid_sample(maps, points, padding_mode="border", align_corners=False)
    bins = F.avg_pool2d(
      read.unflatten(2, (r, samples)).transpose(1, 2).flatten(0, 1), self.sizes.ratio
    )
    cover = batch.cover / batch.cover.sum(-1, keepdim=True)
    mean = cover.to(patches.dtype) @ patches
    features = torch.cat([bins.flatten(1).unflatten(0, (b, r)), mean], -1)
    kind = torch.zeros(b, r, 4)
    kind[..., 2] = 1
    place = torch.cat([batch.boxes, kind], -1)
    return self.output(F.relu(self.hidden(features))) + self.position(place)


def make_training(*, dtype: str, **sizes) -> dict:
  """Forward, backward and AdamW of RegionVLM; bfloat16 is autocast, as people train."""
  import transformers

  model = RegionVLM(sizes).train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
  s = types.SimpleNamespace(**sizes)
  patches = (s.image // s.patch) ** 2
  tokens = torch.randint(10, s.vocab, (s.rows, s.tokens))
  slots = torch.zeros(2, s.rows, s.tokens, dtype=torch.bool)
  slots[0, :, :patches] = True
  slots[1, :, patches + 8 : patches + 8 + 16 * s.regions : 16] = True
  labels = tokens.clone()
  labels[:, : -s.supervised] = -100
  corner = torch.rand(s.rows, s.regions, 2) * 0.5
  boxes = torch.cat([corner, corner + 0.1 + 0.4 * torch.rand(s.rows, s.regions, 2)], -1)
  batch = types.SimpleNamespace(
    images=torch.randn(s.rows, 3, s.image, s.image), tokens=tokens, image_slots=slots[0],
    region_slots=slots[1], labels=labels, boxes=boxes,
    cover=torch.full((s.rows, s.regions, patches), 0.25),
  )  # fmt: skip
  low = torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=dtype == "bfloat16")

  def step():
    optimizer.zero_grad(set_to_none=True)
    with low:
      loss = model(batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

  return dict(step=step, facts=hugging_face(transformers, model))


def torchvision_reader(torchvision) -> Callable[[str], torch.Tensor]:
  """torchvision's own JPEG decoder: a path to uint8 [3, H, W]."""
  from torchvision.io import ImageReadMode, decode_jpeg, read_file

  return lambda path: decode_jpeg(read_file(path), mode=ImageReadMode.RGB)


def pillow_reader(path: str) -> torch.Tensor:
  """What a plain loader does: a path to uint8 [3, H, W]."""
  from PIL import Image

  with Image.open(path) as picture:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def make_input(*, paths: list[str], side: int, rule: str, rows: int) -> dict:
  """JPEG files to normalised float32 batches of `rows` pictures, on one core.

  'chatspot' squashes with antialiased bicubic; 'gpt4roi' does so for the shortest edge and then
  squashes the long side with plain bilinear. Pillow decodes where torchvision is missing.
  """
  try:
    import torchvision
    from torchvision.transforms.v2 import functional as resizing
  except ImportError:
    torchvision, read, against = None, pillow_reader, f"Pillow loop, torch {torch.__version__}"
  else:
    read, against = torchvision_reader(torchvision), f"torchvision {torchvision.__version__}"
  torch.set_num_threads(1)
  torch.set_default_device("cpu")
  mean, std = torch.full((3, 1, 1), 0.45), torch.full((3, 1, 1), 0.27)

  def bicubic(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if torchvision is not None:  # has a path for uint8
      return resizing.resize(x, list(size), resizing.InterpolationMode.BICUBIC, antialias=True)
    return F.interpolate(x[None].float(), size, mode="bicubic", antialias=True)[0]

  def prepare(path: str) -> torch.Tensor:
    x = read(path)
    h, w = x.shape[1:]
    if rule == "gpt4roi":
      x = bicubic(x, (side * h // min(h, w), side * w // min(h, w))).float()
      x = F.interpolate(x[None], (side, side), mode="bilinear")[0]
    else:
      x = bicubic(x, (side, side)).float()
    return (x / 255 - mean) / std

  def jpeg():
    for start in range(0, len(paths), rows):
      torch.stack([prepare(path) for path in paths[start : start + rows]])

  return dict(jpeg=jpeg, facts=dict(against=against))


MAKERS = {
  "input": make_input,
  "training": make_training,
  "roi_align": make_roi_align,
  "vit": make_vit,
  "decoder": make_decoder,
  "region_module": make_region_module,
}


def main() -> None:
  torch.set_default_device(sys.argv[1])
  if sys.argv[1] == "cuda":  # there jax multiplies float32 in TF32, and so does torch if told to
    torch.set_float32_matmul_precision("high")
  torch.set_num_threads(os.cpu_count() or 1)  # `make_input` takes one, in a process of its own
  torch.manual_seed(0)
  case: dict = {}
  for line in sys.stdin:
    request = json.loads(line)
    if "make" in request:
      case.clear()  # one case at a time in memory
      try:
        case.update(MAKERS[request["make"]](**request["sizes"]))
        steps = [name for name in case if name != "facts"]
        answer = dict(ok=True, steps=steps, **case["facts"])
      except ImportError as error:
        answer = dict(absent=str(error))
    else:
      start = time.perf_counter(), time.process_time()
      case[request["run"]]()
      if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()
      wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
      answer = dict(seconds=wall, cpu_seconds=cpu)
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
  main()

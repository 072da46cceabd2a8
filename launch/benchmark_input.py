"""Photographs to batches on one core: `benchmark.py`'s case `input`.

Ours is `data.Pipeline` as `regionjax train` runs it, from photographs with eight boxes each to
packed rows of 7 images of 224 pixels and 56 regions: drawing, templates, tokens, decoding,
resizing, what the regions cover, and the arrays of the batch. Photographs are files of a
folder, or records of a packed one (`regionjax pack`). `text` is the part without pixels alone,
which one thread of a host does for the rows of its shards. Theirs (`benchmark_torch.py`) reads,
decodes, resizes by the same rule and stacks the pictures, no more. All are timed in CPU seconds.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from regionjax.config import (
  Config,
  ConnectorConfig,
  DataConfig,
  ModelConfig,
  SourceConfig,
  VisionConfig,
)
from regionjax.data.image_records import pack_images
from regionjax.data.mixing import Mixture
from regionjax.data.pipeline import Pipeline
from regionjax.data.sources import make_source
from regionjax.data.stream import RowStream
from regionjax.renderer import Renderer
from regionjax.tokenizer import load_tokenizer

TOKENS, IMAGES, REGIONS, SIDE = 4096, 7, 56, 224  # the shipped tokenizer's texts are long
ROWS, BATCHES = 2, 4  # of a batch, of a timed turn
PER_TURN = BATCHES * ROWS * IMAGES  # pictures, and examples
COPIES = 64  # of each photograph, under names of their own
MENTIONS = 40  # of each copy in the annotations: the shuffle of a small set costs more than that of
# one as large as those that are trained on (0.3 ms a draw of 128 examples, 5 us from 10,000 on)
# Virtual cores of a TPU host, by its chips (Google's ct5lp-hightpu-4t and -8t).
V5E_HOST = {4: 112, 8: 224}


def photographs(folder: Path | None) -> list[Path]:
  """The JPEG files of a folder; by default scikit-learn's two, of 640 x 427 as COCO's are.

  Raises:
    FileNotFoundError: there are none.
  """
  if folder is None:
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
      raise FileNotFoundError(
        "input: the photographs are scikit-learn's, which is not installed; pip install "
        "scikit-learn, or give a folder of JPEG files with --photos"
      )
    folder = Path(found.origin).parent / "datasets" / "images"
  paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
  if not paths:
    raise FileNotFoundError(f"input: no JPEG file in {folder}; give another folder with --photos")
  return paths


def input_cases(photos: list[Path]) -> Iterator[tuple]:
  """(title, sizes, {'jpeg', 'arrayrecord', 'text': step}, facts) for two resize rules."""
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name) / "photos"
    folder.mkdir()
    copies = [folder / f"{i:04d}_{p.name}" for i, p in enumerate(photos * COPIES)]
    for source, copy in zip(itertools.cycle(photos), copies):
      shutil.copy(source, copy)
    annotations = folder / "boxes.json"
    annotations.write_text(json.dumps(_boxes(copies)))
    pack_images(folder, Path(name) / "packed", files=4)
    size = sum(p.stat().st_size for p in photos) / len(photos)
    for rule in ("chatspot", "gpt4roi"):
      files = make_config(annotations, folder, rule)
      records = make_config(annotations, Path(name) / "packed", rule)
      turns = dict(jpeg=Turn(files), arrayrecord=Turn(records))
      facts = dict(images=PER_TURN, bytes_per_image=round(size), clock="cpu")
      sizes = dict(paths=[str(p) for p in copies[:PER_TURN]], side=SIDE, rule=rule)
      try:
        steps = turns | dict(text=text_turn(files))
        yield f"{PER_TURN} photos, {rule}", sizes | dict(rows=ROWS * IMAGES), steps, facts
      finally:
        for turn in turns.values():
          turn.close()


def _boxes(paths: list[Path]) -> dict[str, Any]:
  """COCO-format annotations, eight boxes a photograph."""
  images, annotations = [], []
  for k, path in enumerate(paths * MENTIONS):
    with Image.open(path) as picture:
      width, height = picture.size
    images.append(dict(id=k, file_name=path.name, width=width, height=height))
    for j in range(REGIONS // IMAGES):
      box = [width * j / 16, height * j / 20, width / 4 + j, height / 3 + j]
      annotations.append(dict(id=len(annotations), image_id=k, category_id=1 + j % 3, bbox=box))
  names = ("cat", "boat", "flower")
  categories = [dict(id=i + 1, name=name) for i, name in enumerate(names)]
  return dict(images=images, annotations=annotations, categories=categories)


def make_config(annotations: Path, images: Path, rule: str) -> Config:
  """The tiny preset with CLIP's image size, and a COCO source."""
  model = dataclasses.replace(
    ModelConfig.tiny(), vision=VisionConfig.clip_vit_l14(), connector=ConnectorConfig()
  )
  args = dict(annotations=str(annotations), images=str(images))
  data = DataConfig(
    sources=(SourceConfig("coco", args=args),), resize=rule, rows=ROWS, tokens_per_row=TOKENS,
    images_per_row=IMAGES, regions_per_row=REGIONS, prefetch=1,
  )  # fmt: skip
  return Config("benchmark", model, data=data)


def make_renderer(config: Config) -> Renderer:
  return Renderer(config.prompt, config.model, load_tokenizer(config.prompt.tokenizer))


class Turn:
  """Calls of it take the next batches of a pipeline that decodes in this process."""

  def __init__(self, config: Config):
    self._pipeline = Pipeline(config, make_renderer(config))

  def __call__(self) -> None:
    batches = (next(self._pipeline)[0] for _ in range(BATCHES))
    found = sum(int(batch["image_mask_bk"].sum()) for batch in batches)
    if found != PER_TURN:
      raise RuntimeError(f"input: {found} pictures in {BATCHES} batches, expected {PER_TURN}")

  def close(self) -> None:
    self._pipeline.close()


def text_turn(config: Config) -> Callable[[], None]:
  """Makes the rows of as many batches, without pixels: drawing, templates, tokens, packing."""
  data = config.data
  mixture = Mixture(data.sources, [make_source(s) for s in data.sources], seed=data.seed)
  stream = RowStream(mixture, make_renderer(config), config)

  def turn() -> None:
    for _ in range(BATCHES):
      stream.next_rows()

  return turn


def print_demand(
  rows: list[dict[str, Any]], compiled: Path | None, say: Callable[[str], None] = print
) -> None:
  """Images per second of a core and, beside a `regionjax compile --json` file, what a pod takes."""
  rates = {
    (row["size"], row["step"]): 1e3 * row["images"] / row["ours_ms"]
    for row in rows
    if row["case"] == "input"
  }
  for (size, step), rate in rates.items():
    what = "examples" if step == "text" else "images"
    say(f"  {size:<22} {step:<12} {rate:7.1f} {what}/s per core")
  if compiled is None:
    return
  report = json.loads(compiled.read_text(encoding="utf-8"))
  seconds, chips = report["time"]["step"], report["topology"]["chips"]
  images = report["rows"] * report["row"]["images"]
  rate_all = images / seconds
  say(
    f"  {report['config']} on {report['topology']['name']}, one image an example: {images} images "
    f"in a step of {seconds:.2f} s are {rate_all:.0f}/s, {rate_all / chips:.1f}/s a chip; of which "
    "a host needs, in cores:"
  )
  for (size, step), rate in rates.items():
    cores = rate_all / chips / rate
    if step == "text":
      need = f"{rate_all / rate:.2f} of its one thread with data.shards=1; with a shard a host " + (
        ", ".join(f"{cores * n:.3f} with {n} chips" for n in V5E_HOST)
      )
    else:
      need = ", ".join(
        f"{cores * n:.2f} of {V5E_HOST[n]} for decoding with {n} chips" for n in V5E_HOST
      )
    say(f"  {size:<22} {step:<12} {need}")

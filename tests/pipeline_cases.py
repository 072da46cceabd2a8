"""Small sources, dialogues and settings that the tests of the input pipeline share."""

import dataclasses

import numpy as np

from regionjax.config import (
  Config,
  ConnectorConfig,
  DataConfig,
  ModelConfig,
  PromptConfig,
  SourceConfig,
  VisionConfig,
)
from regionjax.data.schema import Example, ImageRef, Turn
from regionjax.regions import Region

SIZES = ((40, 30), (32, 32), (25, 50), (64, 48))


class Pictures:
  """`n` examples: text only, one image with one to three regions, or two images to compare."""

  name = "pictures"

  def __init__(self, folder, n=13):
    self.folder, self.n = folder, n

  def __len__(self):
    return self.n

  def __getitem__(self, i):
    rng = np.random.default_rng(i)
    k = int(rng.integers(len(SIZES)))
    images = [ImageRef("file", str(self.folder / f"{(k + j) % 4}.png")) for j in range(i % 3)]
    mask = np.zeros((10, 10), bool)
    mask[2:5, 3:9] = True
    regions = [
      Region.box(0.1, 0.2, 0.5, 0.9),
      Region.point(*rng.random(2)),
      Region.from_mask(mask),
    ][: 1 + i % 3]
    if not images:
      regions = []
    turns = []
    for q in range(int(rng.integers(1, 4))):
      about = f"What is {{region:{q % len(regions)}}}?" if regions else f"What is {q} + {i}?"
      turns += [Turn("user", about), Turn("assistant", f"It is {i * q}.", True, "sum")]
    return Example(
      images=tuple(images),
      regions=tuple(regions),
      region_images=tuple(j % len(images) for j in range(len(regions))),
      turns=tuple(turns),
      meta={"task": "sum", "source": self.name, "id": f"pictures/{i}"},
    )


class Listed:
  """A source of given examples."""

  name = "listed"

  def __init__(self, examples):
    self.examples = examples

  def __len__(self):
    return len(self.examples)

  def __getitem__(self, i):
    return self.examples[i]


def dialogue(name, *, images=(), pairs=1, supervise=True, answer="Yes."):
  turns = [Turn("user", "Is it?"), Turn("assistant", answer, supervise, "yesno")] * pairs
  return Example(images=tuple(images), turns=tuple(turns), meta={"id": name, "task": "yesno"})


def make_config(*, kind="pool", model=None, **data):
  """Images of 32 pixels, 16 tokens each."""
  settings = dict(
    sources=(SourceConfig("pictures"),), rows=4, tokens_per_row=288, images_per_row=3,
    regions_per_row=8, packing_bins=3, prefetch=2,
  )  # fmt: skip
  model = ModelConfig.tiny(kind)
  vision = VisionConfig.tiny(image_size=32, patch_size=8)
  model = dataclasses.replace(model, vision=vision, connector=ConnectorConfig())
  return Config(model=model, prompt=PromptConfig(), data=DataConfig(**(settings | data)))


def take(pipeline, n):
  return [next(pipeline) for _ in range(n)]


def assert_same(a, b):
  """Two lists of (batch, meta) are bit-identical."""
  assert len(a) == len(b)
  for (batch, meta), (other, other_meta) in zip(a, b):
    assert meta == other_meta
    assert batch.keys() == other.keys()
    for name in batch:
      np.testing.assert_array_equal(batch[name], other[name], err_msg=name)
      assert batch[name].dtype == other[name].dtype


def joined(parts):
  """Batches of several hosts -> global batches."""
  out = []
  for shares in zip(*parts):
    names = shares[0][0].keys()
    batch = {name: np.concatenate([share[0][name] for share in shares]) for name in names}
    out.append((batch, [row for share in shares for row in share[1]]))
  return out

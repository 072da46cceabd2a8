"""The check of a region module: the original's own figures, and the rows that see an error."""

import dataclasses

import numpy as np
import pytest
import torch
from region_module import draw, figures, relative

from regionjax.config import ConnectorConfig, DecoderConfig, ModelConfig, RegionConfig, VisionConfig
from regionjax.weights import check, check_numbers, check_regions, release
from regionjax.weights.families import gpt4roi
from regionjax.weights.leaves import ArrayLeaf

MODULE = "model.spi_module."
TINY = ModelConfig(
  vision=VisionConfig(image_size=28, patch_size=7, width=8, layers=11, heads=2, select_layer=-2),
  connector=ConnectorConfig("linear"),
  region=RegionConfig(width=64, token_width=20, position_width=12, layers=(1, 4, 7, 10)),
  decoder=DecoderConfig.tiny(),
)
BOXES = np.asarray(check.BOXES, np.float32)


def test_region_tokens_are_the_originals_own_figures():
  data, names = figures(), []

  def read(name):
    names.append(name)
    name = name.removeprefix(MODULE)
    return torch.from_numpy(draw(name, shape_of(name)))

  hidden = [np.zeros((1, 257, 128), np.float32)] * 12
  for l in range(4):  # every third is read, up to the last but one
    hidden[1 + 3 * l] = np.pad(data[f"features_{l}"][1][None], ((0, 0), (1, 0), (0, 0)))
  boxes = data["boxes"][1]
  boxes = boxes[np.isfinite(boxes).all(axis=1)]
  levels = check_regions.region_maps(read, hidden, -2)
  assert [level.shape for level in levels] == [(1, 128, n, n) for n in (128, 64, 32, 16)]
  tokens = check_regions.region_tokens(read, levels, boxes)
  assert relative(tokens, data["tokens_1"]) < 1e-4
  assert len(names) == len(set(names)) == 43


def shape_of(name):
  """Of the original's tensors with maps of 128 channels."""
  *_, kind, index, last = ("", *name.split("."))
  weights = {
    "input_conv": (128, 130, 1, 1), "conv": (128, 128, 3, 3), "gn": (128,),
    "pconvs": (128, 128, 3, 3), "flatten_linear": (1024, 128 * 14 * 14), "updims": (4096, 1024),
    "pos_embedd": {"0": (256, 4), "2": (256,), "3": (1024, 256), "5": (1024,)}.get(index),
  }  # fmt: skip
  shape = weights[kind if kind in weights else index]
  return shape if last == "weight" else shape[:1]


@pytest.fixture(scope="module")
def theirs():
  """(published tensors, hidden states, the oracle's levels and tokens), all random."""
  rng = np.random.default_rng(0)
  shapes = release.part_shapes(TINY, gpt4roi.PARTS)
  leaves = {path: ArrayLeaf(np.broadcast_to(np.float32(0), s)) for path, s in shapes.items()}
  published = {
    name: rng.normal(size=leaf.shape, scale=0.2).astype(np.float32) + (leaf.shape[1:] == ())
    for name, leaf in gpt4roi.table(TINY).back(leaves).items()
    if name.startswith(MODULE)
  }
  hidden = [rng.normal(size=(1, 17, 8)).astype(np.float32) for _ in range(12)]

  def read(name):
    return torch.from_numpy(published[name])

  levels = check_regions.region_maps(read, hidden, -2)
  return published, hidden, levels, check_regions.region_tokens(read, levels, BOXES)


@pytest.fixture(scope="module")
def ours(theirs):
  """Parameters by path, through the table."""
  table = gpt4roi.table(TINY)
  rules = {rule.key: rule for rule in table.rules}
  return {rules[name].path: rules[name].transform.forward(a) for name, a in theirs[0].items()}


def rows(ours, theirs, model=TINY):
  _, hidden, levels, tokens = theirs
  weights = check_numbers.Weights({path: ArrayLeaf(a) for path, a in ours.items()})
  return check_numbers.compare_regions(
    [level.numpy() for level in levels], tokens, BOXES, hidden=hidden, model=model, weights=weights
  )


def failed(listed):
  assert [row.name for row in listed] == ["region maps", "region tokens"]
  return {row.name for row in listed if not row.passed}


def test_a_sound_conversion_passes(ours, theirs):
  assert not failed(rows(ours, theirs))


def other_order(kernel):
  """Of a flattened crop: channel, y, x in the place of y, x, channel."""
  return kernel.reshape(14 * 14, 64, -1).swapaxes(0, 1).reshape(kernel.shape)


def y_before_x(kernel):
  return kernel[:, :, [*range(8), 9, 8]]


ERRORS = {
  "coordinates": ("input_conv_1/kernel", y_before_x, "maps"),
  "shared convolution": ("round_3/conv/kernel", lambda k: k.swapaxes(2, 3), "maps"),
  "a norm": ("round_4/norm/bias", lambda b: b[::-1], "maps"),
  "crop convolution": ("crop_conv_2/kernel", lambda k: k.swapaxes(0, 1), "tokens"),
  "flattened crop": ("flatten/kernel", other_order, "tokens"),
  "box": ("position_0/kernel", lambda k: k[[1, 0, 3, 2]], "tokens"),
  "position norm": ("position_norm_1/scale", lambda s: s[::-1], "tokens"),
  "output": ("output/bias", lambda b: b[::-1], "tokens"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_shows_in_its_half_alone(name, ours, theirs):
  path, change, half = ERRORS[name]
  changed = {**ours, f"regions/{path}": change(ours[f"regions/{path}"])}
  assert failed(rows(changed, theirs)) == {f"region {half}"}


def test_hidden_states_that_a_configuration_miscounts(ours, theirs):
  region = dataclasses.replace(TINY.region, layers=(2, 5, 8, 11))
  assert failed(rows(ours, theirs, dataclasses.replace(TINY, region=region))) == {"region maps"}

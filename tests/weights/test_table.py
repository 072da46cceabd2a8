"""Transforms undo each other, leaves give the same values however they are read, and a table says
everything that is wrong at once and reads nothing to say it."""

import ml_dtypes
import numpy as np
import pytest
import torch

from regionjax.ops.tokens import patchify
from regionjax.weights import leaves
from regionjax.weights.leaves import ArrayLeaf, Cast, Layer, Padded, Stacked, Viewed, from_arrays
from regionjax.weights.table import Rule, Table
from regionjax.weights.tensors import Tensor, WeightsError
from regionjax.weights.transforms import (
  conv,
  flatten,
  linear,
  linear_rows,
  patch,
  rows,
  same,
)

RNG = np.random.default_rng(0)


class Unread(Tensor):
  """A tensor that must not be read."""

  def array(self):
    raise AssertionError(f"{self.name} was read")


def unread(shapes, dtype=np.float16):
  return {name: Unread(name, shape, dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize(
  "transform, stored, ours",
  [
    (same, (5,), (5,)),
    (linear, (5, 7), (7, 5)),
    (conv, (5, 7, 3, 2), (3, 2, 7, 5)),
    (patch(4), (5, 3, 4, 4), (48, 5)),
    (flatten(3, 4), (5, 36), (36, 5)),
    (rows(6, 6), (6, 5), (6, 5)),
    (rows(6, 8), (6, 5), (8, 5)),
    (linear_rows(6, 8), (6, 5), (5, 8)),
  ],
  ids=lambda x: getattr(x, "name", None),
)
def test_transforms_undo_each_other(transform, stored, ours):
  assert transform.our_shape(stored) == ours
  assert transform.stored_shape(ours) == stored
  values = RNG.normal(size=stored)
  np.testing.assert_array_equal(transform.backward(transform.forward(values)), values)


def test_patch_is_the_convolution_over_our_patches():
  weight = RNG.normal(size=(5, 3, 4, 4)).astype(np.float32)
  images = RNG.normal(size=(2, 8, 12, 3)).astype(np.float32)
  theirs = torch.nn.functional.conv2d(
    torch.tensor(images).permute(0, 3, 1, 2), torch.tensor(weight), stride=4
  )
  ours = np.asarray(patchify(images, 4)) @ patch(4).forward(weight)
  np.testing.assert_allclose(ours, theirs.flatten(2).permute(0, 2, 1).numpy(), atol=1e-5)


def test_flatten_is_the_linear_map_over_our_order():
  weight, maps = RNG.normal(size=(5, 36)), RNG.normal(size=(2, 3, 3, 4))
  theirs = maps.transpose(0, 3, 1, 2).reshape(2, -1) @ weight.T
  ours = maps.reshape(2, -1) @ flatten(3, 4).forward(weight)
  np.testing.assert_allclose(ours, theirs)


def some_leaves():
  """Leaves of every kind, with the values that they must give."""
  rng = np.random.default_rng(1)
  a, b = (rng.normal(size=(6, 5)).astype(np.float32) for _ in range(2))
  tensors = from_arrays({"a": a, "b": b})
  turned = [Viewed(tensors[n], linear.forward) for n in "ab"]
  stack = Stacked(turned)
  both = np.stack([a.T, b.T])
  return {
    "array": (ArrayLeaf(a), a),
    "viewed": (turned[0], a.T),
    "stacked": (stack, both),
    "layer of an array": (Layer(ArrayLeaf(both), 1), b.T),
    "layer of a stack": (Layer(stack, 1), b.T),
    "padded rows": (Padded(ArrayLeaf(a), axis=0, size=9), np.pad(a, [(0, 3), (0, 0)])),
    "padded columns": (Padded(turned[0], axis=1, size=8), np.pad(a.T, [(0, 0), (0, 2)])),
    "cast": (Cast(stack, ml_dtypes.bfloat16), both.astype(ml_dtypes.bfloat16)),
    "scalar": (ArrayLeaf(np.float32(3)), np.float32(3)),
  }


@pytest.mark.parametrize("piece_bytes", [1, 50, 1 << 20])
@pytest.mark.parametrize("name", some_leaves())
def test_leaves_give_the_same_values_however_they_are_read(name, piece_bytes, monkeypatch):
  monkeypatch.setattr(leaves, "PIECE_BYTES", piece_bytes)
  leaf, want = some_leaves()[name]
  whole = leaves.read_all(leaf)
  assert whole.shape == leaf.shape and whole.dtype == leaf.dtype
  np.testing.assert_array_equal(whole, want)
  got = np.full(leaf.shape, np.nan, leaf.dtype)
  end = 0
  for start, block in leaf.pieces():
    assert start == end and block.dtype == leaf.dtype
    if leaf.shape:
      end += len(block)
      got[start:end] = block
    else:
      got = block
  np.testing.assert_array_equal(got, want)
  if len(leaf.shape) > 1:
    for index in [(slice(1, 2),), (slice(None), slice(2, 4)), (slice(0, 2), slice(3, None))]:
      part = leaf.read(index)
      np.testing.assert_array_equal(part, want[index])
      assert part.flags["C_CONTIGUOUS"] and part.flags["OWNDATA"]


def test_reading_gives_memory_back():
  released = []

  class Counting(Tensor):
    def array(self):
      return np.zeros(self.shape, self.dtype)

    def release(self):
      released.append(self.name)

  stack = Stacked([Viewed(Counting(n, (2, 3), np.float32), linear.forward) for n in "ab"])
  seen = [list(released) for _ in stack.pieces()]
  assert seen == [[], ["a"]] and released == ["a", "b"]
  Padded(stack, axis=1, size=4).read((slice(1, 2),))
  assert released == ["a", "b", "b"]


def test_layers_of_several_dtypes_become_float32():
  a = {"a": np.ones((2, 2), np.float16), "b": np.ones((2, 2), ml_dtypes.bfloat16)}
  stack = Stacked([Viewed(t) for t in from_arrays(a).values()])
  assert stack.dtype == np.float32
  assert [block.dtype for _, block in stack.pieces()] == [np.float32] * 2


TABLE = Table(
  "Toy",
  (
    Rule("model.embed.weight", "embed/embedding", rows(6, 8)),
    Rule("model.layers.{layer}.up.weight", "layers/up/kernel", linear),
    Rule("model.layers.{layer}.norm.weight", "layers/norm/scale"),
    Rule("model.head.weight", "head/kernel", linear_rows(6, 8)),
  ),
  aliases=((r"^(?=layers\.)", "model."), (r"^output\.", "model.head.")),
  ignored=(r"inv_freq$",),
  spare=(r"^model\.spare\.",),
  twins=(("model.twin.weight", "model.embed.weight"),),
)
WANTED = {
  "embed/embedding": (8, 4),
  "layers/up/kernel": (3, 4, 5),
  "layers/norm/scale": (3, 4),
  "head/kernel": (4, 8),
}
SHAPES = {
  "model.embed.weight": (6, 4),
  **{f"model.layers.{i}.up.weight": (5, 4) for i in range(3)},
  **{f"model.layers.{i}.norm.weight": (4,) for i in range(3)},
  "model.head.weight": (6, 4),
}


def arrays(shapes, dtype=np.float16):
  return {name: RNG.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def test_a_plan_reads_nothing_and_sorts_what_it_finds():
  source = unread(SHAPES | {"model.spare.x": (1,), "model.layers.0.inv_freq": (2,)})
  plan = TABLE.plan(source, WANTED)
  assert {path: leaf.shape for path, leaf in plan.leaves.items()} == WANTED
  assert list(plan.spare) == ["model.spare.x"] and plan.ignored == ["model.layers.0.inv_freq"]
  with pytest.raises(AssertionError, match=r"model.layers.0.up.weight was read"):
    list(plan.leaves["layers/up/kernel"].pieces())


def test_there_and_back_is_bit_exact():
  stored = arrays(SHAPES)
  plan = TABLE.plan(from_arrays(stored | {"model.spare.x": np.ones(1)}), WANTED)
  ours = {path: leaves.read_all(leaf) for path, leaf in plan.leaves.items()}
  np.testing.assert_array_equal(ours["layers/up/kernel"][1], stored["model.layers.1.up.weight"].T)
  assert not ours["embed/embedding"][6:].any() and not ours["head/kernel"][:, 6:].any()
  for params in (ours, plan.leaves):  # from arrays, and without holding them
    back = TABLE.back(params, spare=plan.spare)
    assert back.keys() == {*stored, "model.spare.x"}
    for name, array in stored.items():
      got = leaves.read_all(back[name])
      assert got.dtype == array.dtype
      np.testing.assert_array_equal(got, array)
  # Whole layers one behind the other, as published.
  assert list(back)[:4] == [
    "model.embed.weight",
    "model.layers.0.up.weight",
    "model.layers.0.norm.weight",
    "model.layers.1.up.weight",
  ]


def test_other_layouts_are_read_under_their_own_names():
  renamed = {n.replace("model.layers", "layers").replace("model.head", "output"): s
             for n, s in SHAPES.items()}  # fmt: skip
  assert "output.weight" in renamed
  assert TABLE.plan(unread(renamed), WANTED).leaves.keys() == WANTED.keys()
  renamed["output.weight"] = (7, 4)
  with pytest.raises(WeightsError, match=r"output.weight \(model.head.weight\) is \[7, 4\]"):
    TABLE.plan(unread(renamed), WANTED)


def test_everything_that_is_wrong_is_said_at_once():
  shapes = dict(SHAPES)
  for gone in ("model.layers.1.up.weight", "model.layers.1.norm.weight", "model.embed.weight"):
    del shapes[gone]
  shapes |= {"model.layers.0.up.weight": (4, 5), "model.head.weight": (7, 4)}
  shapes |= {"model.layers.3.up.weight": (5, 4), "model.bias": (1,), "layers.2.norm.weight": (4,)}
  source = unread(shapes)
  source["model.layers.2.up.weight"] = Unread("model.layers.2.up.weight", (5, 4), np.int8)
  with pytest.raises(WeightsError) as error:
    TABLE.plan(source, WANTED | {"regions/kernel": (2, 2)})
  lines = [line.strip() for line in str(error.value).splitlines()]
  assert lines[0].startswith("the checkpoint: its tensors are not those of Toy")
  for kind, *listed in (
    ("3 missing:", "model.embed.weight [6, 4]", "model.layers.1.up.weight [5, 4]",
     "model.layers.1.norm.weight [4]"),
    ("2 unexpected:", "model.layers.3.up.weight [5, 4]", "model.bias [1]"),
    ("2 of another shape:", "model.layers.0.up.weight is [4, 5], expected [5, 4]",
     "model.head.weight is [7, 4], expected [6, 4]"),
    ("1 stored twice:",
     "model.layers.2.norm.weight: as model.layers.2.norm.weight and as layers.2.norm.weight"),
    ("1 of a dtype that is not read:",),
    ("1 parameters that such files do not have:", "regions/kernel [2, 2]"),
  ):  # fmt: skip
    at = lines.index(kind)
    assert sorted(lines[at + 1 : at + 1 + len(listed)]) == sorted(listed)


def test_a_long_list_is_not_cut():
  shapes = {f"model.other.{i}": (1,) for i in range(500)}
  with pytest.raises(WeightsError) as error:
    TABLE.plan(unread(SHAPES | shapes), WANTED)
  assert all(f"    {name} [1]\n" in str(error.value) for name in shapes)


def test_a_tensor_that_repeats_another_must_be_equal():
  stored = arrays(SHAPES)
  twin = {"model.twin.weight": stored["model.embed.weight"].copy()}
  assert TABLE.plan(from_arrays(stored | twin), WANTED).ignored == ["model.twin.weight"]
  twin["model.twin.weight"][5, 3] += 1
  with pytest.raises(WeightsError, match=r"model.twin.weight differs.*tie_word_embeddings"):
    TABLE.plan(from_arrays(stored | twin), WANTED)


def test_parameters_without_a_place_are_named_on_the_way_back():
  params = {path: np.zeros(shape, np.float32) for path, shape in WANTED.items()}
  params["layers/up/lora_a"] = params.pop("head/kernel")
  with pytest.raises(WeightsError) as error:
    TABLE.back(params)
  assert "layers/up/lora_a [4, 8]" in str(error.value) and "head/kernel" in str(error.value)

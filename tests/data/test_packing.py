"""Packing into rows, and the arrays of a row, on made-up examples."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regionjax.data.packing import FirstFit, Size
from regionjax.data.rows import text_arrays

CAPACITY = Size(tokens=64, images=3, regions=8)
SIZES = st.builds(Size, st.integers(2, 64), st.integers(0, 3), st.integers(0, 8))


def pack(sizes, bins):
  """Rows of item indices in the order in which they close, and the rows of each `add`."""
  packer = FirstFit(CAPACITY, bins)
  closed = [packer.add(i, size) for i, size in enumerate(sizes)]
  rows = [row for row in closed if row is not None]
  return rows, packer


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(SIZES, max_size=60), bins=st.integers(1, 8))
def test_every_example_is_in_one_row_that_has_room_for_it(sizes, bins):
  rows, packer = pack(sizes, bins)
  assert len(packer.open) <= bins
  rows += packer.flush()
  assert sorted(i for row in rows for i in row.items) == list(range(len(sizes)))
  for row in rows:
    assert row.items == sorted(row.items)
    total = Size(*np.sum([sizes[i] for i in row.items], axis=0))
    assert row.used == total
    assert total.within(CAPACITY)
  assert packer.open == []


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(SIZES, max_size=40), bins=st.integers(1, 6), cut=st.integers(0, 40))
def test_restored_packer_goes_on_alike(sizes, bins, cut):
  whole, _ = pack(sizes, bins)
  first, packer = pack(sizes[:cut], bins)
  again = FirstFit(CAPACITY, bins)
  again.restore([[(i, sizes[i]) for i in row.items] for row in packer.open])
  rest = [again.add(i, sizes[i]) for i in range(min(cut, len(sizes)), len(sizes))]
  assert first + [row for row in rest if row is not None] == whole


def test_the_fullest_row_is_closed():
  packer = FirstFit(CAPACITY, 2)
  assert packer.add("a", Size(30, 0, 0)) is None
  assert packer.add("b", Size(60, 0, 0)) is None
  assert packer.add("c", Size(50, 0, 0)).items == ["b"]
  # By whichever limit is nearest: three images fill a row of ten tokens.
  assert packer.add("d", Size(10, 3, 0)) is None
  assert [row.items for row in packer.open] == [["a", "d"], ["c"]]
  assert packer.add("e", Size(20, 1, 0)).items == ["a", "d"]


@pytest.mark.parametrize(
  "size, limit",
  [(Size(65, 0, 0), "tokens"), (Size(1, 4, 0), "images"), (Size(1, 0, 9), "regions")],
)
def test_too_large_an_example_is_refused(size, limit):
  assert size.over(CAPACITY) == limit
  with pytest.raises(ValueError, match=f"data.{limit}_per_row"):
    FirstFit(CAPACITY, 4).add(0, size)


def test_waste_is_below_what_closing_all_rows_gives():
  # The figures of the module's docstring: dialogues in rows of 512 tokens and 4 images.
  rng = np.random.default_rng(0)
  sizes = [
    Size(94 + 22 * int(q), 1, int(r))
    for q, r in zip(rng.integers(1, 11, 4000), rng.integers(1, 12, 4000))
  ]
  packer = FirstFit(Size(512, 4, 24), 8)
  rows = [row for row in (packer.add(i, s) for i, s in enumerate(sizes)) if row is not None]
  waste = 1 - sum(row.used.tokens for row in rows) / (512 * len(rows))
  assert waste < 0.11


@dataclasses.dataclass(frozen=True)
class Encoded:
  """As much of conversation.Encoded as the token arrays need."""

  ids: np.ndarray
  mask: np.ndarray
  answer_ids: np.ndarray
  answers: tuple


def encoded(rng, n):
  """n random ids with up to two supervised answers."""
  answer_ids = np.zeros(n, np.int32)
  cuts = np.sort(rng.choice(np.arange(1, n), size=min(4, n - 1), replace=False))
  answers = [(cuts[i], cuts[i + 1]) for i in range(0, len(cuts) - 1, 2)]
  for j, (start, stop) in enumerate(answers, 1):
    answer_ids[start:stop] = j
  ids = rng.integers(10, 100, n).astype(np.int32)
  names = tuple(("task", str(j), "box") for j in range(len(answers)))
  return Encoded(ids, answer_ids > 0, answer_ids, names)


@settings(max_examples=60, deadline=None)
@given(
  lengths=st.lists(st.lists(st.integers(2, 16), max_size=4), min_size=1, max_size=3),
  seed=st.integers(0, 99),
)
def test_each_position_predicts_the_next_token_of_its_segment(lengths, seed):
  rng = np.random.default_rng(seed)
  rows = [[encoded(rng, n) for n in row] for row in lengths]
  out = text_arrays(rows, tokens=64, pad_id=7)
  for b, row in enumerate(rows):
    used = sum(len(e.ids) for e in row)
    np.testing.assert_array_equal(out["tokens_bt"][b, used:], 7)
    np.testing.assert_array_equal(out["segment_ids_bt"][b, used:], 0)
    assert not out["loss_weights_bt"][b, used:].any()
    before = 0
    for k, e in enumerate(row, 1):
      here = out["segment_ids_bt"][b] == k
      n = len(e.ids)
      assert here.sum() == n
      np.testing.assert_array_equal(out["tokens_bt"][b, here], e.ids)
      np.testing.assert_array_equal(out["positions_bt"][b, here], np.arange(n))
      np.testing.assert_array_equal(out["targets_bt"][b, here][:-1], e.ids[1:])
      np.testing.assert_array_equal(out["loss_weights_bt"][b, here], [*e.mask[1:], 0])
      want = np.append(np.where(e.answer_ids[1:] > 0, e.answer_ids[1:] + before, 0), 0)
      np.testing.assert_array_equal(out["answer_ids_bt"][b, here], want)
      before += len(e.answers)
  # An answer id stands exactly where there is a loss.
  np.testing.assert_array_equal(out["answer_ids_bt"] > 0, out["loss_weights_bt"] > 0)
  assert {a.dtype for n, a in out.items() if n != "loss_weights_bt"} == {np.dtype(np.int32)}

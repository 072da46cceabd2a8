"""Wilson intervals: published values, coverage and edges."""

import numpy as np
import pytest

from regionjax.evaluate.intervals import wilson


@pytest.mark.parametrize(
  ("correct", "total", "low", "high"),
  [
    (0, 20, 0.0, 0.1611),  # z²/(n+z²)
    (20, 20, 0.8389, 1.0),
    (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
    (15, 148, 0.0624, 0.1605),
    (1, 29, 0.0061, 0.1718),
  ],
)
def test_known_values(correct, total, low, high):
  got = wilson(correct, total)
  assert got == pytest.approx((low, high), abs=6e-5)


def test_no_trials_say_nothing():
  assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("total", [1, 7, 500])
def test_holds_the_share_and_narrows(total):
  for correct in {0, total // 3, total}:
    low, high = wilson(correct, total)
    assert 0 <= low <= correct / total <= high <= 1
    low4, high4 = wilson(4 * correct, 4 * total)
    assert high4 - low4 < high - low


def test_covers_the_truth_about_95_times_in_100():
  hits = np.random.default_rng(0).binomial(200, 0.9, size=2000)
  covered = np.mean([low <= 0.9 <= high for low, high in (wilson(int(h), 200) for h in hits)])
  assert 0.93 < covered < 0.97


def test_impossible_counts_are_refused():
  with pytest.raises(ValueError, match="expected 0 <= correct"):
    wilson(5, 4)

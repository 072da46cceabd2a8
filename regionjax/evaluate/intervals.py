"""Confidence intervals of a share: how sure an accuracy on n questions can be."""

from __future__ import annotations

import math

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def wilson(correct: int, total: int, *, z: float = Z_95) -> tuple[float, float]:
  """Wilson's score interval of `correct / total` (Wilson 1927; Brown, Cai and DasGupta 2001).

  Unlike the textbook interval it stays in [0, 1] and is not empty at 0 or total hits.

  Args:
    correct: hits, 0..total.
    total: trials.
    z: normal quantile; the default gives 95 %.

  Returns:
    (low, high); (0, 1) for no trials.

  Raises:
    ValueError: correct is not in 0..total.
  """
  if not 0 <= correct <= total:
    raise ValueError(f"{correct} correct of {total}: expected 0 <= correct <= total")
  if total == 0:
    return 0.0, 1.0
  share = correct / total
  scale = 1 + z * z / total
  centre = (share + z * z / (2 * total)) / scale
  half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
  # At 0 and at total hits the exact ends are 0 and 1; rounding must not move past the share.
  return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)

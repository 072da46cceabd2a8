"""RoIAlign sample by sample, as the rule is told: the oracle of the tests. Never fast.

Axes: R boxes, H and W cells, P and Q bins, C channels.
"""

from __future__ import annotations

import math

import numpy as np


def roi_align_reference(
  features_hwc: np.ndarray,
  boxes_r4: np.ndarray,
  *,
  output_size: tuple[int, int],
  sampling_ratio: int,
) -> np.ndarray:
  """RoIAlign of one image, with scalar arithmetic on positions and a loop over samples.

  Positions are float32 in torchvision's order of operations, so that both agree on which side of
  the map's edge a sample lies; weights and sums are float64.

  Args:
    features_hwc: [H, W, C].
    boxes_r4: [R, 4] normalised xyxy.
    output_size: (P, Q).
    sampling_ratio: S; S*S samples per bin.

  Returns:
    [R, P, Q, C] float64; zeros for boxes that are not finite.
  """
  height, width, channels = features_hwc.shape
  features_hwc = features_hwc.astype(np.float64)
  p_bins, q_bins = output_size
  out_rpqc = np.zeros((len(boxes_r4), p_bins, q_bins, channels))
  for r, box in enumerate(np.asarray(boxes_r4, np.float32)):
    if not np.all(np.isfinite(box)):
      continue
    for p in range(p_bins):
      for q in range(q_bins):
        for sy in range(sampling_ratio):
          y = _position(box[1], box[3], height, p_bins, p, sampling_ratio, sy)
          for sx in range(sampling_ratio):
            x = _position(box[0], box[2], width, q_bins, q, sampling_ratio, sx)
            out_rpqc[r, p, q] += _bilinear(features_hwc, y, x)
  return out_rpqc / sampling_ratio**2


def _position(
  lo: np.float32, hi: np.float32, cells: int, bins: int, index: int, ratio: int, sample: int
) -> np.float32:
  f = np.float32
  start = lo * f(cells) - f(0.5)
  bin_size = (hi * f(cells) - f(0.5) - start) / f(bins)
  return start + f(index) * bin_size + (f(sample) + f(0.5)) * bin_size / f(ratio)


def _bilinear(features_hwc: np.ndarray, y: np.float32, x: np.float32) -> np.ndarray | float:
  height, width, _ = features_hwc.shape
  if y < -1 or y > height or x < -1 or x > width:
    return 0.0
  y = min(max(float(y), 0.0), height - 1.0)
  x = min(max(float(x), 0.0), width - 1.0)
  y0, x0 = math.floor(y), math.floor(x)
  y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
  dy, dx = y - y0, x - x0
  top = (1 - dx) * features_hwc[y0, x0] + dx * features_hwc[y0, x1]
  bottom = (1 - dx) * features_hwc[y1, x0] + dx * features_hwc[y1, x1]
  return (1 - dy) * top + dy * bottom

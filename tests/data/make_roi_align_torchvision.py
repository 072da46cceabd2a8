"""Writes roi_align_torchvision.npz: torchvision's RoIAlign, forward and gradient, on small maps.

Run where torch and torchvision are installed (jax isn't needed):

  python tests/data/make_roi_align_torchvision.py tests/data/roi_align_torchvision.npz
"""

import sys

import numpy as np
import torch
import torchvision


def case(name: str, height: int, width: int, size: tuple[int, int], ratio: int, seed: int) -> dict:
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((1, height, width, 4), dtype=np.float32)
  inside = np.sort(rng.uniform(0, 1, (12, 2, 2)), axis=1).reshape(12, 4)
  crossing = np.sort(rng.uniform(-0.6, 1.6, (12, 2, 2)), axis=1).reshape(12, 4)
  special = [
    [0, 0, 1, 1],
    [0.3, 0.6, 0.3, 0.6],  # a point
    [0.2, 0.4, 0.9, 0.4],  # a line
    [0.8, 0.7, 0.3, 0.2],  # inverted
    [1.5, 1.5, 2, 2],  # outside
    [-0.25, -0.25, 1.25, 1.25],
    [-0.01, 0.99, 0.01, 1.01],  # on a corner
  ]
  boxes = np.concatenate([inside, crossing, special]).astype(np.float32)
  t = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
  pixels = torch.from_numpy(boxes * np.array([width, height, width, height], np.float32))
  out = torchvision.ops.roi_align(t, [pixels], size, 1.0, ratio, aligned=True)
  cotangent = torch.from_numpy(rng.standard_normal(out.shape, dtype=np.float32))
  out.backward(cotangent)
  arrays = dict(
    features=x,
    boxes=boxes[None],
    size=np.array(size),
    ratio=np.array(ratio),
    out=out.detach().numpy().transpose(0, 2, 3, 1)[None],
    cotangent=cotangent.numpy().transpose(0, 2, 3, 1)[None],
    grad=t.grad.numpy().transpose(0, 2, 3, 1),
  )
  return {f"{name}_{k}": v for k, v in arrays.items()}


if __name__ == "__main__":
  np.savez_compressed(
    sys.argv[1],
    torchvision_version=np.array(torchvision.__version__),
    **case("square", 16, 16, (7, 7), 2, seed=0),
    **case("wide", 6, 20, (3, 5), 1, seed=1),
  )

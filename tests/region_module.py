"""The published region module's own figures, and the parameters that they were computed with.

`data/region_module_128.npz` holds what the original module computes in float32 with maps of 128
channels (2 per GroupNorm group) for two images of 3 and 4 boxes, one of them empty and one leaving
its image. Its parameters are not stored: they are drawn from their names.
"""

import math
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np

FILE = Path(__file__).parent / "data" / "region_module_128.npz"


def draw(key: str, shape: tuple[int, ...]) -> np.ndarray:
  """The parameter of this name, in PyTorch's layout."""
  rng = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
  x = rng.standard_normal(shape, dtype=np.float32)
  if key.endswith("bias"):
    return x * np.float32(0.02)
  if len(shape) == 1:
    return 1 + np.float32(0.1) * x
  return (x / math.sqrt(math.prod(shape[1:]))).astype(np.float32)


def figures() -> dict[str, np.ndarray]:
  with np.load(FILE) as z:
    return dict(z)


def inputs(data):
  """(hidden states, boxes, which of them exist) of two rows of one image each."""
  hidden = [jnp.asarray(data[f"features_{l}"])[:, None] for l in range(4)]
  boxes = jnp.asarray(data["boxes"])
  return hidden, boxes, jnp.all(jnp.isfinite(boxes), axis=-1)


def relative(a, b) -> float:
  return float(np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(b)))

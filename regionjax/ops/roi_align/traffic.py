"""How many bytes the TPU kernels move between HBM and fast memory, from their own index maps.

  python -m regionjax.ops.roi_align.traffic

A kernel's grid is walked in order, and a block is moved whenever its index differs from that of the
step before: that is what the pipeline around a Pallas kernel does. XLA's cost analysis can't tell:
it repeats the estimate that the kernel's author gave. Bytes are those of whole tiles, so 14 bins
count as the 16 rows that they occupy.

Axes: B rows, K images of a row, R boxes, H and W cells, P and Q bins, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from regionjax.ops.roi_align import pallas_schedule, pallas_tpu
from regionjax.ops.roi_align.sampling import Boxes

DIRECTIONS = ("forward", "backward")
SHAPES = ((16, 16, 1024), (32, 32, 1024), (64, 64, 1024), (112, 112, 256), (128, 128, 1024))


class Traffic(NamedTuple):
  """Bytes of one call on one device."""

  maps: int
  crops: int
  scalars: int  # schedule and boxes
  minimum: int  # every map with boxes (all of them in the gradient) and every crop moved once

  @property
  def ratio(self) -> float:
    return (self.maps + self.crops + self.scalars) / self.minimum


def roi_align_traffic(
  shape: tuple[int, ...],
  image_br: np.ndarray,
  *,
  direction: str,
  dtype: Any = jnp.bfloat16,
  valid_br: np.ndarray | None = None,
  output_size: tuple[int, int] = (14, 14),
  sampling_ratio: int = 2,
) -> Traffic:
  """Traffic of one call of the kernel.

  Args:
    shape: of the features, [B, K, H, W, C].
    image_br: int32 [B, R], the image of each box; where the boxes lie in it changes nothing.
    direction: 'forward' or 'backward'.
    valid_br: bool [B, R], default all.

  Raises:
    ValueError: the kernel doesn't take such maps.
  """
  if direction not in DIRECTIONS:
    raise ValueError(f"direction={direction!r}, expected one of {DIRECTIONS}")
  forward = direction == "forward"
  valid_br = np.ones(image_br.shape, bool) if valid_br is None else valid_br
  boxes = Boxes(
    jnp.zeros((*image_br.shape, 4)), jnp.asarray(image_br, jnp.int32), jnp.asarray(valid_br)
  )
  case = pallas_tpu.make_case(
    shape, jnp.dtype(dtype), boxes, output_size, sampling_ratio, forward=forward
  )
  make = pallas_schedule.forward_schedule if forward else pallas_schedule.backward_schedule
  schedule = make(boxes, images=shape[1], stripes=case.stripes)
  scalars = [np.asarray(x) for x in pallas_tpu.scalars(schedule, boxes)]
  spec = pallas_tpu.forward_grid(case) if forward else pallas_tpu.backward_grid(case)
  ins, outs = (
    moved_blocks(spec.grid, block.index_map, scalars)
    * pallas_schedule.tiled_bytes(block.block_shape, case.dtype.itemsize, packed=False)
    for block in (*spec.in_specs, spec.out_specs)
  )
  maps, crops = (ins, outs) if forward else (outs, ins)
  images = [set(image[ok]) for image, ok in zip(image_br, valid_br)]
  read = sum(map(len, images)) if forward else shape[0] * shape[1]
  crops_needed = image_br.size if forward else int(valid_br.sum())
  channels = case.dtype.itemsize * shape[-1]
  return Traffic(
    maps, crops, sum(x.nbytes for x in scalars),
    channels * (read * shape[2] * shape[3] + crops_needed * math.prod(output_size)),
  )  # fmt: skip


def moved_blocks(grid: Sequence[int], index_map, scalars: Sequence[np.ndarray]) -> int:
  """How often a block's index changes over the grid, last axis fastest; the first one counts.

  Args:
    index_map: takes the grid's indices and the prefetched scalars; only arithmetic and look-ups,
      so that it can be given arrays of all steps at once.
  """
  steps = np.indices(grid).reshape(len(grid), -1)
  index = np.stack([np.broadcast_to(i, steps.shape[1:]) for i in index_map(*steps, *scalars)])
  return 1 + int(np.any(index[:, 1:] != index[:, :-1], axis=0).sum())


def main() -> None:
  """Prints the traffic of both kernels for typical maps, 14x14 bins and one image."""
  print("map, boxes        dtype     direction   moved MB   minimum MB   ratio")
  for h, w, c in SHAPES:
    for boxes in (8, 64):
      for dtype in pallas_schedule.DTYPES:
        for direction in DIRECTIONS:
          image_br = np.zeros((1, boxes), np.int32)
          t = roi_align_traffic((1, 1, h, w, c), image_br, direction=direction, dtype=dtype)
          moved = t.ratio * t.minimum
          print(
            f"{h}x{w}x{c}, {boxes:2}".ljust(18) + f"{jnp.dtype(dtype).name:10}{direction:10}"
            f"{moved / 1e6:10.1f}{t.minimum / 1e6:13.1f}{t.ratio:8.2f}"
          )


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  main()

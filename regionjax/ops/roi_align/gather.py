"""RoIAlign by reading the four neighbours of every sample, and its transpose.

Per axis a bin has T = 2S taps: the cell below and the cell above each of its S samples. A bin is a
weighted sum of T*T cells, each a contiguous vector of C channels.

Axes: B rows, K images of a row, R boxes, H and W cells, P and Q bins, T taps, C channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from regionjax.ops.roi_align.sampling import Boxes, sample_positions


def forward(
  features_bkhwc: jax.Array, boxes: Boxes, *, output_size: tuple[int, int], sampling_ratio: int
) -> jax.Array:
  """RoIAlign by T*T gathers, which XLA:CPU fuses into one pass over the result: [B, R, P, Q, C].

  Rows of the batch are gathered under `vmap`, so that a batch sharded over devices stays so.
  """
  b, k, h, w, c = features_bkhwc.shape
  y_brpt, wy_brpt, x_brqt, wx_brqt = _taps(boxes, features_bkhwc, output_size, sampling_ratio)

  def one_row(cells_nc, y_rpt, wy_rpt, x_rqt, wx_rqt):
    total = jnp.zeros((*y_rpt.shape[:2], x_rqt.shape[1], c), jnp.float32)
    for i in range(y_rpt.shape[-1]):
      for j in range(x_rqt.shape[-1]):
        cell_rpq = y_rpt[:, :, None, i] + x_rqt[:, None, :, j]
        weight_rpq = wy_rpt[:, :, None, i] * wx_rqt[:, None, :, j]
        tap_rpqc = cells_nc.at[cell_rpq].get(mode="promise_in_bounds")
        total += tap_rpqc.astype(jnp.float32) * weight_rpq[..., None]
    return total.astype(features_bkhwc.dtype)

  cells_bnc = features_bkhwc.reshape(b, k * h * w, c)
  return jax.vmap(one_row)(cells_bnc, y_brpt, wy_brpt, x_brqt, wx_brqt)


def backward(
  cotangent_brpqc: jax.Array,
  boxes: Boxes,
  features: jax.ShapeDtypeStruct,
  *,
  output_size: tuple[int, int],
  sampling_ratio: int,
) -> jax.Array:
  """The transpose of `forward`: the gradient to features [B, K, H, W, C]."""
  kw = dict(output_size=output_size, sampling_ratio=sampling_ratio)

  def scatter(g, boxes):
    zeros = jnp.zeros(features.shape, features.dtype)
    return jax.vjp(lambda x: forward(x, boxes, **kw), zeros)[1](g)[0]

  def loop(g, boxes):
    return _backward_loop(g, boxes, features, **kw)

  # XLA:CPU runs a scatter as a loop that first writes out all of its T*T*R*P*Q updates: 126 ms on
  # 16x16x1024 where the loop takes 11.
  return jax.lax.platform_dependent(cotangent_brpqc, boxes, cpu=loop, default=scatter)


def _backward_loop(
  cotangent_brpqc: jax.Array,
  boxes: Boxes,
  features: jax.ShapeDtypeStruct,
  *,
  output_size: tuple[int, int],
  sampling_ratio: int,
) -> jax.Array:
  """Adds each bin's cotangent to its cells in place, in float32.

  One step does the T column taps of one row tap: with all T*T unrolled the program takes twice as
  long to compile and is no faster.
  """
  b, k, h, w, c = features.shape
  y_brpt, wy_brpt, x_brqt, wx_brqt = _taps(boxes, features, output_size, sampling_ratio)
  t = y_brpt.shape[-1]
  y_brpt += jnp.arange(b, dtype=jnp.int32)[:, None, None, None] * (k * h * w)
  cell_brpqtt = y_brpt[:, :, :, None, :, None] + x_brqt[:, :, None, :, None, :]
  weight_brpqtt = wy_brpt[:, :, :, None, :, None] * wx_brqt[:, :, None, :, None, :]
  cell_mt, weight_mt = cell_brpqtt.reshape(-1, t), weight_brpqtt.reshape(-1, t)
  g_mc = cotangent_brpqc.astype(jnp.float32).reshape(-1, c)

  def add_row_tap(m, total_nc):
    g_1c = jax.lax.dynamic_slice(g_mc, (m // t, 0), (1, c))
    for i in range(t):
      at = (cell_mt[m, i], 0)
      cell_1c = jax.lax.dynamic_slice(total_nc, at, (1, c))
      total_nc = jax.lax.dynamic_update_slice(total_nc, cell_1c + weight_mt[m, i] * g_1c, at)
    return total_nc

  total_nc = jnp.zeros((b * k * h * w, c), jnp.float32)
  total_nc = jax.lax.fori_loop(0, cell_mt.shape[0], add_row_tap, total_nc)
  return total_nc.reshape(features.shape).astype(features.dtype)


def _taps(
  boxes: Boxes,
  features: jax.Array | jax.ShapeDtypeStruct,
  output_size: tuple[int, int],
  sampling_ratio: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Offset of each row tap and column tap in the row's K*H*W cells, and their weights."""
  _, _, h, w, _ = features.shape
  x1_br, y1_br, x2_br, y2_br = (boxes.xyxy_br4[..., i] for i in range(4))

  def axis(lo_br, hi_br, cells, bins):
    pos, inside = sample_positions(lo_br, hi_br, cells=cells, bins=bins, ratio=sampling_ratio)
    below = jnp.floor(pos).astype(jnp.int32)
    above = jnp.minimum(below + 1, cells - 1)
    share = jnp.where(inside, 1.0 / sampling_ratio, 0.0)
    weights = jnp.concatenate([(1.0 - (pos - below)) * share, (pos - below) * share], axis=-1)
    return jnp.concatenate([below, above], axis=-1), weights

  y_brpt, wy_brpt = axis(y1_br, y2_br, h, output_size[0])
  x_brqt, wx_brqt = axis(x1_br, x2_br, w, output_size[1])
  y_brpt = (y_brpt + boxes.image_br[:, :, None, None] * h) * w
  return y_brpt, jnp.where(boxes.valid_br[:, :, None, None], wy_brpt, 0.0), x_brqt, wx_brqt

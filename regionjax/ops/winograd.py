"""3x3 convolution by Winograd's minimal filtering: a quarter of the multiplications.

F(4x4, 3x3) of Lavin and Gray (arXiv 1509.09308): each 4x4 tile of the result comes from a 6x6 tile
of the input, both transformed by small constant matrices, and the convolution becomes 36 products
of matrices [tiles, C] x [C, D]: 36 multiplications per tile and pair of channels instead of 144.

The matrices are Cook and Toom's for the points 0, +-sqrt(2), +-sqrt(1/2) and infinity. The usual
integer points 0, +-1, +-2 lose 3.5 times as much to rounding: against float64, with 256 channels,
the largest error is 9.7e-6 of the largest result with those and 2.7e-6 with these (a direct
convolution in float32: 0.6e-6).

Arithmetic is float32 whatever the input: what bfloat16 loses in the transforms would show.

Axes: b images, h w cells, c input and d output channels; n rows of tiles (of all images), t tiles
across, p = (n, t) tiles, k l the 36 places of a transformed tile, s = (k, l).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

OUT, WINDOW = 4, 3
IN = OUT + WINDOW - 1
# Tiles transformed at once. At 1024 channels in and out their transforms take 2 x 75 MB.
TILES = 512


def _toom_cook() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """A [4, 6], G [6, 3] and B [6, 6] with y = A ((G g) * (B x)), float64.

  A product of polynomials is evaluation at points, multiplication there, interpolation; correlation
  is its transpose.
  """
  points = np.array([0.0, 2**0.5, -(2**0.5), 0.5**0.5, -(0.5**0.5)])

  def evaluate(coefficients: int) -> np.ndarray:
    at_infinity = np.eye(coefficients)[-1:]
    return np.concatenate([points[:, None] ** np.arange(coefficients), at_infinity])

  b = np.linalg.inv(evaluate(IN)).T
  b[np.abs(b) < 1e-9] = 0.0
  scale = np.abs(b).max(axis=1, keepdims=True)  # inputs keep their size, kernels take the factors
  return evaluate(OUT).T, evaluate(WINDOW) * scale, b / scale


A_OI, G_IW, B_II = (matrix.astype(np.float32) for matrix in _toom_cook())


def forward(x_bhwc: Array, kernel_ijcd: Array) -> Array:
  """A 3x3 convolution of stride 1 with zeros around the image, in x's dtype.

  Temporary memory: the kernel's transform (four times its size) and, however large and many the
  images are, the transforms of `TILES` tiles, each 36/16 of its part of the input and of the
  result. For 128x128 cells, 1024 channels in and out: 151 MB + 151 MB, and the padded input.
  """
  b, h, w, _ = x_bhwc.shape
  high, wide = _tiles(h), _tiles(w)
  u_scd = _kernel_transform(kernel_ijcd.astype(jnp.float32))

  def chunk(four_n4wc: Array, two_n2wc: Array) -> Array:
    v_spc = _input_transform(four_n4wc, two_n2wc, wide)
    m_spd = jnp.einsum("spc,scd->spd", v_spc, u_scd, precision=jax.lax.Precision.HIGHEST)
    return _output_transform(m_spd, wide)

  y_n4wd = _in_chunks(chunk, _input_rows(x_bhwc), wide)
  y_bhwd = y_n4wd.reshape(b, high * OUT, wide * OUT, -1)[:, :h, :w]
  return y_bhwd.astype(x_bhwc.dtype)


def backward(x_bhwc: Array, kernel_ijcd: Array, g_bhwd: Array) -> tuple[Array, Array]:
  """Gradients to x and to the kernel, each at the forward pass's cost.

  The first is a convolution of g with the kernel turned by 180 degrees; the second sums products of
  both transforms over all tiles. Transforms of x are computed anew: keeping them would take 2.25
  times x's memory.
  """
  turned_ijdc = kernel_ijcd[::-1, ::-1].swapaxes(2, 3)
  return forward(g_bhwd, turned_ijdc), _kernel_gradient(x_bhwc, g_bhwd).astype(kernel_ijcd.dtype)


def _kernel_gradient(x_bhwc: Array, g_bhwd: Array) -> Array:
  b, h, w, c = x_bhwc.shape
  high, wide, d = _tiles(h), _tiles(w), g_bhwd.shape[-1]
  behind = ((0, 0), (0, high * OUT - h), (0, wide * OUT - w), (0, 0))
  g_n4wd = jnp.pad(g_bhwd.astype(jnp.float32), behind).reshape(b * high, OUT, wide * OUT, d)

  def chunk(four_n4wc: Array, two_n2wc: Array, g_n4wd: Array) -> Array:
    v_spc = _input_transform(four_n4wc, two_n2wc, wide)
    z_spd = _gradient_transform(g_n4wd)
    return jnp.einsum("spc,spd->scd", v_spc, z_spd, precision=jax.lax.Precision.HIGHEST)

  rows = (*_input_rows(x_bhwc), g_n4wd)
  if (size := _chunk_rows(b * high, wide)) == b * high:
    sum_scd = chunk(*rows)
  else:
    zero = jnp.zeros((IN * IN, c, d), jnp.float32)
    add = lambda total, xs: (total + chunk(*xs), None)  # noqa: E731
    sum_scd, _ = jax.lax.scan(add, zero, tuple(_split(x, size) for x in rows))
  sum_klcd = sum_scd.reshape(IN, IN, c, d)
  return jnp.einsum("ki,klcd,lj->ijcd", G_IW, sum_klcd, G_IW, precision=jax.lax.Precision.HIGHEST)


def _tiles(cells: int) -> int:
  return math.ceil(cells / OUT)


def _chunk_rows(rows: int, wide: int) -> int:
  """Rows of tiles in a chunk: about `TILES` tiles at most, all chunks alike."""
  chunks = math.ceil(rows / max(1, TILES // wide))
  return math.ceil(rows / chunks)


def _split(x_n: Array, size: int) -> Array:
  """[N, ...] to [chunks, size, ...], zeros behind."""
  chunks = math.ceil(x_n.shape[0] / size)
  behind = [(0, chunks * size - x_n.shape[0])] + [(0, 0)] * (x_n.ndim - 1)
  return jnp.pad(x_n, behind).reshape(chunks, size, *x_n.shape[1:])


def _in_chunks(chunk: Callable[..., Array], rows_n: tuple[Array, ...], wide: int) -> Array:
  """chunk(*rows), of some rows of tiles at a time where all would need much memory."""
  count = rows_n[0].shape[0]
  size = _chunk_rows(count, wide)
  if size == count:
    return chunk(*rows_n)
  y = jax.lax.map(lambda xs: chunk(*xs), tuple(_split(x, size) for x in rows_n))
  return y.reshape(-1, *y.shape[2:])[:count]


def _input_rows(x_bhwc: Array) -> tuple[Array, Array]:
  """Rows of cells that each row of tiles reads: its own four [N, 4, W', C], the next two."""
  b, h, w, c = x_bhwc.shape
  high, wide = _tiles(h), _tiles(w)
  around = ((0, 0), (1, OUT * (high + 1) - 1 - h), (1, OUT * wide + 1 - w), (0, 0))
  padded = jnp.pad(x_bhwc.astype(jnp.float32), around)
  across = padded.shape[2]
  own = padded[:, : OUT * high].reshape(b * high, OUT, across, c)
  following = padded[:, OUT:].reshape(b * high, OUT, across, c)
  return own, following[:, : IN - OUT]


def _combine(matrix: np.ndarray, parts: list[Array], axis: int) -> Array:
  """sum_i matrix[:, i] * parts[i], the rows of the matrix becoming a new axis.

  Written as multiplications of whole arrays, which XLA:CPU makes one vectorised loop: stacking the
  rows' own sums compiled twice as long.
  """
  shape = [1] * (parts[0].ndim + 1)
  shape[axis] = matrix.shape[0]
  terms = [
    jnp.asarray(matrix[:, i]).reshape(shape) * jnp.expand_dims(part, axis)
    for i, part in enumerate(parts)
  ]
  return sum(terms[1:], terms[0])


def _input_transform(four_n4wc: Array, two_n2wc: Array, wide: int) -> Array:
  """B x B^T of every tile: [36, P, C]."""
  rows = [four_n4wc[:, i] for i in range(OUT)] + [two_n2wc[:, i] for i in range(IN - OUT)]
  # The barrier keeps both directions apart: fused, each of 36 places would read all 36 cells.
  x_nkwc = jax.lax.optimization_barrier(_combine(B_II, rows, 1))
  last = OUT * (wide - 1) + 1
  v_lnktc = _combine(B_II, [x_nkwc[:, :, j : j + last : OUT] for j in range(IN)], 0)
  return v_lnktc.transpose(2, 0, 1, 3, 4).reshape(IN * IN, -1, v_lnktc.shape[-1])


def _output_transform(m_spd: Array, wide: int) -> Array:
  """A m A^T of every tile: rows of results [N, 4, W', D]."""
  d = m_spd.shape[-1]
  m_klntd = m_spd.reshape(IN, IN, -1, wide, d)
  m_lnatd = jax.lax.optimization_barrier(_combine(A_OI, [m_klntd[k] for k in range(IN)], 2))
  y_natbd = _combine(A_OI, [m_lnatd[l] for l in range(IN)], 3)
  return y_natbd.reshape(-1, OUT, wide * OUT, d)


def _gradient_transform(g_n4wd: Array) -> Array:
  """A^T g A of every tile of the result's gradient: [36, P, D]."""
  a_io = np.ascontiguousarray(A_OI.T)
  g_nkwd = jax.lax.optimization_barrier(_combine(a_io, [g_n4wd[:, a] for a in range(OUT)], 1))
  z_lnktd = _combine(a_io, [g_nkwd[:, :, a::OUT] for a in range(OUT)], 0)
  return z_lnktd.transpose(2, 0, 1, 3, 4).reshape(IN * IN, -1, z_lnktd.shape[-1])


def _kernel_transform(kernel_ijcd: Array) -> Array:
  """G g G^T for every pair of channels: [36, C, D].

  Once per program and kernel (XLA merges equal ones: levels that share a kernel share this). It is
  a function of the weights alone, but they are arguments of the program: it runs in every call.
  """
  c, d = kernel_ijcd.shape[2:]
  half_kjcd = _combine(G_IW, [kernel_ijcd[i] for i in range(WINDOW)], 0)
  u_klcd = _combine(G_IW, [half_kjcd[:, j] for j in range(WINDOW)], 1)
  return u_klcd.reshape(IN * IN, c, d)

"""How a stored tensor becomes ours and back: numpy views, so that nothing is read to plan it.

PyTorch stores a linear map as (out, in), a convolution as (out, in, height, width); ours are
(in, out) and (height, width, in, out). A `Transform` is a pair of view functions that undo each
other, plus the vocabulary's padding where a table has token rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

View = Callable[[np.ndarray], np.ndarray]
Shape = tuple[int, ...]


def shape_of_view(view: View, shape: Shape) -> Shape:
  """The shape that `view` makes of `shape`: tried on an array of one element and no strides."""
  return view(np.broadcast_to(np.zeros((), np.int8), shape)).shape


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """Token rows: `size` of them are stored, our table has `padded` (the rest is zero).

  Attributes:
    axis: of our layout.
    size: rows that mean something.
    padded: rows of our table, at least `size`.
  """

  axis: int
  size: int
  padded: int


@dataclasses.dataclass(frozen=True)
class Transform:
  """PyTorch's layout of one tensor to ours (`forward`) and back (`backward`).

  Attributes:
    name: for messages.
    forward: stored array -> our array without padding rows; a view where numpy can give one.
    backward: our array without padding rows -> stored array.
    vocabulary: padding rows, None where the tensor has no token rows.
  """

  name: str
  forward: View
  backward: View
  vocabulary: Vocabulary | None = None

  def stored_shape(self, shape: Shape) -> Shape:
    """The stored tensor's shape for ours."""
    if self.vocabulary is not None:
      axis = self.vocabulary.axis
      shape = (*shape[:axis], self.vocabulary.size, *shape[axis + 1 :])
    return shape_of_view(self.backward, shape)

  def our_shape(self, shape: Shape) -> Shape:
    """Our shape for a stored tensor's."""
    ours = shape_of_view(self.forward, shape)
    if self.vocabulary is not None:
      axis = self.vocabulary.axis
      ours = (*ours[:axis], self.vocabulary.padded, *ours[axis + 1 :])
    return ours


def _identity(a: np.ndarray) -> np.ndarray:
  return a


def _transpose(a: np.ndarray) -> np.ndarray:
  return a.T


same = Transform("same", _identity, _identity)
linear = Transform("linear", _transpose, _transpose)
conv = Transform("conv", lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))


def patch(size: int, channels: int = 3) -> Transform:
  """A ViT's patch convolution (C, 3, P, P) <-> our linear map (P*P*3, C).

  Our rows are in the order of `ops.tokens.patchify`: y, x, channel.

  Args:
    size: P, pixels per side.
    channels: of the image.
  """

  def forward(a: np.ndarray) -> np.ndarray:
    return a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0])

  def backward(a: np.ndarray) -> np.ndarray:
    return a.reshape(size, size, channels, -1).transpose(3, 2, 0, 1)

  return Transform("patch", forward, backward)


def flatten(size: int, channels: int) -> Transform:
  """A linear map over a flattened feature map: (T, C*P*P) <-> (P*P*C, T).

  PyTorch flattens channel, y, x; we flatten y, x, channel.

  Args:
    size: P, cells per side.
    channels: C.
  """

  def forward(a: np.ndarray) -> np.ndarray:
    cells = a.reshape(-1, channels, size, size)
    return cells.transpose(2, 3, 1, 0).reshape(-1, a.shape[0])

  def backward(a: np.ndarray) -> np.ndarray:
    cells = a.reshape(size, size, channels, -1)
    return cells.transpose(3, 2, 0, 1).reshape(a.shape[1], -1)

  return Transform("flatten", forward, backward)


def rows(size: int, padded: int) -> Transform:
  """The token table (V, D), with zero rows up to `padded` on our side.

  Args:
    size: rows that mean something (`DecoderConfig.vocab_size`).
    padded: rows of our table (`DecoderConfig.padded_vocab`).
  """
  return Transform("rows", _identity, _identity, _vocabulary(0, size, padded))


def linear_rows(size: int, padded: int) -> Transform:
  """The output layer (V, D) <-> (D, V), padded like `rows`."""
  return Transform("linear rows", _transpose, _transpose, _vocabulary(1, size, padded))


def _vocabulary(axis: int, size: int, padded: int) -> Vocabulary | None:
  return None if size == padded else Vocabulary(axis, size, padded)

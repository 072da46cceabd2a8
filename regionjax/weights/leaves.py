"""Leaves: arrays of known shape that are read block by block, when they are written or placed.

A conversion is a mapping from name to leaf. Nothing is read to make one: a leaf knows its shape,
gives consecutive blocks to a writer (`pieces`) and any slice to a device (`read`), and returns the
memory of what it read. So a 13 GB model passes through a few hundred megabytes.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from regionjax.weights.tensors import Tensor, TensorSource
from regionjax.weights.transforms import View, shape_of_view

# Larger arrays are handed to a writer in blocks of at most this size.
PIECE_BYTES = 64 << 20

Index = tuple[slice, ...]


class Leaf(Protocol):
  """An array that is made piece by piece: what writers and meshes want of one.

  Attributes:
    shape: of the whole.
    dtype: of every piece.
  """

  @property
  def shape(self) -> tuple[int, ...]: ...

  @property
  def dtype(self) -> np.dtype: ...

  def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
    """(start, block): consecutive blocks along axis 0 that cover it, such as stacked layers.

    A leaf without axes gives (0, itself) once. A block may be a view, and is good until the next
    one is asked for.
    """
    ...

  def read(self, index: Index) -> np.ndarray:
    """A copy of any slice, in C order."""
    ...


class LazyLeaf(abc.ABC):
  """A leaf made of `array()`: a view of a file, or computed anew by each call."""

  def __init__(self, shape: Iterable[int], dtype: Any):
    self.shape: tuple[int, ...] = tuple(shape)
    self.dtype = np.dtype(dtype)

  def __repr__(self) -> str:
    return f"{type(self).__name__}({list(self.shape)}, {self.dtype.name})"

  @abc.abstractmethod
  def array(self) -> np.ndarray:
    """All of it."""

  def release(self) -> None:
    """Gives back the memory that reading has filled."""
    return

  def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
    array = self.array()
    if not self.shape:
      yield 0, array
    else:
      rows = max(1, PIECE_BYTES * self.shape[0] // max(array.nbytes, 1))
      for start in range(0, self.shape[0], rows):
        yield start, array[start : start + rows]
    self.release()

  def read(self, index: Index) -> np.ndarray:
    copy = np.array(self.array()[index], order="C")
    self.release()
    return copy


class ArrayLeaf(LazyLeaf):
  """An array in memory or mapped by its owner; jax arrays are fetched when they are read."""

  def __init__(self, values: Any):
    super().__init__(values.shape, values.dtype)
    self._values = values

  def array(self) -> np.ndarray:
    return np.asarray(self._values)


class Viewed(LazyLeaf):
  """A stored tensor, or another lazy leaf, through a function that gives a view of it."""

  def __init__(self, source: Tensor | LazyLeaf, view: View | None = None):
    shape = source.shape if view is None else shape_of_view(view, source.shape)
    super().__init__(shape, source.dtype)
    self._source, self._view = source, view

  def array(self) -> np.ndarray:
    array = self._source.array()
    return array if self._view is None else self._view(array)

  def release(self) -> None:
    self._source.release()


class Layer(LazyLeaf):
  """One layer of a stacked leaf."""

  def __init__(self, stacked: Leaf, index: int):
    super().__init__(stacked.shape[1:], stacked.dtype)
    self._stacked, self._index = stacked, index

  def array(self) -> np.ndarray:
    if isinstance(self._stacked, (ArrayLeaf, Viewed)):  # a view, where the rest would copy
      return self._stacked.array()[self._index]
    return self._stacked.read((slice(self._index, self._index + 1),))[0]

  def release(self) -> None:
    if isinstance(self._stacked, LazyLeaf):
      self._stacked.release()


class Stacked:
  """Leaves of one shape on a new first axis: the layers of a scanned model."""

  def __init__(self, layers: Sequence[LazyLeaf]):
    self._layers = tuple(layers)
    self.shape = (len(self._layers), *self._layers[0].shape)
    dtypes = {layer.dtype for layer in self._layers}
    # A checkpoint whose layers differ in dtype is odd but sound; float32 holds them all.
    self.dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

  def __repr__(self) -> str:
    return f"Stacked({list(self.shape)}, {self.dtype.name})"

  def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
    for i, layer in enumerate(self._layers):
      yield i, layer.array().astype(self.dtype, copy=False)[None]
      layer.release()

  def read(self, index: Index) -> np.ndarray:
    outer, inner = (index or (slice(None),))[0], index[1:]
    chosen = range(*outer.indices(len(self._layers)))
    shape = shape_of_view(lambda a: a[inner], self.shape[1:])
    out = np.empty((len(chosen), *shape), self.dtype)
    for k, i in enumerate(chosen):
      out[k] = self._layers[i].read(inner)
    return out


class Padded:
  """A leaf with zeros behind it on one axis: rows that pad a vocabulary."""

  def __init__(self, inner: Leaf, *, axis: int, size: int):
    self._inner, self._axis = inner, axis
    self.shape = (*inner.shape[:axis], size, *inner.shape[axis + 1 :])
    self.dtype = inner.dtype

  def __repr__(self) -> str:
    return f"Padded({list(self.shape)}, {self.dtype.name})"

  def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
    size, real = self.shape[self._axis], self._inner.shape[self._axis]
    for start, block in self._inner.pieces():
      yield start, block if self._axis == 0 else self._pad(block, size - real)
    if self._axis == 0 and size > real:
      yield real, np.zeros((size - real, *self.shape[1:]), self.dtype)

  def read(self, index: Index) -> np.ndarray:
    index = (*index, *(slice(None),) * (len(self.shape) - len(index)))
    start, stop, step = index[self._axis].indices(self.shape[self._axis])
    if step != 1:
      raise ValueError(f"a slice with step {step} of a padded leaf; only 1 is supported")
    real = self._inner.shape[self._axis]
    inside = slice(min(start, real), min(stop, real))
    block = self._inner.read((*index[: self._axis], inside, *index[self._axis + 1 :]))
    return self._pad(block, max(stop - start, 0) - block.shape[self._axis])

  def _pad(self, block: np.ndarray, count: int) -> np.ndarray:
    if not count:
      return block
    shape = (*block.shape[: self._axis], count, *block.shape[self._axis + 1 :])
    return np.concatenate([block, np.zeros(shape, block.dtype)], axis=self._axis)


class Cast:
  """A leaf in another floating dtype, cast block by block.

  What the dtype cannot hold becomes infinite; the writer names such a tensor.
  """

  def __init__(self, inner: Leaf, dtype: Any):
    self._inner = inner
    self.shape, self.dtype = inner.shape, np.dtype(dtype)

  def __repr__(self) -> str:
    return f"Cast({list(self.shape)}, {self.dtype.name})"

  def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
    for start, block in self._inner.pieces():
      yield start, self._cast(block)

  def read(self, index: Index) -> np.ndarray:
    return self._cast(self._inner.read(index))

  def _cast(self, block: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
      return block.astype(self.dtype, copy=False)


def as_leaf(values: Any) -> Leaf:
  """Whatever holds an array (numpy, jax, a stored tensor, a leaf) as a leaf."""
  if hasattr(values, "pieces"):
    return values
  return Viewed(values) if isinstance(values, Tensor) else ArrayLeaf(values)


def as_lazy(values: Any) -> LazyLeaf:
  """The same with `array()`; a leaf that has only blocks is read whole when it is asked for."""
  leaf = as_leaf(values)
  return leaf if isinstance(leaf, LazyLeaf) else _Read(leaf)


def cast(leaves: Mapping[str, Leaf], dtype: Any) -> dict[str, Leaf]:
  """Every leaf in `dtype`; those that already are stay as they are."""
  dtype = np.dtype(dtype)
  return {k: v if v.dtype == dtype else Cast(v, dtype) for k, v in leaves.items()}


def read_all(leaf: Leaf) -> np.ndarray:
  """A leaf as one array in memory."""
  return leaf.read((slice(None),) * len(leaf.shape))


def from_arrays(arrays: Mapping[str, Any], *, where: str = "memory") -> TensorSource:
  """Arrays by name as a source of tensors, for what never was a file."""
  return TensorSource((_ArrayTensor(name, a) for name, a in arrays.items()), where=where)


class _Read(LazyLeaf):
  """A leaf that has only blocks, read whole by each call of `array`."""

  def __init__(self, leaf: Leaf):
    super().__init__(leaf.shape, leaf.dtype)
    self._leaf = leaf

  def array(self) -> np.ndarray:
    return read_all(self._leaf)


class _ArrayTensor(Tensor):
  def __init__(self, name: str, values: Any):
    super().__init__(name, values.shape, values.dtype)
    self._values = values

  def array(self) -> np.ndarray:
    return np.asarray(self._values)

"""The pickle of a state dict, read without running any of it.

A pickle is a program: it names functions and calls them. Here `find_class` knows the few names that
a state dict needs, each stands for a constructor of ours that only notes what it was given, and any
other name ends the reading before anything was called. What the pickle holds it cannot alter: the
opcode that sets attributes (BUILD) would otherwise let it swap the functions behind the names, or
change a note once it has been checked.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from regionjax.weights.tensors import WeightsError

_DTYPES = {
  name: np.dtype(name)
  for name in (
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
  )
} | {
  name: np.dtype(getattr(ml_dtypes, name))
  for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")
}

_STORAGES = {
  "BoolStorage": "bool",
  "ByteStorage": "uint8",
  "CharStorage": "int8",
  "ShortStorage": "int16",
  "IntStorage": "int32",
  "LongStorage": "int64",
  "HalfStorage": "float16",
  "BFloat16Storage": "bfloat16",
  "FloatStorage": "float32",
  "DoubleStorage": "float64",
  "ComplexFloatStorage": "complex64",
  "ComplexDoubleStorage": "complex128",
}


class _Fixed:
  """What a pickle gets to hold; whatever it does to change one of these is refused."""

  __slots__ = ()

  def __init__(self, **values: Any):
    for name, value in values.items():
      object.__setattr__(self, name, value)

  def __setstate__(self, state: object) -> NoReturn:
    raise pickle.UnpicklingError(f"it sets the state of a {type(self).__name__}")

  def __setattr__(self, name: str, value: object) -> NoReturn:
    raise AttributeError(f"{type(self).__name__} is not to be changed")


class Storage(_Fixed):
  """A storage by its key in the archive. `dtype` is None where `count` is in bytes."""

  __slots__ = ("count", "dtype", "key")
  count: int
  dtype: np.dtype | None
  key: str


class Note(_Fixed):
  """A tensor as the pickle describes it, unchecked; offset and stride in elements.

  `dtype` is given where it is not the storage's.
  """

  __slots__ = ("dtype", "offset", "shape", "storage", "stride")
  dtype: np.dtype | None
  offset: Any
  shape: Any
  storage: Any
  stride: Any


class _Name(_Fixed):
  """A name that a pickle may use. As an element type it has a `dtype`, as a function a `make`."""

  __slots__ = ("dtype", "make", "name")
  dtype: np.dtype | None
  make: Callable[..., Any] | None
  name: str

  def __call__(self, *args: Any) -> Any:
    if self.make is None:
      raise pickle.UnpicklingError(f"it calls {self.name}, which is no function")
    return self.make(*args)


class _Dict(dict):
  """An OrderedDict. What BUILD hangs on one (a module's `_metadata`) is let go."""

  __slots__ = ()

  def __setstate__(self, state: object) -> None:
    return


def load_notes(data: bytes, *, where: str) -> Any:
  """The object in a pickle, with a Note in the place of each tensor.

  Args:
    data: the pickle.
    where: what errors call it.

  Raises:
    WeightsError: it names anything that a state dict does not need (nothing of it is run), or it
      is damaged.
  """
  try:
    for opcode, argument, _ in pickletools.genops(data):
      # Extension codes that this process has met before come from a cache, not from find_class.
      if opcode.name.startswith("EXT"):
        raise pickle.UnpicklingError("it uses an extension code")
      # Declared lengths are checked by genops; an entry of the memo table at 2**32 would make the
      # unpickler allocate the table up to there.
      if "PUT" in opcode.name and int(argument or 0) >= len(data):
        raise pickle.UnpicklingError("its memo table has gaps")
    return _Unpickler(data, where).load()
  except WeightsError:
    raise
  except Exception as error:  # damaged pickles raise TypeError, IndexError, EOFError, ...
    raise WeightsError(
      f"{where}: its data.pkl is damaged or no state dict ({type(error).__name__}: {error}); "
      "nothing of it was run. Download the file again"
    ) from None


class _Unpickler(pickle.Unpickler):
  def __init__(self, data: bytes, where: str):
    super().__init__(io.BytesIO(data), encoding="utf-8")
    self._where = where

  def find_class(self, module: str, name: str) -> Any:
    # By the pair: a dotted name would be walked through as attributes, a joined one is ambiguous.
    found = _NAMES.get((module, name))
    if found is None:
      full = f"{module}.{name}"
      raise WeightsError(
        f"{self._where} holds {full[:100] if full.isprintable() else ascii(full)[:100]}: this is "
        "no plain state dict; not opened, nothing of it was run. Where you trust it, load it with "
        "torch and save `model.state_dict()` with safetensors"
      )
    return found

  def persistent_load(self, pid: Any) -> Storage:
    kind, storage, key, _, count = pid
    named = isinstance(storage, _Name) and storage.make is None
    if kind != "storage" or not named or type(key) is not str or type(count) is not int:
      raise pickle.UnpicklingError("it refers to something that is no storage")
    return Storage(key=key, dtype=storage.dtype, count=count)


def _rebuild(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Note:
  """torch._utils._rebuild_tensor(_v2): the rest is requires_grad, hooks and pending operations."""
  return _note(storage, offset, shape, stride, None, rest[2:])


def _rebuild_typed(
  storage: Any,
  offset: Any,
  shape: Any,
  stride: Any,
  _grad: Any,
  _hooks: Any,
  dtype: Any,
  *rest: Any,
) -> Note:
  """torch._utils._rebuild_tensor_v3: the element type stands beside an untyped storage."""
  if not isinstance(dtype, _Name) or dtype.dtype is None:
    raise pickle.UnpicklingError("a tensor's element type is none")
  return _note(storage, offset, shape, stride, dtype.dtype, rest)


def _note(
  storage: Any, offset: Any, shape: Any, stride: Any, dtype: np.dtype | None, pending: tuple
) -> Note:
  if any(pending):
    raise pickle.UnpicklingError("a tensor awaits its conjugation or negation; resolve it first")
  return Note(storage=storage, offset=offset, shape=shape, stride=stride, dtype=dtype)


def _parameter(data: Any, *_: Any) -> Any:
  return data


def _size(values: Any = ()) -> tuple:
  return tuple(values)


def _device(*_: Any) -> None:
  return None


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
  ("collections", "OrderedDict"): _Dict,
  ("torch", "Size"): _size,
  ("torch", "device"): _device,
  ("torch._utils", "_rebuild_tensor"): _rebuild,
  ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
  ("torch._utils", "_rebuild_tensor_v3"): _rebuild_typed,
  ("torch._utils", "_rebuild_parameter"): _parameter,
  ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}
_TYPES: dict[tuple[str, str], np.dtype | None] = {
  **{("torch", name): dtype for name, dtype in _DTYPES.items()},
  **{("torch", name): _DTYPES[dtype] for name, dtype in _STORAGES.items()},
  ("torch.storage", "UntypedStorage"): None,
}
_NAMES = {
  key: _Name(name=".".join(key), make=make, dtype=None) for key, make in _FUNCTIONS.items()
} | {key: _Name(name=".".join(key), make=None, dtype=dtype) for key, dtype in _TYPES.items()}

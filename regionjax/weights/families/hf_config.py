"""Reads a Hugging Face config.json strictly: what can't be computed here is refused by field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from regionjax.weights.tensors import WeightsError

T = TypeVar("T")

_NOT_RUN = (  # fields that change the computation, and the values under which they do not
  ("quantization_config", (None,), "the weights are quantised; use the checkpoint they came from"),
  ("sliding_window", (None,), "attention here sees all tokens before it"),
  ("num_local_experts", (None, 0, 1), "mixtures of experts are not computed here"),
  ("num_experts", (None, 0, 1), "mixtures of experts are not computed here"),
)


class Fields:
  """The fields of a config.json; problems are collected, so that one error names all of them."""

  def __init__(self, values: Mapping[str, Any], what: str, *, _parent: Fields | None = None):
    """`what` is the family, for messages."""
    self._values, self._what = values, what
    self._prefix = "" if _parent is None else f"{what}."
    self._problems: list[str] = [] if _parent is None else _parent._problems

  def __contains__(self, name: str) -> bool:
    return self._values.get(name) is not None

  def group(self, name: str, defaults: Mapping[str, Any] | None = None) -> Fields:
    """A nested object; its problems are reported with these.

    Args:
      name: of the object; absent is taken for empty.
      defaults: values of the fields that it lacks.
    """
    values = self._values.get(name)
    if values is not None and not isinstance(values, Mapping):
      self.refuse(name, "expected an object")
      values = None
    given = {k: v for k, v in (values or {}).items() if v is not None}
    return Fields({**(defaults or {}), **given}, f"{self._prefix}{name}", _parent=self)

  def read(self, name: str, default: T) -> T:
    """A value of the default's type; absent or null gives the default, as in transformers."""
    value = self._values.get(name)
    if value is None:
      return default
    kind = type(default)
    if kind is float and type(value) is int:
      return float(value)  # type: ignore[return-value]
    if type(value) is not kind:
      self.refuse(name, f"expected a value of type {kind.__name__}")
      return default
    return value

  def positive(self, name: str, default: int) -> int:
    """A size."""
    value = self.read(name, default)
    if value < 1:
      self.refuse(name, "expected a positive number")
      return default
    return value

  def one_of(self, name: str, default: str, known: Mapping[str, str]) -> str:
    """The translation of a name."""
    value = self.read(name, default)
    if value not in known:
      self.refuse(name, f"expected {_either(known)}")
      return known[default]
    return known[value]

  def must_be(self, name: str, *values: Any, why: str = "") -> None:
    """Refuses other values; absent is taken for the first."""
    if name in self._values and self._values[name] not in values:
      expected = f"expected {_either(repr(v) for v in values)}"
      self.refuse(name, f"{expected}: {why}" if why else expected)

  def must_be_plain(self) -> None:
    """Refuses what no family here computes: quantised weights, sliding windows, experts."""
    for name, values, why in _NOT_RUN:
      self.must_be(name, *values, why=why)

  def refuse(self, name: str, why: str) -> None:
    self._problems.append(f"{self._prefix}{name}={self._values.get(name)!r}: {why}")

  def check(self) -> None:
    """Raises WeightsError that names every field refused so far."""
    if self._problems:
      raise WeightsError(
        f"config.json describes a model that is not run here as {self._what}:\n  "
        + "\n  ".join(self._problems)
      )


def _either(values: Any) -> str:
  return " or ".join(str(v) for v in values)

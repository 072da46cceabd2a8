"""Dataclasses to plain values and back; the way back refuses what it does not know."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, TypeVar

from regionjax.config.errors import ConfigError

T = TypeVar("T")


def to_dict(config: Any) -> Any:
  """Dataclass -> plain dicts, lists and scalars, fit for JSON and for ConfigDict."""
  if dataclasses.is_dataclass(config) and not isinstance(config, type):
    return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
  if isinstance(config, (tuple, list)):
    return [to_dict(v) for v in config]
  if isinstance(config, typing.Mapping):
    return {k: to_dict(v) for k, v in config.items()}
  return config


def from_dict(cls: type[T], values: Any, path: str = "") -> T:
  """Plain dicts (or a ConfigDict) -> dataclass.

  Raises:
    ConfigError: an unknown key (near matches are named) or a value of the wrong type.
  """
  hints = typing.get_type_hints(cls)
  known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
  kwargs = {}
  for key, value in dict(values).items():
    where = f"{path}{key}"
    if key not in known:
      near = difflib.get_close_matches(str(key), known, n=3, cutoff=0.5)
      hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
      raise ConfigError(f"unknown config key {where!r}; {hint}")
    kwargs[key] = _coerce(hints[key], value, where)
  return cls(**kwargs)


def _coerce(hint: Any, value: Any, where: str) -> Any:
  if isinstance(hint, type) and dataclasses.is_dataclass(hint):
    if isinstance(value, hint):
      return value
    if isinstance(value, str) or not hasattr(value, "items"):
      raise ConfigError(f"{where}: expected a group of settings, got {value!r}")
    return from_dict(hint, value, where + ".")
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):
    groups = [a for a in args if isinstance(a, type) and dataclasses.is_dataclass(a)]
    if groups and hasattr(value, "items"):
      return _coerce(groups[0], value, where)  # whose complaint names the wrong key
    for arg in args:
      try:
        return _coerce(arg, value, where)
      except ConfigError:
        continue
    raise ConfigError(f"{where}: expected {hint}, got {value!r}")
  if origin is tuple:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
      raise ConfigError(f"{where}: expected a list, got {value!r}")
    return tuple(_coerce(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if hint in (int, float, str, bool, types.NoneType):
    if type(value) is not hint:
      raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value
  return dict(value) if hasattr(value, "items") else value

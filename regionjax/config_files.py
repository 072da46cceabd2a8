"""Config files and command-line overrides -> `Config`.

A config file is a Python file with `get_config(arg: str | None) -> ConfigDict`. The command line
names it as `path.py` or `path.py:arg`, where `arg` is by convention `key=value,key=value` and
means whatever that file says it means. Afterwards any field is overridden by its dotted name:
`--train.steps=200 --data.sources.0.args.turns=1`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regionjax.config import Config, ConfigError, from_dict, to_dict


class _UnknownKeyError(Exception):
  """An override names a setting that isn't there; the argument says more, or nothing."""


def load_config(spec: str, overrides: Sequence[str] = ()) -> Config:
  """Reads a config file and applies overrides.

  Args:
    spec: `path.py` or `path.py:arg`.
    overrides: strings `dotted.key=value`, with or without leading dashes.

  Raises:
    ConfigError: no such file, no `get_config` in it, an unknown key (near matches are named), or
      a value that doesn't read as its field's type.
  """
  path, _, arg = spec.partition(":")
  config = from_dict(Config, _get_config(Path(path), arg))
  return apply_overrides(config, overrides)


def parse_arg(arg: str | None, defaults: Mapping[str, Any]) -> types.SimpleNamespace:
  """`'scale=2,region=text'` -> a namespace with the defaults' keys and their types.

  For the `get_config(arg)` of a config file.

  Raises:
    ConfigError: an unknown key or a value of another type than its default's.
  """
  values = dict(defaults)
  for item in filter(None, (part.strip() for part in (arg or "").split(","))):
    key, equals, text = item.partition("=")
    if not equals:
      raise ConfigError(f"config argument {item!r}: expected key=value, e.g. {_usage(defaults)}")
    if key not in values:
      raise ConfigError(f"unknown config argument {key!r}; {_near(key, values)}")
    values[key] = parse_value(type(defaults[key]), text, key)
  return types.SimpleNamespace(**values)


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
  """Returns `config` with `dotted.key=value` strings applied in order; see `load_config`."""
  values = to_dict(config)
  for override in overrides:
    key, equals, text = override.lstrip("-").partition("=")
    if not equals:
      raise ConfigError(f"override {override!r}: expected --key=value, e.g. --train.steps=200")
    try:
      _set(values, Config, key.split("."), text, key)
    except _UnknownKeyError as error:
      raise ConfigError(
        f"unknown config key {key!r}{error}; {_near(key, flatten(values))}"
      ) from None
  return from_dict(Config, values)


def parse_value(hint: Any, text: str, where: str) -> Any:
  """A command-line string -> a value of the type `hint`.

  Lists are `1,2,3`, with or without brackets; settings of unknown type are Python literals or,
  failing that, strings.

  Raises:
    ConfigError: the text doesn't read as that type.
  """
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):
    for arg in args:
      try:
        return parse_value(arg, text, where)
      except ConfigError:
        continue
    raise ConfigError(f"{where}: {text!r} is none of {' | '.join(map(str, args))}")
  if origin is tuple:
    return [parse_value(args[0], part, where) for part in _items(text)]
  if hint is bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() in words:
      return words[text.lower()]
    raise ConfigError(f"{where}: expected true or false, got {text!r}")
  if hint in (int, float):
    try:
      return _whole(text) if hint is int else float(text)
    except ValueError:
      raise ConfigError(f"{where}: expected {hint.__name__}, got {text!r}") from None
  return text if hint is str else _literal(text)


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
  """Nested dicts and lists (as from `to_dict`) -> {'dotted.key': leaf}."""
  if isinstance(values, Mapping):
    items = list(values.items())
  elif isinstance(values, (list, tuple)) and any(isinstance(v, Mapping) for v in values):
    items = list(enumerate(values))
  else:
    return {prefix: values}
  flat: dict[str, Any] = {}
  for key, value in items:
    flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
  return flat


def difference(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
  """Dotted keys in which two configs differ -> (old value, new value)."""
  a, b = flatten(to_dict(old)), flatten(to_dict(new))
  return {
    key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)
  }


def write_config(path: Path, config: Config) -> None:
  """Writes a config as JSON, whole or not at all."""
  part = path.with_name(path.name + ".part")
  part.write_text(json.dumps(to_dict(config), indent=2) + "\n")
  part.replace(path)


def read_config(path: Path) -> Config:
  """Reads what `write_config` wrote.

  Raises:
    ConfigError: the file is not JSON, or holds keys that this version doesn't know.
  """
  try:
    return from_dict(Config, json.loads(path.read_text()))
  except json.JSONDecodeError as error:
    raise ConfigError(f"{path} is not a config in JSON ({error}); restore or delete it") from error


def _get_config(path: Path, arg: str) -> Any:
  if not path.is_file():
    folder = path.parent
    names = [p.name for p in folder.glob("*.py")] if folder.is_dir() else []
    there = f"; {folder}/ holds {', '.join(sorted(names))}" if names else ""
    raise ConfigError(f"no config file {str(path)!r}{there}")
  spec = importlib.util.spec_from_file_location(f"regionjax_config_{path.stem}", path)
  if spec is None or spec.loader is None:
    raise ConfigError(f"{path} is not a Python file; expected one with get_config(arg)")
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # where a dataclass in the file looks its own types up
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise ConfigError(f"{path} has no get_config(arg); see configs/tiny.py for one that has")
  values = module.get_config(arg or None)
  return values.to_dict() if hasattr(values, "to_dict") else values


def _set(values: Any, hint: Any, keys: list[str], text: str, where: str) -> None:
  """Sets values[keys[0]][keys[1]]... in place; `hint` is the type of `values`."""
  key, rest = keys[0], keys[1:]
  node: Any = values
  child: Any
  slot: Any
  if isinstance(hint, type) and dataclasses.is_dataclass(hint):
    hints = typing.get_type_hints(hint)
    if key not in hints:
      raise _UnknownKeyError
    child, slot = hints[key], key
    if rest:
      child = _group(child)
      if node[slot] is None:  # an optional group that was absent
        node[slot] = {}
  elif isinstance(values, list):
    if not key.isdigit() or int(key) >= len(values):
      raise ConfigError(f"{where}: expected an index below {len(values)}, got {key!r}")
    child, slot = typing.get_args(hint)[0], int(key)
  else:  # a free mapping, such as the arguments of a source
    child, slot = Any, key
  if rest:
    if child is Any and not isinstance(node.get(slot), Mapping):
      raise _UnknownKeyError(f": {slot!r} has no parts")
    if child in (int, float, str, bool):
      raise _UnknownKeyError(f": {slot!r} is one value, not a group")
    _set(node[slot], child, rest, text, where)
  elif isinstance(child, type) and dataclasses.is_dataclass(child):
    fields = ", ".join(f.name for f in dataclasses.fields(child))
    raise ConfigError(f"{where} is a group of settings; set one of its keys: {fields}")
  else:
    node[slot] = parse_value(child, text, where)


def _group(hint: Any) -> Any:
  """The dataclass of an optional group; other types as they are."""
  groups = [a for a in typing.get_args(hint) if dataclasses.is_dataclass(a)]
  return groups[0] if groups and types.NoneType in typing.get_args(hint) else hint


def _near(key: str, known: Mapping[str, Any]) -> str:
  near = difflib.get_close_matches(key, list(known), n=3, cutoff=0.5)
  if near:
    return f"did you mean {' or '.join(near)}?"
  groups = dict.fromkeys(name.partition(".")[0] for name in known)
  return f"known: {', '.join(groups)}"


def _usage(defaults: Mapping[str, Any]) -> str:
  return ",".join(f"{k}={v}" for k, v in defaults.items())


def _items(text: str) -> list[str]:
  inner = text.strip()
  if inner[:1] in "([" and inner[-1:] in ")]":
    inner = inner[1:-1]
  return [part.strip().strip("'\"") for part in inner.split(",") if part.strip()]


def _whole(text: str) -> int:
  """An int, also as 1e4."""
  value = float(text)
  if value != int(value):
    raise ValueError(text)
  return int(text) if text.lstrip("+-").isdigit() else int(value)


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)

"""What a run starts from: parameters of releases (`train.init_from`), and which one is its base.

`train.init_from` names a release folder, or several with commas between: each gives what those
before it lack, and behind a colon a regex on whole parameter paths picks some of its parameters.
`runs/llm,tiny:vision/.*` is a decoder of one release and the vision encoder of another. The first
is the run's base, which `base.json` in the work folder records: an adapter is written on top of it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from regionjax.config import Config, ConfigError
from regionjax.train.state import Params, flatten_paths, unflatten_paths
from regionjax.weights.adapter import Base, describe_base
from regionjax.weights.fit import TOKEN_TABLES, Fit, fit_params, match_lora

BASE = "base.json"
Log = Callable[[str], None]


class Given(NamedTuple):
  """Parameters to start from.

  Attributes:
    params: nested, in the shapes of the model; {} without `train.init_from`.
    of_base: paths that are the base's own numbers (tables with tokens added included), so that an
      adapter need not hold them as long as they are frozen.
  """

  params: Params
  of_base: tuple[str, ...] = ()


class Origin(NamedTuple):
  """The base of a run, as its work folder records it; see `Given` for `of_base`."""

  base: Base
  of_base: tuple[str, ...]


class _Entry(NamedTuple):
  folder: str
  pattern: str  # '' takes everything


def given_params(config: Config, shapes: Params, tokenizer: Any, *, log: Log = print) -> Given:
  """Parameters of the releases `train.init_from`, fit for the model.

  Parts that the releases lack, or a region encoder of another kind, start fresh, and parts that the
  model lacks are left out; tokens that the model has beyond a release's start as the mean of the
  others, and for images of another size the position table is resampled. All of this is named
  through `log`.

  Args:
    config: the run.
    shapes: the model's parameters, nested; leaves have a shape.
    tokenizer: the run's.
    log: takes a line of text.

  Raises:
    ConfigError: shapes differ (all of them are listed), nothing fits, or the tokenizers differ.
  """
  entries = _entries(config.train.init_from)
  wanted = {path: tuple(leaf.shape) for path, leaf in flatten_paths(shapes).items()}
  given: dict[str, Any] = {}
  of_base: tuple[str, ...] = ()
  unused: list[str] = []
  for number, entry in enumerate(entries):
    lacking = {path: shape for path, shape in wanted.items() if path not in given}
    fit, own, left = _take(entry, config, lacking, tokenizer, log)
    if number == 0:
      of_base = tuple(sorted(fit.params.keys() - fit.resampled - own))
    given |= fit.params
    unused += [f"train.init_from={entry.folder}: of the release not used: {left}"] if left else []
  if entries and (fresh := _listed(wanted.keys() - given.keys(), wanted)):
    log(f"train.init_from={config.train.init_from}: not in the release, starts fresh: {fresh}")
  for line in unused:
    log(line)
  return Given(unflatten_paths(given), of_base)


def starting_params(config: Config, shapes: Params, tokenizer: Any, *, log: Log = print) -> Params:
  """The parameters of `given_params` alone."""
  return given_params(config, shapes, tokenizer, log=log).params


def _entries(init_from: str) -> list[_Entry]:
  if not init_from or Path(init_from).is_dir():
    return [_Entry(init_from, "")] if init_from else []
  entries = []
  for item in init_from.split(","):
    folder, _, pattern = item.partition(":")
    if not folder:
      raise ConfigError(
        f"train.init_from={init_from!r}: expected release folders with commas between, each "
        "perhaps with a colon and a regex, as in 'runs/llm,tiny:vision/.*'"
      )
    entries.append(_Entry(folder, pattern))
  return entries


def _take(
  entry: _Entry,
  config: Config,
  wanted: dict[str, tuple[int, ...]],
  tokenizer: Any,
  log: Log,
) -> tuple[Fit, frozenset[str], str]:
  """(what one release gives, paths that as an adapter it has not from its base, what is left)."""
  from regionjax.weights import release

  where = f"train.init_from={entry.folder}"
  source, nested, _ = release.load(entry.folder)
  model, nested = match_lora(source.model, nested, config.model)
  merged = model != source.model
  if merged:
    log(f"{where}: its low-rank updates are merged into the maps that they update")
  params = _picked(flatten_paths(nested), entry)
  if TOKEN_TABLES.keys() & params.keys() & wanted.keys():
    _check_tokens(entry.folder, config, tokenizer)
  fit = fit_params(model, params, config.model, wanted, where=where)
  if not fit.params:
    raise ConfigError(f"{where} holds no parameter of this model")
  for note in fit.notes:
    log(f"{where}: {note}")
  left = _listed(params.keys() - fit.params.keys(), params)
  file = release.find(entry.folder) / release.ADAPTER
  if not file.is_file():
    return fit, frozenset(), left
  own = set(release.read_file(file))
  if merged:
    own |= {path.replace("/lora_a", "/kernel") for path in own if path.endswith("/lora_a")}
  return fit, frozenset(own), left


def _picked(params: dict[str, Any], entry: _Entry) -> dict[str, Any]:
  if not entry.pattern:
    return params
  try:
    pattern = re.compile(entry.pattern)
  except re.error as error:
    raise ConfigError(f"train.init_from: {entry.pattern!r} is not a regex ({error})") from None
  picked = {path: leaf for path, leaf in params.items() if pattern.fullmatch(path)}
  if not picked:
    raise ConfigError(
      f"train.init_from: {entry.pattern!r} matches no parameter of {entry.folder}; a regex must "
      f"match a whole path, e.g. {min(params)!r} or 'vision/.*'"
    )
  return picked


def _check_tokens(folder: str, config: Config, tokenizer: Any) -> None:
  """The run's tokenizer must be the release's, with `prompt.added_tokens` behind its own tokens."""
  from regionjax.tokenizer import load_tokenizer
  from regionjax.weights import release

  theirs = load_tokenizer(str(release.find(folder)), config.prompt.added_tokens)
  if theirs.fingerprint != tokenizer.fingerprint:
    raise ConfigError(
      f"train.init_from={folder}: its tokenizer ({theirs.fingerprint}) is another than "
      f"prompt.tokenizer={config.prompt.tokenizer!r} ({tokenizer.fingerprint}), so its embeddings "
      f"mean other tokens; set prompt.tokenizer={folder}"
    )


def _listed(paths: Collection[str], among: Collection[str]) -> str:
  """Paths, sorted, with 'part/.*' for those that are all of a part of the model."""
  whole = {p.split("/")[0] for p in paths} - {p.split("/")[0] for p in set(among) - set(paths)}
  return ", ".join(
    sorted({f"{part}/.*" if (part := p.split("/")[0]) in whole else p for p in paths})
  )


def write_origin(workdir: Path, config: Config, given: Given) -> None:
  """Records the base in base.json, whole or not at all; nothing without `train.init_from`."""
  entries = _entries(config.train.init_from)
  if not entries:
    return
  record = {**dataclasses.asdict(describe_base(entries[0].folder)), "of_base": given.of_base}
  part = workdir / f"{BASE}.part"
  part.write_text(json.dumps(record, indent=2) + "\n")
  part.replace(workdir / BASE)


def read_origin(workdir: Path) -> Origin | None:
  """What `write_origin` recorded; None where the run started from nothing."""
  path = workdir / BASE
  if not path.is_file():
    return None
  record = json.loads(path.read_text())
  return Origin(Base(record["name"], record["sha256"], record["path"]), tuple(record["of_base"]))

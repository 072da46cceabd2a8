"""An adapter: a release that holds only what was trained, on top of another release, its base.

  config.json          as in a release, and {"adapter": {"base": {"name", "sha256", "path"}}}
  adapter.safetensors  the parameters that are not the base's own: LoRA, connector, regions, ...
  tokenizer.json, README.md

The base is named by the SHA-256 of its weights, so that no other release can stand in for it. It is
looked for where it was when the adapter was written (relative to the adapter's folder, or among the
releases that ship with the package), then beside the adapter under its name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from regionjax.config import Config
from regionjax.weights import release
from regionjax.weights.fit import fit_params, match_lora
from regionjax.weights.release import ReleaseError

_BLOCK = 1 << 22  # bytes hashed at a time


@dataclasses.dataclass(frozen=True)
class Base:
  """The release that an adapter was trained from.

  Attributes:
    name: its folder's name.
    sha256: of its weights, see `weights_sha256`.
    path: of its folder; '' for a release that ships with the package. In an adapter's file it is
      relative to the adapter's folder.
  """

  name: str
  sha256: str
  path: str = ""

  @property
  def label(self) -> str:
    """For messages: 'smollm2' (sha256 0123456789ab...)."""
    return f"{self.name!r} (sha256 {self.sha256[:12]}...)"


def weights_sha256(folder: pathlib.Path) -> str:
  """SHA-256 of a release's weights, in hex: `cat model*.safetensors | sha256sum`, read in blocks.

  Raises:
    ReleaseError: there are no such files; an adapter has none of its own.
  """
  files = _weight_files(folder)
  if not files:
    kind = "is an adapter itself" if (folder / release.ADAPTER).is_file() else "holds no weights"
    raise ReleaseError(f"{folder} {kind}: an adapter's base must be a release with all its weights")
  digest = hashlib.sha256()
  for path in files:
    with path.open("rb") as file:
      while block := file.read(_BLOCK):
        digest.update(block)
  return digest.hexdigest()


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
  stem, suffix = release.WEIGHTS.split(".")
  return sorted(folder.glob(f"{stem}*.{suffix}"))


def describe_base(name_or_path: str | os.PathLike) -> Base:
  """The `Base` that a release is; of an adapter, the one that it stands on.

  Raises:
    ReleaseError: it is incomplete, or an adapter whose base is not found.
  """
  folder = release.find(name_or_path)
  if (folder / release.ADAPTER).is_file():
    folder = find_base(folder)
  shipped = folder.parent == release.SHIPPED
  resolved = folder.resolve()
  return Base(resolved.name, weights_sha256(folder), "" if shipped else str(resolved))


def save_adapter(
  folder: str | os.PathLike,
  config: Config,
  params: Mapping[str, Any],
  tokenizer: Any,
  card: str,
  *,
  base: Base,
  dtype: str = "float32",
) -> pathlib.Path:
  """Writes an adapter, atomically as `release.save` does.

  Args:
    folder: destination.
    config: of the whole model, LoRA included.
    params: nested dict of the parameters that are not the base's own.
    tokenizer: the model's, with the tokens added to the base's.
    card: Markdown text of the model card.
    base: what the parameters were trained on.
    dtype: adapters are small, so by default they keep every bit of what was trained.

  Returns:
    The folder.

  Raises:
    ReleaseError: as for `release.save`.
  """
  folder = pathlib.Path(folder)
  if base.path:
    base = dataclasses.replace(base, path=os.path.relpath(base.path, folder.resolve()))
  payload = release.make_payload(config, adapter={"base": dataclasses.asdict(base)})
  return release.write_leaves(
    folder, release.to_leaves(params, dtype), payload, tokenizer=tokenizer, card=card,
    prefix=release.ADAPTER.split(".")[0],
  )  # fmt: skip


def load_adapter(
  folder: str | os.PathLike, *, base: str | os.PathLike | None = None
) -> tuple[Config, dict[str, Any], Any]:
  """Opens an adapter on its base; see `release.load`, which calls this.

  Returns:
    (config, params, tokenizer): the whole model, its low-rank updates not merged.

  Raises:
    ReleaseError: the adapter is damaged, or its base is missing or another one.
    ConfigError: the base's parameters don't have the shapes of the adapter's model.
  """
  from regionjax.models.params import param_shapes
  from regionjax.tokenizer import load_tokenizer

  folder = release.find(folder)
  config = release.load_config(folder)
  own = release.read_arrays(folder / release.ADAPTER)
  tokenizer = load_tokenizer(str(folder))
  below = find_base(folder, base)
  source, theirs, _ = release.load(below)
  model, theirs = match_lora(source.model, theirs, config.model)
  shapes = {path: tuple(s.shape) for path, s in release.flatten(param_shapes(config.model)).items()}
  wanted = {path: shape for path, shape in shapes.items() if path not in own}
  given = release.flatten(theirs)
  fit = fit_params(model, given, config.model, wanted, where=f"{below} (base of {folder})")
  arrays = fit.params | own
  release.check(arrays, config, tokenizer, where=f"{folder / release.ADAPTER} on {below}")
  return config, release.unflatten(arrays), tokenizer


def read_base(folder: pathlib.Path) -> Base:
  """The base that an adapter's config.json names.

  Raises:
    ReleaseError: the entry is missing or malformed.
  """
  adapter = release.read_payload(folder).get("adapter")
  entry = adapter.get("base") if isinstance(adapter, dict) else None
  fields = {"name", "sha256"} | ({"path"} if isinstance(entry, dict) and "path" in entry else set())
  if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in fields):
    raise ReleaseError(
      f"{folder / release.CONFIG}: expected 'adapter': {{'base': {{'name', 'sha256'}}}} beside "
      f"{release.ADAPTER}; export the adapter again"
    )
  return Base(**{key: entry[key] for key in fields})


def find_base(folder: pathlib.Path, given: str | os.PathLike | None = None) -> pathlib.Path:
  """The folder of an adapter's base.

  Args:
    folder: the adapter.
    given: where the base is said to be; None looks in the usual places.

  Raises:
    ReleaseError: it is in none of the places, or what is there is another release.
  """
  base = read_base(folder)
  if given is not None:
    below = release.find(given)
    found = weights_sha256(below)
    if found != base.sha256:
      raise ReleaseError(
        f"{below} is not the base of {folder}: its weights have sha256 {found[:12]}..., but the "
        f"adapter was trained on {base.label}; on other weights it means nothing"
      )
    return below
  tried = []
  for place in _places(folder, base):
    if not _weight_files(place):
      tried.append(f"  {place}: no release there")
    elif (found := weights_sha256(place)) == base.sha256:
      return place
    else:
      tried.append(f"  {place}: another release (sha256 {found[:12]}...)")
  raise ReleaseError(
    f"{folder} is an adapter: it holds only what was trained on top of {base.label}, which was not "
    "found:\n" + "\n".join(tried) + f"\nPut that release at {folder.parent / base.name}, or say "
    "where it is: regionjax.load(adapter, base=FOLDER), on the command line --base FOLDER"
  )


def _places(folder: pathlib.Path, base: Base) -> Iterator[pathlib.Path]:
  """Where a base may be, each place once."""
  home = folder.resolve()
  recorded = home / base.path if base.path else release.SHIPPED / base.name
  places = (pathlib.Path(os.path.normpath(recorded)), home.parent / base.name)
  yield from dict.fromkeys(place for place in places if place != home)

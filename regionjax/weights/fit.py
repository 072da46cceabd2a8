"""One model's parameters for another one: what both have is taken over, what differs is named.

Axes: v vocabulary, d decoder channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from regionjax.config import ConfigError, DecoderConfig, ModelConfig
from regionjax.models.lora import merge_lora

# The tables with one entry per token, and the axis that counts them.
TOKEN_TABLES = {"decoder/embed/embedding": 0, "decoder/head/kernel": 1}
POSITIONS, BLOCKS = "vision/positions", "vision/layers/"


@dataclasses.dataclass(frozen=True)
class Fit:
  """What a model takes over.

  Attributes:
    params: arrays by path, in the shapes of the model.
    resampled: paths whose numbers are no longer the source's own.
    notes: what was changed, for people.
  """

  params: dict[str, Any]
  resampled: frozenset[str] = frozenset()
  notes: tuple[str, ...] = ()


def match_lora(
  source: ModelConfig, params: Mapping[str, Any], target: ModelConfig
) -> tuple[ModelConfig, dict[str, Any]]:
  """A model without low-rank updates other than the target's: those are merged into their maps.

  Args:
    source: the model that `params` are of.
    params: all of its parameters, nested.
    target: the model that is to take them over.

  Returns:
    The source as given, or without LoRA; and its parameters.
  """
  if source.decoder.lora == target.decoder.lora:
    return source, dict(params)
  return merge_lora(source, params)


def fit_params(
  source: ModelConfig,
  params: Mapping[str, Any],
  target: ModelConfig,
  shapes: Mapping[str, tuple[int, ...]],
  *,
  where: str,
) -> Fit:
  """Those of `params` that a model wants.

  Tokens that the model has beyond the source's start as the mean of all that the source has; for
  images of another size the position table is resampled; of a deeper vision tower the first blocks
  are taken. A region encoder of another kind gives
  nothing: equal names in it mean nothing.

  Args:
    source: the model that `params` are of.
    params: arrays by path ('a/b/c'), all of the model's or those of some parts.
    target: the model that wants them.
    shapes: of the parameters wanted, by path.
    where: names the source in messages.

  Raises:
    ConfigError: shapes differ; all of them are listed.
  """
  shared = {path: params[path] for path in sorted(params.keys() & shapes.keys())}
  if source.region.features != target.region.features:
    shared = {path: leaf for path, leaf in shared.items() if not path.startswith("regions/")}
  notes, resampled = [], frozenset()
  if POSITIONS in shared and _other_grid(source, target):
    shared[POSITIONS] = _resample(source, shared[POSITIONS], target)
    resampled = frozenset((POSITIONS,))
    old, new = source.vision, target.vision
    notes.append(
      f"{POSITIONS} resampled from {_times(old.grid)} patches (images of {_times(old.image_hw)} "
      f"pixels) to {_times(new.grid)} ({_times(new.image_hw)})"
    )
  for path in TOKEN_TABLES.keys() & shared.keys():
    table = _with_tokens(shared[path], TOKEN_TABLES[path], source.decoder, target.decoder)
    if table is not None:
      shared[path] = table
      added = target.decoder.vocab_size - source.decoder.vocab_size
      notes += [f"{path}: {added} tokens added, each the mean of the others"] if added else []
  for path, leaf in shared.items():
    # A model reads the first blocks of a tower; those past them were never needed.
    if path.startswith(BLOCKS) and leaf.shape[0] > shapes[path][0]:
      shared[path] = leaf[: shapes[path][0]]
  wrong = [
    f"  {path}: {tuple(leaf.shape)} in the release, {tuple(shapes[path])} in the model"
    for path, leaf in shared.items()
    if tuple(leaf.shape) != tuple(shapes[path])
  ]
  if wrong:
    raise ConfigError(f"{where} doesn't fit the model:\n" + "\n".join(wrong))
  return Fit(shared, resampled, tuple(notes))


def _other_grid(source: ModelConfig, target: ModelConfig) -> bool:
  old, new = source.vision, target.vision
  return old.patch_size == new.patch_size and old.grid != new.grid


def _resample(source: ModelConfig, positions: Any, target: ModelConfig) -> np.ndarray:
  from regionjax.models.params import resize_images

  nested = {"vision": {"positions": positions}}
  _, nested = resize_images(source, nested, target.vision.image_size)
  return np.asarray(nested["vision"]["positions"])


def _with_tokens(table: Any, axis: int, old: DecoderConfig, new: DecoderConfig) -> Any | None:
  """A table with the entries of `new`: added tokens get the mean, padding zeros; None: as it is."""
  fits = (old.vocab_size, old.padded_vocab) == (new.vocab_size, new.padded_vocab)
  if fits or new.vocab_size < old.vocab_size or table.shape[axis] != old.padded_vocab:
    return None
  source_vd = np.moveaxis(np.asarray(table), axis, 0)[: old.vocab_size]
  out_vd = np.zeros((new.padded_vocab, *source_vd.shape[1:]), source_vd.dtype)
  out_vd[: old.vocab_size] = source_vd
  mean_d = source_vd.mean(axis=0, dtype=np.float32)
  out_vd[old.vocab_size : new.vocab_size] = mean_d.astype(source_vd.dtype)
  return np.ascontiguousarray(np.moveaxis(out_vd, 0, axis))


def _times(sides: tuple[int, int]) -> str:
  return f"{sides[0]}x{sides[1]}"

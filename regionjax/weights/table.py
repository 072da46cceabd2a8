"""The conversion table: published names and layouts on one side, our parameter tree on the other.

A family of models is one `Table`, used in both directions. `plan` compares all names and shapes
before anything is read and says everything that is wrong at once; `back` gives the published
tensors of our parameters. Both only arrange lazy leaves: whoever writes them reads them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from regionjax.weights import leaves as lazy
from regionjax.weights.leaves import Leaf
from regionjax.weights.tensors import Tensor, WeightsError
from regionjax.weights.transforms import Transform, same

LAYER = "{layer}"
FLOATS = tuple(np.dtype(t) for t in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16))

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
  """One published tensor, or one per layer.

  Attributes:
    key: the published name; '{layer}' stands for the layer's number.
    path: ours, joined by '/'. Where the key has a layer, all of them are stacked on axis 0.
    transform: of one layer.
  """

  key: str
  path: str
  transform: Transform = same

  @property
  def layered(self) -> bool:
    return LAYER in self.key

  def at(self, layer: int) -> str:
    """The name of one layer's tensor."""
    return self.key.replace(LAYER, str(layer))


@dataclasses.dataclass(frozen=True)
class Plan:
  """A conversion that will work.

  Attributes:
    leaves: our parameters by path, not yet read.
    spare: published tensors that the model does not use, by published name, for the way back.
    ignored: names in the source that carry nothing.
  """

  leaves: dict[str, Leaf]
  spare: dict[str, Tensor]
  ignored: list[str]


@dataclasses.dataclass(frozen=True)
class Table:
  """A family's names.

  Attributes:
    family: for messages.
    rules: every tensor that the model uses.
    aliases: (regex, replacement) applied in this order to a source's names, which bring the other
      layouts in which a family is found to the published one. A regex must not match its result.
    ignored: regexes of published names that carry nothing (constants that old files stored, parts
      of a larger model).
    spare: regexes of published names that this model does not use but whose files have them.
    twins: pairs (name, name of the tensor it repeats): where a source has both, their values must
      be equal, and the first is dropped. A tied output layer, which some files store.
  """

  family: str
  rules: tuple[Rule, ...]
  aliases: tuple[tuple[str, str], ...] = ()
  ignored: tuple[str, ...] = ()
  spare: tuple[str, ...] = ()
  twins: tuple[tuple[str, str], ...] = ()

  def canonical(self, name: str) -> str:
    """The published name for a source's."""
    for pattern, replacement in self.aliases:
      name = re.sub(pattern, replacement, name)
    return name

  def is_ignored(self, key: str) -> bool:
    return any(re.search(p, key) for p in self.ignored)

  def is_spare(self, key: str) -> bool:
    return any(re.search(p, key) for p in self.spare)

  def plan(self, source: Mapping[str, Tensor], wanted: Mapping[str, Shape]) -> Plan:
    """Arranges the conversion of a source.

    Args:
      source: stored tensors by name.
      wanted: the shape of each of our parameters by path, layers stacked; exactly those that this
        table gives.

    Returns:
      Leaves in the order of the rules.

    Raises:
      WeightsError: tensors that are missing, unexpected, of another shape, of a dtype that is no
        plain float, or stored under two names; all of them are listed, with the shapes as stored.
    """
    where = getattr(source, "where", "the checkpoint")
    problems = _Problems(
      f"{where}: its tensors are not those of {self.family} with this configuration",
      "Check that config.json belongs to these weights and that no file is missing.",
    )
    expected = {rule.at(i): shape for rule, i, shape in self._expected(wanted, problems)}
    found, spare, ignored = self._sort(source, expected, problems)
    for key, shape in expected.items():
      if key not in found:
        problems.add("missing", f"{key} {list(shape)}")
      elif found[key].shape != shape:
        problems.add(
          "of another shape",
          f"{_said(found[key], key)} is {list(found[key].shape)}, expected {list(shape)}",
        )
      elif found[key].dtype not in FLOATS:
        problems.add(
          "of a dtype that is not read",
          f"{_said(found[key], key)} is {found[key].dtype.name}: quantised checkpoints must be "
          "stored in a plain float dtype first",
        )
    problems.raise_any()
    leaves = {rule.path: _forward(rule, found, wanted[rule.path]) for rule in self.rules}
    return Plan(leaves, spare, ignored)

  def back(
    self, params: Mapping[str, Any], *, spare: Mapping[str, Any] | None = None
  ) -> dict[str, Leaf]:
    """The published tensors of our parameters, padding rows stripped.

    Args:
      params: arrays, stored tensors or leaves by path, layers stacked; exactly those of the table.
      spare: published tensors that the model does not use, by published name.

    Returns:
      Leaves in the published layout by published name, layer after layer.

    Raises:
      WeightsError: parameters that this layout has no place for, or that are missing.
    """
    problems = _Problems(
      f"these parameters cannot be written as {self.family}",
      "Give the parameters of that part of the model alone, with adapters merged.",
    )
    paths = {rule.path for rule in self.rules}
    for path in params:
      if path not in paths:
        problems.add("without a place in that layout", f"{path} {list(params[path].shape)}")
    for path in sorted(paths - params.keys()):
      problems.add("missing", path)
    problems.raise_any()
    return dict(self._published(params)) | {
      key: lazy.as_leaf(tensor) for key, tensor in (spare or {}).items()
    }

  def _published(self, params: Mapping[str, Any]) -> Iterator[tuple[str, Leaf]]:
    # Layer by layer, as published: a shard then holds whole layers.
    for _, rules in itertools.groupby(self.rules, key=lambda r: r.key.split(LAYER)[0]):
      rules = list(rules)
      if not rules[0].layered:
        yield from ((r.key, _backward(r, lazy.as_lazy(params[r.path]))) for r in rules)
        continue
      stacks = [lazy.as_leaf(params[r.path]) for r in rules]
      for i in range(stacks[0].shape[0]):
        for rule, stack in zip(rules, stacks):
          yield rule.at(i), _backward(rule, lazy.Layer(stack, i))

  def _expected(
    self, wanted: Mapping[str, Shape], problems: _Problems
  ) -> Iterator[tuple[Rule, int, Shape]]:
    """Every tensor that the source must have: (rule, layer, stored shape)."""
    paths = {rule.path for rule in self.rules}
    for path in wanted:
      if path not in paths:
        problems.add("parameters that such files do not have", f"{path} {list(wanted[path])}")
    for rule in self.rules:
      shape = wanted.get(rule.path)
      if shape is None:
        problems.add("parameters that the model does not have", rule.path)
      elif not rule.layered:
        yield rule, 0, rule.transform.stored_shape(tuple(shape))
      else:
        stored = rule.transform.stored_shape(tuple(shape[1:]))
        yield from ((rule, i, stored) for i in range(shape[0]))

  def _sort(
    self, source: Mapping[str, Tensor], expected: Mapping[str, Shape], problems: _Problems
  ) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """The source's tensors as (used, spare, ignored), by published name."""
    twins = dict(self.twins)
    named: dict[str, Tensor] = {}
    for name, tensor in source.items():
      key = self.canonical(name)
      if key in named:
        problems.add("stored twice", f"{key}: as {named[key].name} and as {name}")
      named[key] = tensor
    found, spare, ignored = {}, {}, []
    for key, tensor in named.items():
      if key in expected:
        found[key] = tensor
      elif self.is_ignored(key):
        ignored.append(tensor.name)
      elif self.is_spare(key):
        spare[key] = tensor
      elif key in twins:
        if twins[key] in named and not _equal(tensor, named[twins[key]]):
          problems.add(
            "not what the configuration says",
            f"{tensor.name} differs from {named[twins[key]].name}, but tie_word_embeddings is "
            "true; set it to false in the source's config.json",
          )
        ignored.append(tensor.name)
      else:
        problems.add("unexpected", f"{_said(tensor, key)} {list(tensor.shape)}")
    return found, spare, ignored


class _Problems:
  """Everything that is wrong, by kind, for one message."""

  def __init__(self, headline: str, remedy: str):
    self._headline, self._remedy = headline, remedy
    self._kinds: dict[str, list[str]] = {}

  def add(self, kind: str, problem: str) -> None:
    self._kinds.setdefault(kind, []).append(problem)

  def raise_any(self) -> None:
    if not self._kinds:
      return
    lines = [self._headline]
    for kind, listed in self._kinds.items():
      lines += [f"  {len(listed)} {kind}:", *(f"    {line}" for line in listed)]
    raise WeightsError("\n".join([*lines, f"  {self._remedy}"]))


def _forward(rule: Rule, found: Mapping[str, Tensor], shape: Shape) -> Leaf:
  """One of our parameters from its stored tensors."""
  if rule.layered:
    return lazy.Stacked(
      [lazy.Viewed(found[rule.at(i)], rule.transform.forward) for i in range(shape[0])]
    )
  leaf = lazy.Viewed(found[rule.key], rule.transform.forward)
  vocabulary = rule.transform.vocabulary
  if vocabulary is None:
    return leaf
  return lazy.Padded(leaf, axis=vocabulary.axis, size=vocabulary.padded)


def _backward(rule: Rule, leaf: lazy.LazyLeaf) -> Leaf:
  vocabulary = rule.transform.vocabulary
  if vocabulary is not None:
    kept = (*(slice(None),) * vocabulary.axis, slice(vocabulary.size))
    leaf = lazy.Viewed(leaf, functools.partial(_take, index=kept))
  return lazy.Viewed(leaf, rule.transform.backward)


def _take(array: np.ndarray, *, index: tuple[slice, ...]) -> np.ndarray:
  return array[index]


def _said(tensor: Tensor, key: str) -> str:
  """A tensor's name as the file has it, and the published one where that differs."""
  return key if tensor.name == key else f"{tensor.name} ({key})"


def _equal(a: Tensor, b: Tensor) -> bool:
  if a.shape != b.shape or a.dtype != b.dtype:
    return False
  pairs = zip(lazy.Viewed(a).pieces(), lazy.Viewed(b).pieces())
  return all(np.array_equal(x, y) for (_, x), (_, y) in pairs)

"""Proof of a conversion: bits against the source, numbers against transformers.

Two kinds. `check_bits` brings every parameter of a release back to the published layout and
compares it with the source bit by bit; it streams, and needs nothing but the files. The others run
torch (`check_oracle`, `check_regions`) and this program (`check_numbers`) on the same input in
float32, block by block, so that a model larger than memory can be checked. Only tokens are
generated with whole models, one after the other, and where one doesn't fit into memory choices at
the positions of a text are compared in their place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from regionjax.weights import check_numbers as numbers
from regionjax.weights import leaves as lazy
from regionjax.weights import release
from regionjax.weights.check_numbers import Row
from regionjax.weights.convert import Arranged
from regionjax.weights.tensors import WeightsError

NEW_TOKENS = 64
PROMPT = "The quick brown fox jumps over the lazy dog. In the year 1999,"
# At least NEW_TOKENS tokens of any vocabulary.
TEXT = f"""{PROMPT} the old lighthouse at the end of the harbour was painted again: two white bands
and a red one, 31 metres high. "Can you see it from the ferry?" she asked. He couldn't, because the
fog had come in before noon; but there were 12 boats on the water, three of them blue, and a dog
that ran along the quay as if it had been expected there since the morning. Later, when the sun came
out, everything was visible at once."""
# Boxes that a region module is tried with: of usual sizes, whole, thin, and beyond the image. None
# of the last one's samples lies where RoIAlign's become 0: there rounding would decide.
BOXES = (
  (0.1, 0.2, 0.55, 0.9), (0.0, 0.0, 1.0, 1.0), (0.62, 0.05, 0.66, 0.98), (-0.043, 0.4, 0.3, 1.087)
)  # fmt: skip
# What a model takes while it is read, in shares of itself: stacked layers of the largest kind are a
# fifth of a LLaMA, and stand in memory twice while they are placed.
SPARE_MEMORY = 1.3


@dataclasses.dataclass
class Report:
  """What a check found.

  Attributes:
    rows: numbers against transformers.
    tensors: compared bit by bit.
    wrong: names of tensors whose bits differ.
    tokens: greedy tokens compared; 0 if none were.
    differs_at: index of the first token that differs; None if all are equal.
    why: '' where the tokens were generated; else why they are choices at the positions of a text.
  """

  rows: list[Row] = dataclasses.field(default_factory=list)
  tensors: int = 0
  wrong: list[str] = dataclasses.field(default_factory=list)
  tokens: int = 0
  differs_at: int | None = None
  why: str = ""

  @property
  def passed(self) -> bool:
    return not self.wrong and self.differs_at is None and all(row.passed for row in self.rows)

  def __str__(self) -> str:
    lines = [f"{self.tensors} tensors brought back: " + self._bits()]
    width = max([len(row.name) for row in self.rows], default=0)
    for row in self.rows:
      verdict = "" if row.passed else f"  ABOVE {row.limit:g}"
      lines.append(f"{row.name:<{width}}  {row.error:.1e}{verdict}")
    if self.tokens:
      lines.append(self._tokens())
    return "\n".join([*lines, "check passed" if self.passed else "CHECK FAILED"])

  def _tokens(self) -> str:
    what = f"{self.tokens} greedy tokens"
    if self.why:
      what = f"{self.why}: choices at {self.tokens} positions of one text"
    if self.differs_at is None:
      return f"{what}: all equal"
    if self.why:
      return f"{what}: the first that differs is at {self.differs_at}"
    return f"{what}: differ from token {self.differs_at} on"

  def _bits(self) -> str:
    if not self.wrong:
      return "every bit is the source's"
    return f"{len(self.wrong)} DIFFER from the source:\n  " + "\n  ".join(self.wrong)


def check(
  arranged: Arranged,
  made: pathlib.Path,
  *,
  source: pathlib.Path,
  clip: pathlib.Path | None = None,
  log: Callable[[str], None] = lambda _: None,
) -> Report:
  """Checks a release against the source that it was converted from.

  Args:
    arranged: the conversion.
    made: the release.
    source: what it was arranged from: a folder, or a .gguf file.
    clip: of a GPT4RoI: CLIP's folder.
    log: told what is being done.

  Raises:
    WeightsError: torch is not installed.
  """
  opened = release.open_release(made)
  report = Report()
  log("comparing bits")
  check_bits(arranged, opened, report)
  # On a GPU or TPU products of float32 are otherwise of fewer bits.
  with _torch(), jax.default_matmul_precision("highest"):
    work = _Work(arranged, opened, source, clip, report, log)
    if "vision" in opened.parts:
      work.check_images()
    if "decoder" in opened.parts:
      work.check_decoder()
  return report


def check_bits(arranged: Arranged, opened: release.Opened, report: Report) -> None:
  """Compares what the tables make of the release with what the source holds, tensor by tensor."""
  for step in arranged.steps:
    paths = {rule.path for rule in step.table.rules}
    params = {path: leaf for path, leaf in opened.leaves.items() if path in paths}
    named = {step.table.canonical(name): tensor for name, tensor in step.source.items()}
    for key, leaf in step.table.back(params).items():
      report.tensors += 1
      if not _same_bits(leaf, named[key]):
        report.wrong.append(key)
    for key, tensor in step.plan.spare.items():
      report.tensors += 1
      if key not in opened.spare or not _same_bits(opened.spare[key], tensor):
        report.wrong.append(key)


def _same_bits(ours: lazy.Leaf, theirs: Any) -> bool:
  """Equal values, the source's rounded to the release's dtype."""
  a, b = lazy.as_lazy(ours), lazy.as_lazy(theirs)
  equal = a.shape == b.shape and np.array_equal(a.array(), b.array().astype(a.dtype))
  a.release()
  b.release()
  return equal


@dataclasses.dataclass(frozen=True)
class _Work:
  """One check in numbers: its two sides, and the report that it fills."""

  arranged: Arranged
  opened: release.Opened
  source: pathlib.Path
  clip: pathlib.Path | None
  report: Report
  log: Callable[[str], None]

  @property
  def weights(self) -> numbers.Weights:
    return numbers.Weights(self.opened.leaves)

  @property
  def dtype(self) -> np.dtype | None:
    """Of the release; None where it keeps several, which are then the source's."""
    dtypes = {leaf.dtype for leaf in self.opened.leaves.values()}
    return dtypes.pop() if len(dtypes) == 1 else None

  def check_images(self) -> None:
    """The tower, and what makes tokens of its hidden states."""
    from regionjax.weights import check_oracle as oracle

    self.log("running transformers' vision tower beside this program's, in float32")
    arranged, model, rows = self.arranged, self.opened.config.model, self.report.rows
    images = numbers.draw_images(model.vision)
    tower = oracle.open_tower(arranged, self.source, clip=self.clip, dtype=self.dtype)
    hidden = oracle.hidden_states(tower, images)
    del tower
    rows += numbers.compare_tower(hidden, images, model.vision, self.weights)
    if "connector" in self.opened.parts:
      theirs = oracle.image_tokens(arranged, self.source, hidden, self.dtype)
      rows.append(numbers.compare_connector(theirs, hidden, model, self.weights))
    if arranged.family == "gpt4roi":
      from regionjax.weights import check_regions as regions

      self.log("running the region module in torch and here")
      read = oracle.Published(arranged.steps[-1], self.dtype)
      hidden = [state[:1] for state in hidden]
      levels = regions.region_maps(read, hidden, oracle.select_layer(self.source))
      boxes = np.asarray(BOXES, np.float32)
      tokens = regions.region_tokens(read, levels, boxes)
      rows += numbers.compare_regions(
        [level.numpy() for level in levels], tokens, boxes,
        hidden=hidden, model=model, weights=self.weights,
      )  # fmt: skip

  def check_decoder(self) -> None:
    """Every block on transformers' own input, the logits, and greedy tokens."""
    from regionjax.weights import check_oracle as oracle

    self.log("running transformers' decoder, block by block, in float32")
    config = self.opened.config.model.decoder
    decoder = oracle.open_decoder(self.arranged, self.source, self.dtype)
    ids = self._encode(TEXT)[: config.max_length]
    trace = decoder.run(ids)
    self.log("running this program's on the same")
    rows, ours = numbers.compare_decoder(
      trace.hidden, trace.logits_1tv, ids, config=config, weights=self.weights
    )
    self.report.rows += rows
    theirs = np.argmax(trace.logits_1tv[0], axis=-1).tolist()
    self.report.why = too_large(decoder.nbytes)
    if not self.report.why:
      ids = self._encode(PROMPT)
      self.log(f"generating {NEW_TOKENS} tokens here")
      ours = numbers.greedy(config, self.weights.tree("decoder"), ids, NEW_TOKENS)
      gc.collect()
      self.log("and by transformers")
      theirs = decoder.generate(ids, NEW_TOKENS)
    self._compare_tokens(ours, theirs)

  def _compare_tokens(self, ours: Sequence[int], theirs: Sequence[int]) -> None:
    self.report.tokens = len(theirs)
    differing = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    self.report.differs_at = differing[0] if differing else None

  def _encode(self, text: str) -> list[int]:
    tokenizer = self.opened.tokenizer
    return [i for i in (tokenizer.bos_id,) if i >= 0] + tokenizer.encode_text(text)


def too_large(nbytes: int) -> str:
  """Why a model is not held in memory as a whole, or ''.

  Args:
    nbytes: of its weights.
  """
  free = available_bytes()
  if nbytes * SPARE_MEMORY <= free:
    return ""
  return f"model of {nbytes / 1e9:.1f} GB in float32, {free / 1e9:.1f} GB available"


def available_bytes() -> float:
  """Memory that a program can still take; infinite where the system doesn't say."""
  try:
    with open("/proc/meminfo", encoding="ascii") as file:
      told = dict(line.split(":", 1) for line in file)
    return int(told["MemAvailable"].split()[0]) * 1024
  except (OSError, KeyError):
    pass
  try:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  except (AttributeError, ValueError, OSError):
    return float("inf")


@contextlib.contextmanager
def _torch() -> Iterator[None]:
  try:
    yield
  except ImportError as error:
    raise WeightsError(
      f"the numbers cannot be checked without transformers' own models ({error}); "
      "pip install torch, and gguf for a GGUF file. The conversion itself is complete"
    ) from None

"""A tokenizer's JSON as it is published, for programs that follow nothing else.

`regionjax` puts the begin token before a text and the dummy prefix's blank aside by itself, so that
a JSON made of a sentencepiece file says nothing of either. transformers 5 takes both from the JSON:
it neither reads `add_bos_token` beside a tokenizer.json nor knows of a prefix to drop. On the way
out the steps are written, and beside them, in tokenizer_config.json, what stood in their place: a
tokenizer that comes back is the one that left, with its fingerprint.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

KEY = "regionjax_as_before"  # in tokenizer_config.json
_PARTS = ("post_processor", "decoder")


def published(spec: Mapping[str, Any], begin: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
  """The JSON with the steps that its text needs elsewhere.

  Args:
    spec: a `tokenizers` JSON.
    begin: the added token that begins a text; None where none does.

  Returns:
    (the JSON, what of it was changed: parts as they were). A template that the JSON already has is
    its publisher's word and stays.
  """
  changed: dict[str, Any] = {}
  step = spec.get("post_processor")
  if begin is not None and text_template(step) is None:
    index = next(t["id"] for t in spec["added_tokens"] if t["content"] == begin)
    template = _template(begin, index)
    changed["post_processor"] = (
      {"type": "Sequence", "processors": [step, template]} if step else template
    )
  decoder = spec.get("decoder") or {}
  if _prepends(spec.get("normalizer")) and decoder.get("type") == "Sequence":
    steps = decoder["decoders"]
    if all(step["type"] not in ("Strip", "Metaspace") for step in steps):
      strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
      changed["decoder"] = decoder | {"decoders": [*steps, strip]}
  return {**spec, **changed}, {part: spec.get(part) for part in changed}


def as_before(spec: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
  """The JSON without what `published` did to it, by the tokenizer_config.json beside it."""
  before = config.get(KEY)
  before = before if isinstance(before, dict) else {}
  return {**spec, **{part: before[part] for part in _PARTS if part in before}}


def text_template(step: Any) -> list[str] | None:
  """The tokens that a post-processor puts before a text; None where it is no template of one."""
  step = step or {}
  if step.get("type") == "Sequence":
    found = map(text_template, step.get("processors", []))
    return next((tokens for tokens in found if tokens is not None), None)
  if step.get("type") != "TemplateProcessing":
    return None
  before = itertools.takewhile(lambda part: "SpecialToken" in part, step.get("single", []))
  return [part["SpecialToken"]["id"] for part in before]


def _template(begin: str, index: int) -> dict[str, Any]:
  """One begin token before each text, as LLaMA's published tokenizer.json has it."""
  single, pair = (
    [{"SpecialToken": {"id": begin, "type_id": i}}, {"Sequence": {"id": name, "type_id": i}}]
    for i, name in enumerate("AB")
  )
  return {
    "type": "TemplateProcessing",
    "single": single,
    "pair": [*single, *pair],
    "special_tokens": {begin: {"id": begin, "ids": [index], "tokens": [begin]}},
  }


def _prepends(normalizer: Any) -> bool:
  """Whether the normaliser puts sentencepiece's dummy prefix."""
  normalizer = normalizer or {}
  steps = [normalizer, *normalizer.get("normalizers", [])]
  return any(step.get("type") == "Prepend" for step in steps)

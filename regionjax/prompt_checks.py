"""What an example and a configuration must satisfy before they are written down."""

from __future__ import annotations

import dataclasses

from regionjax.config import ConfigError, ModelConfig, PromptConfig
from regionjax.data.schema import SLOT, Example, Turn
from regionjax.regions import FORMATS
from regionjax.templates import EOS, TEMPLATES, Added
from regionjax.tokenizer import Tokenizer

_MENTIONS = ("name+slot", "slot")
_MASKS = ("answer", "gpt4roi")
_COORDINATE_MARKS = ("box", "none")


class PromptError(ValueError):
  """An Example or a dialogue that cannot be written down as asked."""


def check_config(prompt: PromptConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
  for field, value, known in (
    ("template", prompt.template, tuple(TEMPLATES)),
    ("mention", prompt.mention, _MENTIONS),
    ("mask", prompt.mask, _MASKS),
    ("coordinate_marks", prompt.coordinate_marks, _COORDINATE_MARKS),
    ("coordinates", prompt.coordinates, tuple(FORMATS)),
  ):
    if value not in known:
      raise ConfigError(f"prompt.{field}={value!r}: expected one of {', '.join(known)}")
  if prompt.mask == "gpt4roi" and prompt.template != "vicuna_v0":
    raise ConfigError(
      f"prompt.mask='gpt4roi' is defined for template vicuna_v0, not {prompt.template!r}; "
      "use mask='answer'"
    )
  if tokenizer.vocab_size > model.decoder.vocab_size:
    raise ConfigError(
      f"the tokenizer has {tokenizer.vocab_size} ids, but model.decoder.vocab_size is "
      f"{model.decoder.vocab_size}; raise it or use another tokenizer"
    )
  template = TEMPLATES[prompt.template]
  marks = [m for f in dataclasses.fields(template) if isinstance(getattr(template, f.name), tuple)
           for m in getattr(template, f.name) if isinstance(m, Added)]  # fmt: skip
  missing = sorted({m.content for m in marks if m is not EOS and m.content not in tokenizer.added})
  if any(m is EOS for m in marks) and tokenizer.eos_id < 0:
    missing.append("an end token such as </s>")
  if model.region.features is not None and tokenizer.region_slot_id < 0:
    missing.append("<bbox>")
  if missing:
    raise ConfigError(
      f"template {prompt.template!r} with region.kind={model.region.kind!r} needs tokens that the "
      f"tokenizer lacks: {', '.join(missing)}; add them with load_tokenizer(..., added=[...])"
    )


def check_resize(prompt: PromptConfig, resize: str) -> None:
  """Refuses coordinates that would not name the places that the model sees.

  Prompts and answers give 'pixels_resized' as shares of the image times its resized sides, which
  is where things are only if the rule maps the whole image onto the whole model input.

  Args:
    prompt: its `coordinates` are read.
    resize: the rule that `data.resize` names.

  Raises:
    ConfigError: the two don't fit.
  """
  if FORMATS[prompt.coordinates].frame == "resized" and resize in ("letterbox", "hf"):
    raise ConfigError(
      f"prompt.coordinates={prompt.coordinates!r} with data.resize={resize!r}: the rule pads or "
      "crops, so pixels of the resized image aren't shares of the original's sides; use "
      "data.resize='chatspot' or 'gpt4roi', or coordinates in another format such as 'unit3'"
    )


def split_turns(example: Example) -> tuple[str | None, tuple[Turn, ...]]:
  """(the system turn's text, or None without one; the other turns, whose order is checked)."""
  system, turns = None, example.turns
  if turns and turns[0].role == "system":
    system, turns = turns[0].text, turns[1:]
  for k, turn in enumerate(turns):
    wanted = ("user", "assistant")[k % 2]
    if turn.role != wanted:
      raise PromptError(
        f"{name(example)}: turn {k} is the {turn.role}'s; expected the {wanted}'s (an optional "
        "system turn, then user and assistant by turns)"
      )
  if not turns:
    raise PromptError(f"{name(example)}: it has no turns")
  return system, turns


def asked_kind(example: Example, question: Turn) -> str:
  kinds = {
    example.regions[int(k)].kind for what, k in SLOT.findall(question.text) if what == "region"
  }
  return kinds.pop() if len(kinds) == 1 else "mixed" if kinds else ""


def name(example: Example) -> str:
  return f"example {example.meta.get('id', '?')}"

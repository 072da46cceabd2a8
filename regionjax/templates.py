"""How a dialogue is written down: the marks around each turn, by template.

A template is a set of `Marks`: sequences of text and of added tokens. `Added("</s>")` is the token
itself; the same characters in a plain string are text. Text that people wrote goes between the
marks and is encoded apart from them, so no mark can be imitated.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Added:
  """An added token, by its string. `EOS` stands for the tokenizer's own end token."""

  content: str


EOS = Added("")
Marks = tuple[str | Added, ...]


@dataclasses.dataclass(frozen=True)
class Template:
  """The marks of one template.

  A dialogue reads: bos; the system's text between `system_open` and `system_close`; `first`; then
  per exchange `user_open` text `user_close` `answer_open` text `stop`, with `between` from one
  exchange to the next and `end` behind the last. A prompt for generation ends with `answer_open`.

  Attributes:
    system_text: what the system says where the example doesn't.
    blank: what stands between a role's mark and its text.
    guard: strings that text from people and answers may not form, since the stop is made of
      ordinary characters.
  """

  name: str
  system_text: str = ""
  system_open: Marks = ()
  system_close: Marks = ()
  first: Marks = ()
  user_open: Marks = ()
  user_close: Marks = ()
  answer_open: Marks = ()
  stop: Marks = ()
  between: Marks = ()
  end: Marks = ()
  blank: str = " "
  guard: tuple[str, ...] = ()


# The two sentences are Vicuna's own; v0 says human, v1 says user.
_SYSTEM = (
  "A chat between a curious {} and an artificial intelligence assistant. "
  "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
)

_CHATML = Template(
  name="chatml",
  system_open=(Added("<|im_start|>"), "system\n"),
  system_close=(Added("<|im_end|>"), "\n"),
  user_open=(Added("<|im_start|>"), "user\n"),
  user_close=(Added("<|im_end|>"), "\n"),
  answer_open=(Added("<|im_start|>"), "assistant\n"),
  stop=(Added("<|im_end|>"),),
  between=("\n",),
  blank="",
)


def _llama3_role(name: str) -> Marks:
  return (Added("<|start_header_id|>"), name, Added("<|end_header_id|>"), "\n\n")


TEMPLATES: dict[str, Template] = {
  t.name: t
  for t in (
    # GPT4RoI. The mark "###" that ends an answer is the one that opens the next turn.
    Template(
      name="vicuna_v0",
      system_text=_SYSTEM.format("human", "human"),
      system_close=("\n\n",),
      first=("###",),
      user_open=(" Human:",),
      user_close=("\n",),
      answer_open=("### Assistant:",),
      stop=("\n###",),
      end=(" ",),
      guard=("###",),
    ),
    # ChatSpot and LLaVA 1.5.
    Template(
      name="vicuna_v1",
      system_text=_SYSTEM.format("user", "user"),
      system_close=(" ",),
      user_open=("USER:",),
      answer_open=(" ASSISTANT:",),
      stop=(EOS,),
    ),
    _CHATML,
    dataclasses.replace(
      _CHATML,
      name="smollm2",
      system_text="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    ),
    # LLaMA 3's own. (From 3.1 on the published template also writes dates into the system's text.)
    Template(
      name="llama3",
      system_open=_llama3_role("system"),
      system_close=(Added("<|eot_id|>"),),
      user_open=_llama3_role("user"),
      user_close=(Added("<|eot_id|>"),),
      answer_open=_llama3_role("assistant"),
      stop=(Added("<|eot_id|>"),),
      blank="",
    ),
    # As few tokens as a dialogue can do with: the tiny preset's.
    Template(name="plain", system_close=("\n",), answer_open=("\n",), stop=(EOS,)),
  )
}

"""The tokenizer in a GGUF file's metadata, as `tokenizers` JSON.

llama.cpp knows a vocabulary's way of cutting text by a name only (`tokenizer.ggml.pre`); the rules
for the names below are those of the models' own tokenizer.json. A name that isn't known is an
error: with another rule most texts are encoded alike and some are not, and nobody notices.

transformers (5.23) builds tokenizers from GGUF files, too, but not always those that the models
were trained with: it knows no 'smollm' and cuts with GPT-2's rule instead, where a blank may stick
to a digit ("a  2"), and it merges whole words of LLaMA 3's vocabulary that should be left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from regionjax.tokenizer_files import (
  TokenizerError,
  TokenizerFiles,
  added_token,
  bpe_spec,
  find_roles,
)
from regionjax.weights.gguf_header import Fields

_UNKNOWN, _CONTROL, _USER = 2, 3, 4  # of tokenizer.ggml.token_type; 1 normal, 5 unused, 6 byte
_KEYS = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}

# LLaMA 3's, from its tokenizer.json.
_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
  """Bytes as printable characters; the regex is GPT-2's."""
  return dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=use_regex)


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
  return {"type": "Sequence", "pretokenizers": list(steps)}


_GPT2 = _byte_level(use_regex=True)
_SMOLLM = _sequence({"type": "Digits", "individual_digits": True}, _GPT2)
_LLAMA_BPE = _sequence(
  {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False},
  _byte_level(use_regex=False),
)
PRE_TOKENIZERS = {
  "gpt-2": _GPT2,
  "default": _GPT2,
  "smollm": _SMOLLM,
  "llama-bpe": _LLAMA_BPE,
  "llama3": _LLAMA_BPE,
  "llama-v3": _LLAMA_BPE,
}


def read_tokenizer(fields: Fields) -> TokenizerFiles:
  """The tokenizer of a GGUF file.

  A begin token that llama.cpp doesn't put before a text (SmolLM2's `<|im_start|>`) is none.

  Args:
    fields: the file's metadata (`GgufSource.fields`).

  Returns:
    What `Tokenizer` takes; `Tokenizer(files).save(folder)` writes it for `load_tokenizer`.

  Raises:
    TokenizerError: a kind of vocabulary or a pre-tokenizer that isn't known, or lists that don't
      fit together.
    WeightsError: a value is missing or of another type.
  """
  tokens = fields.take("tokenizer.ggml.tokens", list)
  kinds = fields.take("tokenizer.ggml.token_type", list, [1] * len(tokens))
  if len(kinds) != len(tokens):
    raise TokenizerError(f"{fields.where}: {len(tokens)} tokens, but {len(kinds)} token types")
  twice = [token for token, count in Counter(tokens).items() if count > 1]
  if twice:
    raise TokenizerError(f"{fields.where}: tokens with several ids: {', '.join(twice[:5])}")
  model = fields.take("tokenizer.ggml.model", str)
  if model == "gpt2":
    spec = _byte_level_spec(fields, tokens, kinds)
  elif model == "llama":
    spec = _sentencepiece_spec(fields, tokens, kinds)
  else:
    raise TokenizerError(
      f"{fields.where}: tokenizer.ggml.model is {model!r}; expected 'gpt2' (byte-level BPE) or "
      "'llama' (sentencepiece BPE); save the tokenizer with transformers and give its folder"
    )
  roles = _roles(fields, tokens, sentencepiece=model == "llama")
  entries = {entry["id"]: entry for entry in spec["added_tokens"]}
  for content in roles.values():  # some files call the end token a normal one
    entries.setdefault(tokens.index(content), added_token(content, tokens.index(content)))
  spec["added_tokens"] = [entries[index] for index in sorted(entries)]
  # By name what the file doesn't say, as it will be when it is read from a folder again.
  return TokenizerFiles(spec, find_roles(spec, known=roles, begins="bos" in roles))


def _byte_level_spec(fields: Fields, tokens: list[str], kinds: Sequence[int]) -> dict[str, Any]:
  """Byte-level BPE; characters whose bytes the vocabulary lacks are dropped, as in its own."""
  pre = fields.take("tokenizer.ggml.pre", str, "")
  if pre not in PRE_TOKENIZERS:
    raise TokenizerError(
      f"{fields.where}: "
      + (f"tokenizer.ggml.pre is {pre!r}" if pre else "it doesn't name a tokenizer.ggml.pre")
      + f", the rule by which text is cut before merging; known are {', '.join(PRE_TOKENIZERS)}. "
      "Give the folder with the model's own tokenizer.json, or set the name with "
      "`gguf-new-metadata --pre-tokenizer`"
    )
  vocab = {token: index for index, token in enumerate(tokens)}
  merges = [merge.split(" ") for merge in fields.take("tokenizer.ggml.merges", list)]
  for pair in merges:
    if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
      raise TokenizerError(
        f"{fields.where}: damaged: the merge {' '.join(pair)!r} is not of two tokens into a third"
      )
  return {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
      added_token(tokens[i], i, special=kind != _USER)
      for i, kind in enumerate(kinds)
      if kind in (_UNKNOWN, _CONTROL, _USER)
    ],
    "normalizer": None,
    "pre_tokenizer": PRE_TOKENIZERS[pre],
    "post_processor": None,
    "decoder": _GPT2,
    "model": {
      "type": "BPE",
      "dropout": None,
      "unk_token": None,
      "continuing_subword_prefix": None,
      "end_of_word_suffix": None,
      "fuse_unk": False,
      "byte_fallback": False,
      # LLaMA 3 takes a word that is a token as it is, even where merging would end elsewhere.
      "ignore_merges": PRE_TOKENIZERS[pre] is _LLAMA_BPE,
      "vocab": vocab,
      "merges": merges,
    },
  }


def _sentencepiece_spec(fields: Fields, tokens: list[str], kinds: Sequence[int]) -> dict[str, Any]:
  scores = fields.take("tokenizer.ggml.scores", list)
  if len(scores) != len(tokens):
    raise TokenizerError(f"{fields.where}: {len(tokens)} tokens, but {len(scores)} scores")
  return bpe_spec(
    list(zip(tokens, scores, kinds)),
    byte_fallback="<0x00>" in tokens,
    dummy_prefix=fields.take("tokenizer.ggml.add_space_prefix", bool, True),
  )


def _roles(fields: Fields, tokens: list[str], *, sentencepiece: bool) -> dict[str, str]:
  """The strings of the tokens that the metadata names by id."""
  roles = {}
  for role, name in _KEYS.items():
    index = fields.take(f"tokenizer.ggml.{name}", int, None)
    if index is None:
      continue
    if not 0 <= index < len(tokens):
      raise TokenizerError(
        f"{fields.where}: tokenizer.ggml.{name} is {index}, but there are {len(tokens)} tokens"
      )
    roles[role] = tokens[index]
  # llama.cpp's defaults where the file doesn't say: LLaMA 1 to 3 begin with their token.
  default = sentencepiece or PRE_TOKENIZERS.get(fields.get("tokenizer.ggml.pre")) is _LLAMA_BPE
  if not fields.take("tokenizer.ggml.add_bos_token", bool, default):
    roles.pop("bos", None)
  return roles

"""Text to ids and back, with one rule for plain text whatever the tokenizer's file.

Two things are ours rather than the library's. **Plain text is plain**: `encode_text` never yields
the id of an added or special token, whatever people write; such ids come from the program only.
**Added tokens cut the text**: each stretch of text between them is encoded on its own. Where the
vocabulary is sentencepiece-like, white space on both sides of an added token is dropped and every
stretch gets the dummy prefix, which is what LLaMA's original ("slow") tokenizer did and what the
released GPT4RoI weights were trained with; elsewhere the token's own `lstrip` and `rstrip` decide.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from regionjax import tokenizer_files
from regionjax.config import CHATSPOT_TOKENS, GPT4ROI_TOKENS
from regionjax.tokenizer_files import TokenizerError, TokenizerFiles
from regionjax.tokenizer_published import KEY, published

__all__ = ["CHATSPOT_TOKENS", "GPT4ROI_TOKENS", "Tokenizer", "TokenizerError", "load_tokenizer"]

# Texts kept. Full of coordinates, which hardly ever recur, 8,192 take 30 MB; longer texts than the
# system prompts aren't kept at all.
_CACHE_SIZE, _CACHE_LONGEST = 1 << 13, 200


class Tokenizer:
  """A tokenizer with the rules of this module.

  Attributes:
    vocab_size: one more than the highest id.
    added: every added and special token's string -> id; `encode_text` never yields these ids.
    bos_id, eos_id, pad_id: -1 where the vocabulary has none (pad falls back to eos); bos also where
      the published tokenizer puts none before a text.
    image_slot_id, im_start_id, im_end_id, region_slot_id: `<im_patch>` (LLaVA's `<image>` where
      there is none), `<im_start>`, `<im_end>` and `<bbox>`, or -1.
    dummy_prefix: whether a stretch of text starts with sentencepiece's extra blank.
  """

  def __init__(self, files: TokenizerFiles) -> None:
    self._files = files
    spec = files.spec
    entries = spec["added_tokens"]
    self.added: dict[str, int] = {t["content"]: t["id"] for t in entries}
    self.dummy_prefix, plain = _plain(spec)
    self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
    self._strings = {i: s for s, i in self.added.items()}
    unknown = self.added.get(spec["model"].get("unk_token") or "", -1)
    self._reserved = frozenset(self.added.values()) - {unknown}
    both = self.dummy_prefix
    self._strip = {t["id"]: (both or t["lstrip"], both or t["rstrip"]) for t in entries}
    model_size = 1 + max(self._plain.get_vocab(with_added_tokens=False).values(), default=-1)
    self.vocab_size = max([model_size, *(i + 1 for i in self.added.values())])
    self.bos_id, self.eos_id, self.pad_id = (
      self.added.get(files.roles.get(role, ""), -1) for role in ("bos", "eos", "pad")
    )
    if self.pad_id < 0:
      self.pad_id = self.eos_id
    self.image_slot_id = self.added.get("<im_patch>", self.added.get("<image>", -1))
    self.im_start_id = self.added.get("<im_start>", -1)
    self.im_end_id = self.added.get("<im_end>", -1)
    self.region_slot_id = self.added.get("<bbox>", -1)
    self._cached = functools.lru_cache(maxsize=_CACHE_SIZE)(self._encode)

  def encode_text(
    self, text: str, *, guard: Sequence[str] = (), start: str = "segment"
  ) -> list[int]:
    """Plain text to ids.

    Args:
      text: anything; strings of added tokens in it are ordinary characters.
      guard: strings (stops, as a rule) whose usual ids must not appear: where one occurs, each of
        its characters is encoded on its own. Decoding still gives the same text.
      start: 'segment' (the start of a text or just behind an added token: the dummy prefix is
        put, if the vocabulary uses one) or 'inside' (more text of a segment already begun).

    Returns:
      Ids, none of them of an added token.

    Raises:
      TokenizerError: a character of the text is itself an added token and has no other encoding,
        or the text isn't Unicode (half a surrogate pair).
    """
    return list(self.cached_ids(text, tuple(guard), start))

  def cached_ids(self, text: str, guard: tuple[str, ...], start: str) -> tuple[int, ...]:
    """`encode_text` without the copy: results for recent texts are kept."""
    encode = self._cached if len(text) <= _CACHE_LONGEST else self._encode
    return encode(text, guard, start)

  def _encode(self, text: str, guard: tuple[str, ...], start: str) -> tuple[int, ...]:
    if start not in ("segment", "inside"):
      raise TokenizerError(f"start={start!r}: expected 'segment' or 'inside'")
    if not text:
      return ()
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise TokenizerError(f"text with half a surrogate pair: {error}") from error
    pieces = _cut(text, guard)
    if start == "segment" and self.dummy_prefix:
      pieces[0] = " " + pieces[0]
    return tuple(i for piece in pieces for i in self._encode_piece(piece))

  def _encode_piece(self, piece: str) -> list[int]:
    ids = self._plain.encode(piece, add_special_tokens=False).ids
    if self._reserved.isdisjoint(ids):
      return ids
    # Some files' merges do lead to a special token's string. Cut into characters, none can form.
    ids = [i for c in piece for i in self._plain.encode(c, add_special_tokens=False).ids]
    if not self._reserved.isdisjoint(ids):
      bad = sorted({self._strings[i] for i in ids if i in self._reserved})
      raise TokenizerError(
        f"text holds {', '.join(map(repr, bad))}, which this tokenizer can only encode as a "
        "special token; remove it from the text"
      )
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    """Ids to text. Added tokens appear as their strings; `decode(encode_text(t)) == t`.

    Bytes that are no UTF-8 become U+FFFD; ids beyond the vocabulary raise TokenizerError.
    """
    parts: list[str] = []
    run: list[int] = []
    for index in map(int, ids):
      if not 0 <= index < self.vocab_size:
        raise TokenizerError(f"id {index} is outside the vocabulary of {self.vocab_size}")
      if index in self._strings:
        parts += [self._plain.decode(run, skip_special_tokens=False), self._strings[index]]
        run = []
      else:
        run.append(index)
    parts.append(self._plain.decode(run, skip_special_tokens=False))
    text = "".join(parts)
    return text[1:] if self.dummy_prefix and text.startswith(" ") else text

  def strips(self, index: int) -> tuple[bool, bool]:
    """Whether the added token `index` drops white space on its left and on its right."""
    return self._strip[index]

  def is_added(self, index: int) -> bool:
    return index in self._strip

  def to_json(self) -> str:
    """The tokenizer as a `tokenizers` JSON, added tokens included."""
    return json.dumps(self._files.spec, ensure_ascii=False)

  def save(self, folder: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, from which `load_tokenizer` reads it."""
    self._write(folder, self._files.spec, {})

  def publish(self, folder: str | Path) -> None:
    """Writes both for transformers: there, too, a text begins with the begin token.

    `load_tokenizer` reads the same tokenizer from them, with the same fingerprint.
    """
    spec, before = published(self._files.spec, self._files.roles.get("bos"))
    self._write(folder, spec, {KEY: before} if before else {})

  def _write(self, folder: str | Path, spec: dict[str, Any], more: dict[str, Any]) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(spec, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    roles = self._files.roles
    config: dict[str, Any] = {f"{role}_token": name for role, name in roles.items()}
    # Without a word about it a `<s>` that isn't put would come back as one that is.
    config |= {"add_bos_token": "bos" in roles, "tokenizer_class": "PreTrainedTokenizerFast"}
    path = folder / tokenizer_files.CONFIG
    path.write_text(json.dumps(config | more, indent=2), encoding="utf-8")

  @functools.cached_property
  def fingerprint(self) -> str:
    """16 hex digits that change with any id, merge or rule."""
    state = json.dumps([self._files.spec, self._files.roles], sort_keys=True)
    return hashlib.sha256(state.encode()).hexdigest()[:16]


def load_tokenizer(
  name_or_path: str | Path, added: Sequence[str] | Mapping[str, int] = ()
) -> Tokenizer:
  """Loads a tokenizer.

  Args:
    name_or_path: 'tiny' (shipped with the package), a tokenizer.json, a sentencepiece .model, or
      a folder with either.
    added: tokens to add where the file lacks them: strings, which get the next free ids in
      order, or a mapping to the ids they must have. `GPT4ROI_TOKENS` and `CHATSPOT_TOKENS` are
      those of the two 7B systems.

  Raises:
    TokenizerError: the file cannot be read, or an added token's id is taken.
  """
  files = tokenizer_files.read(name_or_path)
  entries = files.spec["added_tokens"]
  taken = dict(files.spec["model"]["vocab"]) if _has_map(files.spec) else {}
  taken |= {t["content"]: t["id"] for t in entries}
  following = 1 + max(taken.values(), default=-1)
  for content in added:
    wanted = added[content] if isinstance(added, Mapping) else taken.get(content, following)
    clash = next((s for s, i in taken.items() if i == wanted and s != content), None)
    if clash is not None or taken.get(content, wanted) != wanted:
      raise TokenizerError(
        f"cannot add {content!r} as id {wanted}: "
        + (f"that id is {clash!r}" if clash else f"it already has id {taken[content]}")
      )
    taken[content] = wanted
    following = max(following, wanted + 1)
    if all(t["content"] != content for t in entries):
      entries.append(tokenizer_files.added_token(content, wanted))
  roles = tokenizer_files.find_roles(files.spec, known=files.roles, begins="bos" in files.roles)
  return Tokenizer(TokenizerFiles(files.spec, roles))


def _has_map(spec: dict[str, Any]) -> bool:
  return isinstance(spec["model"].get("vocab"), dict)


def _cut(text: str, guard: tuple[str, ...]) -> list[str]:
  """Cuts a text between all characters of each guarded string in it, overlaps included."""
  cuts = {
    at
    for word in guard
    for match in re.finditer(f"(?={re.escape(word)})", text)
    for at in range(match.start() + 1, match.start() + len(word))
  }
  edges = [0, *sorted(cuts), len(text)]
  return [text[a:b] for a, b in itertools.pairwise(edges)]


def _plain(spec: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
  """(whether the file asks for a dummy prefix, the JSON without it and without added tokens)."""
  plain = dict(spec)
  found = False

  def visit(node: Any, part: str) -> Any:
    nonlocal found
    if isinstance(node, list):
      return [v for v in (visit(n, part) for n in node) if v is not None]
    if not isinstance(node, dict):
      return node
    kind = node.get("type")
    if kind == "Prepend":
      found = True
      return None
    if kind == "Metaspace":
      found |= node.get("prepend_scheme", "always") != "never" and node.get(
        "add_prefix_space", True
      )
      return {"type": kind, "replacement": node["replacement"], "prepend_scheme": "never",
              "split": node.get("split", True)}  # fmt: skip
    if kind == "Strip" and part == "decoder":
      return None  # it would take a blank of the text for the prefix
    if kind == "ByteLevel":
      return node | {"add_prefix_space": False}
    return {key: visit(value, part) for key, value in node.items()}

  for part in ("normalizer", "pre_tokenizer", "decoder"):
    plain[part] = visit(plain.get(part), part)
  return found, plain | {
    "added_tokens": [], "post_processor": None, "truncation": None, "padding": None,
  }  # fmt: skip

"""Reads tokenizer files of the formats in use into one: the `tokenizers` JSON.

Accepted are a `tokenizer.json`, a folder that holds one (as transformers writes it), a folder of an
older layout that transformers can convert, and a sentencepiece `.model` file. Everything past this
module sees a `TokenizerFiles`.

**A begin token is one that the published tokenizer puts before a text.** Many name a `bos_token`
that nothing puts there: SmolLM2's is the `<|im_start|>` that its chat template writes, and a prompt
that began with the two would be one that the model never saw.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from regionjax.tokenizer_published import as_before, text_template

TINY = Path(__file__).parent / "assets" / "tiny_tokenizer.json"
CONFIG = "tokenizer_config.json"  # beside the tokenizer's own file, what transformers knows of it
BLANK = "▁"  # sentencepiece's mark for a blank

# Names by which a role is known where no CONFIG says it, best first.
ROLE_NAMES = {
  "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>"),
  "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
  "pad": ("[PAD]", "<pad>", "<|pad|>", "<|finetune_right_pad_id|>"),
}


class TokenizerError(ValueError):
  """A tokenizer file that cannot be used, or a text that cannot be encoded with it."""


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
  """A tokenizer as it lies on disk.

  Attributes:
    spec: the `tokenizers` JSON as a dict, added tokens and dummy prefix included.
    roles: the strings of 'bos', 'eos' and 'pad'; a role nobody fills is absent, and so is a
      'bos' that the published tokenizer doesn't put before a text.
  """

  spec: dict[str, Any]
  roles: dict[str, str]


def read(name_or_path: str | Path) -> TokenizerFiles:
  """Reads 'tiny', a tokenizer.json, a sentencepiece .model, or a folder with either.

  Raises:
    TokenizerError: no such file, or one that is no tokenizer; says what was looked for.
  """
  if str(name_or_path) == "tiny":
    path = TINY
  else:
    path = Path(name_or_path).expanduser()
  if not path.exists():
    raise TokenizerError(
      f"tokenizer {str(name_or_path)!r}: no such file or folder; give 'tiny', a tokenizer.json, "
      "a sentencepiece .model file, or a folder that holds one (nothing is downloaded)"
    )
  folder, file = (path, _file_in(path)) if path.is_dir() else (path.parent, path)
  if file is None:
    spec = _read_older(folder)
  elif file.suffix == ".model":
    spec = read_sentencepiece(file.read_bytes(), name=str(file))
  else:
    spec = _read_json(file)
  for content, index in _sidecar(folder, "added_tokens.json").items():
    if isinstance(index, int) and content not in {t["content"] for t in spec["added_tokens"]}:
      spec["added_tokens"].append(added_token(content, index, special=False))
  config = _sidecar(folder, CONFIG)
  roles = find_roles(spec, known=_named_roles(config | _sidecar(folder, "special_tokens_map.json")))
  if (folder / CONFIG).is_file() and not _puts_begin(spec, roles.get("bos"), config, file):
    roles.pop("bos", None)
  return TokenizerFiles(as_before(spec, config), roles)  # the roles are by what the file says now


def _file_in(folder: Path) -> Path | None:
  """The file of a folder that can be read here; None leaves it to transformers."""
  if (folder / "tokenizer.json").is_file():
    return folder / "tokenizer.json"
  models = sorted(folder.glob("*.model"))
  return models[0] if len(models) == 1 else None


def _read_older(folder: Path) -> dict[str, Any]:
  try:
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return json.loads(fast.backend_tokenizer.to_str())  # type: ignore[union-attr]
  except (ImportError, OSError, ValueError, AttributeError, KeyError) as error:
    raise TokenizerError(
      f"{folder}: expected tokenizer.json or one *.model file there, or files that transformers "
      f"can make a fast tokenizer of ({error})"
    ) from error


def _read_json(path: Path) -> dict[str, Any]:
  try:
    spec = json.loads(path.read_text(encoding="utf-8"))
  except (UnicodeDecodeError, json.JSONDecodeError) as error:
    raise TokenizerError(f"{path}: not a tokenizers JSON file ({error})") from error
  if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
    raise TokenizerError(f"{path}: not a tokenizers JSON file (it has no 'model' entry)")
  spec["added_tokens"] = list(spec.get("added_tokens") or [])
  return spec


def _sidecar(folder: Path, name: str) -> dict[str, Any]:
  path = folder / name
  if not path.is_file():
    return {}
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except (UnicodeDecodeError, json.JSONDecodeError) as error:
    raise TokenizerError(f"{path}: not JSON ({error})") from error
  return values if isinstance(values, dict) else {}


def _named_roles(config: dict[str, Any]) -> dict[str, str]:
  named = {role: config.get(f"{role}_token") for role in ROLE_NAMES}
  named = {r: v.get("content") if isinstance(v, dict) else v for r, v in named.items()}
  return {role: name for role, name in named.items() if isinstance(name, str)}


def _puts_begin(
  spec: dict[str, Any], begin: str | None, config: dict[str, Any], file: Path | None
) -> bool:
  """Whether a tokenizer with a CONFIG puts the token `begin` before a text.

  The first of these that says something decides: `add_bos_token`; a sentencepiece file, whose
  begin token transformers puts; the JSON's template of a text, which is all that transformers 5
  writes; the class, since LLaMA's put one unless they are told not to.
  """
  told = config.get("add_bos_token")
  if isinstance(told, bool):
    return told
  if file is not None and file.suffix == ".model":
    return True
  template = text_template(spec.get("post_processor"))
  if template is not None:
    return begin in template
  kind = str(config.get("tokenizer_class")).lower()
  return kind.startswith(("llama", "codellama"))  # the first ones were called LLaMATokenizer


def find_roles(
  spec: dict[str, Any], *, known: dict[str, str], begins: bool = True
) -> dict[str, str]:
  """The added tokens that fill the roles of ROLE_NAMES: as `known` says, else by their names.

  Without `begins` nobody fills 'bos', whatever there is.
  """
  contents = {t["content"] for t in spec["added_tokens"]}
  roles = {}
  for role, names in ROLE_NAMES.items():
    if role == "bos" and not begins:
      continue
    for name in (known.get(role), *names):
      if name in contents:
        roles[role] = name
        break
  return roles


def added_token(content: str, index: int, *, special: bool = True) -> dict[str, Any]:
  """An entry of the JSON's `added_tokens`."""
  return dict(
    id=index, content=content, single_word=False, lstrip=False, rstrip=False,
    normalized=False, special=special,
  )  # fmt: skip


def read_sentencepiece(data: bytes, *, name: str = "model") -> dict[str, Any]:
  """A sentencepiece BPE model file as a `tokenizers` JSON.

  Args:
    data: the serialised ModelProto.
    name: what to call it in messages.

  Raises:
    TokenizerError: sentencepiece is not installed, the bytes are no model, or the model is of a
      kind that the conversion does not cover (unigram, or with a normaliser of its own).
  """
  try:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2
  except ImportError as error:
    raise TokenizerError(
      f"{name}: reading a sentencepiece model needs `pip install sentencepiece protobuf`"
    ) from error
  proto = sentencepiece_model_pb2.ModelProto()
  try:
    proto.ParseFromString(data)
  except DecodeError as error:
    raise TokenizerError(f"{name}: not a sentencepiece model ({error})") from error
  normaliser = proto.normalizer_spec
  if (
    proto.trainer_spec.model_type != proto.trainer_spec.BPE
    or normaliser.precompiled_charsmap
    or normaliser.remove_extra_whitespaces
  ):
    raise TokenizerError(
      f"{name}: only BPE models that leave the text as it is (LLaMA's kind) are converted; save "
      "it with transformers and give the folder with its tokenizer.json"
    )
  return bpe_spec(
    [(p.piece, p.score, p.type) for p in proto.pieces],
    byte_fallback=proto.trainer_spec.byte_fallback,
    dummy_prefix=normaliser.add_dummy_prefix,
  )


def bpe_spec(
  pieces: Sequence[tuple[str, float, int]], *, byte_fallback: bool = True, dummy_prefix: bool = True
) -> dict[str, Any]:
  """A `tokenizers` JSON from sentencepiece's pieces (string, score, type), in id order.

  sentencepiece merges whichever neighbours make the piece of the highest score; so every way to
  cut a piece in two known pieces is a merge, and they are ranked by the score of the whole.
  """
  normal = {piece for piece, _, kind in pieces if kind in (1, 5)}
  merges: list[tuple[float, str, str]] = []
  for piece, score, kind in pieces:
    if kind == 1:
      merges += [(-score, left, right) for left, right in _cuts(piece, normal)]
  merges.sort(key=lambda m: m[0])
  unknown = [piece for piece, _, kind in pieces if kind == 2]
  steps = [{"type": "Replace", "pattern": {"String": " "}, "content": BLANK}]
  prefix = [{"type": "Prepend", "prepend": BLANK}] if dummy_prefix else []
  return {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
      added_token(piece, i, special=kind != 4)
      for i, (piece, _, kind) in enumerate(pieces)
      if kind in (2, 3, 4)
    ],
    "normalizer": {"type": "Sequence", "normalizers": prefix + steps},
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": {
      "type": "Sequence",
      "decoders": [
        {"type": "Replace", "pattern": {"String": BLANK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
      ],
    },
    "model": {
      "type": "BPE",
      "dropout": None,
      "unk_token": unknown[0] if unknown else None,
      "continuing_subword_prefix": None,
      "end_of_word_suffix": None,
      "fuse_unk": True,
      "byte_fallback": byte_fallback,
      "vocab": {piece: i for i, (piece, _, _) in enumerate(pieces)},
      "merges": [[left, right] for _, left, right in merges],
    },
  }


def _cuts(piece: str, known: set[str]) -> Iterable[tuple[str, str]]:
  for at in range(len(piece) - 1, 0, -1):
    if piece[:at] in known and piece[at:] in known:
      yield piece[:at], piece[at:]

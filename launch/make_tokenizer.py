"""Trains the tokenizer of the tiny preset: byte-level BPE, at most 1,024 entries, single digits.

    python launch/make_tokenizer.py            # rewrites regionjax/assets/tiny_tokenizer.json

The same scenes give the same file, byte for byte. Its text is what the tiny preset reads: the turns
of the scenes world's training examples, mentions of regions and images taken out, each behind the
blank that the `plain` template puts there.

What the pieces are, and why. A piece never crosses a word: whole phrases would save two tokens of a
question, but their words would then hardly be seen one by one, and a person's own wording consists
of such words. Words carry their blank in front (` red`), so that a word is the same piece wherever
it stands. Digits are single, so that coordinates and counts are spelt; `, `, `.` and brackets are
pieces, and so is the mark of a choice (` (A)`). All 256 bytes are in, so any text can be encoded.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from regionjax.data.schema import SLOT
from regionjax.data.sources.scenes import ScenesSource
from regionjax.tokenizer import Tokenizer
from regionjax.tokenizer_files import TINY, TokenizerFiles, find_roles

ENTRIES = 1024
# In id order. White space to the left of an opening mark is dropped: it would cost a token and
# says nothing.
ADDED = (
  "<pad>", "</s>", "<im_patch>", "<im_start>", "<im_end>", "<bbox>", "<box>", "</box>",
  "<|im_start|>", "<|im_end|>",
)  # fmt: skip
DROPS_LEFT = ("<im_start>", "<bbox>", "<box>")
PIECES = "|".join(
  (
    r"[0-9]",
    r" ?\([A-Z]\)",
    r" ?\p{L}+(?:['’]\p{L}+)?",
    r" ?[^\s\p{L}\p{N}]+(?: (?=[0-9]))?",
    r"\p{N}",
    r"\s",
  )
)
# What the scenes don't hold: the marks of the other templates ("##" must be a piece, since the stop
# of vicuna_v0 is told from people's text by it), and coordinates of all formats.
MARKS = (
  "###", "\n### Human:", "### Assistant:", " USER:", " ASSISTANT:", "user\n", "assistant\n",
  "system\n", " region1", "[0.12, 0.34, 0.56, 0.78]", "[12.3, 4.5].", " [123, 456]?",
)  # fmt: skip
MARK_WEIGHT = 1000  # each is seen this often


def texts(examples: int) -> Iterator[str]:
  """The stretches of text between mentions in the first training examples, then the marks."""
  source = ScenesSource(split="train", seed=0)
  for i in range(examples):
    for turn in source[i].turns:
      stretches = SLOT.split(f" {turn.text}")[::3]  # [1::3] and [2::3] are kind and index
      yield from filter(None, stretches)
  for mark in MARKS:
    yield from [mark] * MARK_WEIGHT


def train(lines: Iterable[str]) -> tokenizers.Tokenizer:
  """Byte-level BPE over PIECES, ADDED first."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(PIECES), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train_from_iterator(
    lines,
    trainers.BpeTrainer(
      vocab_size=ENTRIES,
      show_progress=False,
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
      special_tokens=[
        tokenizers.AddedToken(name, lstrip=name in DROPS_LEFT, normalized=False, special=True)
        for name in ADDED
      ],
    ),
  )
  return tokenizer


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--examples", type=int, default=20_000, help="scenes read (default 20,000)")
  parser.add_argument("--out", type=Path, default=TINY, help=f"file to write (default {TINY})")
  args = parser.parse_args()

  spec = json.loads(train(texts(args.examples)).to_str())
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.write_text(json.dumps(spec, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
  tokenizer = Tokenizer(TokenizerFiles(spec, find_roles(spec, known={})))
  print(f"{args.out}: {tokenizer.vocab_size} entries, {args.out.stat().st_size:,} bytes")
  lines = list(texts(min(args.examples, 500)))[: -len(MARKS) * MARK_WEIGHT]
  count = sum(len(tokenizer.encode_text(line)) for line in lines)
  words = sum(len(line.split()) for line in lines)
  print(f"{count / words:.2f} tokens a word over {len(lines)} stretches of text")


if __name__ == "__main__":
  main()

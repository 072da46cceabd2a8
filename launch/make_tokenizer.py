"""Trains the tokenizer of the tiny preset: byte-level BPE, at most 1,024 entries, single digits.

    python launch/make_tokenizer.py            # rewrites regionjax/assets/tiny_tokenizer.json

The same words give the same file, byte for byte. Its text is what the tiny preset reads: the turns
of the scenes world's training examples, mentions of regions and images taken out, each behind the
blank that the `plain` template puts there.

What the pieces are, and why. A piece never crosses a word: whole phrases would save two tokens of a
question, but their words would then hardly be seen one by one, and a person's own wording consists
of such words. Every word of the scenes world is one piece (`ignore_merges`: a word in the
vocabulary is taken whole); plain BPE leaves 69 of the 243 words to read in two to four pieces,
because it spends entries on the steps towards each. What room is left goes to BPE's first merges,
for words the world doesn't know. Words carry their blank in front (` red`), so that a word is the
same piece wherever it stands. Digits are single, so that coordinates and counts are spelt; `, `,
`.` and brackets are pieces, and so is the mark of a choice (` (A)`). All 256 bytes are in, so any
text can be encoded.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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
SELDOM = 5  # pieces seen less often are not worth an entry


def texts(examples: int) -> Iterator[str]:
  """The stretches of text between mentions in the first training examples, then the marks.

  The blank before a mention is left out: a slot drops it, and a name takes it along.
  """
  source = ScenesSource(split="train", seed=0)
  for i in range(examples):
    for turn in source[i].turns:
      stretches = SLOT.split(f" {turn.text}")[::3]  # [1::3] and [2::3] are kind and index
      yield from (text for text in map(str.rstrip, stretches) if text)
  for mark in MARKS:
    yield from [mark] * MARK_WEIGHT


def train(lines: Iterable[str]) -> dict[str, Any]:
  """The `tokenizers` JSON: ADDED, the bytes, the words of `lines`, and BPE merges over them.

  It depends on which words there are, not on how often each is drawn, so that a change of the
  scenes' layout leaves it as it is.
  """
  tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(PIECES), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  counts: Counter[str] = Counter()
  for line, times in Counter(lines).items():
    for piece, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(line):
      counts[piece, line[start:end]] += times
  seen = sorted(pair for pair, times in counts.items() if times >= SELDOM)
  trainer = trainers.BpeTrainer(
    vocab_size=ENTRIES,
    show_progress=False,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    special_tokens=[
      tokenizers.AddedToken(name, lstrip=name in DROPS_LEFT, normalized=False, special=True)
      for name in ADDED
    ],
  )
  tokenizer.train_from_iterator([text for _, text in seen], trainer)
  spec = json.loads(tokenizer.to_str())
  model = spec["model"]
  base = sorted(model["vocab"], key=model["vocab"].get)[: len(ADDED) + 256]
  vocab = list(dict.fromkeys(base + [piece for piece, _ in seen]))
  if len(vocab) > ENTRIES:
    raise SystemExit(f"{len(vocab) - len(base)} words, but there is room for {ENTRIES - len(base)}")
  merges = []
  for left, right in model["merges"]:
    if left + right not in vocab:
      if len(vocab) == ENTRIES:
        break
      vocab.append(left + right)
    merges.append([left, right])
  model |= {"vocab": {piece: i for i, piece in enumerate(vocab)}, "merges": merges}
  return spec


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--examples", type=int, default=20_000, help="scenes read (default 20,000)")
  parser.add_argument("--out", type=Path, default=TINY, help=f"file to write (default {TINY})")
  args = parser.parse_args()

  spec = train(texts(args.examples))
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

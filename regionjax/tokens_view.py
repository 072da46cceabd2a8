"""An encoded dialogue for people: a line per token, marked and coloured, and a summary."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from regionjax.prompt_writer import Encoded
from regionjax.renderer import Renderer
from regionjax.tokenizer import Tokenizer

# What a token is, the letter in front of its line, and its ANSI colour.
KINDS = {"loss": ("L", "32"), "image": ("I", "34"), "region": ("R", "35"), "added": ("+", "36"),
         "text": (" ", "")}  # fmt: skip
_PIECE = 28  # columns for a piece; what doesn't fit pushes the note to the right


@dataclasses.dataclass(frozen=True)
class Line:
  """One token, or the run of slots of one image.

  Attributes:
    start, count: position of the first token, and how many there are.
    index: the id.
    piece: its text, quoted; an added token's string as it is.
    kind: 'image', 'region', 'added' or 'text'.
    answer: number of the supervised answer that it belongs to, or 0.
    slot: number of the image or region whose slot it is, counted from 1, or 0.
  """

  start: int
  count: int
  index: int
  piece: str
  kind: str
  answer: int
  slot: int

  def note(self, *, loss: bool) -> str:
    """What the line says behind the piece; `loss`: whether the loss counts it."""
    parts = [f"{self.kind} {self.slot}"] if self.slot else []
    if loss:
      parts.append(f"loss, answer {self.answer}" if self.answer else "loss")
    return ", ".join(parts)


def lines(encoded: Encoded, renderer: Renderer) -> Iterator[Line]:
  """The tokens of a dialogue in order."""
  tokenizer = renderer.tokenizer
  images = iter(encoded.image_slots)
  regions = iter(encoded.region_slots)
  at = 0
  while at < len(encoded):
    index = int(encoded.ids[at])
    kind, count, slot = "text", 1, 0
    if index == tokenizer.image_slot_id:
      kind, count, slot = "image", renderer.model.image_tokens, next(images) + 1
    elif index == tokenizer.region_slot_id:
      kind, slot = "region", next(regions) + 1
    elif tokenizer.is_added(index):
      kind = "added"
    answer = int(encoded.answer_ids[at])
    yield Line(at, count, index, piece_of(index, tokenizer), kind, answer, slot)
    at += count


def piece_of(index: int, tokenizer: Tokenizer) -> str:
  """What an id stands for: an added token's string, else its text in quotes.

  A blank at its beginning is shown, which `decode` would take for sentencepiece's dummy prefix, and
  a part of a character is U+FFFD.
  """
  if tokenizer.is_added(index):
    return tokenizer.decode([index])
  before = next(iter(tokenizer.added.items()), None)
  if before is None:
    return repr(tokenizer.decode([index]))
  return repr(tokenizer.decode([before[1], index])[len(before[0]) :])


def show(encoded: Encoded, renderer: Renderer, *, colour: bool) -> None:
  """Prints every token, then how many there are of each kind."""
  width = len(str(max(len(encoded) - 1, 0)))
  digits = len(str(max(renderer.tokenizer.vocab_size - 1, 0)))
  for line in lines(encoded, renderer):
    loss = bool(encoded.mask[line.start])
    end = line.start + line.count - 1
    place = f"{line.start:>{width}}" + (f"-{end:<{width}}" if line.count > 1 else " " * (width + 1))
    piece = f"{line.piece} x{line.count}" if line.count > 1 else line.piece
    mark, code = KINDS["loss" if loss else line.kind]
    row = f"{mark} {place} {line.index:>{digits}}  "
    row += f"{_painted(piece, code, colour)}{' ' * (_PIECE - len(piece))} {line.note(loss=loss)}"
    print(row.rstrip())
  print()
  for row in summary(encoded, renderer):
    print(row)
  print("marks: " + ", ".join(_painted(f"{m} {k}", c, colour) for k, (m, c) in KINDS.items() if c))


def summary(encoded: Encoded, renderer: Renderer) -> Iterator[str]:
  """Counts by kind, and what ends an answer."""
  counts = dict.fromkeys(("image", "region", "added", "text"), 0)
  for line in lines(encoded, renderer):
    counts[line.kind] += line.count
  limit = renderer.model.decoder.max_length
  beyond = len(encoded) - limit
  yield f"{len(encoded)} tokens" + (
    f": {beyond} more than the decoder's max_length of {limit}"
    if beyond > 0
    else f" of at most {limit}"
  )
  images, regions = len(encoded.image_slots), len(set(encoded.region_slots))
  yield f"  {_many(counts['image'], 'slot')} of {_many(images, 'image')}"
  yield f"  {_many(counts['region'], 'slot')} of {_many(regions, 'region')}"
  yield f"  {_many(counts['added'], 'other added token')}, {counts['text']} of text"
  supervised = int(encoded.mask.sum())
  yield f"  {supervised} counted by the loss, in {_many(len(encoded.answers), 'answer')}"
  pieces = (
    " ".join(piece_of(i, renderer.tokenizer) for i in stop) for stop in renderer.stop_sequences
  )
  yield f"an answer ends with: {' or '.join(dict.fromkeys(pieces))}"


def _painted(text: str, code: str, colour: bool) -> str:
  return f"\033[{code}m{text}\033[0m" if colour and code else text


def _many(count: int, noun: str) -> str:
  return f"{count} {noun}" + ("" if count == 1 else "s")

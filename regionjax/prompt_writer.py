"""Writes ids, mask and slots side by side: the one place where text and added tokens meet."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from regionjax.templates import EOS, Added, Marks
from regionjax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Encoded:
  """A dialogue, or a piece of one, as ids. T tokens.

  Attributes:
    ids: int32 [T].
    mask: bool [T]; True where the token is a supervised target.
    answer_ids: int32 [T]; 1, 2, ... on the tokens of each supervised answer and its stop, else 0.
    image_slots: index of the image of each image block, in order of appearance.
    region_slots: index of the region of each region slot token, in order of appearance.
    answers: (task, text, kind of the regions asked about) of each supervised answer; the kind is
      a `Region.kind`, 'mixed' for several kinds, '' where the question mentions no region.
    introduced: regions whose slot or coordinates the text has brought, in that order.
  """

  ids: np.ndarray
  mask: np.ndarray
  answer_ids: np.ndarray
  image_slots: tuple[int, ...] = ()
  region_slots: tuple[int, ...] = ()
  answers: tuple[tuple[str, str, str], ...] = ()
  introduced: tuple[int, ...] = ()

  def __len__(self) -> int:
    return len(self.ids)

  def followed_by(self, generated: Sequence[int], more: Encoded) -> Encoded:
    """This, then ids that the model generated, then `more` (what `Renderer.extend` gave)."""
    middle = np.asarray(generated, np.int32).reshape(-1)
    shift = int(self.answer_ids.max(initial=0))
    return Encoded(
      ids=np.concatenate([self.ids, middle, more.ids]),
      mask=np.concatenate([self.mask, np.zeros(len(middle), bool), more.mask]),
      answer_ids=np.concatenate(
        [self.answer_ids, 0 * middle, more.answer_ids + shift * (more.answer_ids > 0)]
      ).astype(np.int32),
      image_slots=self.image_slots + more.image_slots,
      region_slots=self.region_slots + more.region_slots,
      answers=self.answers + more.answers,
      introduced=self.introduced + more.introduced,
    )


class Writer:
  """Appends text, marks and slots; text waits until the next added token or `flush`.

  `flush` is called wherever a generated answer may begin or end. Nothing written later changes
  what was flushed, which is what makes one turn's prompt a prefix of the next one's.
  """

  def __init__(
    self, tokenizer: Tokenizer, *, behind: int | None = None, known: Sequence[int] = ()
  ) -> None:
    """`behind`: the id that the new ones will follow (-1: some ordinary one); None: nothing.
    `known`: regions that were introduced before."""
    self.tokenizer = tokenizer
    self.known = frozenset(known)
    self.ids: list[int] = []
    self.mask: list[bool] = []
    self.answer_ids: list[int] = []
    self.image_slots: list[int] = []
    self.region_slots: list[int] = []
    self.answers: list[tuple[str, str, str]] = []
    self.introduced: list[int] = []
    self.supervised = False
    self.answer = 0
    self._waiting: list[tuple[str, tuple[str, ...]]] = []
    self._behind(behind)

  def _behind(self, index: int | None) -> None:
    added = index is not None and self.tokenizer.is_added(index)
    self._start = "segment" if added or index is None else "inside"
    self._strip_left = bool(added and self.tokenizer.strips(index)[1])  # type: ignore[arg-type]

  def text(self, text: str, guard: tuple[str, ...] = ()) -> None:
    if text:
      self._waiting.append((text, guard))

  def added(self, index: int, count: int = 1) -> None:
    """The added token `index`, `count` times."""
    if self.tokenizer.strips(index)[0]:
      self._strip_waiting()
    self.flush()
    self._put((index,) * count)
    self._behind(index)

  def raw(self, ids: Sequence[int]) -> None:
    """Ids that are known already."""
    self.flush()
    self._put(ids)
    self._behind(ids[-1])

  def marks(self, marks: Marks) -> None:
    for mark in marks:
      if isinstance(mark, Added):
        self.added(self.tokenizer.eos_id if mark is EOS else self.tokenizer.added[mark.content])
      else:
        self.text(mark)

  def supervise(self, on: bool, answer: int = 0) -> None:
    """From here on tokens are targets (or not), of answer number `answer`."""
    self.flush()
    self.supervised, self.answer = on, answer

  def flush(self) -> None:
    """Encodes the waiting text."""
    for text, guard in self._waiting:
      if self._strip_left:
        text = text.lstrip()
      if text:
        self._put(self.tokenizer.cached_ids(text, guard, self._start))
        self._start, self._strip_left = "inside", False
    self._waiting.clear()

  def _strip_waiting(self) -> None:
    while self._waiting:
      text, guard = self._waiting.pop()
      if text := text.rstrip():
        self._waiting.append((text, guard))
        return

  def _put(self, ids: Sequence[int]) -> None:
    self.ids += ids
    self.mask += [self.supervised] * len(ids)
    self.answer_ids += [self.answer] * len(ids)

  _LISTS = (
    "ids", "mask", "answer_ids", "image_slots", "region_slots", "answers", "introduced",
  )  # fmt: skip

  def snapshot(self) -> tuple[int, ...]:
    """Where the writer stands, for `roll_back`."""
    self.flush()
    return tuple(len(getattr(self, name)) for name in self._LISTS)

  def roll_back(self, snapshot: tuple[int, ...]) -> None:
    self._waiting.clear()
    for name, length in zip(self._LISTS, snapshot):
      del getattr(self, name)[length:]
    self._behind(self.ids[-1] if self.ids else None)

  def encoded(self) -> Encoded:
    self.flush()
    return Encoded(
      ids=np.asarray(self.ids, np.int32),
      mask=np.asarray(self.mask, bool),
      answer_ids=np.asarray(self.answer_ids, np.int32),
      image_slots=tuple(self.image_slots),
      region_slots=tuple(self.region_slots),
      answers=tuple(self.answers),
      introduced=tuple(self.introduced),
    )

"""Examples and dialogues to ids, loss mask and slots, built turn by turn.

`Renderer` turns an Example into training ids (`encode`), into the prompt for its last answer
(`prompt`), and a running dialogue into the ids of its next turn (`extend`). A dialogue is ids: what
the model generated is kept as it is, so the prompt of turn t is a prefix of the prompt of turn t+1.

Where a region is written depends on `ModelConfig.region.kind` and `PromptConfig.mention`: a slot
token that the model fills with features, coordinates between `<box>` and `</box>`, both, or only
its name ("region1"). An assistant's `{region:k}` is always coordinates, without the two marks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from regionjax.config import ConfigError, ModelConfig, PromptConfig
from regionjax.data.schema import SLOT, Example, Turn
from regionjax.mentions import Mention, parse
from regionjax.prompt_checks import PromptError, asked_kind, check_config, name, split_turns
from regionjax.prompt_writer import Encoded, Writer
from regionjax.regions import FORMATS
from regionjax.templates import TEMPLATES, Marks
from regionjax.tokenizer import Tokenizer


class Renderer:
  """Writes Examples down for one model, prompt configuration and tokenizer.

  Attributes:
    stop_ids: ids each of which ends an answer.
    stop_strings: texts that end an answer whatever tokens spell them, of templates whose stop is
      ordinary text. Training writes them in people's and assistants' texts character by character,
      so that a reader of ids can tell them from a stop; a generated answer ends there all the same.
    stop_sequences: id sequences that end an answer: the ids above and those of the strings.
  """

  def __init__(self, prompt: PromptConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raises ConfigError where the three don't fit; the message says what to change."""
    self.config, self.model, self.tokenizer = prompt, model, tokenizer
    check_config(prompt, model, tokenizer)
    self.template = TEMPLATES[prompt.template]
    self._format = FORMATS[prompt.coordinates]
    guard = self.template.guard
    enders = {
      tuple(tokenizer.encode_text(word, start=start))
      for word in guard
      for start in ("segment", "inside")
    }
    self._stop = self._ids_of(self.template.stop)
    self._end = self._ids_of(self.template.end)
    self._answer_open = self._ids_of(self.template.answer_open)
    if not guard:
      enders.add(self._stop)
    self._own_stops = tuple(sorted(enders))
    eos = {(tokenizer.eos_id,)} if tokenizer.eos_id >= 0 else set()
    self.stop_sequences = tuple(sorted(enders | eos))
    self.stop_strings = guard
    self.stop_ids = tuple(sorted(s[0] for s in enders | eos if tokenizer.is_added(s[0])))
    for word in guard:
      if _find(tokenizer.encode_text(f"a{word}", guard=guard), enders) is not None:
        raise ConfigError(
          f"prompt.template={prompt.template!r}: this tokenizer has no piece longer than one "
          f"character of the stop {word!r}, so that text could not be told from it; use another "
          "template (plain, vicuna_v1, chatml)"
        )

  def _ids_of(self, marks: Marks) -> tuple[int, ...]:
    """The ids of marks that follow ordinary text."""
    writer = Writer(self.tokenizer, behind=-1)
    writer.marks(marks)
    return tuple(map(int, writer.encoded().ids))

  def blank(self) -> Renderer:
    """The same, but regions are only named: what a model that ignores them would be given."""
    region = dataclasses.replace(self.model.region, kind="none")
    return Renderer(self.config, dataclasses.replace(self.model, region=region), self.tokenizer)

  def encode(self, example: Example, *, max_length: int | None = None) -> Encoded:
    """Training ids of a whole example, stops included.

    Args:
      example: its turns are an optional system turn, then user and assistant by turns.
      max_length: most tokens wanted. Whole exchanges are dropped from the end (the first ones
        bring the images and introduce the regions); a slot is never cut.

    Raises:
      PromptError: turns in another order, or a first exchange that is longer than `max_length`.
    """
    system, turns = split_turns(example)
    if len(turns) % 2:
      raise PromptError(f"{name(example)}: the last turn must be the assistant's to train on it")
    writer = self._begin(system)
    prefix = self._image_prefix(example)
    for k in range(0, len(turns), 2):
      before = writer.snapshot()
      if k:
        writer.marks(self.template.between)
      supervise = turns[k + 1].supervise
      self._user(writer, example, turns[k], prefix="" if k else prefix, supervise=supervise)
      self._answer(writer, example, turns[k], turns[k + 1])
      length = len(writer.ids) + len(self._end)
      if max_length is not None and length > max_length:
        if k == 0:
          raise PromptError(
            f"{name(example)}: the first question and answer take {length} tokens, but the "
            f"limit is {max_length}; shorten them or raise the limit"
          )
        writer.roll_back(before)
        supervise = turns[k - 1].supervise
        break
    if self._end:
      writer.supervise(supervise and self.config.mask == "gpt4roi")
      writer.raw(self._end)
    return writer.encoded()

  def prompt(self, example: Example) -> Encoded:
    """The prompt for generating the example's last answer; ends with the assistant's mark.

    An assistant's turn at the end (the answer wanted) is left out. Earlier answers are written
    with their stops, and nothing is supervised.
    """
    system, turns = split_turns(example)
    turns = turns[: len(turns) - (len(turns) + 1) % 2]
    if not turns:
      raise PromptError(f"{name(example)}: no user turn to answer")
    writer = self._begin(system)
    prefix = self._image_prefix(example)
    for k in range(0, len(turns), 2):
      if k:
        answer = dataclasses.replace(turns[k - 1], supervise=False)
        self._answer(writer, example, turns[k - 2], answer)
        writer.marks(self.template.between)
      self._user(writer, example, turns[k], prefix=prefix)
      prefix = ""
    return _unsupervised(writer.encoded())

  def extend(self, prev: Encoded, generated: Sequence[int], example: Example) -> Encoded:
    """What to append to `prev.ids` and `generated` to ask the next question.

    Args:
      prev: the prompt that was answered.
      generated: the ids generated after it, with or without the stop, as they are.
      example: its last turn is the new question; its regions and images are those of the whole
        dialogue, the new ones last. Earlier turns are not read.

    Returns:
      The new ids only, beginning with whatever of the stop `generated` lacks.
      `prev.followed_by(generated, result)` is the next prompt.
    """
    if not example.turns or example.turns[-1].role != "user":
      raise PromptError(f"{name(example)}: the last turn must be the user's next question")
    generated = [int(i) for i in generated]
    last = generated[-1] if generated else int(prev.ids[-1])
    writer = Writer(self.tokenizer, behind=last, known=prev.introduced)
    if not self._stopped(generated):
      done = next(
        (n for n in range(len(self._stop) - 1, 0, -1) if _ends_with(generated, self._stop[:n])), 0
      )
      if done:
        writer.raw(self._stop[done:])
      else:
        writer.marks(self.template.stop)
        writer.flush()
    writer.marks(self.template.between)
    self._user(writer, example, example.turns[-1], prefix="")
    return _unsupervised(writer.encoded())

  def cut_at_stop(self, generated: Sequence[int]) -> tuple[list[int], bool]:
    """The generated ids up to and with the first stop, and whether there was one.

    A stop is one of `stop_sequences`, or a text of `stop_strings` however it is spelled; the ids
    then end with the one that completes it, even if more text is in that one.
    """
    ids, _, found = self._cut(generated)
    return ids, found

  def answer_text(self, generated: Sequence[int]) -> str:
    """The text of a generated answer, without stop and surrounding white space."""
    _, text, _ = self._cut(generated)
    return text.strip()

  def _cut(self, generated: Sequence[int]) -> tuple[list[int], str, bool]:
    """(ids with the first stop, text before it, whether there is one)."""
    ids = [int(i) for i in generated]
    found = _find(ids, self.stop_sequences)
    spelled = self._find_spelled(ids[: found[1] - 1] if found else ids)
    if spelled is not None:
      text = self.tokenizer.decode(ids[:spelled])
      at = min(text.find(s) for s in self.stop_strings if s in text)
      return ids[:spelled], text[:at], True
    if found is None:
      return ids, self.tokenizer.decode(ids), False
    return ids[: found[1]], self.tokenizer.decode(ids[: found[0]]), True

  def _find_spelled(self, ids: list[int]) -> int | None:
    """How many of the ids complete the first stop string; None without one."""
    if not self._spells_stop(ids):
      return None
    low, high = 1, len(ids)
    while low < high:  # once complete, a stop string stays found
      middle = (low + high) // 2
      low, high = (low, middle) if self._spells_stop(ids[:middle]) else (middle + 1, high)
    return low

  def _spells_stop(self, ids: Sequence[int]) -> bool:
    text = self.tokenizer.decode(ids) if self.stop_strings else ""
    return any(stop in text for stop in self.stop_strings)

  def _stopped(self, generated: list[int]) -> bool:
    """Whether the ids end with a stop, and with nothing behind it in the last one."""
    if any(_ends_with(generated, stop) for stop in self._own_stops):
      return True
    text = self.tokenizer.decode(generated) if self.stop_strings else ""
    return any(text.find(stop) == len(text) - len(stop) >= 0 for stop in self.stop_strings)

  # The parts of a dialogue.

  def _begin(self, system: str | None) -> Writer:
    writer = Writer(self.tokenizer)
    if self.tokenizer.bos_id >= 0:
      writer.added(self.tokenizer.bos_id)
    guard = self.template.guard if system else ()
    if system is None:
      system = self.template.system_text
    if system:
      writer.marks(self.template.system_open)
      for part in parse(system):
        if isinstance(part, Mention):
          raise PromptError("a system turn cannot hold an image or a region; put it in a user turn")
        writer.text(part, guard)
      writer.marks(self.template.system_close)
    writer.supervise(self.config.mask == "gpt4roi")
    writer.marks(self.template.first)
    writer.supervise(False)
    return writer

  def _user(
    self, writer: Writer, example: Example, turn: Turn, *, prefix: str, supervise: bool = False
  ) -> None:
    """One user turn with the mark of the answer to come; `supervise` is that answer's flag."""
    writer.marks(self.template.user_open)
    self._content(writer, example, prefix + turn.text, role="user")
    writer.marks(self.template.user_close)
    writer.supervise(supervise and self.config.mask == "gpt4roi")
    before = len(writer.ids)
    writer.marks(self.template.answer_open)
    writer.flush()
    if len(writer.ids) == before:  # a mark of white space alone, dropped behind a slot
      writer.raw(self._answer_open)
    writer.supervise(False)

  def _answer(self, writer: Writer, example: Example, question: Turn, turn: Turn) -> None:
    if turn.supervise:
      writer.supervise(True, len(writer.answers) + 1)
    text = self._content(writer, example, turn.text, role="assistant")
    writer.marks(self.template.stop)
    writer.supervise(False)
    if turn.supervise:
      task = turn.task or str(example.meta.get("task", ""))
      writer.answers.append((task, text, asked_kind(example, question)))

  def _content(self, writer: Writer, example: Example, text: str, *, role: str) -> str:
    """Writes a turn's text with its images and regions; returns it as plain text."""
    guard = self.template.guard
    shown: list[str] = []
    run = self.template.blank
    for part in parse(text):
      if isinstance(part, str):
        run += part
      elif part.kind == "region" and role == "assistant":
        run += self._coordinates(example, part.index)
      elif part.kind == "region":
        named, slot, coordinates = self._region_form(part.index, writer)
        run += f"region{part.index + 1}" if named else ""
        run += " " if named and (slot or coordinates) else ""
        if slot or coordinates:
          shown.append(run)
          writer.text(run, guard)
          run = ""
          writer.introduced.append(part.index)
        if slot:
          writer.region_slots.append(part.index)
          writer.added(self.tokenizer.region_slot_id)
        if coordinates:
          self._box(writer, self._coordinates(example, part.index), blank=" " if slot else "")
      else:
        shown.append(run)
        writer.text(run, guard)
        run = ""
        self._image(writer, part.index)
    writer.text(run, guard)
    return "".join([*shown, run]).strip()

  def _region_form(self, index: int, writer: Writer) -> tuple[bool, bool, bool]:
    """(name, slot, coordinates): what stands for this mention of a region."""
    region = self.model.region
    slot, coordinates = region.features is not None, region.text
    if self.config.mention == "slot":
      return not (slot or coordinates), slot, coordinates
    new = index not in writer.known and index not in writer.introduced
    return True, slot and new, coordinates and new

  def _box(self, writer: Writer, coordinates: str, *, blank: str) -> None:
    """Coordinates between their marks, which are text where the vocabulary lacks them."""
    added = self.tokenizer.added
    writer.text(blank)
    if self.config.coordinate_marks == "none":
      writer.text(coordinates)
    elif "<box>" in added and "</box>" in added:
      writer.added(added["<box>"])
      writer.text(coordinates)
      writer.added(added["</box>"])
    else:
      writer.text(f"<box>{coordinates}</box>")

  def _image(self, writer: Writer, index: int) -> None:
    tokenizer = self.tokenizer
    if tokenizer.image_slot_id < 0:
      raise PromptError(
        "the example has an image, but the tokenizer has no <im_patch>; load it with "
        "added=GPT4ROI_TOKENS or CHATSPOT_TOKENS"
      )
    writer.image_slots.append(index)
    if tokenizer.im_start_id >= 0:
      writer.added(tokenizer.im_start_id)
    writer.added(tokenizer.image_slot_id, self.model.image_tokens)
    if tokenizer.im_end_id >= 0:
      writer.added(tokenizer.im_end_id)

  def _coordinates(self, example: Example, index: int) -> str:
    height, width = self.model.vision.image_hw
    image = example.images[example.region_images[index]]
    return self._format.print(
      example.regions[index],
      size=image.size,
      resized=(width, height),
      max_vertices=self.config.max_vertices,
    )

  def _image_prefix(self, example: Example) -> str:
    """What goes before the first user text: images that no turn places itself."""
    if not example.images or any(
      k == "image" for t in example.turns for k, _ in SLOT.findall(t.text)
    ):
      return ""
    prefix = self.config.image_prefix
    placed = [part.index for part in parse(prefix) if isinstance(part, Mention)]
    if any(k >= len(example.images) for k in placed):
      raise PromptError(
        f"{name(example)}: prompt.image_prefix names image {max(placed)}, but there are "
        f"{len(example.images)} images"
      )
    rest = "".join(f"{{image:{k}}}" for k in range(len(example.images)) if k not in placed)
    rest += self.template.blank if rest else ""
    return prefix + rest if placed else rest + prefix


def _unsupervised(encoded: Encoded) -> Encoded:
  return dataclasses.replace(
    encoded,
    mask=np.zeros_like(encoded.mask),
    answer_ids=np.zeros_like(encoded.answer_ids),
    answers=(),
  )


def _ends_with(ids: Sequence[int], end: Sequence[int]) -> bool:
  return len(ids) >= len(end) and tuple(ids[len(ids) - len(end) :]) == tuple(end)


def _find(ids: Sequence[int], sequences: Iterable[Sequence[int]]) -> tuple[int, int] | None:
  """(start, end) of the first of the sequences to be complete."""
  sequences = [tuple(s) for s in sequences]
  for end in range(1, len(ids) + 1):
    for sequence in sequences:
      start = end - len(sequence)
      if start >= 0 and tuple(ids[start:end]) == sequence:
        return start, end
  return None

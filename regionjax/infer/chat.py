"""Chat about regions of images: `load`, `RegionChat`, `Session`.

  chat = regionjax.load()
  chat.ask("photo.jpg", "What is <region1>?", [Region.box(0.1, 0.2, 0.5, 0.9)]).text

  session = chat.start("photo.jpg")  # the image is encoded once
  session.ask("What is <region1>?", [Region.point(0.4, 0.4)])
  session.ask("What colour is <region1>?")  # only these words are new to the model

In a text `<region1>` is the first region of the dialogue, counted over all its turns. A region that
is given with a question must be mentioned in it, with one relief: when a single region is given and
the text mentions none, ` <region1>` (its number) is put behind the text. Regions of earlier
questions or of `Session.add` are never put there.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from regionjax.config import Config
from regionjax.conversation import Conversation, Renderer, user_to_internal
from regionjax.data.rows import Frame
from regionjax.data.schema import Example, ImageRef, Turn
from regionjax.images import ImageError, decode, from_pil
from regionjax.infer.batching import GenerationError
from regionjax.infer.engine import Engine, Generation, State
from regionjax.infer.prompts import answer_examples, make_prompt
from regionjax.infer.sampling import Sampling
from regionjax.mentions import mention_the_only
from regionjax.prompt_checks import check_resize
from regionjax.regions import FORMATS, Refusal, Region, scan_regions
from regionjax.weights import release

ImageSource = str | Path | bytes | BinaryIO | np.ndarray | Image.Image
MAX_NEW_TOKENS = 96
# Tokens of later turns that a dialogue's cache has room for from the start: growing it compiles the
# decode program anew.
ROOM_AHEAD = 256


@dataclasses.dataclass(frozen=True)
class Answer:
  """What the model said.

  Attributes:
    text: the answer without stop marks.
    ids: the generated ids, the stop's included; the dialogue goes on from these.
    finish: 'stop', 'length' (cut at `max_new_tokens`) or '' (streaming, more to come).
    regions: regions written in the text, in shares of the original image's sides.
    spans: (start, end) of each of them in the text.
    refused: lists of numbers in the text that are no region (an inverted box, one beyond the
      image), and why.
  """

  text: str
  ids: tuple[int, ...] = ()
  finish: str = ""
  regions: tuple[Region, ...] = ()
  spans: tuple[tuple[int, int], ...] = ()
  refused: tuple[Refusal, ...] = ()

  def __str__(self) -> str:
    return self.text


@dataclasses.dataclass(frozen=True)
class Question:
  """One of many for `RegionChat.ask_many`; see `RegionChat.ask` for the fields."""

  image: ImageSource | Sequence[ImageSource] | None
  text: str
  regions: Sequence[Region] = ()
  region_images: Sequence[int] | None = None


def load(
  path_or_name: str | os.PathLike = "tiny",
  *,
  base: str | os.PathLike | None = None,
  mesh: Mesh | None = None,
) -> RegionChat:
  """Opens a release folder, or the checkpoint shipped with the package ('tiny').

  Args:
    path_or_name: a release, or an adapter, which holds only what was trained.
    base: the release that an adapter was trained from, where it is not found by itself.
    mesh: devices that share the model (`regionjax.mesh.make_mesh`), e.g. one that doesn't fit into
      one of them; None is jax's default device.

  Raises:
    regionjax.config.ConfigError: the mesh can't split the model.
    regionjax.weights.release.ReleaseError: it is missing, truncated or does not fit its
      configuration; an adapter's base is missing or another one.
  """
  config, params, tokenizer = release.load(path_or_name, base=base)
  if tokenizer is None:
    raise release.ReleaseError(
      f"{path_or_name} holds a vision tower alone, which cannot answer; train a model from it "
      "(train.init_from)"
    )
  return RegionChat(config, params, tokenizer, mesh=mesh)


def read_image(source: ImageSource) -> np.ndarray:
  """A path, bytes, open file, PIL image or array as uint8 [h, w, 3].

  A file gives the same pixels in each of the first four forms (see `images.decode`).

  Raises:
    ImageError: not an image, or an array of another shape or type.
  """
  if isinstance(source, Image.Image):
    return from_pil(source)
  if not isinstance(source, np.ndarray):
    return decode(source)
  if source.dtype == np.uint8 and source.ndim == 2:
    source = np.repeat(source[:, :, None], 3, axis=2)
  if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
    raise ImageError(
      f"array of shape {source.shape} and type {source.dtype}: expected uint8 [height, width, 3] "
      "in RGB (scale floats in [0, 1] by 255 and round them)"
    )
  return source


class RegionChat:
  """A loaded model that answers questions about regions of images.

  Attributes:
    config: the configuration that it was trained with.
    tokenizer, renderer: how dialogues become ids.
    engine: the model on the device.
    frame: how pixels become its input.
  """

  def __init__(
    self,
    config: Config,
    params: Any,
    tokenizer: Any,
    *,
    steps: int = 16,
    mesh: Mesh | None = None,
  ) -> None:
    """See `release.load` for the first three; `steps` is tokens per dispatch (`Engine`)."""
    self.config = config
    self.tokenizer = tokenizer
    self.renderer = Renderer(config.prompt, config.model, tokenizer)
    check_resize(config.prompt, config.data.resize)
    self.engine = Engine(
      config.model, params, tokenizer, stop_sequences=self.renderer.stop_sequences,
      stop_strings=self.renderer.stop_strings, steps=steps, mesh=mesh,
    )  # fmt: skip
    self.frame = Frame.of(config)

  def ask(
    self,
    image: ImageSource | Sequence[ImageSource] | None,
    text: str,
    regions: Sequence[Region] = (),
    *,
    region_images: Sequence[int] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = MAX_NEW_TOKENS,
  ) -> Answer:
    """Asks one question; `start` for a dialogue, `ask_many` for many questions at once.

    Args:
      image: path, bytes, open file, PIL image or uint8 [h, w, 3]; a list of several; or None.
      text: `<region1>` stands for `regions[0]`, and so on.
      regions: each must be mentioned in the text (see the module for the one relief).
      region_images: with several images, the index of each region's image (default: the first).
      temperature, top_p, seed: see `sampling.Sampling`; 0 is greedy.
      max_new_tokens: the answer is cut there.

    Raises:
      ImageError, RegionError, GenerationError: bad input; nothing is changed by it.
    """
    return self.start(image).ask(
      text,
      regions,
      region_images=region_images,
      temperature=temperature,
      top_p=top_p,
      seed=seed,
      max_new_tokens=max_new_tokens,
    )

  def ask_many(
    self,
    questions: Sequence[Question],
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = MAX_NEW_TOKENS,
  ) -> list[Answer]:
    """Answers independent questions in batches; an image given several times is encoded once."""
    pixels: dict[str, np.ndarray] = {}
    names: dict[int, str] = {}
    examples = []
    for question in questions:
      refs = []
      for source in _sources(question.image):
        key = names.setdefault(id(source), str(len(names)))
        if key not in pixels:
          pixels[key] = read_image(source)
        refs.append(ImageRef("memory", key, _size(pixels[key])))
      text = mention_the_only(question.text, range(1, len(question.regions) + 1))
      examples.append(
        Example(
          images=tuple(refs),
          regions=tuple(question.regions),
          region_images=_region_images(question.regions, question.region_images, len(refs)),
          turns=(Turn("user", user_to_internal(text, len(question.regions))),),
        )
      )
    generations = answer_examples(
      self.engine, self.frame, self.renderer, examples, lambda ref: pixels[ref.key],
      max_new_tokens=max_new_tokens, sampling=Sampling(temperature, top_p, seed),
    )  # fmt: skip
    return [
      self.answer(g, e.images[0].size if e.images else None) for g, e in zip(generations, examples)
    ]

  def start(self, image: ImageSource | Sequence[ImageSource] | None = None) -> Session:
    """A dialogue about an image (or several, or none); it is encoded now, and only now."""
    return Session(self, [read_image(source) for source in _sources(image)])

  def answer(self, generation: Generation, size: tuple[int, int] | None) -> Answer:
    """An Answer out of generated ids; `size` is (width, height) of the image it speaks of."""
    kept, _ = self.renderer.cut_at_stop(generation.ids)
    text = self.renderer.answer_text(kept)
    if not generation.finish:
      text = _settled(text, self.renderer.stop_strings)
    height, width = self.config.model.vision.image_hw
    fmt = FORMATS[self.config.prompt.coordinates]
    found, refused = [], []
    if size is not None or fmt.frame != "original":
      found, refused = scan_regions(text, fmt, size=size, resized=(width, height))
    return Answer(
      text,
      tuple(kept),
      generation.finish,
      tuple(region for _, _, region in found),
      tuple((start, end) for start, end, _ in found),
      tuple(refused),
    )


class Session:
  """A dialogue about some images. Image features, region maps and the cache are kept.

  Attributes:
    images: uint8 [h, w, 3] each.
    turns: what was said, as (role, text) with people's `<region1>`.
    answers: the assistant's turns in full.
  """

  def __init__(self, chat: RegionChat, images: Sequence[np.ndarray]) -> None:
    """Use `RegionChat.start`."""
    self.images = list(images)
    self.turns: list[tuple[str, str]] = []
    self.answers: list[Answer] = []
    self._chat = chat
    prepared = [chat.frame.prepare(image) for image in images]
    self._transforms = [transform for _, transform in prepared]
    self._features = chat.engine.encode_images([pixels for pixels, _ in prepared])
    refs = [ImageRef("memory", str(k), _size(image)) for k, image in enumerate(images)]
    self._conversation = Conversation(chat.renderer, images=refs)
    self._state: State | None = None  # None: nothing is cached

  @property
  def regions(self) -> tuple[Region, ...]:
    """All regions of the dialogue; the first is `<region1>`."""
    return self._conversation.regions

  @property
  def ids(self) -> tuple[int, ...]:
    """The dialogue so far as ids, answers included."""
    c = self._conversation
    return () if c.prompt is None else (*map(int, c.prompt.ids), *c.generated)

  def add(self, regions: Sequence[Region], *, image: int = 0) -> list[int]:
    """Makes regions known that later questions may mention; returns their numbers.

    Regions given to `ask` must be mentioned at once, these need not.
    """
    c = self._conversation
    images = _region_images(regions, (image,) * len(regions), len(self.images))
    first = len(c.regions) + 1
    c.regions += tuple(regions)
    c.region_images += images
    return list(range(first, first + len(regions)))

  def ask(
    self,
    text: str,
    regions: Sequence[Region] = (),
    *,
    region_images: Sequence[int] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = MAX_NEW_TOKENS,
  ) -> Answer:
    """The next question and its answer; arguments as for `RegionChat.ask`.

    `<region1>` is the dialogue's first region, so the regions given here go on counting.
    """
    *_, answer = self.stream(
      text,
      regions,
      region_images=region_images,
      temperature=temperature,
      top_p=top_p,
      seed=seed,
      max_new_tokens=max_new_tokens,
    )
    return answer

  def stream(
    self,
    text: str,
    regions: Sequence[Region] = (),
    *,
    region_images: Sequence[int] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = MAX_NEW_TOKENS,
  ) -> Iterator[Answer]:
    """Like `ask`, but yields the answer so far after every few tokens, the whole one last.

    Each text begins with the one before. Whoever stops iterating early keeps a dialogue with the
    answer as far as it came.
    """
    sampling = Sampling(temperature, top_p, seed)
    known = len(self.regions)
    text = mention_the_only(text, range(known + 1, known + len(regions) + 1))
    images = _region_images(regions, region_images, len(self.images))
    before = copy.copy(self._conversation)
    cached = len(self.ids)
    try:
      prompt = self._conversation.ask(text, regions, region_images=images)
      state = self._feed(prompt, cached, max_new_tokens)
    except Exception:
      self._conversation = before  # a refused question leaves the dialogue as it was
      raise
    turn = sum(role == "user" for role, _ in self.turns)
    self.turns.append(("user", text))
    answer = Answer("")
    size = _size(self.images[0]) if self.images else None
    try:
      for (generation,) in self._chat.engine.decode(
        state, max_new_tokens=max_new_tokens, sampling=sampling, rows=[turn]
      ):
        answer = self._chat.answer(generation, size)
        yield answer
      self._state = state
    finally:
      self._conversation.answered(answer.ids)
      self.turns.append(("assistant", answer.text))
      self.answers.append(answer)

  def _feed(self, prompt: Any, cached: int, max_new_tokens: int) -> State:
    """Brings the prompt into the cache: what is new of it, or all when nothing is cached.

    The state is put back only after a complete answer: arrays of an interrupted one are donated.
    """
    engine = self._chat.engine
    start = cached if self._state is not None else 0
    piece = make_prompt(
      prompt,
      self._conversation.regions,
      self._conversation.region_images,
      self._transforms,
      grid=self._chat.frame.grid,
      region_slot_id=self._chat.tokenizer.region_slot_id,
      images=range(len(self.images)),
      start=start,
    )
    if self._state is None:
      room = max_new_tokens + ROOM_AHEAD
      return engine.prefill([piece], self._features, new_tokens=room)
    state = self._state
    # Some tokens behind the stop may have been generated, or an interrupted answer's last missing.
    engine.rewind(state, [start])
    state = engine.extend(state, [piece], self._features, new_tokens=max_new_tokens)
    self._state = None
    return state


def _sources(image: ImageSource | Sequence[ImageSource] | None) -> list[ImageSource]:
  if isinstance(image, (list, tuple)):
    return list(image)
  return [] if image is None else [image]


def _region_images(
  regions: Sequence[Region], images: Sequence[int] | None, count: int
) -> tuple[int, ...]:
  """The image of each region, by default the first, of `count`."""
  images = (0,) * len(regions) if images is None else tuple(images)
  if len(images) != len(regions):
    raise GenerationError(f"{len(regions)} regions, but region_images names {len(images)}")
  for image in images:
    if not 0 <= image < count:
      raise GenerationError(
        f"a region of image {image}, but there are {count} images (counted from 0)"
      )
  return images


def _size(image: np.ndarray) -> tuple[int, int]:
  return image.shape[1], image.shape[0]


def _settled(text: str, stops: Sequence[str]) -> str:
  """Drops what later tokens may still change: half a character, or the beginning of a stop."""
  text = text.rstrip("�")
  for stop in stops:
    for length in range(len(stop) - 1, 0, -1):
      if text.endswith(stop[:length]):
        text = text[:-length]
        break
  return text.rstrip()

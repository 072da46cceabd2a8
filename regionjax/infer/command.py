"""`regionjax chat`: ask about regions of an image on the command line.

  regionjax chat photo.jpg --box 40,30,210,180 --ask "What is <region1>?"
  regionjax chat photo.jpg --box 40,30,90,80 --point 150,60 \\
      --ask "What is <region1>?" --ask "Is <region1> larger than <region2>?" --save card.png
  regionjax chat photo.jpg --mask dog.png

Regions are numbered as they stand on the command line. Without --ask a prompt opens, at which
`box 10,20,90,80` and its like add regions and everything else is a question.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regionjax.infer.chat import (
  MAX_NEW_TOKENS,
  Answer,
  RegionChat,
  Session,
  load,
  read_image,
)
from regionjax.infer.mesh_option import add_mesh_option, mesh_of
from regionjax.infer.region_options import add_region_options, check_questions, policies
from regionjax.infer.regions_input import KINDS, parse_region
from regionjax.infer.sampling import Sampling
from regionjax.regions import Region

_DEFECTS = {
  "inverted": "its corners are the wrong way round",
  "outside": "it lies beyond the image",
  "text": "its numbers are not of the model's format",
}
HELP = """\
  box x1,y1,x2,y2    adds a region; likewise point x,y, polygon x1,y1,..., scribble, mask FILE
  regions            lists the regions
  save FILE.png      writes the image with its regions and this dialogue
  new                starts a new dialogue about the same image
  quit               leaves (or Ctrl-D)
Everything else is a question. <region1> in it is the first region."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of `regionjax chat`."""
  parser.description = __doc__
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("image", type=Path, help="any JPEG, PNG, ... file")
  add_region_options(parser)
  parser.add_argument("--ask", action="append", metavar="TEXT", help="a question; repeatable")
  parser.add_argument("--checkpoint", default="tiny", help="a release folder (default: shipped)")
  parser.add_argument(
    "--base", metavar="DIR",
    help="the release that an adapter was trained from, where it is not found by itself",
  )  # fmt: skip
  add_mesh_option(parser)
  parser.add_argument("--save", type=Path, metavar="FILE.png", help="picture of the dialogue")
  parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
  parser.add_argument("--top-p", type=float, default=1.0, help="nucleus, in (0, 1]")
  parser.add_argument("--seed", type=int, default=0, help="of the draws at temperature > 0")
  parser.add_argument(
    "--max-new-tokens", type=int, default=MAX_NEW_TOKENS, help="an answer is cut there"
  )


def run(args: argparse.Namespace) -> int:
  """Runs `regionjax chat`; all input is checked before the model is loaded."""
  sampling = Sampling(args.temperature, args.top_p, args.seed)
  if args.max_new_tokens < 1:
    raise ValueError(f"--max-new-tokens {args.max_new_tokens}: expected at least 1")
  image = read_image(args.image)
  size = (image.shape[1], image.shape[0])
  regions = [
    parse_region(kind, text, size=size, **policies(args)) for kind, text in args.regions or []
  ]
  if args.save is not None:
    _check_writable(args.save)
  questions = check_questions(args.ask, len(regions)) if args.ask else []
  chat = load(args.checkpoint, base=args.base, mesh=mesh_of(args))
  console = Console(chat, image, regions, sampling=sampling, max_new_tokens=args.max_new_tokens)
  if questions:
    for question in questions:
      print(f"> {question}")
      console.ask(question)
  else:
    console.loop(policies(args))
  if args.save is not None:
    console.save(args.save)
  return 0


class Console:
  """A dialogue on a terminal."""

  def __init__(
    self,
    chat: RegionChat,
    image: np.ndarray,
    regions: Sequence[Region],
    *,
    sampling: Sampling,
    max_new_tokens: int,
  ) -> None:
    self._chat, self._image = chat, image
    self._sampling, self._max_new_tokens = sampling, max_new_tokens
    self._session = self._start(regions)

  def _start(self, regions: Sequence[Region]) -> Session:
    session = self._chat.start(self._image)
    session.add(regions)
    return session

  @property
  def size(self) -> tuple[int, int]:
    """(width, height) of the image."""
    return self._image.shape[1], self._image.shape[0]

  def ask(self, text: str) -> None:
    """Asks, and prints the answer as it comes."""
    shown, answer = "", Answer("")
    for answer in self._session.stream(
      text,
      temperature=self._sampling.temperature,
      top_p=self._sampling.top_p,
      seed=self._sampling.seed,
      max_new_tokens=self._max_new_tokens,
    ):
      print(answer.text.removeprefix(shown), end="", flush=True)
      shown = answer.text
    print(" ... (cut; see --max-new-tokens)" if answer.finish == "length" else "")
    show_regions(answer, self.size)

  def loop(self, policies: dict[str, Any]) -> None:
    """Reads commands and questions until the end of the input; policies as for `parse_region`."""
    print(f"Image of {self.size[0]} x {self.size[1]} pixels. `help` lists the commands.")
    for number, region in enumerate(self._session.regions, 1):
      print(f"<region{number}> is {describe(region, self.size)}")
    for line in _lines():
      word, _, rest = line.partition(" ")
      if word in ("quit", "exit"):
        return
      try:
        self._command(word, rest.strip(), line, policies)
      except (ValueError, OSError) as error:
        print(f"error: {error}")

  def _command(self, word: str, rest: str, line: str, policies: dict[str, Any]) -> None:
    if word == "help" and not rest:
      print(HELP)
    elif word == "new" and not rest:
      self._session = self._start(self._session.regions)
    elif word == "regions" and not rest:
      for number, region in enumerate(self._session.regions, 1):
        print(f"<region{number}> is {describe(region, self.size)}")
    elif word == "save" and rest.lower().endswith((".png", ".jpg", ".jpeg")):
      self.save(Path(rest))
    elif word in KINDS and rest and (word == "mask" or rest[0] in "-.0123456789"):
      region = parse_region(word, rest, size=self.size, **policies)
      (number,) = self._session.add([region])
      print(f"<region{number}> is {describe(region, self.size)}")
    else:
      self.ask(line)

  def save(self, path: Path) -> None:
    """Writes the image with its numbered regions and the dialogue beside it."""
    from regionjax.infer.cards import session_card

    session_card(self._session).save(path)
    print(f"wrote {path}")


def show_regions(answer: Answer, size: tuple[int, int]) -> None:
  """Prints the regions of an answer in pixels, and what in it is meant for one and is none."""
  for region in answer.regions:
    print(f"  = {describe(region, size)}")
  for refusal in answer.refused:
    numbers = answer.text[refusal.start : refusal.end]
    print(f"  = {numbers} is no region ({_DEFECTS.get(refusal.reason, refusal.reason)})")


def describe(region: Region, size: tuple[int, int]) -> str:
  """A region in pixels, for people."""
  width, height = size
  if region.kind in ("mask", "scribble"):
    x1, y1, x2, y2 = region.box_xyxy
    inside = f"{x1 * width:.0f},{y1 * height:.0f},{x2 * width:.0f},{y2 * height:.0f}"
    return f"a {region.kind} inside {inside}"
  numbers = ",".join(f"{x * width:.0f},{y * height:.0f}" for x, y in region.points)
  return f"{region.kind} {numbers}"


def _lines() -> Iterator[str]:
  """Non-empty lines of the input, with line editing where it is a terminal."""
  terminal = sys.stdin.isatty()
  if terminal:
    import contextlib

    with contextlib.suppress(ImportError):  # absent on Windows
      import readline  # noqa: F401
  while True:
    try:
      line = input("> " if terminal else "")
    except EOFError:
      if terminal:
        print()
      return
    if line.strip():
      yield line.strip()


def _check_writable(path: Path) -> None:
  """Says now, not after the answers, that a picture cannot be written."""
  if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
    raise ValueError(f"--save {path}: expected a name that ends in .png or .jpg")
  if not path.parent.is_dir():
    raise ValueError(f"--save {path}: there is no folder {path.parent}")

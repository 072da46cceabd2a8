"""`regionjax tokens`: what a dialogue becomes: ids, slots, and the tokens that the loss counts.

  regionjax tokens photo.jpg --box 40,30,210,180 --ask "What is <region1>?"
  regionjax tokens --size 640,480 --box 40,30,210,180 --point 300,90 --ask "What is <region1>?" \\
      --answer "A cat." --ask "And <region2>?" --answer "A dog."
  regionjax tokens --checkpoint configs/tiny.py:region=text --size 640,480 --point 9,9 --ask "What?"

With an answer at the end these are the ids that training sees, with its loss mask; with a question
at the end, the prompt that the model is given. Any setting can be overridden, for instance
--prompt.template=vicuna_v1. No weights are read.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from regionjax.config import Config
from regionjax.data.schema import Example, ImageRef, Turn
from regionjax.infer.region_options import (
  AppendNamed,
  add_region_options,
  check_questions,
  policies,
)
from regionjax.infer.regions_input import parse_region
from regionjax.mentions import escape, user_to_internal
from regionjax.regions import Region
from regionjax.tokenizer import Tokenizer

Size = tuple[int, int]

ROLES = {"ask": "user", "answer": "assistant"}  # who speaks, by option


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of `regionjax tokens`."""
  parser.description = __doc__
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument(
    "image", type=Path, nargs="?", help="any JPEG, PNG, ... file; only its size is used"
  )
  parser.add_argument(
    "--size", metavar="WIDTH,HEIGHT", help="instead of an image: one of that many pixels"
  )
  add_region_options(parser)
  parser.add_argument("--system", metavar="TEXT", help="what the system says first")
  for option, what in (("--ask", "a question"), ("--answer", "the answer to the one before")):
    parser.add_argument(
      option, action=AppendNamed, dest="turns", metavar="TEXT", help=f"{what}; repeatable"
    )
  parser.add_argument(
    "--checkpoint",
    default="tiny",
    help="a release folder (default: shipped), or a config file, e.g. configs/tiny.py:arg",
  )
  parser.add_argument(
    "--color",
    choices=("auto", "always", "never"),
    default="auto",
    help="auto (default): on a terminal, unless NO_COLOR is set",
  )


def run(args: argparse.Namespace) -> int:
  """Runs `regionjax tokens`."""
  from regionjax.renderer import Renderer
  from regionjax.tokens_view import show

  example = read_example(args)
  config, tokenizer = open_prompt(args.checkpoint, args.overrides)
  renderer = Renderer(config.prompt, config.model, tokenizer)
  trained = example.turns[-1].role == "assistant"
  encoded = renderer.encode(example) if trained else renderer.prompt(example)
  title = f"{config.name}: template {config.prompt.template}, regions {config.model.region.kind}"
  print(f"{title}; {'what training sees' if trained else 'a prompt to answer'}")
  show(encoded, renderer, colour=in_colour(args.color, sys.stdout))
  return 0


def open_prompt(spec: str, overrides: Sequence[str] = ()) -> tuple[Config, Tokenizer]:
  """Configuration and tokenizer of a release or of a config file, without any weights.

  Args:
    spec: a release folder, the name of a shipped one, or `path.py` or `path.py:arg`.
    overrides: strings `dotted.key=value`.

  Raises:
    ReleaseError, ConfigError, TokenizerError: see `release.find`, `load_config`, `load_tokenizer`.
  """
  from regionjax import config_files
  from regionjax.tokenizer import load_tokenizer
  from regionjax.weights import release

  if spec.partition(":")[0].endswith(".py"):
    config = config_files.load_config(spec, overrides)
    return config, load_tokenizer(config.prompt.tokenizer, config.prompt.added_tokens)
  folder = release.find(spec)
  config = config_files.apply_overrides(release.load_config(folder), overrides)
  return config, load_tokenizer(str(folder))


def read_example(args: argparse.Namespace) -> Example:
  """The dialogue of a command line.

  Raises:
    ValueError: turns that don't alternate, or regions in pixels of an image of unknown size.
    ImageError, RegionError: as for `regionjax chat`.
  """
  said = _check_turns([(ROLES[option], text) for option, text in args.turns or []])
  size = _image_size(args)
  regions = [_region(kind, text, size, args) for kind, text in args.regions or []]
  questions = iter(check_questions([t for role, t in said if role == "user"], len(regions)))
  known = len(regions)
  turns = [Turn("system", escape(args.system))] if args.system else []
  for role, text in said:
    text = next(questions) if role == "user" else text
    internal = user_to_internal(text, known, already=known)
    turns.append(Turn(role, internal, supervise=role == "assistant"))
  has_image = args.image is not None or args.size is not None or bool(regions)
  return Example(
    images=(ImageRef("file", str(args.image or ""), size),) if has_image else (),
    regions=tuple(regions),
    region_images=(0,) * known,
    turns=tuple(turns),
    meta={"id": "on the command line"},
  )


def in_colour(when: str, stream: TextIO) -> bool:
  """Whether to write ANSI colours; NO_COLOR (no-color.org) and dumb terminals are respected."""
  if when != "auto":
    return when == "always"
  wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
  return wanted and stream.isatty()


def _check_turns(said: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
  if not said:
    raise ValueError('nothing is asked; give at least one --ask "..."')
  for k, (role, text) in enumerate(said):
    if role != ("user", "assistant")[k % 2]:
      wanted, given = ("--ask", "--answer") if role == "assistant" else ("--answer", "--ask")
      raise ValueError(
        f"{given} {text!r:.40} stands where a dialogue has {wanted}; begin with --ask and put one "
        "--answer behind each question that has been answered"
      )
  return said


def _image_size(args: argparse.Namespace) -> Size | None:
  """(width, height) of the image, None where it isn't known or there is none."""
  if args.image is not None:
    from regionjax.images import decode

    if args.size is not None:
      raise ValueError(f"--size {args.size} and an image {args.image}; give one of them")
    height, width, _ = decode(args.image).shape
    return width, height
  if args.size is None:
    return None
  words = args.size.replace("x", ",").split(",")
  if len(words) != 2 or not all(w.strip().isdecimal() and int(w) for w in words):
    raise ValueError(f"--size {args.size}: expected WIDTH,HEIGHT in pixels, e.g. 640,480")
  return int(words[0]), int(words[1])


def _region(kind: str, text: str, size: Size | None, args: argparse.Namespace) -> Region:
  if size is None and (kind == "mask" or not args.normalized):
    raise ValueError(
      f"--{kind} {text}: pixels of an image of unknown size; give the image, or --size 640,480"
      + ("" if kind == "mask" else ", or shares of its sides with --normalized")
    )
  return parse_region(kind, text, size=size or (1, 1), **policies(args))

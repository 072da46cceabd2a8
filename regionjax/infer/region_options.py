"""The options by which a command line gives regions, and what its questions must mention of them.

Regions are numbered as they stand on the command line, whatever their kinds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from regionjax.infer.regions_input import KINDS
from regionjax.mentions import has_mention, mention_the_only, user_to_internal


class AppendNamed(argparse.Action):
  """Collects several options into one list of (option's name, text), as the command line has them.

  Give them one `dest`.
  """

  def __call__(
    self,
    parser: argparse.ArgumentParser,
    namespace: argparse.Namespace,
    values: Any,
    option_string: str | None = None,
  ) -> None:
    before = getattr(namespace, self.dest) or []
    setattr(namespace, self.dest, [*before, ((option_string or "").lstrip("-"), values)])


def add_region_options(parser: argparse.ArgumentParser) -> None:
  """Adds --box, --point, ..., collected as (kind, text) in `args.regions`, and their policies."""
  for kind, form in KINDS.items():
    parser.add_argument(
      f"--{kind}", action=AppendNamed, dest="regions", metavar=form,
      help=f"adds a {kind}; repeatable",
    )  # fmt: skip
  parser.add_argument(
    "--normalized",
    action="store_true",
    help="coordinates are shares of the image's sides (0 to 1); by default they are pixels",
  )
  parser.add_argument(
    "--outside",
    choices=("error", "clip"),
    default="error",
    help="clip: cut regions at the image's border instead of refusing them",
  )
  parser.add_argument(
    "--inverted",
    choices=("error", "swap"),
    default="error",
    help="swap: put the corners of a box in order instead of refusing it",
  )


def policies(args: argparse.Namespace) -> dict[str, Any]:
  """The options' values as arguments of `parse_region`."""
  return {name: getattr(args, name) for name in ("normalized", "outside", "inverted")}


def check_questions(asked: Sequence[str], regions: int) -> list[str]:
  """The questions of a command line as they are asked.

  Of a single region that none of them mentions the first one gets the mention behind it.

  Raises:
    RegionError: a region that is never mentioned, or a mention without a region; then nothing is
      asked at all.
  """
  first, *rest = asked
  if not any(map(has_mention, rest)):
    first = mention_the_only(first, range(1, regions + 1))
  user_to_internal("\n".join([first, *rest]), regions)
  return [first, *rest]

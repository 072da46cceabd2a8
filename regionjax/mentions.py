"""How texts mention regions and images: people's form, the internal form, and escapes.

People write `<region1>` (1-based). Inside, a text says `{region:0}` and `{image:0}` (0-based, see
`data.schema.SLOT`). Whoever puts other people's text into an Example passes it through `escape`, so
that a literal `{region:0}` stays what it is: the escape is a backslash before the colon
(`{region\\:0}`), one more for each that was already there, and the renderer takes one away.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

from regionjax.data.schema import SLOT
from regionjax.regions import RegionError

_LITERAL = re.compile(r"\{(region|image)(\\*):(\d+)\}")
_ESCAPED = re.compile(r"\{(region|image)\\(\\*):(\d+)\}")
_PEOPLE = re.compile(r"<region(\d+)>")
_DIGITS = 10  # of a mention that are read: int() refuses 4,300, and no dialogue has so many regions


@dataclasses.dataclass(frozen=True)
class Mention:
  """A place in a text where a region or an image stands. `kind` is 'region' or 'image'."""

  kind: str
  index: int


def escape(text: str) -> str:
  """Makes any text literal: `parse(escape(t))` yields t and nothing else."""
  return _LITERAL.sub(r"{\1\2\\:\3}", text)


def parse(text: str) -> Iterator[str | Mention]:
  """The literal stretches (escapes undone) and the mentions of an internal text, in order."""
  end = 0
  for match in SLOT.finditer(text):
    if match.start() > end:
      yield _unescape(text[end : match.start()])
    yield Mention(match[1], int(match[2]))
    end = match.end()
  if end < len(text):
    yield _unescape(text[end:])


def _unescape(text: str) -> str:
  return _ESCAPED.sub(r"{\1\2:\3}", text) if "\\" in text else text


def user_to_internal(text: str, n_regions: int, *, already: int = 0) -> str:
  """A person's text to the internal form.

  Args:
    text: `<region1>` stands for the first region; everything else is literal. A region may be
      mentioned as often as one likes.
    n_regions: how many regions there are, those of earlier turns included.
    already: how many of them earlier turns have brought; these need no mention.

  Raises:
    RegionError: the text mentions a region that isn't there, or leaves a new one out.
  """
  out, end, seen = [], 0, set()
  for match in _PEOPLE.finditer(text):
    number = int(match[1][:_DIGITS])
    if not 1 <= number <= n_regions:
      shown = match[0] if len(match[0]) < 20 else f"{match[0][:20]}..."
      raise RegionError(
        "text",
        f"the text mentions {shown}, but "
        + (f"there are regions 1 to {n_regions}" if n_regions else "no region was given")
        + "; give the region's box, point, polygon or mask, or take the mention out"
        + (" (regions are counted from 1)" if number == 0 else ""),
      )
    seen.add(number)
    out += [escape(text[end : match.start()]), f"{{region:{number - 1}}}"]
    end = match.end()
  missing = [k for k in range(already + 1, n_regions + 1) if k not in seen]
  if missing:
    names = ", ".join(f"<region{k}>" for k in missing)
    raise RegionError(
      "text",
      f"{n_regions - already} regions were given, but the text never mentions {names}; write "
      f"e.g. 'What is <region{missing[0]}>?', or don't give the region",
    )
  return "".join(out) + escape(text[end:])


def has_mention(text: str) -> bool:
  """Whether a person's text mentions a region, be it there or not."""
  return _PEOPLE.search(text) is not None


def mention_the_only(text: str, numbers: Sequence[int]) -> str:
  """A person's text; with a mention behind it when it has none and one region alone comes with it.

  Args:
    text: what was asked.
    numbers: of the regions that come with it, counted from 1.
  """
  if len(numbers) == 1 and not has_mention(text):
    return f"{text.rstrip()} <region{numbers[0]}>"
  return text

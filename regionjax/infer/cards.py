"""A dialogue as a picture: the image with its numbered regions, and what was said beside it."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from regionjax.draw import dialogue_card
from regionjax.infer.chat import Session


def session_card(session: Session, *, notes: Sequence[str] = ()) -> Image.Image:
  """The card of a dialogue about one image.

  Regions that answers name are drawn too, numbered after those of the person, and the number is
  put behind their coordinates.

  Args:
    session: with at least one image; the first one is drawn.
    notes: put behind the answers, in order (such as whether they are right).
  """
  regions = list(session.regions)
  labels = [""] * len(regions)
  turns = []
  answers = iter(session.answers)
  remarks = iter(notes)
  for role, text in session.turns:
    if role == "assistant":
      answer = next(answers)
      end = 0
      parts = []
      for (_, stop), region in zip(answer.spans, answer.regions):
        regions.append(region)
        labels.append("answer")
        parts += [text[end:stop], f" <region{len(regions)}>"]
        end = stop
      text = "".join([*parts, text[end:]]) or "(nothing)"
      text += "".join(f"  {remark}" for remark in [next(remarks, "")] if remark)
    turns.append((role, text))
  return dialogue_card(session.images[0], regions, turns, labels=labels)

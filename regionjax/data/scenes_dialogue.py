"""Locating, describing the whole, dialogues; and the table of all tasks of the scenes world."""

from __future__ import annotations

from collections.abc import Callable

from regionjax.data import phrases
from regionjax.data import scenes_questions as questions
from regionjax.data.scenes_questions import Asker, coloured, describe_uniquely, value


def locate(a: Asker) -> bool:
  """Phrase to box; the box is text in the answer."""
  k = a.draw.choose(a.scene.asked)
  rivals = [t for j, t in enumerate(a.scene.things) if j != k]
  d = describe_uniquely(a.draw, a.scene.things[k], rivals)
  if d is None:
    return False
  a.add("locate", "box", a.draw.choose(phrases.LOCATE).format(d=d), a.mention(k, "box"))
  return True


def scene(a: Asker) -> bool:
  """All objects from left to right."""
  order = sorted(range(len(a.scene.things)), key=a.scene.centre)
  listed = [coloured(a.scene.things[k]) for k in order]
  answer = " and ".join([", ".join(listed[:-1]), listed[-1]])
  a.add("scene", "objects", a.draw.choose(phrases.SCENE), answer)
  return True


def dialogue(a: Asker) -> bool:
  """Two to four turns that build on each other: 'it', earlier regions by name, 'and this one?'.

  Only the first question depends on a region alone; what was said before helps with the others,
  so they have no chance level.
  """
  talk = _Talk(a)
  if not talk.open():
    return False
  for _ in range(1 + a.draw.below(3)):
    a.draw.choose((talk.ask_more, talk.ask_more, talk.move_on, talk.relate, talk.look_back))()
  return True


class _Talk:
  """A dialogue's state: what 'it' is, what was asked last, which regions are on the table."""

  def __init__(self, a: Asker):
    self.a = a
    self.kind = a.next_kind()
    self.named: dict[int, str] = {}  # object -> its mention
    self.it = -1
    self.aspect = ""
    self.told: set[tuple[int, str]] = set()

  def open(self) -> bool:
    aspects = ["category", "colour", "texture", "size", "text"]
    for aspect in self.a.draw.shuffled(aspects):
      answers = self.a.all(aspect)
      k = self.a.pick(answers)
      if k is not None:
        forms = {"category": phrases.NAME, "text": phrases.READ, **phrases.ATTRIBUTE}[aspect]
        others = [answer for j, answer in answers.items() if j != k]
        self._say(k, aspect, forms, others=others)
        return True
    return False

  def ask_more(self) -> None:
    """Another aspect of it."""
    aspect = self._untold(self.it)
    if aspect:
      self._say(self.it, aspect, phrases.FOLLOW[aspect])

  def move_on(self) -> None:
    """The same of another region."""
    fresh = [k for k in self.a.all(self.aspect) if k not in self.named]
    if fresh:
      self._say(self.a.draw.choose(fresh), self.aspect, phrases.SAME_OF)

  def look_back(self) -> None:
    """Another aspect of a region spoken of before."""
    k = self.a.draw.choose(list(self.named))
    aspect = self._untold(k)
    if aspect in phrases.ATTRIBUTE:
      self._say(k, aspect, phrases.ATTRIBUTE[aspect])

  def relate(self) -> None:
    """Compares it with another region, known or new."""
    other = self.a.draw.choose([k for k in range(len(self.a.scene.things)) if k != self.it])
    about = self.a.draw.choose(("same colour", "same kind", "larger", "left", "above"))
    answer = questions.relation(self.a.scene, about, self.it, other)
    if answer:
      form = self.a.draw.choose(phrases.COMPARE[about])
      question = form.format(a=self._mention(self.it), b=self._mention(other))
      self.a.add("dialogue", about, question, answer, kind=self.kind)

  def _say(
    self, k: int, aspect: str, forms: tuple[str, ...], others: list[str] | None = None
  ) -> None:
    form = self.a.draw.choose(forms)
    question = form.format(r=self._mention(k)) if "{r}" in form else form
    answer = value(self.a.scene.things[k], aspect)
    self.a.add("dialogue", aspect, question, answer, kind=self.kind, others=others)
    self.it, self.aspect = k, aspect
    self.told.add((k, aspect))

  def _mention(self, k: int) -> str:
    if k not in self.named:
      self.named[k] = self.a.mention(k, self.kind)
    return self.named[k]

  def _untold(self, k: int) -> str:
    """An aspect of object k that wasn't told yet; '' if none."""
    thing = self.a.scene.things[k]
    left = [s for s in phrases.FOLLOW if (k, s) not in self.told and value(thing, s)]
    return self.a.draw.choose(left) if left else ""


# A task adds its questions to the Asker; False: this scene doesn't allow it.
TASKS: dict[str, Callable[[Asker], bool]] = {
  "name": questions.name,
  "attribute": questions.attribute,
  "caption": questions.describe,
  "read": questions.read,
  "compare": questions.compare,
  "pick": questions.pick,
  "count": questions.count,
  "yesno": questions.yesno,
  "choice": questions.choice,
  "rationale": questions.rationale,
  "locate": locate,
  "scene": scene,
  "dialogue": dialogue,
}
# Shares of the questions in training. Captions lead: one that is asked for by pointing alone costs
# nine tokens and tells everything about its region, right behind the region's slot. After 1,000
# steps of configs/tiny.py 58 % of names were right; with captions asked for in words, and fewer of
# them, 16 %. A dialogue brings two to four turns.
WEIGHTS: dict[str, float] = {
  "name": 4.0, "attribute": 4.0, "caption": 14.0, "read": 1.5, "compare": 1.2, "pick": 0.8,
  "count": 0.6, "yesno": 1.0, "choice": 0.6, "rationale": 0.3, "locate": 0.6, "scene": 0.3,
  "dialogue": 0.8,
}  # fmt: skip

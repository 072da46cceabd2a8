"""Questions about a scene, their answers, and what a blind guess would score.

Answers are of one fixed form, a short phrase or a sentence, so that exact match means something. A
question that depends on a region is drawn so that, without the region, nothing beats answering for
some object of the scene at random: the answer is drawn evenly among those that the scene's objects
would give, and only then the object; yes and no are equally likely; letters and positions are drawn
evenly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regionjax.data import phrases
from regionjax.data.scenes import Scene, Thing
from regionjax.data.scenes_references import refer
from regionjax.data.scenes_world import (
  CATEGORIES,
  COLOURS,
  HELD_OUT,
  PLURALS,
  READABLE,
  SIZE_RANK,
  SIZES,
  TEXTURES,
  WORDS,
  Draw,
)
from regionjax.data.schema import Turn
from regionjax.regions import Region

LETTERS = ("(A)", "(B)", "(C)", "(D)")
ORDINALS = ("first", "second", "third")
APART = 0.06  # least distance of two centres, of the image's side, for left and above


def value(thing: Thing, aspect: str) -> str:
  """'category', 'colour', 'size', 'texture' or 'text' of an object."""
  return getattr(thing, aspect)


def caption(thing: Thing) -> str:
  """All that is seen of an object but its text: `a large red striped star`; plain goes unsaid."""
  return _phrase(thing.category, thing.colour, thing.size, thing.texture)


def _phrase(category: str, colour: str, size: str, texture: str) -> str:
  return f"a {size} {colour} {'' if texture == 'plain' else texture + ' '}{category}"


def coloured(thing: Thing) -> str:
  """`a red star`, `an orange moon`."""
  return phrases.with_article(f"{thing.colour} {thing.category}")


class Asker:
  """Collects the questions of one example.

  Args:
    scene: what they are about.
    draw: chance.
    references: kinds of reference, used in turn.
    first: which of them comes first.
    sentences: answers are sentences, not phrases.
  """

  def __init__(
    self, scene: Scene, draw: Draw, references: Sequence[str], first: int, *, sentences: bool
  ):
    self.scene, self.draw, self.sentences = scene, draw, sentences
    self.regions: list[Region] = []
    self.turns: list[Turn] = []
    self.notes: list[dict[str, Any]] = []  # one per answer
    self.options: tuple[str, ...] = ()  # of the last question, if it had any
    self._references, self._next = references, first

  def next_kind(self) -> str:
    """The kind of reference of the next question."""
    self._next += 1
    return self._references[(self._next - 1) % len(self._references)]

  def mention(self, k: int, kind: str) -> str:
    """Adds a reference to object k; returns its place in a text."""
    self.regions.append(refer(self.scene, k, kind, self.draw))
    return f"{{region:{len(self.regions) - 1}}}"

  def add(
    self, task: str, about: str, question: str, answer: str, *, kind: str = "none",
    others: Sequence[str] | None = None, options: Sequence[str] = (),
  ) -> None:  # fmt: skip
    """Adds a question and its answer.

    Args:
      about: what of the object is asked.
      answer: in short, as are `others`; a sentence is made of them here.
      kind: of the references in the question.
      others: what the answer would be for other objects of the scene; None if the question
        doesn't depend on a region.
    """
    if self.sentences:
      answer = phrases.sentence(about, answer)
      others = None if others is None else [phrases.sentence(about, other) for other in others]
    self.turns += [Turn("user", question), Turn("assistant", answer, supervise=True, task=task)]
    note: dict[str, Any] = {
      "task": task, "about": about, "ref": kind, "region_dependent": others is not None,
      "scene_answers": list(others or ()), "chance": None,
    }  # fmt: skip
    if others is not None:
      note["chance"] = (1 + sum(other == answer for other in others)) / (1 + len(others))
    self.notes.append(note)
    self.options = tuple(options)

  def pick(self, answers: Mapping[int, str]) -> int | None:
    """An object to ask about: an answer drawn evenly among those possible, then the object.

    Drawing the object first would make the commonest answer of the scene the best blind guess.
    None unless at least two objects would be answered differently.
    """
    if len(set(answers.values())) < 2:
      return None
    asked = [k for k in self.scene.asked if k in answers]
    if not asked:
      return None
    wanted = self.draw.choose(sorted({answers[k] for k in asked}))
    return self.draw.choose([k for k in asked if answers[k] == wanted])

  def ask_one(
    self, task: str, about: str, forms: Sequence[str], answers: Mapping[int, str]
  ) -> bool:
    """Asks one of `forms` about one object; False if the scene doesn't allow the question."""
    k = self.pick(answers)
    if k is None:
      return False
    kind = self.next_kind()
    question = self.draw.choose(forms).format(r=self.mention(k, kind))
    others = [answer for j, answer in answers.items() if j != k]
    self.add(task, about, question, answers[k], kind=kind, others=others)
    return True

  def all(self, aspect: str) -> dict[int, str]:
    """That aspect of every object, by number; of texts only those that are there."""
    answers = {k: value(t, aspect) for k, t in enumerate(self.scene.things)}
    return {k: answer for k, answer in answers.items() if answer}


def name(a: Asker) -> bool:
  return a.ask_one("name", "category", phrases.NAME, a.all("category"))


def attribute(a: Asker) -> bool:
  aspect = a.draw.weighted(("colour", "texture", "size"), (4, 3, 3))
  return a.ask_one("attribute", aspect, phrases.ATTRIBUTE[aspect], a.all(aspect))


def describe(a: Asker) -> bool:
  answers = {k: caption(t) for k, t in enumerate(a.scene.things)}
  forms = phrases.POINTED if a.draw.flip(0.75) else phrases.CAPTION
  return a.ask_one("caption", "caption", forms, answers)


def read(a: Asker) -> bool:
  return a.ask_one("read", "text", phrases.READ, a.all("text"))


def relation(scene: Scene, about: str, i: int, j: int) -> str:
  """What is answered about the pair (i, j); '' if it is too close to call."""
  one, two = scene.things[i], scene.things[j]
  if about == "same colour":
    return "yes" if one.colour == two.colour else "no"
  if about == "same kind":
    return "yes" if one.category == two.category else "no"
  if about in ("left", "above"):
    axis = 0 if about == "left" else 1
    gap = scene.centre(j)[axis] - scene.centre(i)[axis]
    return "" if abs(gap) < APART else "yes" if gap > 0 else "no"
  rise = SIZE_RANK[one.size] - SIZE_RANK[two.size]
  if rise == 0 or "word" in (one.category, two.category):  # a word's length is no size class
    return ""
  if about == "larger":
    return "yes" if rise > 0 else "no"
  return "first" if rise > 0 else "second"


def compare(a: Asker) -> bool:
  about = a.draw.choose(tuple(phrases.COMPARE))
  n = len(a.scene.things)
  pairs = {(i, j): relation(a.scene, about, i, j) for i in range(n) for j in range(n) if i != j}
  pairs = {pair: answer for pair, answer in pairs.items() if answer}
  asked = {p: r for p, r in pairs.items() if p[0] in a.scene.asked or p[1] in a.scene.asked}
  if len(set(asked.values())) < 2:
    return False
  wanted = a.draw.choose(sorted(set(asked.values())))
  i, j = a.draw.choose([pair for pair, answer in asked.items() if answer == wanted])
  kind = a.next_kind()
  form = a.draw.choose(phrases.COMPARE[about])
  question = form.format(a=a.mention(i, kind), b=a.mention(j, kind))
  others = [answer for pair, answer in pairs.items() if pair != (i, j)]
  a.add("compare", about, question, wanted, kind=kind, others=others)
  return True


def describe_uniquely(draw: Draw, thing: Thing, rivals: Sequence[Thing]) -> str | None:
  """A description with 'the' that fits the object and none of its rivals; None if all fit."""
  # Each way with the aspects that it names; plain isn't said, so it can't tell objects apart.
  full = ("size", "colour", "category") + (("texture",) if thing.texture != "plain" else ())
  ways: list[tuple[str, tuple[str, ...]]] = [
    (thing.category, ("category",)),
    (f"{thing.colour} object", ("colour",)),
    (f"{thing.texture} object", ("texture",)),
    (f"{thing.colour} {thing.category}", ("colour", "category")),
    (caption(thing)[2:], full),
  ]
  # The shorter forms in any order, the full ones last, for what only they can tell apart.
  for text, named in [*draw.shuffled(ways[:3]), *ways[3:]]:
    if all(any(value(thing, x) != value(rival, x) for x in named) for rival in rivals):
      return "the " + text
  return None


def pick(a: Asker) -> bool:
  k = a.draw.choose(a.scene.asked)
  rest = a.draw.shuffled([j for j in range(len(a.scene.things)) if j != k])[:2]
  d = describe_uniquely(a.draw, a.scene.things[k], [a.scene.things[j] for j in rest])
  if d is None or len(rest) < 2:
    return False
  order = a.draw.shuffled([k, *rest])
  kind = a.next_kind()
  first, second, third = (a.mention(j, kind) for j in order)
  question = a.draw.choose(phrases.PICK).format(a=first, b=second, c=third, d=d)
  answer = ORDINALS[order.index(k)]
  others = [o for o in ORDINALS if o != answer]
  a.add("pick", "which", question, answer, kind=kind, others=others)
  return True


def count(a: Asker) -> bool:
  things = a.scene.things
  asked = [things[k] for k in a.scene.asked]
  held_out = a.scene.split == "heldout_pairs"
  queries: dict[str, int] = {}
  for category in {t.category for t in asked} if held_out else CATEGORIES:
    queries[PLURALS[category]] = sum(t.category == category for t in things)
  for colour in {t.colour for t in asked} if held_out else COLOURS:
    queries[f"{colour} objects"] = sum(t.colour == colour for t in things)
  for t in asked:
    here = sum((o.colour, o.category) == (t.colour, t.category) for o in things)
    queries[f"{t.colour} {PLURALS[t.category]}"] = here
  if not held_out:
    queries["objects"] = len(things)
  wanted = a.draw.choose(sorted(set(queries.values())))  # else most answers would be 0 and 1
  d = a.draw.choose(sorted(q for q, n in queries.items() if n == wanted))
  a.add("count", "number", a.draw.choose(phrases.COUNT).format(d=d), str(wanted))
  return True


def _claim(a: Asker, aspects: Sequence[str]) -> tuple[int, str, str, dict[int, bool]] | None:
  """A claim about an object: (object, aspect, claimed value, whether it holds for each object).

  The value is one that the scene shows, drawn in the same way for true and for false claims.
  """
  aspect = a.draw.choose(aspects)
  answers = a.all(aspect)
  if len(set(answers.values())) < 2:
    return None
  true = a.draw.flip()
  own = {answers[k] for k in a.scene.asked}
  values = own if true or len(own) > 1 else set(answers.values()) - own
  claimed = a.draw.choose(sorted(values))
  k = a.draw.choose([k for k in a.scene.asked if (answers[k] == claimed) == true])
  return k, aspect, claimed, {j: answer == claimed for j, answer in answers.items()}


def _predicate(aspect: str, claimed: str) -> str:
  return phrases.with_article(claimed) if aspect == "category" else claimed


def yesno(a: Asker) -> bool:
  claim = _claim(a, ("category", "colour", "texture", "size"))
  if claim is None:
    return False
  k, aspect, claimed, holds = claim
  kind = a.next_kind()
  form = a.draw.choose(phrases.YESNO)
  question = form.format(r=a.mention(k, kind), p=_predicate(aspect, claimed))
  answers = {j: "yes" if true else "no" for j, true in holds.items()}
  others = [answer for j, answer in answers.items() if j != k]
  a.add("yesno", aspect, question, answers[k], kind=kind, others=others)
  return True


def _ask_letters(
  a: Asker, task: str, about: str, stem: str, right: str, real: Sequence[str],
  made_up: Sequence[str], kind: str,
) -> None:  # fmt: skip
  """Asks with four options: the right one, those of other objects, and invented ones to fill up."""
  options = a.draw.shuffled([right, *real, *made_up][:4])
  question = f"{stem} {phrases.OPTIONS.format(*options)}"
  others = [LETTERS[options.index(o)] for o in real if o in options]
  answer = LETTERS[options.index(right)]
  a.add(task, about, question, answer, kind=kind, others=others, options=options)


def choice(a: Asker) -> bool:
  about = a.draw.choose(tuple(phrases.CHOICE))
  answers = a.all(about)
  k = a.pick(answers)
  if k is None:
    return False
  right = answers[k]
  real = a.draw.shuffled(sorted(set(answers.values()) - {right}))[:3]
  digit = a.scene.things[k].category == "digit"
  pool = {
    "category": CATEGORIES, "colour": tuple(COLOURS), "texture": TEXTURES,
    "text": tuple("0123456789") if digit else WORDS,
  }[about]  # fmt: skip
  made_up = [v for v in _some(a.draw, pool, 16) if v != right and v not in real]
  kind = a.next_kind()
  stem = a.draw.choose(phrases.CHOICE[about]).format(r=a.mention(k, kind))
  _ask_letters(a, "choice", about, stem, right, real, made_up, kind)
  return True


def _some(draw: Draw, pool: Sequence[str], n: int) -> list[str]:
  """At most n different members of a pool in any order, without shuffling all of a long one."""
  if len(pool) <= 16:
    return draw.shuffled(pool)[:n]
  return list(dict.fromkeys(draw.choose(pool) for _ in range(n)))


def rationale(a: Asker) -> bool:
  """The form of VCR's second question: a question with its answer, and four reasons for it."""
  claim = _claim(a, ("category", "colour", "texture", "size"))
  if claim is None:
    return False
  k, aspect, claimed, holds = claim
  right = caption(a.scene.things[k])
  same = {caption(a.scene.things[j]) for j in holds if j != k and holds[j] == holds[k]} - {right}
  if len(same) < 2:
    return False
  real = a.draw.shuffled(sorted(same))[:3]
  made_up = _invent(a.draw, aspect, claimed, holds[k], {right, *real}, 3 - len(real))
  kind = a.next_kind()
  form = a.draw.choose(phrases.RATIONALE)
  yes = "yes" if holds[k] else "no"
  stem = form.format(r=a.mention(k, kind), p=_predicate(aspect, claimed), y=yes)
  it = [f"it is {o}" for o in (right, *real, *made_up)]
  _ask_letters(
    a, "rationale", aspect, stem, it[0], it[1 : 1 + len(real)], it[1 + len(real) :], kind
  )
  return True


def _invent(
  draw: Draw, aspect: str, claimed: str, holds: bool, taken: set[str], n: int
) -> list[str]:
  """Captions of objects that aren't there, for which the claim holds or fails alike."""
  out: list[str] = []
  while len(out) < n:
    look = {
      "category": draw.choose(CATEGORIES), "colour": draw.choose(tuple(COLOURS)),
      "size": draw.choose(tuple(SIZES)), "texture": draw.choose(TEXTURES),
    }  # fmt: skip
    if holds:
      look[aspect] = claimed
    if look["category"] in READABLE and look["texture"] != "plain":
      continue
    if (look["category"], look["colour"]) in HELD_OUT or (look[aspect] == claimed) != holds:
      continue
    text = _phrase(**look)
    if text not in taken and text not in out:
      out.append(text)
  return out

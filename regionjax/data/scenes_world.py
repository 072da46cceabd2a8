"""The vocabulary of the scenes world, and its source of chance.

Everything a scene can hold is named here: categories, colours, sizes, textures, words, and the
pairs of colour and category that training never shows.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

SHAPES = (
  "circle", "square", "triangle", "star", "heart", "cross", "ring", "moon", "diamond", "arrow",
  "house", "fish",
)  # fmt: skip
READABLE = ("digit", "word")  # cards with something to read on them
CATEGORIES = SHAPES + READABLE
PLURALS = {c: c + "s" for c in CATEGORIES} | {"cross": "crosses", "fish": "fish"}

# RGB, 0-255. Hues far enough apart to survive a colour cast of 6 %; greys belong to backgrounds.
COLOURS = {
  "red": (214, 32, 38), "orange": (245, 130, 20), "yellow": (248, 222, 40), "green": (38, 150, 54),
  "cyan": (50, 205, 215), "blue": (36, 66, 205), "purple": (122, 38, 160), "pink": (250, 140, 190),
}  # fmt: skip
DARK_COLOURS = ("red", "green", "blue", "purple")  # cards that carry white ink; the others black

# Radius of the enclosing circle as a share of the image's side, (least, most). The steps leave
# gaps of a third, so that the class can be told from the image alone.
SIZES = {"small": (0.072, 0.082), "medium": (0.112, 0.124), "large": (0.165, 0.182)}
SIZE_RANK = {"small": 0, "medium": 1, "large": 2}
LETTER_HEIGHT = {"small": 0.094, "medium": 0.125, "large": 0.164}  # font size of words, same unit

TEXTURES = ("plain", "striped", "dotted", "checkered")

_WORDS = """
  apple arm army ant bag bake ball band bank barn bath bean bear bed bee bell belt bike bird
  boat bone book boot bowl box boy bread brick bus bush cake camp can cap car card cat chair
  city clay clock cloud coat cow cup dance dark day deer desk dish dog doll door dress drum duck
  dust ear earth east egg elbow eye face fan farm field film fire flag floor flute food foot
  forest fork fox frog fruit game gate gift girl glass glove goat gold grape grass guest hair
  hall hand hat hen hill home honey horse hotel ice ink iron island jam jar jeans jelly juice
  jump key king kite knee knife lake lamp lamb leaf leg lemon lion lip lock lunch maple map mask
  meal melon milk mint money month mouse mouth music nail neck nest net night north nose nut oak
  ocean oil onion orbit oven owl page paint pan paper park path peach pear pen piano pig pilot
  pipe plane plant plate pond pool queen quiet rain rice river road robot rock roof room root
  rope rose ruler sail salt sand school sea seed sheep ship shirt shoe shop silk sky snow soap
  sock song soup south spoon storm street sugar sun swan table tea tent tiger toast tooth town
  toy train tree truck uncle van vase violin wall watch water wave west whale wheat wheel wind
  window wing winter wolf wood wool yard zebra zoo
"""
WORDS = tuple(_WORDS.split())  # three to six letters; the same in training and test

# One colour for each category that training and the plain test never show in that colour.
HELD_OUT = frozenset(
  (category, tuple(COLOURS)[(3 * k + 1) % len(COLOURS)]) for k, category in enumerate(CATEGORIES)
)
SPLITS = ("train", "test", "heldout_pairs")
TRAIN_DIGITS = 1437  # samples of assets/digits.npz below this number train, the others test


class Draw:
  """Chance that is a pure function of its key, on every platform and Python version.

  Only `random.Random.random` is used, whose stream for a given integer Python guarantees.
  """

  __slots__ = ("random",)

  def __init__(self, *key: str | int):
    text = "/".join(map(str, key)).encode()
    self.random = random.Random(
      int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    ).random

  def below(self, n: int) -> int:
    """A whole number in [0, n)."""
    return int(self.random() * n)

  def uniform(self, low: float, high: float) -> float:
    return low + (high - low) * self.random()

  def flip(self, probability: float = 0.5) -> bool:
    return self.random() < probability

  def choose(self, items: Sequence[T]) -> T:
    return items[int(self.random() * len(items))]

  def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
    mark = self.random() * sum(weights)
    for item, weight in zip(items, weights):
      mark -= weight
      if mark < 0:
        return item
    return items[-1]

  def shuffled(self, items: Sequence[T]) -> list[T]:
    """A shuffled copy (Fisher-Yates)."""
    out = list(items)
    for k in range(len(out) - 1, 0, -1):
      j = int(self.random() * (k + 1))
      out[k], out[j] = out[j], out[k]
    return out

"""A dialogue with a person, kept as ids; the door to everything about prompts.

`Renderer` writes Examples and turns (see `renderer`), `Conversation` keeps a running dialogue,
`user_to_internal` and `escape` take people's text in (see `mentions`).
"""

from __future__ import annotations

from collections.abc import Sequence

from regionjax.data.schema import Example, ImageRef, Turn
from regionjax.mentions import escape, user_to_internal
from regionjax.prompt_checks import PromptError
from regionjax.prompt_writer import Encoded
from regionjax.regions import Region
from regionjax.renderer import Renderer

__all__ = ["Conversation", "Encoded", "PromptError", "Renderer", "escape", "user_to_internal"]


class Conversation:
  """A running dialogue with a person, as ids.

  Each `ask` gives the whole prompt so far, of which the previous prompt and the ids generated for
  it are a prefix.
  """

  def __init__(
    self, renderer: Renderer, *, images: Sequence[ImageRef] = (), system: str = ""
  ) -> None:
    self.renderer = renderer
    self.images = tuple(images)
    self.regions: tuple[Region, ...] = ()
    self.region_images: tuple[int, ...] = ()
    self.prompt: Encoded | None = None
    self.generated: list[int] = []
    self._system = (Turn("system", escape(system)),) if system else ()

  def ask(
    self, text: str, regions: Sequence[Region] = (), *, region_images: Sequence[int] | None = None
  ) -> Encoded:
    """The prompt that asks `text`.

    Args:
      text: a person's; `<region1>` is the first region of the dialogue, counted over all turns.
      regions: the regions that are new in this turn; each must be mentioned.
      region_images: the image of each new region; the first image where not given.

    Raises:
      RegionError: mentions and regions don't match. The dialogue stays as it was.
    """
    images = tuple(region_images) if region_images is not None else (0,) * len(regions)
    every = self.regions + tuple(regions)
    text = user_to_internal(text, len(every), already=len(self.regions))
    first = self.prompt is None
    example = Example(
      images=self.images,
      regions=every,
      region_images=self.region_images + images,
      turns=(*(self._system if first else ()), Turn("user", text)),
    )
    if self.prompt is None:
      prompt = self.renderer.prompt(example)
    else:
      more = self.renderer.extend(self.prompt, self.generated, example)
      prompt = self.prompt.followed_by(self.generated, more)
    self.prompt, self.generated = prompt, []
    self.regions, self.region_images = every, example.region_images
    return prompt

  def answered(self, generated: Sequence[int]) -> str:
    """Keeps the ids generated for the last prompt, up to their stop, and returns their text."""
    self.generated, _ = self.renderer.cut_at_stop(generated)
    return self.renderer.answer_text(self.generated)

"""What a prompt shows of regions and images in each configuration, and what is refused."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regionjax.config import (
  REGION_KINDS,
  ConfigError,
  ConnectorConfig,
  ModelConfig,
  PromptConfig,
  VisionConfig,
)
from regionjax.conversation import Conversation, PromptError, Renderer, escape, user_to_internal
from regionjax.data.schema import Example, ImageRef, Turn
from regionjax.mentions import Mention, has_mention, parse
from regionjax.prompt_checks import check_resize
from regionjax.regions import Region, RegionError
from regionjax.tokenizer import load_tokenizer

IMAGE = ImageRef("file", "a.png", (200, 100))
BOX = Region.box(0.1, 0.2, 0.3, 0.4)
POINT = Region.point(0.25, 0.5)
OVERVIEW = "The {image:0} provides an overview of the picture.\n"
PARTS = ("{region:0}", "{image:0}", "{region\\:0}", "{", "}", "\\", "region:0", "image", "a")


@pytest.fixture(scope="module")
def tiny():
  return load_tokenizer("tiny")


def tiny_renderer(tiny, kind="pool", **prompt) -> Renderer:
  config = dataclasses.replace(
    ModelConfig.tiny(kind),
    vision=VisionConfig.tiny(image_size=32, patch_size=16, stem=()),
    connector=ConnectorConfig(),
  )
  return Renderer(PromptConfig(**({"template": "plain"} | prompt)), config, tiny)


def example(*texts, regions=(BOX, POINT), images=(IMAGE,), supervise=True, **more) -> Example:
  """Turns by role: user, assistant, user, ..."""
  turns = tuple(
    Turn("assistant", t, supervise=supervise, task=f"task{k // 2}") if k % 2 else Turn("user", t)
    for k, t in enumerate(texts)
  )
  return Example(images, regions, (0,) * len(regions), turns, **more)


def test_people_count_from_one_and_may_repeat():
  text = user_to_internal("Is <region2> like <region1> or <region2>? {region:0}", 2)
  assert text == "Is {region:1} like {region:0} or {region:1}? {region\\:0}"


def test_a_mention_may_be_of_any_length():
  """int() refuses more than 4,300 digits with an error about itself."""
  text = f"What is <region{'1' * 5000}>?"
  assert has_mention(text)
  with pytest.raises(RegionError, match=r"mentions <region1{13}\.\.\., but there are"):
    user_to_internal(text, 3)
  internal = f"{{region:{'1' * 5000}}}"
  assert list(parse(user_to_internal(internal, 0))) == [internal]


@pytest.mark.parametrize(
  ("text", "regions", "already", "match"),
  [
    ("What is <region2>?", 1, 0, "mentions <region2>, but there are regions 1 to 1"),
    ("What is <region1>?", 0, 0, "no region was given"),
    ("What is <region0>?", 1, 0, "counted from 1"),
    ("What is this?", 1, 0, "never mentions <region1>"),
    ("Is <region2> red?", 3, 2, "never mentions <region3>"),
  ],
)
def test_mentions_and_regions_must_match(text, regions, already, match):
  with pytest.raises(RegionError, match=match):
    user_to_internal(text, regions, already=already)


def read(renderer, *texts, **more) -> tuple[str, tuple[int, ...]]:
  """The dialogue's text behind the image, and its region slots."""
  encoded = renderer.encode(example(*texts, **more))
  return renderer.tokenizer.decode(encoded.ids).split("<im_end>")[-1], encoded.region_slots


ASKED = ("Is {region:0} as {region:1}? {region:0}", "No", "Why {region:1}?", "So")
B, P = "<box>[0.10, 0.20, 0.30, 0.40]</box>", "<box>[0.25, 0.50]</box>"
FORMS = {
  ("pool", "name+slot"): (
    " Is region1<bbox> as region2<bbox>? region1\n No</s> Why region2?\n So</s>", (0, 1)),
  ("pool", "slot"): (" Is<bbox> as<bbox>?<bbox>\n No</s> Why<bbox>?\n So</s>", (0, 1, 0, 1)),
  ("text", "name+slot"): (
    f" Is region1{B} as region2{P}? region1\n No</s> Why region2?\n So</s>", ()),
  ("text", "slot"): (f" Is{B} as{P}?{B}\n No</s> Why{P}?\n So</s>", ()),
  ("pool+text", "name+slot"): (
    f" Is region1<bbox>{B} as region2<bbox>{P}? region1\n No</s> Why region2?\n So</s>", (0, 1)),
  ("pyramid+text", "slot"): (
    f" Is<bbox>{B} as<bbox>{P}?<bbox>{B}\n No</s> Why<bbox>{P}?\n So</s>", (0, 1, 0, 1)),
  ("none", "slot"): (" Is region1 as region2? region1\n No</s> Why region2?\n So</s>", ()),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "mention"), FORMS)
def test_forms_of_a_region(tiny, kind, mention):
  renderer = tiny_renderer(tiny, kind, mention=mention, coordinates="unit2")
  assert read(renderer, *ASKED) == FORMS[kind, mention]


@pytest.mark.parametrize("kind", REGION_KINDS)
def test_blanked_regions_are_only_named(tiny, kind):
  for mention in ("name+slot", "slot"):
    blank = tiny_renderer(tiny, kind, mention=mention).blank()
    assert read(blank, *ASKED) == FORMS["none", "slot"]


def test_answers_hold_coordinates(tiny):
  for kind in REGION_KINDS:
    renderer = tiny_renderer(tiny, kind, coordinates="int999")
    encoded = renderer.encode(example("Where?", "{region:0} and {region:1}"))
    assert encoded.answers[0][1] == "[100, 200, 300, 400] and [250, 500]"
    assert encoded.region_slots == encoded.introduced == ()
    assert tiny.decode(encoded.ids[encoded.mask]) == " [100, 200, 300, 400] and [250, 500]</s>"


def test_pixel_coordinates_use_the_image_and_the_model_size(tiny):
  original = tiny_renderer(tiny, "text", coordinates="pixels")
  resized = tiny_renderer(tiny, "text", coordinates="pixels_resized")
  assert "[50, 50]" in read(original, "{region:0}", "a", regions=(POINT,))[0]
  assert "[8, 16]" in read(resized, "{region:0}", "a", regions=(POINT,))[0]
  with pytest.raises(RegionError, match="size"):
    read(original, "{region:0}", "a", regions=(POINT,), images=(ImageRef("file", "a.png"),))


def test_outlines_are_simplified(tiny):
  angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
  ring = [(0.5 + 0.3 * np.cos(a), 0.5 + 0.3 * np.sin(a)) for a in angles]
  renderer = tiny_renderer(tiny, "text", max_vertices=5)
  text, _ = read(renderer, "{region:0}", "a", regions=(Region.polygon(ring),))
  assert text.count(",") == 9


def test_image_blocks(tiny):
  renderer = tiny_renderer(tiny)
  block = "<im_start>" + "<im_patch>" * 4 + "<im_end>"
  other = ImageRef("file", "b.png")

  def text(*texts, **more):
    encoded = renderer.encode(example(*texts, regions=(), **more))
    return tiny.decode(encoded.ids), encoded.image_slots

  assert text("a", "b") == (f"{block} a\n b</s>", (0,))
  assert text("a", "b", images=(IMAGE, other)) == (f"{block}{block} a\n b</s>", (0, 1))
  assert text("a", "b", images=()) == (" a\n b</s>", ())
  late = ("a", "b", "{image:1}, {image:0} c", "d")
  assert text(*late, images=(IMAGE, other)) == (
    f" a\n b</s>{block},{block} c\n d</s>", (1, 0))  # fmt: skip
  prefixed = tiny_renderer(tiny, image_prefix=OVERVIEW)
  encoded = prefixed.encode(example("a", "b", regions=(), images=(IMAGE, other)))
  assert tiny.decode(encoded.ids).startswith(
    f" The{block} provides an overview of the picture.{block} a"
  )
  bare = tiny_renderer(tiny, image_prefix="Look: ")
  assert tiny.decode(bare.encode(example("a", "b")).ids) == f"{block} Look: a\n b</s>"
  with pytest.raises(PromptError, match="names image 1"):
    tiny_renderer(tiny, image_prefix="{image:1}").encode(example("a", "b"))


@settings(max_examples=300, deadline=None)
@given(text=st.lists(st.sampled_from(PARTS)).map("".join))
def test_escaped_text_is_literal(text):
  assert "".join(map(str, parse(escape(text)))) == text


def test_mentions_are_found():
  assert list(parse("a {region:2}{image:0} \\")) == [
    "a ", Mention("region", 2), Mention("image", 0), " \\",
  ]  # fmt: skip


@pytest.mark.parametrize(
  ("change", "match"),
  [
    ({"template": "vicuna"}, "prompt.template='vicuna'"),
    ({"mention": "box"}, "prompt.mention"),
    ({"mask": "all"}, "prompt.mask"),
    ({"coordinates": "unit4"}, "prompt.coordinates"),
    ({"template": "plain", "mask": "gpt4roi"}, "defined for template vicuna_v0"),
  ],
)
def test_prompt_settings_are_checked(tiny, change, match):
  with pytest.raises(ConfigError, match=match):
    tiny_renderer(tiny, **change)


@pytest.mark.parametrize("resize", ["letterbox", "hf"])
def test_resized_pixels_need_a_rule_that_keeps_the_whole_image(resize):
  with pytest.raises(ConfigError, match=f"pixels_resized.*data.resize='{resize}'.*chatspot"):
    check_resize(PromptConfig(coordinates="pixels_resized"), resize)
  check_resize(PromptConfig(coordinates="pixels"), resize)
  for whole in ("chatspot", "gpt4roi"):
    check_resize(PromptConfig(coordinates="pixels_resized"), whole)


def test_turns_must_alternate(tiny):
  renderer = tiny_renderer(tiny)
  user, assistant = Turn("user", "a"), Turn("assistant", "b", supervise=True)
  for turns, match in (
    ((), "no turns"),
    ((assistant,), "expected the user's"),
    ((user, user), "expected the assistant's"),
    ((user, assistant, user), "last turn must be the assistant's"),
    ((Turn("system", "s"), user, Turn("system", "s")), "turn 1 is the system's"),
  ):
    with pytest.raises(PromptError, match=match):
      renderer.encode(Example(turns=turns))
  with pytest.raises(PromptError, match="no turns"):
    renderer.prompt(Example())
  with pytest.raises(PromptError, match="next question"):
    renderer.extend(renderer.prompt(Example(turns=(user,))), [], Example(turns=(user, assistant)))
  with pytest.raises(PromptError, match="system turn"):
    renderer.encode(Example(images=(IMAGE,), turns=(Turn("system", "{image:0}"), user, assistant)))


def test_a_refused_question_leaves_the_dialogue_as_it_was(tiny):
  chat = Conversation(tiny_renderer(tiny), images=(IMAGE,))
  first = chat.ask("What is <region1>?", [BOX])
  assert chat.answered([*tiny.encode_text(" a cat"), tiny.eos_id, 7]) == "a cat"
  kept = list(chat.generated)
  with pytest.raises(RegionError):
    chat.ask("What is <region3>?", [POINT])
  assert (chat.prompt, chat.generated, chat.regions) == (first, kept, (BOX,))
  second = chat.ask("Is <region2> like <region1>?", [POINT])
  assert second.region_slots == (0, 1)
  assert tiny.decode(second.ids).endswith("</s> Is region2<bbox> like region1?\n")

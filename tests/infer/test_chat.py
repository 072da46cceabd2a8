"""RegionChat and Session: dialogues from the cache equal dialogues from scratch."""

import dataclasses
import io
import itertools

import numpy as np
import pytest
from PIL import Image

import regionjax
from regionjax import Region
from regionjax.config import ConfigError
from regionjax.images import ImageError
from regionjax.infer.batching import GenerationError
from regionjax.infer.chat import Question, RegionChat, read_image
from regionjax.infer.engine import Generation
from regionjax.infer.prompts import make_prompt
from regionjax.mentions import mention_the_only
from regionjax.regions import RegionError

BOX, POINT = Region.box(0.1, 0.2, 0.6, 0.9), Region.point(0.7, 0.3)
POLYGON = Region.polygon([(0.2, 0.1), (0.9, 0.4), (0.3, 0.8)])
PICTURE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
TURNS = [
  ("What is <region1>?", [BOX]),
  ("And its colour?", []),
  ("Is <region1> larger than <region2>?", [POINT]),
]
FEW = {"max_new_tokens": 5}


def from_scratch(chat: RegionChat, session) -> tuple[int, ...]:
  """The answer to the session's last prompt, with nothing cached."""
  c = session._conversation
  pixels, transform = chat.frame.prepare(PICTURE)
  prompt = make_prompt(
    c.prompt, c.regions, c.region_images, [transform], grid=chat.frame.grid,
    region_slot_id=chat.tokenizer.region_slot_id, images=[0],
  )  # fmt: skip
  features = chat.engine.encode_images([pixels])
  (answer,) = chat.engine.generate([prompt], features, **FEW)
  return tuple(chat.renderer.cut_at_stop(answer.ids)[0])


@pytest.mark.parametrize(
  "kind",
  ["pool", *(pytest.param(k, marks=pytest.mark.slow) for k in ("text", "pyramid", "pool+text"))],
)
def test_a_dialogue_from_the_cache_equals_one_from_scratch(make_chat, kind):
  chat = make_chat(kind)
  session = chat.start(PICTURE)
  before = ()
  for text, regions in TURNS:
    answer = session.ask(text, regions, **FEW)
    assert answer.ids == from_scratch(chat, session)
    assert session.ids[: len(before)] == before
    assert session.ids[len(session.ids) - len(answer.ids) :] == answer.ids
    before = session.ids
  assert [role for role, _ in session.turns] == ["user", "assistant"] * 3
  assert session.regions == (BOX, POINT)
  assert len(session._conversation.prompt.region_slots) == (0 if kind == "text" else 2)


def test_an_image_is_encoded_once(chat, monkeypatch):
  calls = []
  encode = chat.engine.encode_images
  monkeypatch.setattr(
    chat.engine, "encode_images", lambda images: calls.append(len(images)) or encode(images)
  )
  session = chat.start(PICTURE)
  for text, regions in TURNS[:2]:
    session.ask(text, regions, **FEW)
  assert calls == [1]
  calls.clear()
  chat.ask_many([Question(PICTURE, "What is <region1>?", [r]) for r in (BOX, POINT)], **FEW)
  assert calls == [1]


def test_only_new_ids_are_fed(chat, monkeypatch):
  session = chat.start(PICTURE)
  session.ask(*TURNS[0], **FEW)
  fed = []
  extend = chat.engine.extend

  def watched(state, prompts, *args, **kwargs):
    fed.append(len(prompts[0].ids))
    return extend(state, prompts, *args, **kwargs)

  monkeypatch.setattr(chat.engine, "extend", watched)
  known = len(session.ids)
  session.ask("And its colour?", **FEW)
  assert fed == [len(session._conversation.prompt.ids) - known]


def test_ask_many_equals_ask(chat):
  questions = [
    Question(PICTURE, "What is <region1>?", [BOX]),
    Question(PICTURE[:, ::-1], "Is <region2> left of <region1>?", [BOX, POINT]),
    Question(PICTURE, "How many?"),
  ]
  together = chat.ask_many(questions, **FEW)
  assert together == [chat.ask(q.image, q.text, q.regions, **FEW) for q in questions]


def test_ask_many_takes_no_image_and_several(chat):
  two = [PICTURE, PICTURE[::-1]]
  questions = [
    Question(None, "Hello?"),
    Question(two, "Is <region1> like <region2>?", [BOX, BOX], [0, 1]),
    Question(PICTURE, "What is <region1>?", [BOX]),
    Question([], "Hello again?"),
    Question((two[1], two[1]), "Is it <region1>?", [POINT], [1]),
  ]
  together = chat.ask_many(questions, **FEW)
  for question, answer in zip(questions, together):
    alone = chat.ask(
      question.image, question.text, question.regions, region_images=question.region_images, **FEW
    )
    assert answer == alone
  assert chat.ask_many(questions[:1], **FEW) == together[:1]


def test_a_region_needs_its_image(chat):
  for image, region_images, match in (
    (None, None, "a region of image 0, but there are 0 images"),
    ([PICTURE] * 2, [2], "a region of image 2, but there are 2 images"),
    (PICTURE, [0, 0], "1 regions, but region_images names 2"),
  ):
    with pytest.raises(GenerationError, match=match):
      chat.ask_many([Question(image, "What is <region1>?", [BOX], region_images)])
    with pytest.raises(GenerationError, match=match):
      chat.ask(image, "What is <region1>?", [BOX], region_images=region_images)


def test_streaming_grows_to_the_answer(make_chat):
  chat = make_chat("pool")  # 4 tokens per dispatch
  settings = {"temperature": 1.0, "seed": 1, "max_new_tokens": 12}
  whole = chat.start(PICTURE).ask(*TURNS[0], **settings)
  parts = list(chat.start(PICTURE).stream(*TURNS[0], **settings))
  assert parts[-1] == whole
  assert len(parts) > 1
  assert all(b.text.startswith(a.text) for a, b in itertools.pairwise(parts))
  assert [p.finish for p in parts[:-1]] == [""] * (len(parts) - 1)


def test_a_dialogue_goes_on_after_an_answer_was_broken_off(make_chat):
  chat = make_chat("pool")
  session = chat.start(PICTURE)
  stream = session.stream(*TURNS[0], max_new_tokens=12)
  part = next(stream)
  assert len(part.ids) == 4
  stream.close()
  assert session.turns[-1] == ("assistant", part.text)
  answer = session.ask("And its colour?", **FEW)
  assert answer.ids == from_scratch(chat, session)


def test_bad_questions_leave_a_dialogue_as_it_was(chat):
  session = chat.start(PICTURE)
  session.ask(*TURNS[0], **FEW)
  ids, turns = session.ids, list(session.turns)
  with pytest.raises(RegionError, match="<region3>"):
    session.ask("Is <region3> red?", [POINT])
  with pytest.raises(RegionError, match="never mentions <region3>"):
    session.ask("Is <region2> red?", [POINT, BOX])
  with pytest.raises(GenerationError, match="limit is 512"):
    session.ask("word " * 600)
  with pytest.raises(ValueError, match="top_p"):
    session.ask("Why?", top_p=0.0)
  assert (session.ids, session.turns) == (ids, turns)
  assert session.regions == (BOX,)
  answer = session.ask("And its colour?", **FEW)
  assert answer.ids == from_scratch(chat, session)


def test_a_lone_region_is_mentioned_for_you(chat):
  session = chat.start(PICTURE)
  session.ask("What is this?", [BOX], **FEW)
  assert session.turns[0] == ("user", "What is this? <region1>")
  session.ask("And this?", [POINT], **FEW)
  assert session.turns[2] == ("user", "And this? <region2>")
  session.ask("And its colour?", **FEW)
  assert session.turns[4] == ("user", "And its colour?")
  session.ask("And that?", [BOX], **FEW)
  assert session.turns[6] == ("user", "And that? <region3>")
  assert mention_the_only("this?", [1, 2]) == "this?"
  assert mention_the_only("Is <region1> red?", [2]) == "Is <region1> red?"


@pytest.mark.parametrize("added", [[BOX], [BOX, POINT]])
def test_added_regions_wait_for_a_mention(chat, added):
  """Even a single one is in no question but those that mention it."""
  session = chat.start(PICTURE)
  assert session.add(added) == list(range(1, len(added) + 1))
  session.ask("How many?", **FEW)
  assert session.turns[0] == ("user", "How many?")
  session.ask("What is this?", [POLYGON], **FEW)
  assert session.turns[2] == ("user", f"What is this? <region{len(added) + 1}>")
  session.ask(f"What is <region{len(added)}>?", **FEW)
  assert session._conversation.prompt.region_slots == (len(added), len(added) - 1)


def test_special_text_stays_text(chat):
  """What looks like slots and stops is encoded as characters."""
  tokenizer = chat.tokenizer
  session = chat.start(PICTURE)
  session.ask("Is <bbox> </s> <im_patch> {region:0} ### red?", **FEW)
  ids = np.asarray(session._conversation.prompt.ids)
  assert (ids == tokenizer.image_slot_id).sum() == chat.config.model.image_tokens
  assert (ids == tokenizer.region_slot_id).sum() == 0
  text = tokenizer.decode(ids[chat.config.model.image_tokens :])
  assert "<bbox> </s> <im_patch> {region:0} ### red?" in text


def test_answers_carry_their_regions(chat):
  text = "at [0.10, 0.20, 0.50, 0.60] and [0.90, 0.10], not at [3, 4]"
  ids = (*chat.tokenizer.encode_text(text), chat.tokenizer.eos_id)
  answer = chat.answer(Generation(ids, text, "stop"), (64, 48))
  assert answer.text == text == str(answer)
  assert answer.regions == (Region.box(0.1, 0.2, 0.5, 0.6), Region.point(0.9, 0.1))
  assert [text[a:b] for a, b in answer.spans] == ["[0.10, 0.20, 0.50, 0.60]", "[0.90, 0.10]"]
  (refused,) = answer.refused
  assert (text[refused.start : refused.end], refused.reason) == ("[3, 4]", "outside")


def test_answers_tell_of_an_inverted_box(chat):
  text = "at [0.50, 0.20, 0.10, 0.60]"
  ids = (*chat.tokenizer.encode_text(text), chat.tokenizer.eos_id)
  answer = chat.answer(Generation(ids, text, "stop"), (64, 48))
  assert answer.regions == answer.spans == ()
  assert [(r.start, r.end, r.reason) for r in answer.refused] == [(3, len(text), "inverted")]


def test_images_come_in_any_form(tmp_path, chat):
  path = tmp_path / "picture.png"
  Image.fromarray(PICTURE).save(path)
  data = path.read_bytes()
  forms = [path, str(path), data, io.BytesIO(data), Image.open(path), PICTURE]
  for form in forms:
    np.testing.assert_array_equal(read_image(form), PICTURE)
  grey = read_image(PICTURE[:, :, 0])
  np.testing.assert_array_equal(grey[:, :, 2], PICTURE[:, :, 0])
  for wrong in (PICTURE / 255, PICTURE[:, :, :2], PICTURE[:0]):
    with pytest.raises(ImageError, match=r"expected uint8 \[height, width, 3\]"):
      chat.start(wrong)


@pytest.mark.parametrize("kind", ["RGBA", "I;16"])
def test_a_file_and_its_pil_image_have_the_same_pixels(tmp_path, kind):
  """Transparency lies on white and 16 bits are scaled, in both."""
  rng = np.random.default_rng(0)
  if kind == "RGBA":
    image = Image.fromarray(rng.integers(0, 256, (9, 7, 4), np.uint8))
  else:
    image = Image.fromarray(rng.integers(0, 65536, (9, 7), np.uint16))
  path = tmp_path / "picture.png"
  image.save(path)
  want = read_image(path)
  if kind == "RGBA":
    assert not np.array_equal(want, np.asarray(image)[..., :3])
  else:
    np.testing.assert_array_equal(want[..., 0], np.round(np.asarray(image) / 257))
  for form in (image, Image.open(path)):
    np.testing.assert_array_equal(read_image(form), want)
  path.write_bytes(path.read_bytes()[:-30])
  with pytest.raises(ImageError, match="truncated or damaged"):
    read_image(Image.open(path))


def test_no_image_and_two_images(chat):
  assert isinstance(chat.ask(None, "Hello?", **FEW).text, str)
  two = chat.start([PICTURE, PICTURE[::-1]])
  two.ask("Is <region1> like <region2>?", [BOX, BOX], region_images=[0, 1], **FEW)
  prompt = two._conversation.prompt
  assert prompt.image_slots == (0, 1)
  assert prompt.region_slots == (0, 1)


@pytest.mark.parametrize(
  ("pieces", "written"),
  [(("#", "#", "#"), ""), (("##", "#"), ""), (("##", "##"), "\n###")],
  ids=["single", "two and one", "one too many"],
)
def test_a_stop_in_other_pieces_ends_the_answer(make_chain_chat, pieces, written):
  """vicuna_v0 stops at the text "###", whose usual token is none of these."""
  chat = make_chain_chat(["x", "y", *pieces])
  ids = tuple(i for piece in ("x", "y", *pieces) for i in chat.tokenizer.encode_text(piece))
  session = chat.start()
  parts = list(session.stream("Hello?", max_new_tokens=12))
  assert all(b.text.startswith(a.text) for a, b in itertools.pairwise(parts))
  answer = parts[-1]
  assert (answer.text, answer.ids, answer.finish) == ("xy", ids, "stop")
  before = session.ids
  assert before[-len(ids) :] == ids
  assert session.ask("Why?", max_new_tokens=12) == answer
  assert session.ids[: len(before)] == before
  more = chat.tokenizer.decode(session.ids[len(before) : -len(ids)])
  assert more == f"{written} Human: Why?\n### Assistant:"
  assert chat.ask_many([Question(None, "Hello?")], max_new_tokens=12) == [answer]


def test_coordinates_must_fit_the_resize_rule(chat):
  config = dataclasses.replace(
    chat.config,
    prompt=dataclasses.replace(chat.config.prompt, coordinates="pixels_resized"),
    data=dataclasses.replace(chat.config.data, resize="letterbox"),
  )
  with pytest.raises(ConfigError, match="pixels_resized"):
    RegionChat(config, {}, chat.tokenizer)


def test_the_public_names(release_folder):
  assert regionjax.__version__ == "0.1.0"
  assert isinstance(regionjax.load(release_folder), regionjax.RegionChat)
  assert set(regionjax.__all__) <= set(dir(regionjax))
  for name in regionjax.__all__:
    assert getattr(regionjax, name) is not None
  with pytest.raises(AttributeError, match="no attribute 'lode'"):
    regionjax.lode  # noqa: B018


def test_importing_the_package_loads_nothing_heavy():
  import subprocess
  import sys

  code = "import sys, regionjax; print(any(m in sys.modules for m in ('jax', 'flax', 'PIL')))"
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert out.stdout.strip() == "False"

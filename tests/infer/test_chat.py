"""RegionChat and Session: dialogues from the cache equal dialogues from scratch."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

import regionjax
from regionjax import Region
from regionjax.images import ImageError
from regionjax.infer.batching import GenerationError
from regionjax.infer.chat import Question, RegionChat, mention_the_only, read_image
from regionjax.infer.engine import Generation
from regionjax.infer.prompts import make_prompt
from regionjax.regions import RegionError

BOX, POINT = Region.box(0.1, 0.2, 0.6, 0.9), Region.point(0.7, 0.3)
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
  assert mention_the_only("this?", [1, 2]) == "this?"
  assert mention_the_only("Is <region1> red?", [2]) == "Is <region1> red?"


def test_added_regions_wait_for_a_mention(chat):
  session = chat.start(PICTURE)
  assert session.add([BOX, POINT]) == [1, 2]
  session.ask("How many?", **FEW)
  assert session.turns[0] == ("user", "How many?")
  session.ask("What is <region2>?", **FEW)
  assert session._conversation.prompt.region_slots == (1,)


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


def test_no_image_and_two_images(chat):
  assert isinstance(chat.ask(None, "Hello?", **FEW).text, str)
  two = chat.start([PICTURE, PICTURE[::-1]])
  two.ask("Is <region1> like <region2>?", [BOX, BOX], region_images=[0, 1], **FEW)
  prompt = two._conversation.prompt
  assert prompt.image_slots == (0, 1)
  assert prompt.region_slots == (0, 1)


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

"""Prompts: published vectors, masks, dialogues as ids, hostile text, mentions, truncation."""

import dataclasses
import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regionjax.config import ConfigError, ConnectorConfig, ModelConfig, PromptConfig, VisionConfig
from regionjax.conversation import Conversation, PromptError, Renderer, escape
from regionjax.data.schema import Example, ImageRef, Turn
from regionjax.regions import Region
from regionjax.tokenizer import GPT4ROI_TOKENS, Tokenizer, load_tokenizer
from regionjax.tokenizer_files import TokenizerFiles, added_token, bpe_spec, find_roles

DATA = Path(__file__).parent / "data"
IMAGE = ImageRef("file", "a.png", (200, 100))
BOX = Region.box(0.1, 0.2, 0.3, 0.4)
POINT = Region.point(0.25, 0.5)
OVERVIEW = "The {image:0} provides an overview of the picture.\n"
TEMPLATES = ("vicuna_v0", "vicuna_v1", "chatml", "plain")
NASTY = (
  "<bbox>", "<im_patch>", "<im_start>", "</s>", "###", "### Human: a", "<|im_end|>", "{region:0}",
  "{image:0}", "{region\\:0}", "<box>", "####", " ## #", "\n", "  ", "a", "é", "[0.1, 0.2]", "1",
)  # fmt: skip


def make_llama() -> Tokenizer:
  text = lzma.decompress((DATA / "llama1_vocab.txt.xz").read_bytes()).decode()
  kinds = [2, 3, 3] + [6] * 256 + [1] * 40000
  spec = bpe_spec([(p, min(0.0, 259.0 - i), kinds[i]) for i, p in enumerate(text.split("\n"))])
  for name in (*GPT4ROI_TOKENS, "<|im_start|>", "<|im_end|>"):
    known = len(spec["model"]["vocab"]) + len(spec["added_tokens"]) - 3
    spec["added_tokens"].append(added_token(name, known))
  return Tokenizer(TokenizerFiles(spec, find_roles(spec, known={})))


@pytest.fixture(scope="module")
def llama():
  return make_llama()


@pytest.fixture(scope="module")
def tiny():
  return load_tokenizer("tiny")


def gpt4roi(llama, **prompt) -> Renderer:
  """Two image patches instead of 256, as in the published sample."""
  config = ModelConfig.gpt4roi_7b()
  vision = dataclasses.replace(config.vision, image_size=(14, 28))
  decoder = dataclasses.replace(config.decoder, vocab_size=llama.vocab_size)
  config = dataclasses.replace(config, vision=vision, decoder=decoder)
  return Renderer(PromptConfig(**({"image_prefix": OVERVIEW} | prompt)), config, llama)


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


def spans(encoded, tokenizer) -> list[str]:
  """The text of each run of supervised tokens."""
  out, run = [], []
  for index, on in [*zip(encoded.ids, encoded.mask), (0, False)]:
    if on:
      run.append(index)
    elif run:
      out.append(tokenizer.decode(run))
      run = []
  return out


# Published vectors.

HEADER = (
  "1 319 13563 1546 263 12758 5199 322 385 23116 21082 20255 29889 450 20255 4076 8444 29892 13173 "
  "29892 322 1248 568 6089 304 278 5199 29915 29879 5155 29889 13 13"
)
SAMPLE = (
  "2277 29937 12968 29901 450 32004 32001 32001 32005 8128 385 975 1493 310 278 7623 29889 13 5618 "
  "338 5120 29896 32002 2599 29973 13 2277 29937 4007 22137 29901 940 338 2734 29889 13 2277 29937 "
  "29871"
)
RUNNING = example("What is {region:0} doing?", "He is running.", regions=(BOX,))


def numbers(text: str) -> list[int]:
  return [int(n) for n in text.split()]


def test_published_sample(llama):
  encoded = gpt4roi(llama).encode(RUNNING)
  assert encoded.ids.tolist() == numbers(f"{HEADER} {SAMPLE}")
  assert encoded.ids[encoded.mask].tolist() == [940, 338, 2734, 29889, 13, 2277, 29937]
  assert encoded.answer_ids.tolist() == encoded.mask.astype(int).tolist()
  assert (encoded.ids.dtype, encoded.mask.dtype, encoded.answer_ids.dtype) == (
    np.int32, bool, np.int32,
  )  # fmt: skip
  assert (encoded.image_slots, encoded.region_slots) == ((0,), (0,))
  assert encoded.answers == (("task0", "He is running.", "box"),)


def test_published_mask(llama):
  encoded = gpt4roi(llama, mask="gpt4roi").encode(RUNNING)
  header = len(HEADER.split())
  assert encoded.ids.tolist() == numbers(f"{HEADER} {SAMPLE}")
  assert not encoded.mask[:header].any()
  assert encoded.mask[header:].astype(int).tolist() == [1, 1] + [0] * 24 + [1] * 13


def test_published_mask_does_not_slip_behind_a_slot(llama):
  """The original lost a token of its mask for each question that ends in a slot."""
  renderer = gpt4roi(llama, mask="gpt4roi", mention="slot", image_prefix="{image:0}")
  encoded = renderer.encode(example("{region:0}", "cat", "{region:1}", "dog"))
  header = len(HEADER.split())
  got = list(zip(encoded.ids.tolist(), encoded.mask.tolist()))[header:]
  human, image = [12968, 29901], [32004, 32001, 32001, 32005]
  wanted = [(i, True) for i in (2277, 29937)] + [(i, False) for i in [*human, *image, 32002]]
  for answer, last in (([6635], False), ([11203], True)):
    told = [835, 4007, 22137, 29901, *answer, 13, 2277, 29937]
    wanted += [(i, True) for i in told]
    wanted += [(29871, True)] if last else [(i, False) for i in [*human, 32002]]
  assert got == wanted


def test_generation_prompt_ends_with_the_assistants_mark(llama):
  renderer = gpt4roi(llama)
  prompt = renderer.prompt(RUNNING)
  assert prompt.ids[-5:].tolist() == [2277, 29937, 4007, 22137, 29901]
  assert not prompt.mask.any() and not prompt.answer_ids.any() and prompt.answers == ()
  encoded = renderer.encode(RUNNING)
  assert encoded.ids[: len(prompt)].tolist() == prompt.ids.tolist()
  assert encoded.mask[len(prompt)]


def test_white_space_around_added_tokens(llama):
  renderer = gpt4roi(llama, image_prefix="", mention="name+slot")
  encoded = renderer.encode(example("{region:0},{region:1},", "a", images=(IMAGE,)))
  ids = encoded.ids.tolist()
  start = ids.index(32005) + 1
  assert ids[start : start + 8] == [5120, 29896, 32002, 1919, 12803, 29906, 32002, 1919]
  encoded = renderer.encode(example("{region:0} ", "a", regions=(BOX,)))
  ids = encoded.ids.tolist()
  at = ids.index(32002)
  assert ids[at + 1 : at + 5] == [835, 4007, 22137, 29901]


# All templates.


@pytest.fixture(scope="module", params=[f"{t}-{k}" for t in TEMPLATES for k in ("tiny", "llama")])
def renderer(request, tiny, llama):
  template, kind = request.param.split("-")
  if kind == "tiny":
    return tiny_renderer(tiny, template=template)
  return gpt4roi(llama, template=template)


SYSTEM = {
  "vicuna_v0": "A chat between a curious human and an artificial intelligence assistant. The "
  "assistant gives helpful, detailed, and polite answers to the human's questions.",
  "vicuna_v1": "A chat between a curious user and an artificial intelligence assistant. The "
  "assistant gives helpful, detailed, and polite answers to the user's questions.",
}
WRITTEN = {
  "vicuna_v0": SYSTEM["vicuna_v0"] + "\n\n### Human: Hello?\n### Assistant: Hi.\n### Human: Why?\n"
  "### Assistant: So.\n### ",
  "vicuna_v1": SYSTEM["vicuna_v1"] + " USER: Hello? ASSISTANT: Hi.</s>USER: Why? "
  "ASSISTANT: So.</s>",
  "chatml": "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
  "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>",
  "plain": " Hello?\n Hi.</s> Why?\n So.</s>",
}  # fmt: skip
SUPERVISED = {
  "vicuna_v0": ["Hi.\n###", "So.\n###"],
  "vicuna_v1": ["Hi.</s>", "So.</s>"],
  "chatml": ["Hi.<|im_end|>", "So.<|im_end|>"],
  "plain": ["Hi.</s>", "So.</s>"],
}


def test_templates_as_text(tiny):
  dialogue = example("Hello?", "Hi.", "Why?", "So.", images=(), regions=())
  for template, written in WRITTEN.items():
    encoded = tiny_renderer(tiny, template=template).encode(dialogue)
    assert tiny.decode(encoded.ids) == written


def test_answer_and_stop_are_supervised_and_nothing_else(renderer):
  dialogue = example("Hello {region:0}?", "Hi.", "Why?", "So.")
  encoded = renderer.encode(dialogue)
  found = [s.strip() for s in spans(encoded, renderer.tokenizer)]
  assert found == SUPERVISED[renderer.config.template]
  runs = [int(k) for k in np.unique(encoded.answer_ids)]
  assert runs == [0, 1, 2]
  assert ((encoded.answer_ids > 0) == encoded.mask).all()
  assert [a[0] for a in encoded.answers] == ["task0", "task1"]


def test_answers_marked_unsupervised_are_not(renderer):
  dialogue = example("Hello?", "Hi.", "Why?", "So.")
  turns = list(dialogue.turns)
  turns[1] = dataclasses.replace(turns[1], supervise=False)
  encoded = renderer.encode(dataclasses.replace(dialogue, turns=tuple(turns)))
  assert len(spans(encoded, renderer.tokenizer)) == 1
  assert encoded.answers == (("task1", "So.", ""),)
  assert encoded.answer_ids.max() == 1


def test_system_turn_replaces_the_templates_own(renderer):
  dialogue = example("Hello?", "Hi.", images=(), regions=())
  system = dataclasses.replace(dialogue, turns=(Turn("system", "Be brief."), *dialogue.turns))
  text = renderer.tokenizer.decode(renderer.encode(system).ids)
  assert "Be brief." in text and "curious" not in text
  silent = dataclasses.replace(dialogue, turns=(Turn("system", ""), *dialogue.turns))
  assert "curious" not in renderer.tokenizer.decode(renderer.encode(silent).ids)


# A dialogue is ids.


def test_gold_answers_kept_as_ids_give_the_training_ids(renderer):
  texts = ("Is {region:0} {region:1}?", "It is.", "{region:1}", "No", "Why, {region:0}?", "So.")
  whole = renderer.encode(example(*texts))
  prompt = renderer.prompt(example(texts[0]))
  for k in range(1, len(texts), 2):
    assert whole.ids[: len(prompt)].tolist() == prompt.ids.tolist()
    at = len(prompt)
    end = at + int(np.argmin(np.append(whole.mask[at:], False)))
    generated = whole.ids[at:end]
    assert renderer.answer_text(generated) == texts[k]
    assert renderer.cut_at_stop([*generated, 5, 6]) == (generated.tolist(), True)
    if k + 1 < len(texts):
      more = renderer.extend(prompt, generated, example(*texts[: k + 2]))
      prompt = prompt.followed_by(generated, more)
      again = renderer.prompt(example(*texts[: k + 2]))
      assert again.ids.tolist() == prompt.ids.tolist()
      assert (again.region_slots, again.introduced) == (prompt.region_slots, prompt.introduced)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_each_prompt_is_a_prefix_of_the_next(renderer, data):
  """Whatever was generated: with the stop, without it, with half of it, or nothing."""
  chat = Conversation(renderer, images=(IMAGE,))
  before: list[int] = []
  regions = 0
  ids = st.integers(0, renderer.tokenizer.vocab_size - 1)
  for turn in range(3):
    new = data.draw(st.lists(st.sampled_from([BOX, POINT]), max_size=2))
    names = [f"<region{regions + k + 1}>" for k in range(len(new))]
    text = "".join(data.draw(st.permutations(names + data.draw(st.lists(st.sampled_from(NASTY))))))
    regions += len(new)
    prompt = chat.ask(text, new)
    assert prompt.ids[: len(before)].tolist() == before
    if turn:
      assert len(prompt) > len(before)
    slots = (prompt.ids == renderer.tokenizer.region_slot_id).sum()
    made_up = sum(i == renderer.tokenizer.region_slot_id for i in before)
    assert slots >= len(prompt.region_slots) and slots - made_up <= len(prompt.region_slots)
    generated = data.draw(st.lists(ids, max_size=4))
    generated += data.draw(
      st.sampled_from([(), renderer._stop, renderer._stop[:1], *renderer.stop_sequences])
    )
    chat.answered(generated)
    before = prompt.ids.tolist() + chat.generated


def test_the_answers_mark_stands_behind_a_slot(renderer):
  """`plain` marks the answer by a newline, which the slow rule would drop behind a slot."""
  for text in ("", "{region:0}"):
    prompt = renderer.prompt(example(text))
    last = renderer.tokenizer.decode(prompt.ids)
    opening = renderer.template.answer_open[-1]
    assert last.endswith(opening)


def test_missing_part_of_the_stop_is_completed(llama):
  renderer = gpt4roi(llama)
  first = renderer.prompt(RUNNING)
  again = dataclasses.replace(RUNNING, turns=(Turn("user", "Why?"),))
  following = numbers("12968 29901 3750 29973 13 2277 29937 4007 22137 29901")
  for kept in ([], [13], [13, 2277], [13, 2277, 29937], [835]):
    missing = [] if kept in ([835], [13, 2277, 29937]) else [13, 2277, 29937][len(kept) :]
    more = renderer.extend(first, [940, *kept], again)
    assert more.ids.tolist() == missing + following


@pytest.mark.parametrize("kind", ["tiny", "llama"])
@pytest.mark.parametrize(
  "pieces, behind",
  [
    (("#", "#", "#"), ""),
    (("##", "#"), ""),
    (("#", "##"), ""),
    (("\n", "##", "#"), ""),
    (("##", "##"), "\n###"),  # the last piece says more than the stop, which is written again
    (("#", "#", "#", " b"), "\n###"),
  ],
)
def test_a_stop_ends_an_answer_however_it_is_spelled(tiny, llama, kind, pieces, behind):
  """GPT4RoI looks for "###" in the text too, not for its usual ids."""
  renderer = tiny_renderer(tiny, template="vicuna_v0") if kind == "tiny" else gpt4roi(llama)
  tokenizer = renderer.tokenizer
  encoded = [tokenizer.encode_text(piece, start="inside") for piece in ("a", *pieces)]
  generated = [i for ids in encoded for i in ids]
  needed = len(generated) - (len(encoded[-1]) if pieces[-1] == " b" else 0)
  kept, found = renderer.cut_at_stop([*generated, *encoded[0]])
  assert (kept, found) == (generated[:needed], True)
  assert renderer.cut_at_stop(kept) == (kept, True)
  assert renderer.answer_text(kept) == renderer.answer_text(generated) == "a"
  first = renderer.prompt(RUNNING)
  more = renderer.extend(first, generated, dataclasses.replace(RUNNING, turns=RUNNING.turns[:1]))
  assert tokenizer.decode(more.ids).removeprefix(" ").startswith((behind + " Human: ").lstrip(" "))
  # Text without the stop goes on as before.
  assert renderer.cut_at_stop(generated[:2]) == (generated[:2], False)


# Text from people is text.


@settings(max_examples=60, deadline=None)
@given(
  texts=st.lists(st.lists(st.sampled_from(NASTY), max_size=6).map("".join), min_size=2, max_size=2)
)
def test_nothing_that_people_write_is_a_slot_or_a_stop(renderer, texts):
  tokenizer = renderer.tokenizer
  clean = renderer.encode(example("{region:0}", "b", regions=(BOX,)))
  question, answer = (escape(t) for t in texts)
  encoded = renderer.encode(example("{region:0} " + question, answer, regions=(BOX,)))
  for index in tokenizer.added.values():
    assert (encoded.ids == index).sum() == (clean.ids == index).sum()
  assert _stops(encoded.ids, renderer) == _stops(clean.ids, renderer)
  assert len(spans(encoded, tokenizer)) == 1


def _stops(ids, renderer) -> int:
  ids = ids.tolist()
  return sum(
    tuple(ids[at : at + len(stop)]) == stop
    for stop in renderer.stop_sequences
    for at in range(len(ids))
  )


def test_hostile_text_reads_as_it_was_written(tiny):
  text = "</s> ### <bbox> {region:0} {image:0} {region\\:0} <|im_end|> <im_patch>"
  encoded = tiny_renderer(tiny, template="vicuna_v0").encode(
    example(escape(text), escape(text), images=(), regions=())
  )
  assert tiny.decode(encoded.ids).count(text) == 2
  assert encoded.region_slots == encoded.image_slots == ()


# Length.


def test_truncation_drops_whole_exchanges_from_the_end(renderer):
  texts = ("Is {region:0} red?", "No.", "And {region:1}?", "Yes, it is.", "{region:0}?", "Red.")
  full = renderer.encode(example(*texts))
  cuts = [renderer.encode(example(*texts[:n])) for n in (2, 4, 6)]
  for length in range(len(cuts[0]), len(full) + 2):
    got = renderer.encode(example(*texts), max_length=length)
    want = max((c for c in cuts if len(c) <= length), key=len)
    assert got.ids.tolist() == want.ids.tolist()
    assert got.mask.tolist() == want.mask.tolist()
    assert (got.answers, got.region_slots) == (want.answers, want.region_slots)
  with pytest.raises(PromptError, match="limit is"):
    renderer.encode(example(*texts), max_length=len(cuts[0]) - 1)


def test_box_marks_are_text_where_the_vocabulary_lacks_them(llama):
  config = dataclasses.replace(
    ModelConfig.chatspot_7b(),
    decoder=dataclasses.replace(ModelConfig.chatspot_7b().decoder, vocab_size=llama.vocab_size),
  )
  renderer = Renderer(PromptConfig(template="vicuna_v1"), config, llama)
  text = llama.decode(renderer.encode(example("Is {region:1} red?", "No.")).ids)
  assert "Is region2 <box>[0.250, 0.500]</box> red?" in text


def test_tokenizer_must_fit(llama, tiny):
  with pytest.raises(ConfigError, match="vocab_size"):
    Renderer(PromptConfig(), ModelConfig.tiny(), llama)
  bare = bpe_spec([(c, 0.0, 1) for c in "#abc\n ▁"])
  bare = Tokenizer(TokenizerFiles(bare, {}))
  with pytest.raises(ConfigError, match="<bbox>"):
    Renderer(PromptConfig(template="vicuna_v0"), ModelConfig.tiny(), bare)
  with pytest.raises(ConfigError, match=r"<\|im_end\|>, <\|im_start\|>"):
    Renderer(PromptConfig(template="chatml"), ModelConfig.tiny("none"), bare)
  with pytest.raises(ConfigError, match="an end token"):
    Renderer(PromptConfig(template="plain"), ModelConfig.tiny("none"), bare)
  with pytest.raises(ConfigError, match="could not be told"):
    Renderer(PromptConfig(template="vicuna_v0"), ModelConfig.tiny("none"), bare)

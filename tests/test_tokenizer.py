"""Tokenizer: against sentencepiece and transformers, plain text, guards, files, the tiny asset."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_vocabulary import llama_model

from regionjax.config import Config, ModelConfig
from regionjax.conversation import Renderer
from regionjax.data.schema import Example, ImageRef, Turn
from regionjax.regions import Region
from regionjax.tokenizer import (
  CHATSPOT_TOKENS,
  GPT4ROI_TOKENS,
  Tokenizer,
  TokenizerError,
  load_tokenizer,
)
from regionjax.tokenizer_files import TINY

USER = 4  # the kind of a piece
HOSTILE = ("<bbox>", "<im_patch>", "</s>", "<s>", "<unk>", "###", "<|im_end|>", "<0x0A>", "[PAD]")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
  path = tmp_path_factory.mktemp("llama") / "tokenizer.model"
  path.write_bytes(llama_model().SerializeToString())
  return path


@pytest.fixture(scope="module")
def llama(model_file):
  return load_tokenizer(model_file, added=GPT4ROI_TOKENS)


@pytest.fixture(scope="module")
def oracle():
  return sentencepiece.SentencePieceProcessor(model_proto=llama_model().SerializeToString())


@pytest.fixture(scope="module")
def tiny():
  return load_tokenizer("tiny")


def random_texts(count: int, seed: int = 0) -> list[str]:
  chance = random.Random(seed)
  letters = "abc ABCxyz  \n\t#<>/'.,0123456789éüß中文字日本😀\u200b\xa0\u0301"
  words = ["the", "region", "  ", "\n\n", "====", "----", "aaaa", " " * 7, " " * 17, *HOSTILE]
  return [
    "".join(chance.choice(chance.choice((letters, words))) for _ in range(chance.randrange(40)))
    for _ in range(count)
  ]


def test_llama_agrees_with_sentencepiece(llama, oracle):
  for text in random_texts(3000):
    assert llama.encode_text(text) == oracle.encode(text), text


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_llama_agrees_with_sentencepiece_on_any_unicode(llama, oracle, text):
  assert llama.encode_text(text) == oracle.encode(text)


def test_inside_a_segment_there_is_no_dummy_prefix(llama):
  plain = llama_model(add_dummy_prefix=False).SerializeToString()
  oracle = sentencepiece.SentencePieceProcessor(model_proto=plain)
  for text in random_texts(500, seed=1):
    assert llama.encode_text(text, start="inside") == oracle.encode(text), text


def test_published_vectors(llama):
  header = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions.\n\n"
  )
  assert llama.encode_text(header) == [
    319, 13563, 1546, 263, 12758, 5199, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076,
    8444, 29892, 13173, 29892, 322, 1248, 568, 6089, 304, 278, 5199, 29915, 29879, 5155, 29889, 13,
    13,
  ]  # fmt: skip
  assert llama.encode_text("provides") == [8128]
  assert llama.encode_text("###") == [835]
  assert llama.encode_text("\n###", start="inside") == [13, 2277, 29937]


def test_ids_of_the_two_systems(llama, model_file):
  assert llama.vocab_size == 32006
  assert (llama.bos_id, llama.eos_id, llama.pad_id) == (1, 2, 32000)
  assert [llama.added[t] for t in GPT4ROI_TOKENS] == list(range(32000, 32006))
  assert (llama.image_slot_id, llama.region_slot_id) == (32001, 32002)
  assert (llama.im_start_id, llama.im_end_id) == (32004, 32005)
  chatspot = load_tokenizer(model_file, added=CHATSPOT_TOKENS)
  assert chatspot.vocab_size == 32006
  assert chatspot.added["</box>"] == 32005
  assert chatspot.region_slot_id == -1


@pytest.mark.parametrize("name", ["llama", "tiny"])
def test_text_is_text(name, request):
  tokenizer = request.getfixturevalue(name)
  reserved = set(tokenizer.added.values())
  for text in [*HOSTILE, *tokenizer.added, *random_texts(500, seed=2)]:
    ids = tokenizer.encode_text(text)
    assert reserved.isdisjoint(ids), text
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode_text(text, guard=("###", " "))) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_tiny_encodes_any_text(tiny, text):
  ids = tiny.encode_text(text)
  assert tiny.decode(ids) == text
  assert all(len(tiny.added) <= i < tiny.vocab_size for i in ids)


def test_surrogates_are_refused(tiny):
  with pytest.raises(TokenizerError, match="surrogate"):
    tiny.encode_text("a\ud800")


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="# a\n", max_size=30))
def test_guarded_strings_never_have_their_usual_ids(llama, tiny, text):
  for tokenizer in (llama, tiny):
    ids = tokenizer.encode_text(text, guard=("###",))
    assert tokenizer.decode(ids) == text
    joined = f",{','.join(map(str, ids))},"
    for start in ("segment", "inside"):
      stop = ",".join(map(str, tokenizer.encode_text("###", start=start)))
      assert f",{stop}," not in joined


def test_guard_leaves_other_text_alone(llama):
  for text in ("a # b", "## title", "no marks"):
    assert llama.encode_text(text, guard=("###",)) == llama.encode_text(text)


def test_decode_shows_added_tokens_and_refuses_unknown_ids(llama, tiny):
  assert llama.decode([32004, 32001, 32005, 8128]) == "<im_start><im_patch><im_end> provides"
  assert llama.decode([29871, 243]) == "\ufffd"
  with pytest.raises(TokenizerError, match="outside the vocabulary"):
    tiny.decode([tiny.vocab_size])


def test_saved_and_loaded_again_it_is_the_same(llama, tiny, tmp_path):
  for tokenizer in (llama, tiny):
    tokenizer.save(tmp_path / "t")
    again = load_tokenizer(tmp_path / "t")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.added == tokenizer.added
    assert (again.bos_id, again.eos_id, again.pad_id) == (
      tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id,
    )  # fmt: skip
    assert load_tokenizer(tmp_path / "t" / "tokenizer.json").fingerprint == tokenizer.fingerprint
  assert load_tokenizer("tiny", added=["<new>"]).fingerprint != tiny.fingerprint


def test_transformers_opens_what_was_saved(llama, tiny, tmp_path):
  import transformers

  for tokenizer in (llama, tiny):
    tokenizer.save(tmp_path / "t")
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    for text in ("What is this?", "two  blanks, a\nline and é"):
      assert other.encode(text, add_special_tokens=False) == tokenizer.encode_text(text)
    assert other.convert_tokens_to_ids("<bbox>") == tokenizer.region_slot_id


def test_folder_without_tokenizer_json(model_file, llama, tmp_path):
  (tmp_path / "tokenizer.model").write_bytes(model_file.read_bytes())
  added = {t: i for t, i in llama.added.items() if i >= 32000}
  (tmp_path / "added_tokens.json").write_text(json.dumps(added))
  (tmp_path / "special_tokens_map.json").write_text(
    json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": "[PAD]"})
  )
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer.added == llama.added
  assert tokenizer.pad_id == 32000
  assert tokenizer.encode_text("region1 <bbox>") == llama.encode_text("region1 <bbox>")


def test_folder_that_transformers_must_convert(tmp_path):
  import transformers  # noqa: F401

  alphabet = sorted(set("Ġabcdefghij<|endoftext|>"))
  vocab = {c: i for i, c in enumerate(alphabet)} | {"Ġa": len(alphabet), "<|endoftext|>": 90}
  (tmp_path / "vocab.json").write_text(json.dumps(vocab))
  (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ a\n")
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"})
  )
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer.eos_id == 90
  assert tokenizer.encode_text(" ab") == [vocab["Ġa"], vocab["b"]]
  assert not tokenizer.dummy_prefix


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize(
  "pre_tokenizer", [METASPACE, {"type": "Sequence", "pretokenizers": [METASPACE]}]
)
def test_metaspace_files_follow_the_same_rule(llama, tmp_path, pre_tokenizer):
  spec = json.loads(llama.to_json())
  spec |= {"normalizer": None, "pre_tokenizer": pre_tokenizer, "decoder": METASPACE}
  (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
  tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
  assert tokenizer.dummy_prefix
  for text in ("What is this?", "  two", "###"):
    assert tokenizer.encode_text(text) == llama.encode_text(text)
    assert tokenizer.encode_text(text, start="inside") == llama.encode_text(text, start="inside")
    assert tokenizer.decode(tokenizer.encode_text(text)) == text


def test_merges_that_make_a_special_token_are_undone(tmp_path):
  vocab = {c: i for i, c in enumerate("</s>ab")} | {"</": 6, "s>": 7, "</s>": 8}
  spec = {
    "added_tokens": [{"id": 8, "content": "</s>", "lstrip": False, "rstrip": False,
                      "single_word": False, "normalized": False, "special": True}],
    "model": {"type": "BPE", "vocab": vocab, "merges": ["< /", "s >", "</ s>"]},
  }  # fmt: skip
  (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer.encode_text("a</s>b") == [4, 0, 1, 2, 3, 5]
  spec["added_tokens"].append(dict(spec["added_tokens"][0], id=4, content="a"))
  (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
  with pytest.raises(TokenizerError, match="only encode as a special token"):
    load_tokenizer(tmp_path).encode_text("ba")


def test_user_defined_pieces_are_added_tokens(tmp_path):
  model = llama_model()
  model.pieces.add(piece="<mark>", score=0, type=USER)
  path = tmp_path / "m.model"
  path.write_bytes(model.SerializeToString())
  tokenizer = load_tokenizer(path)
  assert tokenizer.added["<mark>"] == 32000
  assert 32000 not in tokenizer.encode_text("a <mark> b")


@pytest.mark.parametrize(
  ("write", "match"),
  [
    (None, "no such file or folder"),
    (("tokenizer.json", b"{"), "not a tokenizers JSON"),
    (("tokenizer.json", b"[]"), "no 'model' entry"),
    (("x.model", b"\xff\xff\xff"), "not a sentencepiece model"),
    (("config.json", b"{}"), "expected tokenizer.json or one"),
  ],
)
def test_files_that_are_no_tokenizer(tmp_path, write, match):
  if write is None:
    tmp_path = tmp_path / "absent"
  else:
    (tmp_path / write[0]).write_bytes(write[1])
  with pytest.raises(TokenizerError, match=match):
    load_tokenizer(tmp_path)


def test_models_that_change_the_text_are_refused(tmp_path):
  path = tmp_path / "m.model"
  path.write_bytes(llama_model(remove_extra_whitespaces=True).SerializeToString())
  with pytest.raises(TokenizerError, match="only BPE models"):
    load_tokenizer(path)


def test_added_ids_must_be_free(model_file):
  assert load_tokenizer(model_file, added={"<bbox>": 32002}).region_slot_id == 32002
  with pytest.raises(TokenizerError, match="that id is"):
    load_tokenizer(model_file, added={"<bbox>": 940})
  with pytest.raises(TokenizerError, match="already has id 2"):
    load_tokenizer(model_file, added={"</s>": 32000})


# The tiny asset.


def test_tiny_vocabulary(tiny):
  assert tiny.vocab_size <= 1024
  vocab = json.loads(TINY.read_text(encoding="utf-8"))["model"]["vocab"]
  assert sorted(vocab.values()) == list(range(tiny.vocab_size))
  digits = [t for t in vocab if any("0" <= c <= "9" for c in t)]
  assert sorted(digits) == list("0123456789")
  assert tiny.encode_text("2023") == [vocab[c] for c in "2023"]
  assert tiny.bos_id == -1
  assert min(tiny.image_slot_id, tiny.im_start_id, tiny.im_end_id, tiny.region_slot_id) > 0


@pytest.mark.parametrize(
  ("text", "most"),
  [
    (" red", 1), (" a small red circle", 4), (" yes", 1), (" (B)", 1), (" What colour is", 3),
    ("[0.12, 0.34, 0.56, 0.78]", 21), (" region1", 2), ("###", 1),
  ],
)  # fmt: skip
def test_tiny_is_short_on_what_it_reads(tiny, text, most):
  assert len(tiny.encode_text(text)) <= most


@pytest.mark.slow
def test_tiny_is_what_its_script_makes(tmp_path):
  script = Path(__file__).parents[1] / "launch" / "make_tokenizer.py"
  subprocess.run([sys.executable, script, "--out", tmp_path / "t.json"], check=True)
  assert (tmp_path / "t.json").read_bytes() == TINY.read_bytes()


def test_repeated_texts_are_encoded_once(tiny, monkeypatch):
  tokenizer = Tokenizer(tiny._files)
  tokenizer.encode_text("What is this?")
  monkeypatch.setattr(tokenizer, "_encode_piece", lambda piece: pytest.fail("encoded again"))
  assert tokenizer.decode(tokenizer.encode_text("What is this?")) == "What is this?"


@pytest.mark.parametrize("name", ["gpt4roi_7b", "gpt4roi_13b", "chatspot_7b"])
def test_presets_bind_tokens_template_and_resize_rule(name, model_file):
  config = getattr(Config, name)(str(model_file))
  assert config.model == getattr(ModelConfig, name)()
  tokenizer = load_tokenizer(config.prompt.tokenizer, config.prompt.added_tokens)
  assert tokenizer.vocab_size == config.model.decoder.vocab_size == 32006
  box = Region.box(0.1, 0.2, 0.5, 0.9)
  image = ImageRef("file", "a.png")
  turns = (Turn("user", "What is {region:0}?"), Turn("assistant", "A cat.", True))
  encoded = Renderer(config.prompt, config.model, tokenizer).encode(
    Example(images=(image,), regions=(box,), region_images=(0,), turns=turns)
  )
  text = tokenizer.decode(encoded.ids)
  assert (encoded.ids == tokenizer.image_slot_id).sum() == 256
  if name == "chatspot_7b":
    assert "<box>[0.100, 0.200, 0.500, 0.900]</box>" in text.replace("<box> ", "<box>")
    assert not encoded.region_slots and config.data.resize == "chatspot"
  else:
    assert "provides an overview of the picture" in text and "region1" in text
    assert len(encoded.region_slots) == 1 and config.data.resize == "gpt4roi"

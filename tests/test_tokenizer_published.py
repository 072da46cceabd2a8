"""What a tokenizer gains on its way to transformers, and that it loses it on the way back."""

import json

import pytest
import tokenizers
from llama_vocabulary import llama_model
from transformers import AutoTokenizer

from regionjax.tokenizer import GPT4ROI_TOKENS, Tokenizer, load_tokenizer
from regionjax.tokenizer_files import TokenizerFiles, added_token, read
from regionjax.tokenizer_published import KEY, published

BEGIN, END = "<s>", "</s>"
ADDED = (BEGIN, END)
BYTE_LEVEL = {
  "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True,
}  # fmt: skip
REPLACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
PREPEND = {"type": "Prepend", "prepend": "▁"}


def template(*before: str) -> dict:
  return {
    "type": "TemplateProcessing",
    "single": [
      *({"SpecialToken": {"id": token, "type_id": 0}} for token in before),
      {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")],
    "special_tokens": {
      token: {"id": token, "ids": [ADDED.index(token)], "tokens": [token]} for token in before
    },
  }


def spec_of(**parts) -> dict:
  """Single bytes and ADDED."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  return {
    "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
    "added_tokens": [added_token(content, i) for i, content in enumerate(ADDED)],
    "pre_tokenizer": BYTE_LEVEL, "post_processor": None, "decoder": BYTE_LEVEL,
    "model": {"type": "BPE", "vocab": {c: i for i, c in enumerate([*ADDED, *alphabet])},
              "merges": [], "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
              "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
              "ignore_merges": False},
  } | parts  # fmt: skip


@pytest.mark.parametrize(
  ("begin", "step", "changed"),
  [
    (BEGIN, None, True),
    (BEGIN, BYTE_LEVEL, True),
    (BEGIN, {"type": "Sequence", "processors": [BYTE_LEVEL]}, True),
    (BEGIN, template(BEGIN), False),
    (BEGIN, template(), False),  # its publisher's word, whatever a configuration told us
    (None, None, False),
    (None, template(BEGIN), False),
  ],
)
def test_texts_begin_in_transformers_and_the_way_back_is_exact(tmp_path, begin, step, changed):
  spec = spec_of(post_processor=step)
  roles = {"eos": END} | ({"bos": begin} if begin else {})
  tokenizer = Tokenizer(TokenizerFiles(spec, roles))
  tokenizer.publish(tmp_path)
  written = json.loads((tmp_path / "tokenizer.json").read_text())
  assert (written != spec) == changed
  assert (KEY in json.loads((tmp_path / "tokenizer_config.json").read_text())) == changed
  if changed:
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("a")["input_ids"] == [0, *tokenizer.encode_text("a")]
    assert theirs("a", "b")["input_ids"] == [
      0, *tokenizer.encode_text("a"), 0, *tokenizer.encode_text("b"),
    ]  # fmt: skip
    assert theirs("a", add_special_tokens=False)["input_ids"] == tokenizer.encode_text("a")
  assert read(tmp_path) == TokenizerFiles(spec, roles)
  assert load_tokenizer(tmp_path / "tokenizer.json").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
  ("normalizer", "decoder", "changed"),
  [
    ({"type": "Sequence", "normalizers": [PREPEND]}, [REPLACE, {"type": "Fuse"}], True),
    (PREPEND, [REPLACE], True),
    (PREPEND, [REPLACE, STRIP], False),
    (PREPEND, [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}], False),
    (None, [REPLACE], False),
  ],
)
def test_a_prefix_that_is_put_is_dropped_again(normalizer, decoder, changed):
  spec = spec_of(normalizer=normalizer, decoder={"type": "Sequence", "decoders": decoder})
  out, before = published(spec, None)
  assert before == ({"decoder": spec["decoder"]} if changed else {})
  assert out["decoder"]["decoders"] == [*decoder, *([STRIP] if changed else [])]
  assert spec["decoder"]["decoders"] == decoder, "the tokenizer's own stays as it is"


def test_our_own_files_say_nothing_of_it(tmp_path):
  (tmp_path / "tokenizer.model").write_bytes(llama_model().SerializeToString())
  tokenizer = load_tokenizer(tmp_path / "tokenizer.model", GPT4ROI_TOKENS)
  before = tokenizer.to_json()
  tokenizer.publish(tmp_path / "theirs")
  again = load_tokenizer(tmp_path / "theirs")
  assert again.fingerprint == tokenizer.fingerprint and again.to_json() == before
  for saved in (tokenizer, again):
    saved.save(tmp_path / "ours")
    spec = json.loads((tmp_path / "ours" / "tokenizer.json").read_text())
    assert spec["post_processor"] is None
    assert all(step["type"] != "Strip" for step in spec["decoder"]["decoders"])
    assert KEY not in json.loads((tmp_path / "ours" / "tokenizer_config.json").read_text())


def test_what_transformers_saves_again_is_read_as_it_is_then(tmp_path):
  (tmp_path / "tokenizer.model").write_bytes(llama_model().SerializeToString())
  tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
  tokenizer.publish(tmp_path / "out")
  theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
  for puts in (True, False):
    theirs.add_bos_token = puts
    theirs.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.bos_id == (1 if puts else -1)
    assert json.loads(again.to_json())["post_processor"] is None
    assert again.encode_text(" a  lion") == tokenizer.encode_text(" a  lion")

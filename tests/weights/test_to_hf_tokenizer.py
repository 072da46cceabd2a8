"""`regionjax convert --to-hf`: the tokenizer that transformers finds there is the original one."""

import json

import pytest
import sentencepiece
import torch
from hf_folders import TEXT, randomised
from llama_vocabulary import llama_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaTokenizerFast

from regionjax.cli import main
from regionjax.tokenizer import load_tokenizer
from regionjax.weights import release

TEXTS = (
  "a lion", "", " ", " a leading blank", "two  blanks   three", "a trailing blank ", "\n",
  "one\ntwo\n\nthree", "\ttab", "héllo wörld ß", "中文字 日本語", "😀 👩‍👩‍👧 \u200b\u0301",
  "don't 12,345.67 <region1> [0.1, 0.5]", "ASSISTANT: USER: ###", "a" * 200,
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """(a LLaMA as it was first published, its release, the way back, the release made of that)."""
  root = tmp_path_factory.mktemp("llama")
  config = LlamaConfig(**TEXT | dict(vocab_size=32000, hidden_size=16, num_hidden_layers=1))
  source, made, back, again = (root / name for name in ("source", "made", "back", "again"))
  randomised(LlamaForCausalLM(config)).to(torch.bfloat16).save_pretrained(source)
  (source / "tokenizer.model").write_bytes(llama_model().SerializeToString())
  names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
  (source / "tokenizer_config.json").write_text(json.dumps(names))
  assert main(["convert", "--from", "hf-llama", str(source), "--to", str(made)]) == 0
  assert main(["convert", "--to-hf", str(made), "--to", str(back)]) == 0
  assert main(["convert", "--from", "hf-llama", str(back), "--to", str(again)]) == 0
  return source, made, back, again


@pytest.fixture(scope="module")
def original():
  """What the slow LlamaTokenizer does: sentencepiece, and the begin token before it."""
  words = sentencepiece.SentencePieceProcessor(model_proto=llama_model().SerializeToString())
  return lambda text: [1, *words.encode(text)]


@pytest.fixture(scope="module")
def theirs(folders):
  return AutoTokenizer.from_pretrained(folders[2])


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_original_ones(theirs, original, text):
  assert theirs(text)["input_ids"] == original(text)
  assert theirs(text, add_special_tokens=False)["input_ids"] == original(text)[1:]
  assert theirs.decode(original(text), skip_special_tokens=True) == text


def test_special_tokens(theirs, original):
  names = (theirs.bos_token, theirs.eos_token, theirs.bos_token_id, theirs.eos_token_id)
  assert names == ("<s>", "</s>", 1, 2)
  cut = [*original("a ")[1:], 1, *original(" b")[1:], 2, *original("c")[1:]]
  assert theirs("a <s> b</s>c")["input_ids"] == [1, *cut]
  assert theirs("a", "b")["input_ids"] == [*original("a"), *original("b")]


def test_llamas_own_class_begins_with_it_too(folders, original):
  """It makes its normaliser itself, which takes leading blanks for the prefix: none here."""
  theirs = LlamaTokenizerFast.from_pretrained(folders[2])
  for text in TEXTS:
    if not text.startswith(" "):
      assert theirs(text)["input_ids"] == original(text), text


def test_there_and_back_it_is_the_same_tokenizer(folders):
  _, made, _, again = folders
  prints = {load_tokenizer(folder).fingerprint for folder in folders}
  assert len(prints) == 1
  for name in ("tokenizer.json", "tokenizer_config.json"):
    assert (again / name).read_bytes() == (made / name).read_bytes()
  assert json.loads((made / "tokenizer.json").read_text())["post_processor"] is None
  opened = release.open_release(again)
  assert opened.tokenizer.bos_id == 1 and opened.tokenizer.vocab_size == 32000

"""Tokenizers from GGUF metadata, against sentencepiece and the tokenizers that they come from."""

import json
import lzma
import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from regionjax.config import DecoderConfig, ModelConfig, PromptConfig, RegionConfig
from regionjax.conversation import Renderer
from regionjax.data.schema import Example, Turn
from regionjax.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from regionjax.weights.gguf_header import Fields
from regionjax.weights.gguf_tokenizer import PRE_TOKENIZERS, read_tokenizer
from regionjax.weights.tensors import WeightsError

DATA = Path(__file__).parents[1] / "data"
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
LLAMA3 = (  # from LLaMA 3's tokenizer.json
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RULES = {
  "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
  "smollm": pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  ),
  "llama-bpe": pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  ),
}


def texts(count: int, seed: int = 0) -> list[str]:
  chance = random.Random(seed)
  words = [
    "the", "region", " ", "  ", "\n", "\n\n", "\t", "12", "2023", "0.5", "²", "don't", "I'LL", "é",
    "日本", "😀", "...", " (", "x1", "<|end|>", "word", "ing", "\r\n", "####", "'s",
  ]  # fmt: skip
  return ["".join(chance.choices(words, k=chance.randrange(1, 14))) for _ in range(count)]


def trained(rule: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
  """A byte-level BPE that learned its merges with this rule."""
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer, made.decoder = rule, decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=600,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=["<|begin|>", "<|end|>"],
    show_progress=False,
  )
  made.train_from_iterator(texts(2000, seed=1), trainer)
  return made


def fields_of(made: tokenizers.Tokenizer, pre: str, **more) -> Fields:
  """A tokenizer as llama.cpp's converter writes it."""
  model = json.loads(made.to_str())["model"]
  tokens = sorted(model["vocab"], key=model["vocab"].get)
  merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
  values = {
    "model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges,
    "token_type": [CONTROL] * 2 + [NORMAL] * (len(tokens) - 2),
    "bos_token_id": 0, "eos_token_id": 1, "padding_token_id": 1,
  } | more  # fmt: skip
  named = {f"tokenizer.ggml.{k}": v for k, v in values.items() if v is not None}
  return Fields(named, where="m.gguf")


@pytest.fixture(scope="module")
def made():
  """The tokenizers that the files are written from, by rule."""
  return {name: trained(rule) for name, rule in RULES.items()}


@pytest.mark.parametrize("pre", RULES)
def test_byte_level_ids_are_the_originals(made, pre):
  ours = Tokenizer(read_tokenizer(fields_of(made[pre], pre)))
  assert ours.vocab_size == 600
  for text in texts(1500):
    plain = text.replace("<|end|>", "")
    assert ours.encode_text(plain) == made[pre].encode(plain).ids, plain
    assert ours.decode(ours.encode_text(text)) == text  # a control token's string is plain text
    assert 1 not in ours.encode_text(text)


def test_the_rules_differ(made):
  """Or the test above could not tell them apart."""
  fields = {pre: fields_of(made["gpt-2"], pre) for pre in RULES}
  ours = {pre: Tokenizer(read_tokenizer(f)) for pre, f in fields.items()}
  ids = {pre: [t.encode_text(text) for text in texts(200)] for pre, t in ours.items()}
  assert ids["gpt-2"] != ids["smollm"] != ids["llama-bpe"] != ids["gpt-2"]
  assert ours["smollm"].encode_text("2023") == [
    i for digit in "2023" for i in ours["smollm"].encode_text(digit)
  ]


def test_llama3_takes_whole_words_as_they_are(made):
  """Its tokenizer.json says ignore_merges: a token that no merge reaches is found all the same."""
  fields = dict(fields_of(made["llama-bpe"], "llama-bpe"))
  tokens = [*fields["tokenizer.ggml.tokens"], "qxqword"]
  fields |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [NORMAL] * len(tokens)}
  ours = Tokenizer(read_tokenizer(Fields(fields, where="m.gguf")))
  assert ours.encode_text("qxqword") == [600]
  fields["tokenizer.ggml.pre"] = "gpt-2"
  assert 600 not in Tokenizer(read_tokenizer(Fields(fields, where="m.gguf"))).encode_text("qxqword")


def test_saved_and_loaded_again_it_is_the_same(made, tmp_path):
  ours = Tokenizer(read_tokenizer(fields_of(made["smollm"], "smollm", add_bos_token=True)))
  ours.save(tmp_path)
  again = load_tokenizer(tmp_path, added=["<im_patch>", "<bbox>"])
  assert again.added == ours.added | {"<im_patch>": 600, "<bbox>": 601}
  assert (again.bos_id, again.eos_id, again.pad_id) == (0, 1, 1)
  for text in texts(100):
    assert again.encode_text(text) == ours.encode_text(text)


@pytest.mark.parametrize(
  ("change", "ids"),
  [
    ({}, (-1, 1, 1)),  # byte-level vocabularies begin with nothing unless the file says so
    ({"add_bos_token": True}, (0, 1, 1)),
    ({"pre": "llama-bpe"}, (0, 1, 1)),  # but LLaMA 3 does
    ({"pre": "llama-bpe", "add_bos_token": False}, (-1, 1, 1)),
    ({"padding_token_id": None}, (-1, 1, 1)),
    ({"eos_token_id": 300, "padding_token_id": None}, (-1, 300, 300)),  # called normal by mistake
  ],
)
def test_roles_are_those_that_llama_cpp_uses(made, change, ids):
  ours = Tokenizer(read_tokenizer(fields_of(made["gpt-2"], change.pop("pre", "gpt-2"), **change)))
  assert (ours.bos_id, ours.eos_id, ours.pad_id) == ids
  assert ours.is_added(ids[1])


def test_user_defined_tokens_are_added_ones(made):
  fields = dict(fields_of(made["gpt-2"], "gpt-2"))
  tokens = [*fields["tokenizer.ggml.tokens"], "<think>", "[PAD601]"]
  kinds = [*fields["tokenizer.ggml.token_type"], USER, UNUSED]
  fields |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
  ours = Tokenizer(read_tokenizer(Fields(fields, where="m.gguf")))
  assert ours.added["<think>"] == 600 and "[PAD601]" not in ours.added
  assert ours.vocab_size == 602
  assert 600 not in ours.encode_text("a <think> b")


# LLaMA's sentencepiece.


def sentencepiece_fields(**more) -> Fields:
  text = lzma.decompress((DATA / "llama1_vocab.txt.xz").read_bytes()).decode()
  tokens = text.split("\n")
  values = {
    "model": "llama", "pre": "default", "tokens": tokens,
    "scores": [float(min(0, 259 - i)) for i in range(len(tokens))],
    "token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(tokens) - 259),
    "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
  } | more  # fmt: skip
  return Fields({f"tokenizer.ggml.{k}": v for k, v in values.items()}, where="m.gguf")


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_are_those_of_sentencepiece(prefix):
  fields = sentencepiece_fields(add_space_prefix=prefix)
  ours = Tokenizer(read_tokenizer(fields))
  model = sentencepiece_model_pb2.ModelProto()
  for piece, score, kind in zip(*(fields[f"tokenizer.ggml.{k}"] for k in
                                  ("tokens", "scores", "token_type"))):  # fmt: skip
    model.pieces.add(piece=piece, score=score, type=kind)
  model.trainer_spec.model_type = model.trainer_spec.BPE
  model.trainer_spec.byte_fallback = True
  model.normalizer_spec.name = "identity"
  model.normalizer_spec.remove_extra_whitespaces = False
  model.normalizer_spec.add_dummy_prefix = prefix
  oracle = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
  for text in texts(500):
    assert ours.encode_text(text) == oracle.encode(text), text
  assert ours.vocab_size == 32000 and ours.dummy_prefix == prefix
  assert (ours.bos_id, ours.eos_id) == (1, 2)


BAD = {
  "unknown rule": ({"pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'.*known are gpt-2.*smollm"),
  "no rule": ({"pre": None}, "doesn't name a tokenizer.ggml.pre"),
  "kind": ({"model": "t5"}, "tokenizer.ggml.model is 't5'; expected 'gpt2'.*or 'llama'"),
  "types": ({"token_type": [1, 3]}, "600 tokens, but 2 token types"),
  "id": ({"eos_token_id": 600}, "eos_token_id is 600, but there are 600 tokens"),
  "merges": ({"merges": ["a b c"]}, "the merge 'a b c' is not of two tokens into a third"),
  "merge into nothing": ({"merges": ["Ċ z"]}, "the merge 'Ċ z' is not of two tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named(made, name):
  change, match = BAD[name]
  fields = fields_of(made["gpt-2"], change.pop("pre", "gpt-2"), **change)
  with pytest.raises(TokenizerError, match=match) as caught:
    read_tokenizer(fields)
  assert "m.gguf" in str(caught.value)


def test_lists_must_be_there_and_sound(made):
  values = dict(fields_of(made["gpt-2"], "gpt-2"))
  tokens = values["tokenizer.ggml.tokens"]
  doubled = [*tokens[:-1], tokens[300]]
  with pytest.raises(TokenizerError, match=r"tokens with several ids: "):
    read_tokenizer(Fields(values | {"tokenizer.ggml.tokens": doubled}, where="m.gguf"))
  with pytest.raises(WeightsError, match=r"its metadata has no 'tokenizer.ggml.tokens'"):
    read_tokenizer(Fields({}, where="m.gguf"))
  with pytest.raises(TokenizerError, match="32000 tokens, but 3 scores"):
    read_tokenizer(sentencepiece_fields(scores=[0.0, 1.0, 2.0]))


def test_every_rule_makes_a_tokenizer(made):
  for pre in PRE_TOKENIZERS:
    assert Tokenizer(read_tokenizer(fields_of(made["gpt-2"], pre))).encode_text("a 12")


# Chat templates: what transformers makes of the published ones.

CHATML = (
  "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
  "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
  "{% endif %}"
)
SMOLLM2 = CHATML.replace(
  "{% for message in messages %}",
  "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
  "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
  "<|im_end|>\n' }}{% endif %}",
)
LLAMA3 = (
  "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
  "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
  "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
  "{% endif %}"
)
PUBLISHED = {
  "chatml": (CHATML, "gpt-2", ["<|im_start|>", "<|im_end|>"]),
  "smollm2": (SMOLLM2, "smollm", ["<|im_start|>", "<|im_end|>"]),
  "llama3": (LLAMA3, "llama-bpe", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
}
SYSTEM = Turn("system", "You answer in 2 words.")
SAID = [
  Turn("user", "What is 12  + 2023?"), Turn("assistant", "It's 2035.", supervise=True),
  Turn("user", "And\n\nin the region?"), Turn("assistant", "The same.", supervise=True),
  Turn("user", "Don't!"), Turn("assistant", "...", supervise=True),
]  # fmt: skip


@pytest.fixture(params=PUBLISHED)
def chat(request, made):
  """(our renderer, transformers' tokenizer with the published template)."""
  template, pre, marks = PUBLISHED[request.param]
  fields = dict(fields_of(made[pre], pre))
  tokens = [*fields["tokenizer.ggml.tokens"], *marks]
  kinds = [*fields["tokenizer.ggml.token_type"], *[CONTROL] * len(marks)]
  fields |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
  ours = Tokenizer(read_tokenizer(Fields(fields, where="m.gguf")))
  model = ModelConfig(region=RegionConfig(kind="none"), decoder=DecoderConfig(vocab_size=700))
  theirs = PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer.from_str(ours.to_json()),
    bos_token="<|begin|>",
    chat_template=template,
  )
  return Renderer(PromptConfig(template=request.param), model, ours), theirs


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_prompts_are_those_of_the_published_template(chat, count, system):
  renderer, theirs = chat
  turns = [SYSTEM] * system + SAID[:count]
  messages = [{"role": t.role, "content": t.text} for t in turns]
  want = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
  assert renderer.prompt(Example(turns=tuple(turns))).ids.tolist() == want


def test_training_ids_are_those_of_the_published_template(chat):
  """But for the line's end that ChatML puts behind a last answer, which nobody reads."""
  renderer, theirs = chat
  encoded = renderer.encode(Example(turns=tuple(SAID)))
  messages = [{"role": t.role, "content": t.text} for t in SAID]
  want = theirs.apply_chat_template(messages, return_dict=False)
  newline = renderer.tokenizer.encode_text("\n") if renderer.config.template != "llama3" else []
  assert [*encoded.ids.tolist(), *newline] == want
  stop = renderer.template.stop[0].content
  answers = "".join(t.text + stop for t in SAID if t.role == "assistant")
  assert renderer.tokenizer.decode(encoded.ids[encoded.mask]) == answers

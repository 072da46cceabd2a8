"""Which token begins a text: what the published tokenizer puts there, kept from file to file."""

import json
from pathlib import Path

import pytest
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

import regionjax
from regionjax.config import DecoderConfig, ModelConfig, PromptConfig, RegionConfig
from regionjax.conversation import Renderer
from regionjax.data.schema import Example, Turn
from regionjax.tokenizer import Tokenizer, load_tokenizer
from regionjax.tokenizer_files import TokenizerFiles
from regionjax.weights.gguf_header import Fields
from regionjax.weights.gguf_tokenizer import read_tokenizer

BEGIN, END, PAD = "<s>", "</s>", "[PAD]"
ADDED = (BEGIN, END, PAD, "<|im_start|>", "<|im_end|>")
CHATML = (  # as SmolLM2 publishes it
  "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
  "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
  "{% endif %}"
)


def entry(content: str, index: int) -> dict:
  flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  return {"id": index, "content": content, "special": True} | flags


def template(*before: str) -> dict:
  """A post-processor as the tokenizers library writes it."""
  text = {"Sequence": {"id": "A", "type_id": 0}}
  tokens = [{"SpecialToken": {"id": token, "type_id": 0}} for token in before]
  end = {"SpecialToken": {"id": END, "type_id": 0}}
  known = {
    token: {"id": token, "ids": [ADDED.index(token)], "tokens": [token]} for token in (*before, END)
  }
  return {
    "type": "TemplateProcessing",
    "single": [*tokens, text, end],
    "pair": [*tokens, text, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": known,
  }


def sequence(*steps: dict) -> dict:
  level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
  return {"type": "Sequence", "processors": [level, *steps]}


def spec_of(post_processor: dict | None = None) -> dict:
  """Single bytes and ADDED."""
  level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocab = {content: i for i, content in enumerate([*ADDED, *alphabet])}
  return {
    "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
    "added_tokens": [entry(content, i) for i, content in enumerate(ADDED)],
    "pre_tokenizer": level, "post_processor": post_processor, "decoder": level,
    "model": {"type": "BPE", "vocab": vocab, "merges": [], "dropout": None, "unk_token": None,
              "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
              "byte_fallback": False, "ignore_merges": False},
  }  # fmt: skip


def write(folder: Path, config: dict | None, post_processor: dict | None = None) -> Path:
  folder.mkdir(exist_ok=True)
  (folder / "tokenizer.json").write_text(json.dumps(spec_of(post_processor)))
  if config is not None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


def write_model(folder: Path, config: dict | None) -> Path:
  """A sentencepiece file of LLaMA's kind."""
  model = sentencepiece_model_pb2.ModelProto()
  kinds = [("<unk>", 2), (BEGIN, 3), (END, 3), *((f"<0x{i:02X}>", 6) for i in range(256)), ("a", 1)]
  for piece, kind in kinds:
    model.pieces.add(piece=piece, score=0, type=kind)
  model.trainer_spec.model_type = model.trainer_spec.BPE
  model.trainer_spec.byte_fallback = True
  model.normalizer_spec.name = "identity"
  model.normalizer_spec.remove_extra_whitespaces = False
  folder.mkdir(exist_ok=True)
  (folder / "tokenizer.model").write_bytes(model.SerializeToString())
  if config is not None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


NAMED = {"bos_token": BEGIN, "eos_token": END}
FAST = NAMED | {"tokenizer_class": "PreTrainedTokenizerFast"}
LLAMA = NAMED | {"tokenizer_class": "LlamaTokenizer"}
IM_START = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


@pytest.mark.parametrize(
  ("config", "post_processor", "begin"),
  [
    (None, None, BEGIN),  # nothing says it: by its name
    (None, template(), BEGIN),
    (FAST, None, None),
    (IM_START | {"tokenizer_class": "GPT2Tokenizer"}, None, None),  # SmolLM2
    ({"tokenizer_class": "GPT2Tokenizer"}, None, None),  # nor by a name
    (FAST | {"add_bos_token": True}, None, BEGIN),
    (FAST | {"add_bos_token": True}, template(), BEGIN),
    (FAST | {"add_bos_token": None}, None, None),
    ({"add_bos_token": True}, None, BEGIN),
    (FAST | {"add_bos_token": False}, template(BEGIN), None),
    (LLAMA, None, BEGIN),
    (LLAMA | {"tokenizer_class": "LlamaTokenizerFast"}, None, BEGIN),
    (LLAMA | {"tokenizer_class": "LLaMATokenizer"}, None, BEGIN),
    (LLAMA | {"tokenizer_class": "CodeLlamaTokenizer"}, None, BEGIN),
    (LLAMA | {"add_bos_token": False}, None, None),
    (LLAMA, template(), None),  # as transformers 5 saves one that was told not to
    (FAST, template(BEGIN), BEGIN),
    (FAST, sequence(template(BEGIN)), BEGIN),  # LLaMA 3
    (FAST, sequence(), None),
    (FAST, template(), None),
    (IM_START, template("<|im_start|>"), "<|im_start|>"),
    (IM_START, template(BEGIN), None),  # puts another one than is named
  ],
)
def test_a_begin_token_is_one_that_is_put(tmp_path, config, post_processor, begin):
  tokenizer = load_tokenizer(write(tmp_path, config, post_processor))
  assert tokenizer.bos_id == (-1 if begin is None else ADDED.index(begin))
  end = "<|im_end|>" if config and config.get("eos_token") == "<|im_end|>" else END
  assert (tokenizer.eos_id, tokenizer.pad_id) == (ADDED.index(end), ADDED.index(PAD))
  assert load_tokenizer(tmp_path / "tokenizer.json").bos_id == tokenizer.bos_id


@pytest.mark.parametrize(
  "post_processor",
  [template(BEGIN), template(), sequence(template(BEGIN)), sequence(template()), sequence()],
)
def test_templates_are_understood_as_transformers_does(tmp_path, post_processor):
  theirs = AutoTokenizer.from_pretrained(write(tmp_path, FAST, post_processor))
  put = theirs.encode("a")[0] == theirs.bos_token_id
  assert (load_tokenizer(tmp_path).bos_id >= 0) == put


@pytest.mark.parametrize("puts", [True, False])
def test_llamas_saved_by_transformers(tmp_path, puts):
  vocab = {"<unk>": 0, BEGIN: 1, END: 2, "▁": 3, "a": 4, "▁a": 5}
  made = LlamaTokenizer(vocab=vocab, merges=[("▁", "a")], add_bos_token=puts)
  assert (made.encode("a") == [1, 5]) == puts
  made.save_pretrained(tmp_path)
  assert load_tokenizer(tmp_path).bos_id == (1 if puts else -1)


@pytest.mark.parametrize(
  ("config", "begin"),
  [
    (None, 1), (LLAMA, 1), (FAST, 1), ({"add_bos_token": True}, 1),
    ({"add_bos_token": False}, -1),
  ],
)  # fmt: skip
def test_a_sentencepiece_file_begins_unless_it_is_told_not_to(tmp_path, config, begin):
  folder = write_model(tmp_path, config)
  for path in (folder, folder / "tokenizer.model"):
    tokenizer = load_tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (begin, 2)


def test_a_folder_that_transformers_must_convert(tmp_path):
  """GPT-2 names its end token as the begin token, too, and puts none."""
  vocab = {"Ġ": 0, "a": 1, "Ġa": 2, "<|endoftext|>": 3}
  (tmp_path / "vocab.json").write_text(json.dumps(vocab))
  (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ a\n")
  names = {f"{role}_token": "<|endoftext|>" for role in ("bos", "eos", "unk")}
  config = names | {"tokenizer_class": "GPT2Tokenizer"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  tokenizer = load_tokenizer(tmp_path)
  assert (tokenizer.bos_id, tokenizer.eos_id) == (-1, 3)


def test_tokens_that_are_added_do_not_begin_a_text():
  assert load_tokenizer("tiny", added=[BEGIN]).bos_id == -1


# What is loaded is what is saved.


def kept(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
  """Saves, loads, and compares."""
  tokenizer.save(folder)
  again = load_tokenizer(folder)
  assert again.fingerprint == tokenizer.fingerprint
  assert again.added == tokenizer.added
  for role in ("bos_id", "eos_id", "pad_id"):
    assert getattr(again, role) == getattr(tokenizer, role), role
  return again


@pytest.mark.parametrize("post_processor", [None, template(), template(BEGIN)])
@pytest.mark.parametrize(
  "config", [None, FAST, LLAMA, *({"add_bos_token": puts} for puts in (False, True))]
)
def test_roles_outlive_a_folder(tmp_path, config, post_processor):
  tokenizer = load_tokenizer(write(tmp_path / "from", config, post_processor))
  kept(kept(tokenizer, tmp_path / "once"), tmp_path / "twice")


@pytest.mark.parametrize("puts", [True, False])
def test_roles_of_a_sentencepiece_file_outlive_it(tmp_path, puts):
  tokenizer = load_tokenizer(write_model(tmp_path / "from", {"add_bos_token": puts}))
  assert kept(tokenizer, tmp_path / "to").bos_id == (1 if puts else -1)


def test_a_begin_token_without_a_role_does_not_come_back_by_its_name(tmp_path):
  roles = {"eos": END, "pad": PAD}
  assert kept(Tokenizer(TokenizerFiles(spec_of(), roles)), tmp_path).bos_id == -1
  saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
  assert saved["add_bos_token"] is False and "bos_token" not in saved
  (tmp_path / "tokenizer_config.json").unlink()  # it is the file that says so
  assert load_tokenizer(tmp_path).bos_id == 0


def test_the_shipped_tokenizer_is_its_releases():
  tiny = load_tokenizer("tiny")
  assert tiny.bos_id == -1
  shipped = Path(regionjax.__file__).parent / "assets" / "tiny"
  assert load_tokenizer(shipped).fingerprint == tiny.fingerprint


@pytest.mark.parametrize("padding", [2, None])
@pytest.mark.parametrize(
  ("kind", "told", "puts"),
  [
    ("gpt2", None, False), ("gpt2", True, True), ("gpt2", False, False), ("llama", None, True),
    ("llama", False, False),
  ],
)  # fmt: skip
def test_roles_of_a_gguf_file_outlive_it(tmp_path, kind, told, puts, padding):
  """A padding token that the file doesn't name is found by its string, before as after."""
  spec = spec_of()
  tokens = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
  fields = {
    "model": kind, "pre": "smollm", "tokens": tokens, "merges": [],
    "scores": [0.0] * len(tokens),
    "token_type": [3] * len(ADDED) + [1] * (len(tokens) - len(ADDED)),
    "bos_token_id": 0, "eos_token_id": 1, "padding_token_id": padding, "add_bos_token": told,
  }  # fmt: skip
  named = {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}
  tokenizer = Tokenizer(read_tokenizer(Fields(named, where="m.gguf")))
  again = kept(tokenizer, tmp_path)
  assert (again.bos_id, again.eos_id, again.pad_id) == (0 if puts else -1, 1, 2)


# Prompts.


@pytest.mark.parametrize("named", [{"bos_token": "<|im_start|>"}, {}])
def test_chatml_prompts_begin_once(tmp_path, named):
  """SmolLM2's folder, against the chat template that transformers writes."""
  theirs = PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(spec_of())),
    eos_token="<|im_end|>",
    chat_template=CHATML,
    **named,
  )
  theirs.save_pretrained(tmp_path)
  path = tmp_path / "tokenizer_config.json"
  config = json.loads(path.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}  # as published
  path.write_text(json.dumps(config))
  ours = load_tokenizer(tmp_path)
  model = ModelConfig(region=RegionConfig(kind="none"), decoder=DecoderConfig(vocab_size=300))
  for tokenizer in (ours, kept(ours, tmp_path / "release")):
    renderer = Renderer(PromptConfig(template="chatml"), model, tokenizer)
    turns = (Turn("system", "Be brief."), Turn("user", "What is a  lion?"))
    ids = renderer.prompt(Example(turns=turns)).ids.tolist()
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    assert ids == theirs.apply_chat_template(
      messages, add_generation_prompt=True, return_dict=False
    )
    start = ours.added["<|im_start|>"]
    assert ids[0] == start and ids[1] != start


def test_llama_prompts_begin_with_their_token(tmp_path):
  tokenizer = load_tokenizer(write_model(tmp_path, LLAMA))
  model = ModelConfig(region=RegionConfig(kind="none"), decoder=DecoderConfig(vocab_size=300))
  renderer = Renderer(PromptConfig(template="vicuna_v1"), model, tokenizer)
  assert renderer.prompt(Example(turns=(Turn("user", "a"),))).ids.tolist().count(1) == 1

"""Adapters: what they hold, how their base is found and checked, and every way to have none."""

import dataclasses
import hashlib
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from regionjax import cli
from regionjax.config import (
  Config,
  ConfigError,
  DecoderConfig,
  LoraConfig,
  ModelConfig,
  PromptConfig,
  VisionConfig,
)
from regionjax.infer import chat as chats
from regionjax.models.lora import merge_lora
from regionjax.models.params import param_shapes, unstack_layers
from regionjax.tokenizer import load_tokenizer
from regionjax.train.state import flatten_paths, unflatten_paths
from regionjax.weights import adapter, release
from regionjax.weights.fit import fit_params
from regionjax.weights.release import ReleaseError

ADDED = ("<one>", "<two>")
TRAINED = ("lora_", "connector/")


def drawn(model, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), param_shapes(model))


@pytest.fixture(scope="module")
def config():
  model = dataclasses.replace(
    ModelConfig.tiny("none"),
    vision=VisionConfig.tiny(
      image_size=32, patch_size=16, stem=(), width=32, layers=1, heads=1, mlp_width=32
    ),
    decoder=DecoderConfig.tiny(
      vocab_size=load_tokenizer("tiny").vocab_size, width=16, layers=2, mlp_width=16
    ),
  )
  return Config(name="base", model=model, prompt=PromptConfig(template="plain"))


@pytest.fixture(scope="module")
def adapted(config):
  """The base's config with LoRA and two more tokens."""
  decoder = dataclasses.replace(
    config.model.decoder,
    lora=LoraConfig(rank=2, targets="q|down"),
    vocab_size=config.model.decoder.vocab_size + len(ADDED),
  )
  model = dataclasses.replace(config.model, decoder=decoder)
  prompt = dataclasses.replace(config.prompt, added_tokens=ADDED)
  return Config(name="seeing", model=model, prompt=prompt)


@pytest.fixture(scope="module")
def own(adapted):
  """What was trained, nested."""
  flat = flatten_paths(drawn(adapted.model, seed=1))
  return unflatten_paths({p: a for p, a in flat.items() if any(t in p for t in TRAINED)})


@pytest.fixture
def base(tmp_path, config):
  params = drawn(config.model)
  return release.save(tmp_path / "llm", config, params, load_tokenizer("tiny"), "")


@pytest.fixture
def folder(tmp_path, base, adapted, own):
  tokenizer = load_tokenizer("tiny", ADDED)
  found = adapter.describe_base(base)
  out = tmp_path / "runs" / "eyes"
  return adapter.save_adapter(out, adapted, own, tokenizer, "# card\n", base=found)


def test_it_holds_what_was_trained_and_nothing_else(folder, own):
  arrays = safetensors.numpy.load_file(folder / release.ADAPTER)
  want = flatten_paths(own)
  assert arrays.keys() == want.keys()
  for path, leaf in want.items():
    assert arrays[path].dtype == np.float32
    np.testing.assert_array_equal(arrays[path], leaf)
  assert {p.name for p in folder.iterdir()} == {
    "config.json", "adapter.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"
  }  # fmt: skip


def test_its_base_is_named_by_the_hash_of_its_weights(folder, base):
  entry = json.loads((folder / "config.json").read_text())["adapter"]["base"]
  digest = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
  assert entry == {"name": "llm", "sha256": digest, "path": "../../llm"}


def test_the_hash_of_shards_is_that_of_their_bytes_in_order(tmp_path):
  parts = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 10 for i in (2, 1)}
  for name, data in parts.items():
    (tmp_path / name).write_bytes(data)
  want = hashlib.sha256(b"\1" * 10 + b"\2" * 10).hexdigest()
  assert adapter.weights_sha256(tmp_path) == want


def test_opened_it_is_the_whole_model(folder, base, adapted, own):
  got_config, params, tokenizer = release.load(folder)
  assert got_config == adapted
  assert tokenizer.fingerprint == load_tokenizer("tiny", ADDED).fingerprint
  flat, trained = flatten_paths(params), flatten_paths(own)
  theirs = flatten_paths(release.load(base)[1])
  assert flat.keys() == flatten_paths(param_shapes(adapted.model)).keys()
  for path, leaf in flat.items():
    if path in trained:
      np.testing.assert_array_equal(leaf, trained[path], err_msg=path)
    elif path != "decoder/embed/embedding":
      assert leaf.dtype == ml_dtypes.bfloat16 and leaf.tobytes() == theirs[path].tobytes(), path
  # New tokens: the mean of those that were there.
  table, old = flat["decoder/embed/embedding"], theirs["decoder/embed/embedding"]
  np.testing.assert_array_equal(table[:-2], old)
  np.testing.assert_array_equal(table[-1], table[-2])
  mean = old.astype(np.float64).mean(axis=0)
  np.testing.assert_allclose(table[-1].astype(np.float64), mean, rtol=0.01, atol=1e-3)


def test_a_chat_opens_it_merged(folder, adapted):
  chat = chats.load(folder)
  _, params, _ = release.load(folder)
  model, merged = merge_lora(adapted.model, params, dtype=np.float32)
  assert chat.engine.config == model and chat.config == adapted
  want = jax.tree.map(lambda a: a.astype(np.float32), unstack_layers(merged))
  jax.tree.map(np.testing.assert_array_equal, chat.engine.params, want)


def test_the_base_is_found_where_it_was_beside_the_adapter_or_where_one_says(
  folder, base, tmp_path
):
  assert adapter.find_base(folder) == base
  moved = tmp_path / "elsewhere" / "deep" / "eyes"
  shutil.copytree(folder, moved)
  beside = moved.parent / "llm"
  base.rename(beside)
  assert adapter.find_base(moved) == beside  # beside, under its name
  assert adapter.find_base(folder, beside) == beside
  with pytest.raises(ReleaseError) as caught:
    release.load(folder)
  message = str(caught.value)
  assert f"{base}: no release there" in message and "trained on top of 'llm'" in message
  assert "base=FOLDER" in message and "--base FOLDER" in message
  assert release.load(folder, base=beside)[0].name == "seeing"


def test_another_release_is_refused(folder, base, config, tmp_path):
  other = release.save(
    tmp_path / "other", config, drawn(config.model, seed=9), load_tokenizer("tiny"), ""
  )
  mine, theirs = adapter.weights_sha256(base), adapter.weights_sha256(other)
  with pytest.raises(ReleaseError) as caught:
    release.load(folder, base=other)
  assert mine[:12] in str(caught.value) and theirs[:12] in str(caught.value)
  assert "is not the base of" in str(caught.value)
  shutil.rmtree(base)
  other.rename(base)  # the right name, the wrong weights
  with pytest.raises(ReleaseError, match=f"another release .sha256 {theirs[:12]}"):
    release.load(folder)


def test_an_adapter_is_no_base_and_a_whole_release_has_none(folder, base):
  with pytest.raises(ReleaseError, match="is an adapter itself"):
    release.load(folder, base=folder)
  with pytest.raises(ReleaseError, match="needs no base"):
    release.load(base, base=base)
  assert adapter.describe_base(folder) == adapter.describe_base(base)


def test_a_base_of_another_width_is_named(folder, base, config):
  wider = dataclasses.replace(
    config.model, decoder=dataclasses.replace(config.model.decoder, width=24)
  )
  other = dataclasses.replace(config, model=wider)
  release.save(base, other, drawn(wider), load_tokenizer("tiny"), "")
  file = folder / "config.json"
  values = json.loads(file.read_text())
  values["adapter"]["base"]["sha256"] = adapter.weights_sha256(base)
  file.write_text(json.dumps(values))
  with pytest.raises(ConfigError) as caught:
    release.load(folder)
  assert f"{base} (base of {folder}) doesn't fit" in str(caught.value)
  assert "decoder/layers/gate/kernel: (2, 24, 16) in the release, (2, 16, 16)" in str(caught.value)


@pytest.mark.parametrize(
  "entry", [None, [], {}, {"base": {}}, {"base": {"name": "llm"}}, {"base": {"sha256": 3}}]
)
def test_a_broken_entry(folder, entry):
  file = folder / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"adapter": entry}))
  with pytest.raises(ReleaseError, match=r"expected 'adapter': \{'base'"):
    release.load(folder)


def test_a_truncated_adapter(folder):
  file = folder / release.ADAPTER
  file.write_bytes(file.read_bytes()[:-100])
  with pytest.raises(ReleaseError, match="truncated or damaged"):
    release.load(folder)


def test_what_neither_holds_is_named(folder, base, adapted, own):
  flat = flatten_paths(own)
  lacking = unflatten_paths({p: a for p, a in flat.items() if "down/lora_b" not in p})
  found = adapter.describe_base(base)
  adapter.save_adapter(folder, adapted, lacking, load_tokenizer("tiny", ADDED), "", base=found)
  with pytest.raises(ReleaseError, match="missing decoder/layers/down/lora_b"):
    release.load(folder)


def test_a_shipped_base_leaves_no_path(tmp_path):
  found = adapter.describe_base("tiny")
  assert found.name == "tiny" and found.path == ""
  config, params, tokenizer = release.load("tiny")
  some = unflatten_paths({"connector/linear/bias": params["connector"]["linear"]["bias"]})
  out = adapter.save_adapter(tmp_path / "x", config, some, tokenizer, "", base=found)
  assert release.find("tiny") == adapter.find_base(out)


@pytest.mark.parametrize("tied", [True, False])
def test_tables_grow_for_added_tokens_and_for_padding(config, tied):
  def sized(vocab, multiple):
    decoder = dataclasses.replace(
      config.model.decoder, vocab_size=vocab, vocab_multiple=multiple, tie_embeddings=tied
    )
    return dataclasses.replace(config.model, decoder=decoder)

  old, new = sized(10, 1), sized(12, 8)
  params = flatten_paths(drawn(old))
  shapes = {path: s.shape for path, s in flatten_paths(param_shapes(new)).items()}
  fit = fit_params(old, params, new, shapes, where="it")
  tables = [fit.params["decoder/embed/embedding"]]
  tables += [] if tied else [fit.params["decoder/head/kernel"].T]
  sources = [params["decoder/embed/embedding"]]
  sources += [] if tied else [params["decoder/head/kernel"].T]
  for table, source in zip(tables, sources, strict=True):
    assert table.shape == (16, 16)
    np.testing.assert_array_equal(table[:10], source)
    np.testing.assert_allclose(table[10:12], np.stack([source.mean(0)] * 2), rtol=1e-5)
    assert not table[12:].any()
  assert len(fit.notes) == len(tables) and "2 tokens added" in fit.notes[0]
  back = fit_params(new, fit.params, sized(12, 1), {"decoder/embed/embedding": (12, 16)}, where="")
  np.testing.assert_array_equal(back.params["decoder/embed/embedding"], tables[0][:12])
  with pytest.raises(ConfigError, match=r"embedding: \(16, 16\) in the release, \(10, 16\)"):
    fit_params(new, fit.params, old, {"decoder/embed/embedding": (10, 16)}, where="it")


def test_the_command_line_takes_a_base(folder, base, monkeypatch, tmp_path):
  from PIL import Image

  picture = tmp_path / "picture.png"
  Image.new("RGB", (32, 32)).save(picture)
  asked = []

  def load(checkpoint, *, base=None, mesh=None):
    asked.append((checkpoint, base))
    raise ReleaseError("seen")

  monkeypatch.setattr("regionjax.infer.command.load", load)
  monkeypatch.setattr("regionjax.infer.chat.load", load)
  words = ["--checkpoint", str(folder), "--base", str(base)]
  assert cli.main(["chat", str(picture), "--ask", "What?", *words]) == 2
  assert cli.main(["evaluate", "-n", "1", *words]) == 2
  assert asked == [(str(folder), str(base))] * 2

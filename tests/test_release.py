"""Release folders: round trip, atomic writing, and every way in which one can be broken."""

import dataclasses
import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from regionjax.config import Config, ConfigError, DecoderConfig, ModelConfig, VisionConfig
from regionjax.models.params import param_shapes
from regionjax.tokenizer import load_tokenizer
from regionjax.weights import release
from regionjax.weights.release import ReleaseError


@pytest.fixture(scope="module")
def tokenizer():
  return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def config(tokenizer):
  model = dataclasses.replace(
    ModelConfig.tiny("pool"),
    vision=VisionConfig.tiny(
      image_size=32, patch_size=16, stem=(), width=32, layers=4, heads=1, mlp_width=32
    ),
    decoder=DecoderConfig.tiny(vocab_size=tokenizer.vocab_size, width=16, layers=2, mlp_width=16),
  )
  return Config(name="small", model=model)


@pytest.fixture(scope="module")
def params(config):
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda s: rng.normal(size=s.shape).astype(np.float32), param_shapes(config.model)
  )


@pytest.fixture
def folder(tmp_path, config, params, tokenizer):
  return release.save(tmp_path / "small", config, params, tokenizer, "# card\n")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_round_trip(tmp_path, config, params, tokenizer, dtype):
  out = release.save(tmp_path / "a" / "b", config, params, tokenizer, "# card\n", dtype=dtype)
  got_config, got, got_tokenizer = release.load(out)
  assert got_config == config
  assert got_tokenizer.fingerprint == tokenizer.fingerprint
  wanted = release.DTYPES[dtype]
  assert jax.tree.structure(got) == jax.tree.structure(params)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(wanted)), got, params)
  assert (out / "README.md").read_text() == "# card\n"
  assert {p.name for p in out.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
  assert [p.name for p in out.parent.iterdir()] == ["b"]  # nothing temporary stays


def test_bfloat16_halves_the_file(tmp_path, config, params, tokenizer):
  big = release.save(tmp_path / "f", config, params, tokenizer, "", dtype="float32")
  small = release.save(tmp_path / "b", config, params, tokenizer, "")
  sizes = [(p / "model.safetensors").stat().st_size for p in (big, small)]
  assert sizes[1] < 0.55 * sizes[0]
  arrays = safetensors.numpy.load_file(small / "model.safetensors")
  assert {a.dtype for a in arrays.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_flatten_and_back():
  tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
  flat = release.flatten(tree)
  assert flat == {"a/b": 1, "a/c/d": 2, "e": 3}
  assert release.unflatten(flat) == tree


def test_a_release_is_replaced_whole(folder, config, params, tokenizer):
  doubled = jax.tree.map(lambda a: 2 * a, params)
  (folder / "leftover.txt").write_text("of the old one")
  release.save(folder, dataclasses.replace(config, name="second"), doubled, tokenizer, "# 2\n")
  assert release.load(folder)[0].name == "second"
  assert not (folder / "leftover.txt").exists()
  assert [p.name for p in folder.parent.iterdir()] == ["small"]


def test_an_interrupted_save_leaves_the_old_release(folder, config, params, tokenizer):
  class Broken:
    def save(self, path):
      raise KeyboardInterrupt

  before = {p.name: p.read_bytes() for p in folder.iterdir()}
  with pytest.raises(KeyboardInterrupt):
    release.save(folder, config, params, Broken(), "# 2\n")
  assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
  assert [p.name for p in folder.parent.iterdir()] == ["small"]


def test_other_folders_are_not_overwritten(tmp_path, config, params, tokenizer):
  (tmp_path / "photos").mkdir()
  (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
  with pytest.raises(ReleaseError, match="no release; choose an empty or new folder"):
    release.save(tmp_path / "photos", config, params, tokenizer, "")
  (tmp_path / "file").write_bytes(b"x")
  with pytest.raises(ReleaseError, match="is a file"):
    release.save(tmp_path / "file", config, params, tokenizer, "")
  assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_diverged_parameters_are_refused(tmp_path, config, params, tokenizer):
  bad = jax.tree.map(np.copy, params)
  bad["decoder"]["norm"]["scale"][0] = np.nan
  with pytest.raises(ReleaseError, match="decoder/norm/scale holds NaN"):
    release.save(tmp_path / "x", config, bad, tokenizer, "")
  assert not (tmp_path / "x").exists()
  with pytest.raises(ReleaseError, match="expected one of bfloat16, float16, float32"):
    release.save(tmp_path / "x", config, params, tokenizer, "", dtype="int8")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights(folder, share):
  file = folder / "model.safetensors"
  data = file.read_bytes()
  file.write_bytes(data[: int(share * len(data))])
  with pytest.raises(ReleaseError, match="truncated or damaged"):
    release.load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_files(folder, name):
  (folder / name).unlink()
  with pytest.raises(ReleaseError, match=f"{name} missing"):
    release.load(folder)


def test_no_such_release(tmp_path):
  with pytest.raises(ReleaseError, match="no release at"):
    release.load(tmp_path / "none")
  with pytest.raises(ReleaseError, match="no release at 'huge'"):
    release.load("huge")


def test_every_mismatch_is_named(folder):
  file = folder / "model.safetensors"
  arrays = safetensors.numpy.load_file(file)
  arrays["decoder/extra"] = np.zeros(3, np.float32)
  del arrays["connector/linear/kernel"]
  arrays["decoder/norm/scale"] = np.zeros(5, np.float32)
  safetensors.numpy.save_file(arrays, file)
  with pytest.raises(ReleaseError) as caught:
    release.load(folder)
  message = str(caught.value)
  assert "missing connector/linear/kernel (128, 16)" in message  # 2 x 2 patches of 32 channels
  assert "unknown decoder/extra (3,)" in message
  assert "decoder/norm/scale is (5,), expected (16,)" in message


def test_broken_configs(folder):
  file = folder / "config.json"
  values = json.loads(file.read_text())
  values["config"]["model"]["decoder"]["widht"] = 16
  file.write_text(json.dumps(values))
  with pytest.raises(ConfigError, match="did you mean width"):
    release.load(folder)
  file.write_text(json.dumps(values | {"format": 99}))
  with pytest.raises(ReleaseError, match="release format 99"):
    release.load(folder)
  file.write_text("[]")
  with pytest.raises(ReleaseError, match="expected an object"):
    release.load(folder)
  file.write_text("{")
  with pytest.raises(ReleaseError, match="not readable JSON"):
    release.load(folder)


def test_a_larger_tokenizer_is_refused(folder, config):
  values = json.loads((folder / "config.json").read_text())
  values["config"]["model"]["decoder"]["vocab_size"] -= 1
  (folder / "config.json").write_text(json.dumps(values))
  with pytest.raises(ReleaseError, match="the tokenizer has"):
    release.load(folder)


def test_the_shipped_model_is_small_and_says_how_it_was_made():
  folder = release.SHIPPED / "tiny"
  files = sorted(path for path in folder.rglob("*") if path.is_file())
  assert {path.name for path in files} >= {
    release.CONFIG, release.WEIGHTS, release.TOKENIZER, release.CARD
  }  # fmt: skip
  assert sum(path.stat().st_size for path in files) <= 4 * 2**20
  arrays = safetensors.numpy.load_file(folder / release.WEIGHTS)
  assert {array.dtype for array in arrays.values()} == {np.dtype(ml_dtypes.bfloat16)}
  assert "    regionjax train configs/tiny.py" in (folder / release.CARD).read_text()
  for path in files:
    if path.name != release.WEIGHTS:
      # Where the command writes is anybody's; other places exist on one machine alone.
      text = path.read_text(encoding="utf-8").replace("--workdir runs/tiny", "")
      assert not re.search(r"/work|/home/|/root|/tmp/|\bruns/", text), path.name

"""`--mesh`: which devices a verb uses, and that its answers are those of one."""

import argparse
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from regionjax.config import ConfigError
from regionjax.infer.mesh_option import add_mesh_option, mesh_of
from regionjax.tokenizer import load_tokenizer
from regionjax.weights import release

ROOT = Path(__file__).parents[2]


def parse(*words):
  parser = argparse.ArgumentParser()
  add_mesh_option(parser)
  return mesh_of(parser.parse_args(words))


def test_without_it_there_is_no_mesh():
  assert parse() is None


def test_it_takes_as_many_devices_as_it_has_places():
  assert dict(parse("--mesh", "tensor=1").shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("text, match", [
  ("tensor=64", "has 64 places, and there are"),
  ("tensor=0", "has 0 places"),
  ("heads=2", "expected axes and sizes"),
])  # fmt: skip
def test_what_it_refuses(text, match):
  with pytest.raises(ConfigError, match=match):
    parse("--mesh", text)


@pytest.fixture
def eight_heads(make_config, make_params, tmp_path):
  """A release of eight heads, whose vocabulary eight devices can't share without padding."""
  config = make_config()
  vision = dataclasses.replace(config.model.vision, heads=8)
  decoder = dataclasses.replace(
    config.model.decoder, heads=8, kv_heads=8, head_dim=4,
    vocab_size=config.model.decoder.vocab_size + 3,
  )  # fmt: skip
  model = dataclasses.replace(config.model, vision=vision, decoder=decoder)
  config = dataclasses.replace(config, model=model)
  tokenizer = load_tokenizer("tiny")
  params = make_params(config)
  return release.save(tmp_path / "eight", config, params, tokenizer, "# card\n", dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor=8", "fsdp=4,tensor=2"])
def test_chat_on_a_mesh_says_what_it_says_on_one_device(eight_heads, tmp_path, mesh):
  Image.new("RGB", (80, 60), (200, 30, 60)).save(tmp_path / "a.png")
  words = [
    sys.executable, "-m", "regionjax", "chat", str(tmp_path / "a.png"), "--checkpoint",
    str(eight_heads), "--box", "5,5,50,40", "--ask", "What is <region1>?", "--max-new-tokens", "12",
  ]  # fmt: skip
  env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}

  def said(*more):
    return subprocess.run(
      [*words, *more], env=env, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout

  assert said("--mesh", mesh) == said()

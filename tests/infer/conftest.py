"""A small random model as a release folder, and chats opened from it."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import numpy as np
import pytest

from regionjax.config import (
  Config,
  ConnectorConfig,
  DecoderConfig,
  ModelConfig,
  PromptConfig,
  RegionConfig,
  VisionConfig,
)
from regionjax.infer.chat import RegionChat, load
from regionjax.models.params import param_shapes
from regionjax.tokenizer import load_tokenizer
from regionjax.weights import release


def small_config(region: str = "pool", *, template: str = "plain") -> Config:
  """16 image tokens, 2 layers of 32 channels: compiles in a second."""
  tokenizer = load_tokenizer("tiny")
  model = ModelConfig(
    name="small",
    vision=VisionConfig.tiny(
      image_size=64, patch_size=16, stem=(), width=32, layers=2, heads=2, mlp_width=64
    ),
    connector=ConnectorConfig("linear"),
    region=dataclasses.replace(RegionConfig.tiny(region), **_region_fields(region)),
    decoder=DecoderConfig.tiny(
      vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=2, kv_heads=2, head_dim=16,
      mlp_width=64,
    ),
    compute_dtype="float32",
  )  # fmt: skip
  prompt = PromptConfig(template=template, coordinates="unit2")
  return Config(name="small", model=model, prompt=prompt)


def _region_fields(region: str) -> dict:
  """Two hidden states, as the small vision encoder has."""
  if region.startswith("pyramid"):
    return {"layers": (1, 2), "upsample": (2, 1), "width": 8, "groups": 2, "token_width": 16}
  return {"layers": (1, 2), "width": 32}


def make_params(config: Config, seed: int = 0):
  """Random parameters without compiling an initialiser: 4 s of CPU time saved per model."""
  rng = np.random.default_rng(seed)

  def draw(leaf):
    if len(leaf.shape) < 2 or leaf.shape[-1] == 1:
      return (1 + 0.1 * rng.normal(size=leaf.shape)).astype(np.float32)
    return (rng.normal(size=leaf.shape) * leaf.shape[-2] ** -0.5).astype(np.float32)

  return jax.tree.map(draw, param_shapes(config.model))


def small_chat(region: str = "pool", *, template: str = "plain", seed: int = 0) -> RegionChat:
  config = small_config(region, template=template)
  params = make_params(config, seed)
  return RegionChat(config, params, load_tokenizer("tiny"), steps=4)


@pytest.fixture(scope="session", name="make_config")
def make_config_fixture():
  """`small_config`."""
  return small_config


@pytest.fixture(scope="session", name="make_params")
def make_params_fixture():
  """`make_params`."""
  return make_params


@pytest.fixture(scope="session")
def make_chat():
  """(region kind, template) -> a chat with random weights; the same object for the same kind."""
  made = {}

  def make(region: str = "pool", template: str = "plain") -> RegionChat:
    key = (region, template)
    if key not in made:
      made[key] = small_chat(region, template=template)
    return made[key]

  return make


@pytest.fixture(scope="session")
def make_chain_chat():
  """Texts of tokens -> a chat whose answer to any question is these tokens, the last repeated.

  It is a real model of template vicuna_v0: blocks that add nothing leave a token's logits to a
  table of what follows it (the embedding and the output layer).
  """
  tokenizer = load_tokenizer("tiny")
  config = small_config("none", template="vicuna_v0")
  decoder = dataclasses.replace(config.model.decoder, tie_embeddings=False)
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder))

  def make(texts: Sequence[str]) -> RegionChat:
    ids = [i for text in (":", *texts) for i in tokenizer.encode_text(text, start="inside")]
    assert len(ids) == 1 + len(texts)  # ":" is the last token of every prompt
    params = make_params(config)["decoder"]
    for array in (params["layers"]["o"], params["layers"]["down"], params["embed"], params["head"]):
      for leaf in array.values():
        leaf[:] = 0
    follower = dict(itertools.pairwise([*ids, ids[-1]]))
    for channel, (token, following) in enumerate(follower.items()):
      params["embed"]["embedding"][token, channel] = 1
      params["head"]["kernel"][channel, following] = 1
    return RegionChat(config, {**make_params(config), "decoder": params}, tokenizer, steps=4)

  return make


@pytest.fixture(scope="session")
def release_folder(tmp_path_factory):
  """A release on disk, in float32 so that it equals the model it was saved from."""
  config = small_config()
  params = make_params(config)
  folder = tmp_path_factory.mktemp("release") / "small"
  return release.save(folder, config, params, load_tokenizer("tiny"), "# card\n", dtype="float32")


@pytest.fixture(scope="session")
def chat(release_folder):
  return load(release_folder)

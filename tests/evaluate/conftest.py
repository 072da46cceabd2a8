"""A RegionChat with random weights; building it compiles nothing."""

import dataclasses

import jax
import numpy as np
import pytest

from regionjax.config import Config, DecoderConfig, ModelConfig, PromptConfig, VisionConfig
from regionjax.infer.chat import RegionChat
from regionjax.models.params import param_shapes
from regionjax.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def chat():
  tokenizer = load_tokenizer("tiny")
  model = dataclasses.replace(
    ModelConfig.tiny("pool"),
    vision=VisionConfig.tiny(
      image_size=64, patch_size=16, stem=(), width=32, layers=1, heads=1, mlp_width=32
    ),
    decoder=DecoderConfig.tiny(
      vocab_size=tokenizer.vocab_size, width=32, layers=1, heads=1, kv_heads=1, head_dim=32,
      mlp_width=32,
    ),
  )  # fmt: skip
  model = dataclasses.replace(model, region=dataclasses.replace(model.region, layers=(1,)))
  config = Config(
    name="small", model=model, prompt=PromptConfig(template="plain", coordinates="unit2")
  )
  rng = np.random.default_rng(0)
  shapes = param_shapes(model)
  params = jax.tree.map(lambda s: 0.3 * rng.normal(size=s.shape).astype(np.float32), shapes)
  return RegionChat(config, params, tokenizer)

"""Fixtures of the tests of the input pipeline."""

import numpy as np
import pytest
from PIL import Image
from pipeline_cases import SIZES, Pictures, make_config

from regionjax.conversation import Renderer
from regionjax.data.pipeline import (
  Pipeline,
)
from regionjax.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
  """Paths of a few small images of different shapes."""
  folder = tmp_path_factory.mktemp("pictures")
  rng = np.random.default_rng(0)
  for k, (w, h) in enumerate(SIZES):
    Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)).save(folder / f"{k}.png")
  return folder


@pytest.fixture(scope="session")
def tokenizer():
  return load_tokenizer("tiny")


@pytest.fixture
def make(pictures, tokenizer):
  """Pipelines over the pictures, closed at the end."""
  made = []

  def build(*, kind="pool", host=0, hosts=1, given=None, **data):
    config = make_config(kind=kind, **data)
    renderer = Renderer(config.prompt, config.model, tokenizer)
    made.append(
      Pipeline(config, renderer, sources=given or [Pictures(pictures)], host=host, hosts=hosts)
    )
    return made[-1]

  yield build
  for pipeline in made:
    pipeline.close()

"""What several tests of weights share: a small GPT4RoI in torch, and its published files."""

import importlib.util
from pathlib import Path

import pytest


def load(name: str):
  """A module beside this file; pytest's importlib mode puts no folder on sys.path."""
  path = Path(__file__).with_name(f"{name}.py")
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="session")
def gpt4roi_twin():
  """The module of that name."""
  return load("gpt4roi_twin")


@pytest.fixture(scope="session")
def published(gpt4roi_twin, tmp_path_factory):
  """A `gpt4roi_published.Published`."""
  return load("gpt4roi_published").publish(tmp_path_factory.mktemp("hub"), gpt4roi_twin.Twin)

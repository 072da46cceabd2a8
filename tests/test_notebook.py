"""The quickstart notebook runs from top to bottom."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from regionjax.config import Config, ModelConfig, PromptConfig
from regionjax.models.params import param_shapes
from regionjax.tokenizer import load_tokenizer
from regionjax.weights import release

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


def random_release(folder: pathlib.Path) -> pathlib.Path:
  """Stands in for the shipped checkpoint where the package has none yet."""
  tokenizer = load_tokenizer("tiny")
  model = ModelConfig.tiny()
  decoder = dataclasses.replace(model.decoder, vocab_size=tokenizer.vocab_size)
  model = dataclasses.replace(model, decoder=decoder)
  config = Config(model=model, prompt=PromptConfig(template="plain", coordinates="unit2"))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda s: 0.1 * rng.normal(size=s.shape).astype(np.float32), param_shapes(model)
  )
  return release.save(folder, config, params, tokenizer, "")


@pytest.mark.slow
def test_quickstart(tmp_path, monkeypatch):
  import ipykernel  # noqa: F401
  import nbclient
  import nbformat

  notebook = nbformat.read(NOTEBOOK, as_version=4)
  if not (release.SHIPPED / "tiny" / release.CONFIG).exists():
    folder = random_release(tmp_path / "tiny")
    for cell in notebook.cells:
      cell.source = cell.source.replace("regionjax.load()", f"regionjax.load({str(folder)!r})")
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  nbclient.NotebookClient(
    notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
  ).execute()
  outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
  pictures = [o for o in outputs if "image/png" in o.get("data", {})]
  assert len(pictures) == 3  # the scene, the dialogue, the curves
  text = "".join(o.text for o in outputs if o.output_type == "stream")
  assert "64 questions about unseen scenes" in text


def test_the_notebook_is_stored_without_outputs():
  """Outputs would make every run a change, and a megabyte of pictures."""
  import nbformat

  for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
    if cell.cell_type == "code":
      assert not cell.outputs
      assert cell.execution_count is None

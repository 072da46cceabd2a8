"""Which file of a folder is opened, and what is said where there is none."""

import json

import numpy as np
import pytest
import safetensors.numpy
import torch

from regionjax.weights.sources import open_weights
from regionjax.weights.tensors import WeightsError


def put(folder, *names):
  """Files with one tensor each, which has the file's name."""
  for name in names:
    if name.endswith(".json"):
      kind = "safetensors" if "safetensors" in name else "bin"
      put(folder, f"part.{kind}")
      weight_map = {f"part.{kind}": f"part.{kind}"}
      (folder / name).write_text(json.dumps({"weight_map": weight_map}))
    elif name.endswith(".safetensors"):
      safetensors.numpy.save_file({name: np.ones(1, np.float32)}, folder / name)
    else:
      torch.save({name: torch.ones(1)}, folder / name)


@pytest.mark.parametrize(
  ("names", "opened"),
  [
    (["model.safetensors", "pytorch_model.bin", "adapter.safetensors"], "model.safetensors"),
    (["model.safetensors.index.json", "pytorch_model.bin"], "part.safetensors"),
    (["clip.safetensors.index.json", "pytorch_model.bin"], "part.safetensors"),
    (["pytorch_model.bin", "training_args.bin", "mm_projector.bin"], "pytorch_model.bin"),
    (["pytorch_model.bin.index.json"], "part.bin"),
    (["weights.safetensors", "pytorch.bin"], "weights.safetensors"),
    (["delta.bin", "training_args.bin", "optimizer.bin"], "delta.bin"),
    (["consolidated.00.pth", "optimizer.pt", "rng_state_0.pth"], "consolidated.00.pth"),
  ],
)
def test_what_is_taken_of_a_folder(tmp_path, names, opened):
  put(tmp_path, *names)
  (tmp_path / "config.json").write_text("{}")
  with open_weights(tmp_path) as source:
    assert list(source) == [opened]
    assert source.where.startswith(str(tmp_path))
  with open_weights(str(tmp_path)) as source:
    assert list(source) == [opened]


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "b.PT", "c.pth", "d.e.ckpt"])
def test_files(tmp_path, name):
  put(tmp_path, name)
  assert list(open_weights(tmp_path / name)) == [name]


@pytest.mark.parametrize("name", ["m.safetensors.index.json", "m.bin.index.json"])
def test_indices(tmp_path, name):
  put(tmp_path, name)
  assert list(open_weights(tmp_path / name)) == [f"part.{name.split('.')[1]}"]


def test_nothing_there(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  (tmp_path / "photos").mkdir()
  torch.save({}, tmp_path / "training_args.bin")
  with pytest.raises(WeightsError) as caught:
    open_weights(tmp_path)
  message = str(caught.value)
  assert "looked for model.safetensors, model.safetensors.index.json" in message
  assert message.endswith("found config.json, photos/, training_args.bin")
  for i in range(30):
    (tmp_path / f"{i:02d}.txt").touch()
  with pytest.raises(WeightsError, match="and 13 more"):
    open_weights(tmp_path)
  with pytest.raises(WeightsError, match="found nothing"):
    open_weights(tmp_path / "photos")
  with pytest.raises(WeightsError, match=r"lmsys/vicuna-7b: no such file or folder .*downloaded"):
    open_weights("lmsys/vicuna-7b")


def test_shards_without_an_index(tmp_path):
  put(tmp_path, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
  with pytest.raises(WeightsError, match=r"holds 2 files \*\.safetensors \(model-00001.*no index"):
    open_weights(tmp_path)


def test_other_kinds(tmp_path):
  (tmp_path / "model.gguf").write_bytes(b"GGUF")
  for path in (tmp_path, tmp_path / "model.gguf"):
    with pytest.raises(WeightsError, match=r"model\.gguf is a GGUF file.*--from gguf"):
      open_weights(path)
  for name in ("weights.msgpack", "weights"):
    (tmp_path / name).touch()
    with pytest.raises(WeightsError, match=f"{name}: weights are recognised by the name"):
      open_weights(tmp_path / name)

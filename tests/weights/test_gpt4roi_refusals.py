"""What is said of a GPT4RoI that cannot be converted: by the command line, with nothing written."""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from regionjax import cli
from regionjax.tokenizer import GPT4ROI_TOKENS

SHARDS = tuple(f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2))
NARROW = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4)


def narrow_base(at: Path) -> None:
  other = LlamaForCausalLM(LlamaConfig(vocab_size=32000, num_hidden_layers=1, **NARROW))
  other.save_pretrained(at / "other")


def vicuna_as_base(at: Path) -> None:
  state = load_file(at / "base" / "model.safetensors")
  for name in ("model.embed_tokens.weight", "lm_head.weight"):
    state[name] = torch.cat((state[name], state[name][:1]))
  put(at / "base", "model.safetensors", lambda path: save_file(state, path))


def narrow_clip(at: Path) -> None:
  config = CLIPVisionConfig(image_size=224, patch_size=14, num_hidden_layers=11, **NARROW)
  CLIPVisionModel(config).save_pretrained(at / "other")


class Malicious:
  def __reduce__(self):
    return os.system, ("touch ran",)


def malicious_shard(at: Path) -> None:
  state = {"model.norm.weight": torch.zeros(128), "lm_head.weight": Malicious()}
  put(at / "delta", SHARDS[1], lambda path: torch.save(state, path))


def truncated_shard(at: Path) -> None:
  data = (at / "delta" / SHARDS[1]).read_bytes()
  put(at / "delta", SHARDS[1], lambda path: path.write_bytes(data[: len(data) // 2]))


def truncated_base(at: Path) -> None:
  data = (at / "base" / "model.safetensors").read_bytes()
  put(at / "base", "model.safetensors", lambda path: path.write_bytes(data[:-1000]))


def missing_shard(at: Path) -> None:
  (at / "delta" / SHARDS[0]).unlink()


def diverged_shard(at: Path) -> None:
  """Seen only while it is written, when most of the release is."""
  state = torch.load(at / "delta" / SHARDS[1])
  state["model.spi_module.roi_align.updims.bias"][3] = math.nan
  put(at / "delta", SHARDS[1], lambda path: torch.save(state, path))


def mixed_up_tokens(at: Path) -> None:
  mixed = {token: 32005 - i for i, token in enumerate(GPT4ROI_TOKENS)}
  put(at / "delta", "added_tokens.json", lambda path: path.write_text(json.dumps(mixed)))


def nothing(at: Path) -> None:
  pass


def put(folder: Path, name: str, write: Callable[[Path], object]) -> None:
  """A file in the place of the link to the published one."""
  (folder / name).unlink()
  write(folder / name)


BASE, TOWER = {"--base": "base"}, {"--clip": "clip"}
BOTH = BASE | TOWER
REFUSALS = {  # (what is done to the folders, the source, options, the message)
  "no base": (nothing, "delta", TOWER, r"is a delta.*LLaMA-7B.*--base FOLDER"),
  "no clip": (nothing, "delta", BASE, r"without their vision tower.*--clip FOLDER"),
  "merged, with a base": (nothing, "merged", BOTH, r"merged.*is no delta.*without a base"),
  "base of another width": (
    narrow_base, "delta", {"--base": "other"} | TOWER, r"the base is 64 wide, the delta 128",
  ),
  "Vicuna as base": (
    vicuna_as_base, "delta", BOTH, r"A base with 32001 rows is not plain LLaMA \(Vicuna",
  ),
  "clip of another width": (
    narrow_clip, "delta", BASE | {"--clip": "other"}, r"mm_hidden_size=128: the CLIP.*64 wide",
  ),
  "malicious shard": (
    malicious_shard, "delta", BOTH, rf"{SHARDS[1]} holds \w+\.system.*nothing of it was run",
  ),
  "truncated shard": (truncated_shard, "delta", BOTH, rf"{SHARDS[1]}: truncated or damaged"),
  "truncated base": (truncated_base, "delta", BOTH, r"base/model.safetensors: truncated: 1000 of"),
  "missing shard": (missing_shard, "delta", BOTH, rf"{SHARDS[0]} is missing, with \d+ tensors"),
  "diverged": (diverged_shard, "delta", BOTH, r"regions/output/bias holds NaN.*\[3\]"),
  "mixed-up tokens": (mixed_up_tokens, "delta", BOTH, r"<bbox> has id 32003, expected 32002"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(published, tmp_path, monkeypatch, capsys, case):
  """Exit code 2, one message that names the cause, and nothing at the destination or beside it."""
  change, source, options, message = REFUSALS[case]
  at = tmp_path / "in"
  for name in ("base", "delta", "merged", "clip"):
    (at / name).mkdir(parents=True)
    for path in getattr(published, name).iterdir():
      (at / name / path.name).symlink_to(path)
  change(at)
  out = tmp_path / "out"
  out.mkdir()
  monkeypatch.chdir(tmp_path)
  words = [word for option, name in options.items() for word in (option, at / name)]
  words = ["convert", "--from", "gpt4roi", at / source, "--to", out / "gpt4roi", *words]
  assert cli.main([str(word) for word in words]) == 2
  error = capsys.readouterr().err
  assert re.search(message, error, re.DOTALL), error
  assert not list(out.iterdir())
  assert not (tmp_path / "ran").exists()

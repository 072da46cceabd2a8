"""Writes a GPT4RoI of width 128 as the original is published, for the tests of the whole way.

Delta and merged checkpoint are two torch shards with an index and LLaMA's real vocabulary; the base
is in safetensors, CLIP in a folder of its own. All is in float32, so that what two programs compute
of it can be compared closely.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from llama_vocabulary import llama_model
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from regionjax.tokenizer import GPT4ROI_TOKENS

WIDTH, LAYERS, ROWS = 128, 3, 32000
MODULE = dict(width=128, position=48, token=96)
LLAMA = dict(
  hidden_size=WIDTH, intermediate_size=176, num_hidden_layers=LAYERS, num_attention_heads=4,
  rms_norm_eps=1e-6, max_position_embeddings=2048, tie_word_embeddings=False,
)  # fmt: skip
CLIP = dict(  # 11 blocks: regions are read from hidden states 1, 4, 7, 10
  hidden_size=WIDTH, intermediate_size=160, num_hidden_layers=11, num_attention_heads=4,
  image_size=224, patch_size=14, hidden_act="quick_gelu",
)  # fmt: skip
SHARDS = tuple(f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2))


@dataclasses.dataclass(frozen=True)
class Published:
  """Folders, and the model that they are of.

  Attributes:
    base, delta, merged, clip: as they are downloaded.
    vocabulary: of tokenizer.model.
    twin: the merged model in torch, a `gpt4roi_twin.Twin`.
    state: the merged checkpoint.
  """

  base: Path
  delta: Path
  merged: Path
  clip: Path
  vocabulary: bytes
  twin: Any
  state: Mapping[str, torch.Tensor]


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
  """Stronger weights than those of transformers, under which attention is nearly uniform."""
  draw = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, p in model.named_parameters():
      noise = torch.randn(p.shape, generator=draw)
      if p.ndim == 1:
        p.add_(0.1 * noise)
      else:
        p.copy_(noise if "embed_tokens" in name else noise / math.sqrt(p[0].numel()))
  return model.eval()


def save_checkpoint(folder: Path, state: Mapping[str, torch.Tensor]) -> Path:
  """What the hub has of a GPT4RoI: two shards, their index, configuration and tokenizer."""
  folder.mkdir()
  names = list(state)
  homes = {name: SHARDS[2 * i // len(names)] for i, name in enumerate(names)}
  for shard in SHARDS:
    part = {name: state[name].clone() for name in names if homes[name] == shard}
    torch.save(part, folder / shard)
  index = {"metadata": {"total_size": 0}, "weight_map": homes}
  (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
  config = {k: v for k, v in LLAMA.items() if k != "tie_word_embeddings"} | dict(
    architectures=["LlavaLlamaForCausalLM"], model_type="llava", vocab_size=ROWS + 6,
    hidden_act="silu", bos_token_id=1, eos_token_id=2, pad_token_id=0, mm_hidden_size=WIDTH,
    mm_use_im_start_end=True, mm_vision_select_layer=-2, use_mm_proj=True, torch_dtype="float32",
    transformers_version="4.29.2",
  )  # fmt: skip
  (folder / "config.json").write_text(json.dumps(config))
  (folder / "tokenizer.model").write_bytes(llama_model().SerializeToString())
  added = {token: ROWS + i for i, token in enumerate(GPT4ROI_TOKENS)}
  (folder / "added_tokens.json").write_text(json.dumps(added))
  return folder


def publish(root: Path, twin_type: Callable[..., Any]) -> Published:
  """Makes the four folders; `twin_type` is `gpt4roi_twin.Twin`."""
  base = randomise(LlamaForCausalLM(LlamaConfig(vocab_size=ROWS, **LLAMA)), seed=0)
  base.save_pretrained(root / "llama-7b")
  tower = CLIPVisionModel(CLIPVisionConfig(**CLIP, attn_implementation="eager"))
  config = LlamaConfig(vocab_size=ROWS + 6, **LLAMA, attn_implementation="eager")
  twin = randomise(twin_type(tower, LlamaForCausalLM(config), **MODULE), seed=1)
  tower.save_pretrained(root / "clip")

  delta, merged, plain = dict(twin.state()), dict(twin.state()), base.state_dict()
  draw = torch.Generator().manual_seed(2)
  for name, value in plain.items():
    # Of the base's tensors a small difference is published, of the rows that it lacks all.
    delta[name] = 0.05 * torch.randn(delta[name].shape, generator=draw)
    delta[name][len(value) :] = merged[name][len(value) :]
    merged[name] = delta[name].clone()
    merged[name][: len(value)] += value
  twin.llama.load_state_dict({name: merged[name] for name in plain})
  # Old files have them: a delta nearly zeros, a merged checkpoint numbers. They carry nothing.
  frequencies = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(LAYERS)]
  delta |= {name: torch.zeros(WIDTH // 8) for name in frequencies}
  assert len(delta) == 368 - 10 * (32 - LAYERS)
  return Published(
    base=root / "llama-7b",
    delta=save_checkpoint(root / "GPT4RoI-7B-delta-V0", delta),
    merged=save_checkpoint(
      root / "GPT4RoI-7B", merged | {name: torch.rand(WIDTH // 8) for name in frequencies}
    ),
    clip=root / "clip",
    vocabulary=llama_model().SerializeToString(),
    twin=twin,
    state=merged,
  )

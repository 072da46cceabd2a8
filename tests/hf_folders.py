"""Folders as Hugging Face publishes them, with tiny random models in them."""

import json

import torch
from transformers import (
  CLIPImageProcessor,
  CLIPVisionConfig,
  CLIPVisionModel,
  LlamaConfig,
  LlamaForCausalLM,
  LlavaConfig,
  LlavaForConditionalGeneration,
)

from regionjax.tokenizer import load_tokenizer

VISION = dict(
  hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, image_size=20,
  patch_size=5, projection_dim=8,
)  # fmt: skip
TEXT = dict(
  hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
  num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=512,
)  # fmt: skip
IMAGE = "<image>"


def randomised(model, seed=0):
  """HF's own initialisation is so small that attention is nearly uniform."""
  torch.manual_seed(seed)
  with torch.no_grad():
    for p in model.parameters():
      p.copy_(torch.randn_like(p) * 0.25 + (p if p.ndim == 1 else 0))
  return model.eval()


def write_tokenizer(folder, *, image=False):
  """The shipped tokenizer's text, without slots of our own; returns the number of entries."""
  spec = json.loads(load_tokenizer("tiny").to_json())
  kept = ("<s>", "</s>", "[PAD]", "<unk>")
  spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in kept]
  size = len(spec["model"]["vocab"])
  if image:
    entry = dict(spec["added_tokens"][0], id=size, content=IMAGE)
    spec["added_tokens"].append(entry)
  (folder / "tokenizer.json").write_text(json.dumps(spec))
  names = {t["content"] for t in spec["added_tokens"]}
  roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]"}
  config = {k: v for k, v in roles.items() if v in names}
  (folder / "tokenizer_config.json").write_text(
    json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"})
  )
  return size + image


def write_llama(folder, *, dtype=torch.float32, **sizes):
  folder.mkdir(parents=True, exist_ok=True)
  size = write_tokenizer(folder)
  config = LlamaConfig(**(TEXT | {"vocab_size": size} | sizes), attn_implementation="eager")
  randomised(LlamaForCausalLM(config)).to(dtype).save_pretrained(folder)
  return folder


def write_processor(folder):
  side = VISION["image_size"]
  CLIPImageProcessor(
    size={"shortest_edge": side}, crop_size={"height": side, "width": side},
    image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3],
  ).save_pretrained(folder)  # fmt: skip


def write_clip(folder, **sizes):
  config = CLIPVisionConfig(**(VISION | sizes), attn_implementation="eager")
  randomised(CLIPVisionModel(config)).save_pretrained(folder)
  write_processor(folder)
  return folder


def write_llava(folder):
  folder.mkdir(parents=True, exist_ok=True)
  size = write_tokenizer(folder, image=True)
  config = LlavaConfig(
    vision_config=VISION | {"model_type": "clip_vision_model"},
    text_config=TEXT | {"model_type": "llama", "vocab_size": size + 3},  # rows that pad it
    image_token_index=size - 1,
    attn_implementation="eager",
  )
  randomised(LlavaForConditionalGeneration(config)).save_pretrained(folder)
  write_processor(folder)
  return folder

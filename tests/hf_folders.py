"""Folders as Hugging Face publishes them, with tiny random models in them."""

import json

import gguf
import numpy as np
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
GGUF_NAMES = {  # of a layer, by llama.cpp; written down apart from the package's
  "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
  "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}  # fmt: skip


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


# What llama.cpp's converter writes.


def gguf_permuted(weight, heads):
  """What the converter does to query and key matrices."""
  halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
  return halves.swapaxes(1, 2).reshape(weight.shape)


def gguf_tensors(model):
  """The tensors of a LlamaForCausalLM, by their names in a GGUF file."""
  state = {k: v.numpy() for k, v in model.state_dict().items()}
  out = {
    "token_embd.weight": state["model.embed_tokens.weight"],
    "output_norm.weight": state["model.norm.weight"],
  }
  if not model.config.tie_word_embeddings:
    out["output.weight"] = state["lm_head.weight"]
  heads = {
    "attn_q": model.config.num_attention_heads,
    "attn_k": model.config.num_key_value_heads,
  }
  for i in range(model.config.num_hidden_layers):
    for ours, theirs in GGUF_NAMES.items():
      weight = state[f"model.layers.{i}.{theirs}.weight"]
      weight = gguf_permuted(weight, heads[ours]) if ours in heads else weight
      out[f"blk.{i}.{ours}.weight"] = weight
  return out


def write_gguf_file(path, tensors, fields, *, arch="llama"):
  kinds = {int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY", bool: "BOOL"}
  writer = gguf.GGUFWriter(path, arch)
  for key, value in fields.items():
    writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])
  for name, array in tensors.items():
    writer.add_tensor(name, np.ascontiguousarray(array))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def write_gguf(folder, **sizes):
  """A .gguf with the shipped tokenizer's pieces; returns its path."""
  folder.mkdir(parents=True, exist_ok=True)
  spec = json.loads(load_tokenizer("tiny").to_json())
  vocab = spec["model"]["vocab"]
  tokens = sorted(vocab, key=vocab.get)
  control = {t["content"] for t in spec["added_tokens"]}
  config = LlamaConfig(**(TEXT | {"vocab_size": len(tokens)} | sizes), attn_implementation="eager")
  fields = {
    "llama.block_count": config.num_hidden_layers,
    "llama.context_length": config.max_position_embeddings,
    "llama.embedding_length": config.hidden_size,
    "llama.feed_forward_length": config.intermediate_size,
    "llama.attention.head_count": config.num_attention_heads,
    "llama.attention.head_count_kv": config.num_key_value_heads,
    "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    "llama.rope.freq_base": 10000.0,
    "llama.vocab_size": config.vocab_size,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": [3 if token in control else 1 for token in tokens],
    "tokenizer.ggml.merges": [
      m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]
    ],
    "tokenizer.ggml.eos_token_id": vocab["</s>"],
  }
  model = randomised(LlamaForCausalLM(config))
  return write_gguf_file(folder / "model.gguf", gguf_tensors(model), fields)

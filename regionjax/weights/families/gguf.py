"""LLaMA-family models in GGUF files: their configuration, and their tensors as Hugging Face's.

**The rotary layout.** llama.cpp rotates channels 2i and 2i + 1 of a head together, `ops.rope` (as
transformers) i and i + H/2. Its converter therefore reorders the rows of every query and key matrix
of a 'llama' model, and `as_hf` puts them back. Forgotten, this raises no error anywhere: shapes are
the same, and the model talks nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from regionjax.config import ConfigError, DecoderConfig, RopeScaling
from regionjax.ops import rope
from regionjax.weights.gguf_file import GgufSource
from regionjax.weights.gguf_header import Fields
from regionjax.weights.tensors import Tensor, TensorSource, WeightsError

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
_NAMES = {
  EMBEDDING: "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  HEAD: "lm_head.weight",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_LAYER_NAMES = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}


def config_from_gguf(source: GgufSource, *, vocab_multiple: int = 1) -> DecoderConfig:
  """The decoder that a GGUF file's metadata describes.

  Args:
    source: an open file.
    vocab_multiple: as in `DecoderConfig`.

  Raises:
    WeightsError: another architecture than llama.cpp's 'llama', a variant of it that is not
      computed here, or metadata that is missing or contradicts the tensors.
  """
  fields = source.fields
  _check_kind(fields)
  if EMBEDDING not in source:
    raise WeightsError(f"{source.where}: it has no tensor {EMBEDDING!r}; it is no whole model")
  width = _one(fields, "llama.embedding_length")
  layers = _one(fields, "llama.block_count")
  heads = _one(fields, "llama.attention.head_count")
  head_dim = fields.take("llama.attention.key_length", int, width // heads)
  base = fields.take("llama.rope.freq_base", float, 10000.0)
  for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
    if (value := fields.take(key, int, head_dim)) != head_dim:
      raise WeightsError(
        f"{source.where}: {key} is {value}, but a head has {head_dim} channels; only heads that "
        "are rotated as a whole and whose keys and values are equally wide are computed here"
      )
  length = _one(fields, "llama.context_length")
  try:
    return DecoderConfig(
      vocab_size=_vocabulary(source),
      vocab_multiple=vocab_multiple,
      width=width,
      layers=layers,
      heads=heads,
      kv_heads=_one(fields, "llama.attention.head_count_kv", heads),
      head_dim=head_dim,
      mlp_width=_one(fields, "llama.feed_forward_length"),
      rope_base=base,
      rope_scaling=_scaling(source, head_dim, base),
      eps=fields.take("llama.attention.layer_norm_rms_epsilon", float),
      tie_embeddings=HEAD not in source,
      # Up to the window's length attention sees all tokens, as it always does here.
      max_length=min(length, fields.take("llama.attention.sliding_window", int, length) or length),
    )
  except ConfigError as error:
    raise WeightsError(f"{source.where}: {error}") from None


def as_hf(source: GgufSource) -> TensorSource:
  """The file's tensors by Hugging Face's names and in its layout, as `families.llama` wants them.

  Query and key rows are brought back to the half-split rotary layout, each tensor when it is read.
  Tensors that no LLaMA has keep their names, so that the conversion's table lists them.

  Raises:
    WeightsError: see `config_from_gguf`.
  """
  config = config_from_gguf(source)
  rows = {"attn_q": config.heads, "attn_k": config.kv_heads}

  def bring(tensor: Tensor) -> Tensor:
    match = _LAYER.fullmatch(tensor.name)
    if match is None or match[2] not in _LAYER_NAMES:
      return _Brought(tensor, _NAMES.get(tensor.name, tensor.name))
    name = f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"
    heads = rows.get(match[2])
    if heads is None or tensor.shape[0] != heads * config.head_dim:  # misshapen: the table says so
      return _Brought(tensor, name)
    return _Brought(tensor, name, lambda array: half_split(array, heads))

  return TensorSource(
    [bring(tensor) for name, tensor in source.items() if name != ROPE_FACTORS],
    where=source.where,
    metadata=source.metadata,
    files=[source],
  )


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
  """Rows of a query or key matrix from llama.cpp's order to that of transformers.

  Args:
    rows: [N * H, ...]; of each head's H rows, 2i and 2i + 1 are rotated together.
    heads: N; of a key matrix its own, fewer heads.

  Returns:
    The same shape, copied; of each head's rows, i and i + H/2 are rotated together.
  """
  pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
  return pairs.swapaxes(1, 2).reshape(rows.shape)


class _Brought(Tensor):
  """A tensor by another name, its values changed by a function that keeps the shape."""

  def __init__(
    self, tensor: Tensor, name: str, change: Callable[[np.ndarray], np.ndarray] | None = None
  ):
    super().__init__(name, tensor.shape, tensor.dtype)
    self._tensor, self._change = tensor, change

  def array(self) -> np.ndarray:
    array = self._tensor.array()
    return array if self._change is None else self._change(array)

  def release(self) -> None:
    self._tensor.release()


def _check_kind(fields: Fields) -> None:
  """Refuses everything but a plain LLaMA."""
  architecture = fields.take("general.architecture", str)
  if architecture != "llama":
    raise WeightsError(
      f"{fields.where}: its architecture is {architecture!r}; expected 'llama' (LLaMA, Vicuna, "
      "TinyLlama, SmolLM2, Mistral, ...), the only one that is computed here"
    )
  if (kind := fields.take("general.type", str, "model")) != "model":
    raise WeightsError(f"{fields.where}: it holds a model's {kind}; give the model's own file")
  if (experts := fields.take("llama.expert_count", int, 0)) > 1:
    raise WeightsError(
      f"{fields.where}: a mixture of {experts} experts, which is not computed here; take a dense "
      "model"
    )


def _one(fields: Fields, key: str, default: int | None = None) -> int:
  """A size. llama.cpp allows a list by layer for some, whose numbers must not differ here."""
  value = fields.get(key, default)
  if not isinstance(value, list):
    value = [fields.take(key, int) if default is None else fields.take(key, int, default)]
  if len(set(value)) != 1:
    raise WeightsError(f"{fields.where}: {key} differs by layer; here all layers are alike")
  if value[0] < 1:
    raise WeightsError(f"{fields.where}: {key} is {value[0]}; expected at least 1")
  return value[0]


def _vocabulary(source: GgufSource) -> int:
  """Rows of the embedding."""
  rows = source[EMBEDDING].shape[0]
  stated = {
    "llama.vocab_size": source.fields.take("llama.vocab_size", int, rows),
    "tokenizer.ggml.tokens": len(source.fields.take("tokenizer.ggml.tokens", list, [])) or rows,
  }
  for key, size in stated.items():
    if size != rows:
      raise WeightsError(
        f"{source.where}: {EMBEDDING} has {rows} rows, but {key} says {size}; tokenizer and model "
        "are not of one piece: convert the model to GGUF again"
      )
  return rows


def _scaling(source: GgufSource, head_dim: int, base: float) -> RopeScaling | None:
  """Linear scaling from the metadata, LLaMA 3's from the tensor of divisors that stands for it."""
  fields = source.fields
  kind = fields.take("llama.rope.scaling.type", str, "none")
  if ROPE_FACTORS in source:
    if kind not in ("none", "linear") or (kind == "linear" and _factor(fields) != 1):
      raise WeightsError(f"{source.where}: {ROPE_FACTORS} and {kind} scaling at once; expected one")
    return _llama3(source, head_dim, base)
  if kind == "linear" or (kind == "none" and "llama.rope.scale_linear" in fields):
    return None if _factor(fields) == 1 else RopeScaling("linear", factor=_factor(fields))
  if kind != "none":
    raise WeightsError(
      f"{source.where}: RoPE scaling {kind!r} is not computed here; expected linear or LLaMA 3's"
    )
  return None


def _factor(fields: Fields) -> float:
  old = fields.take("llama.rope.scale_linear", float, 1.0)  # files of 2023
  return fields.take("llama.rope.scaling.factor", float, old)


def _llama3(source: GgufSource, head_dim: int, base: float) -> RopeScaling:
  """The scaling whose divisors a file carries; the metadata has no word of it.

  All LLaMA 3.1 to 3.3 blend between wavelengths of 8192 / 4 and 8192 tokens and differ in the
  factor alone, which is the largest divisor.
  """
  stored = source[ROPE_FACTORS].array().reshape(-1)
  scaling = RopeScaling("llama3", factor=float(str(np.float32(stored.max()))))
  expected = rope.divisors(rope.frequencies(head_dim=head_dim, base=base), scaling)
  if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-3, atol=0):
    raise WeightsError(
      f"{source.where}: {ROPE_FACTORS} holds other divisors than LLaMA 3's scaling by "
      f"{scaling.factor:g} (low_freq_factor 1, high_freq_factor 4, original length 8192); only "
      "that one is known here: convert the Hugging Face files instead"
    )
  return scaling

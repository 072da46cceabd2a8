"""The other side of a check: torch and transformers on the source's own tensors.

Modules are transformers', filled by its own names of their parameters, so nothing here passes
through a conversion's table. A decoder is never held as a whole: it is built without weights, and
each of its modules reads its own when it runs and drops them behind it. A GGUF file is read by the
package `gguf`, and its rotary layout undone by transformers.

This module imports torch. Axes: b rows, n tokens of an image, t tokens, c d channels, h w pixels,
v vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import (
  AutoConfig,
  AutoModelForCausalLM,
  CLIPVisionModel,
  GenerationConfig,
  LlamaConfig,
  LlavaForConditionalGeneration,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.utils import logging

from regionjax.weights.convert import Arranged, Converted
from regionjax.weights.tensors import WeightsError

Read = Callable[[str], torch.Tensor]  # a parameter's name -> its values in float32
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Trace(NamedTuple):
  """What a decoder computed of one prompt.

  Attributes:
    hidden: [1, T, D] each: the embeddings, then what every block gave.
    logits_1tv: of every position.
  """

  hidden: list[np.ndarray]
  logits_1tv: np.ndarray


class Published:
  """A source's tensors by published name, in float32.

  What a release stores in fewer bits is rounded here, too: a check is of the conversion.
  """

  def __init__(self, step: Converted, dtype: np.dtype | None):
    self._tensors = {step.table.canonical(name): t for name, t in step.source.items()}
    self._dtype = dtype

  def __call__(self, name: str) -> torch.Tensor:
    values = _in_float32(self._tensors[name].array(), self._dtype)
    self._tensors[name].release()
    return values

  def under(self, prefix: str) -> Read:
    """The same with `prefix` before the names."""
    return lambda name: self(prefix + name)


class DecoderOracle:
  """A LLaMA of transformers that reads its weights module by module.

  Attributes:
    nbytes: of the whole model in float32.
  """

  def __init__(
    self,
    config: Any,
    read: Read,
    *,
    load: Callable[[], nn.Module] | None = None,
    divisors: torch.Tensor | None = None,
  ):
    """Nothing is read yet.

    Args:
      config: transformers'.
      read: of a LlamaForCausalLM's names.
      load: gives the whole model by transformers' own reading; None fills one by `read`.
      divisors: of the rotary frequencies, where the configuration doesn't say them.
    """
    self._config, self._read, self._load, self._divisors = config, read, load, divisors
    self.nbytes = 4 * sum(p.numel() for p in self._empty().parameters())

  def run(self, ids: Sequence[int]) -> Trace:
    """One pass over a prompt; at no time is more than one module's weights in memory."""
    model, hidden = self._empty(), []
    for name, module in model.named_modules():
      if next(module.parameters(recurse=False), None) is not None:
        module.register_forward_pre_hook(functools.partial(self._fill, name))
        module.register_forward_hook(_drop)
    for module in (model.model.embed_tokens, *model.model.layers):
      module.register_forward_hook(lambda _module, _args, out: hidden.append(out.numpy()))
    with torch.no_grad():
      logits = model(torch.tensor([list(ids)]), use_cache=False).logits
    return Trace(hidden, logits.numpy())

  def generate(self, ids: Sequence[int], count: int) -> list[int]:
    """The `count` most probable tokens behind a prompt, with all weights in memory; no stop."""
    model = self.whole()
    model.generation_config = GenerationConfig()  # the folder's own may stop, or punish repetition
    prompt = torch.tensor([list(ids)])
    with _quiet(), torch.no_grad():
      out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False
      )
    return out[0, len(ids) :].tolist()

  def whole(self) -> nn.Module:
    """The model with all its weights."""
    if self._load is not None:
      return self._load()
    model = self._empty()
    for name, module in model.named_modules():
      self._fill(name, module)
    return model

  def _empty(self) -> nn.Module:
    with torch.device("meta"):
      model = AutoModelForCausalLM.from_config(self._config, dtype=torch.float32)
    # Its frequencies are computed, not read.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=self._config)
    if self._divisors is not None:
      model.model.rotary_emb.inv_freq /= self._divisors
    return model.eval()

  def _fill(self, name: str, module: nn.Module, _args: Any = None) -> None:
    for key, empty in list(module.named_parameters(recurse=False)):
      whole = f"{name}.{key}"
      tied = whole == HEAD and self._config.tie_word_embeddings
      values = self._read(EMBED if tied else whole)
      if values.shape != empty.shape:
        raise WeightsError(
          f"{whole} is {list(values.shape)} in the source, and transformers expects "
          f"{list(empty.shape)} with its configuration"
        )
      setattr(module, key, nn.Parameter(values, requires_grad=False))


def _drop(module: nn.Module, _args: Any, _out: Any) -> None:
  for key, values in list(module.named_parameters(recurse=False)):
    setattr(module, key, nn.Parameter(values.to("meta"), requires_grad=False))


def open_decoder(
  arranged: Arranged, source: pathlib.Path, dtype: np.dtype | None = None
) -> DecoderOracle:
  """transformers' decoder of a source.

  Args:
    arranged: the conversion.
    source: its folder (of a GPT4RoI: the delta's, or the merged one's).
    dtype: of the release, where all of it is stored in one.
  """
  if arranged.family == "gguf":
    return open_gguf_decoder(pathlib.Path(arranged.where), dtype)
  read = Published(arranged.steps[-1], dtype)
  if arranged.family == "gpt4roi":
    return DecoderOracle(LlamaConfig(**_llama_fields(source)), read)
  config = AutoConfig.from_pretrained(source)
  if arranged.family == "hf-llava":
    config.text_config.tie_word_embeddings = config.tie_word_embeddings
    load = functools.partial(_load, LlavaForConditionalGeneration, source, dtype)
    return DecoderOracle(config.text_config, read.under("language_model."), load=load)
  return DecoderOracle(
    config, read, load=functools.partial(_load, AutoModelForCausalLM, source, dtype)
  )


def open_gguf_decoder(path: pathlib.Path, dtype: np.dtype | None = None) -> DecoderOracle:
  """transformers' decoder of a GGUF file of llama.cpp's 'llama'.

  Its own loader does the same, but builds every name and walks the vocabulary several times (half a
  minute of a file with 135 million parameters), holds the whole model, and does not know of the
  divisors with which llama.cpp stores LLaMA 3's scaling of rotary frequencies.

  Args:
    path: a .gguf file.
    dtype: as for `open_decoder`.
  """
  import gguf
  from transformers.integrations import GGUF_CONFIG_MAPPING
  from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS

  reader = gguf.GGUFReader(path)
  stored = {tensor.name: tensor for tensor in reader.tensors}

  def field(key: str) -> Any:
    found = reader.get_field(key)
    if found is None:
      return None
    part = found.parts[found.data[0]]
    return bytes(part).decode() if found.types[-1] == gguf.GGUFValueType.STRING else part[0].item()

  mapping = {**GGUF_CONFIG_MAPPING["llama"], "attention.key_length": "head_dim"}
  values = {ours: field(f"llama.{key}") for key, ours in mapping.items()}
  values = {ours: value for ours, value in values.items() if value is not None}
  values.setdefault("vocab_size", int(stored["token_embd.weight"].shape[-1]))
  factor = field("llama.rope.scaling.factor") or field("llama.rope.scale_linear")
  if factor and field("llama.rope.scaling.type") in (None, "linear"):
    values["rope_scaling"] = {"rope_type": "linear", "factor": factor}
  config = LlamaConfig(**values, tie_word_embeddings="output.weight" not in stored)
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
  heads = ("num_attention_heads", "num_key_value_heads")
  layout = TENSOR_PROCESSORS["llama"](config={name: getattr(config, name) for name in heads})

  def read(name: str) -> torch.Tensor:
    stem, _, suffix = name.rpartition(".")
    tensor = stored[f"{names.get_name(stem)}.{suffix}"]
    array = gguf.dequantize(tensor.data, tensor.tensor_type)
    return _in_float32(layout.process(array, name=tensor.name).weights, dtype)

  divisors = None
  if "rope_freqs.weight" in stored:
    divisors = _in_float32(stored["rope_freqs.weight"].data, None)
  return DecoderOracle(config, read, divisors=divisors)


def open_tower(
  arranged: Arranged,
  source: pathlib.Path,
  *,
  clip: pathlib.Path | None = None,
  dtype: np.dtype | None = None,
) -> CLIPVisionModel:
  """transformers' vision tower of a source, whole: the largest published one has 1.2 GB.

  Args:
    arranged, source, dtype: as for `open_decoder`.
    clip: of a GPT4RoI: CLIP's folder.
  """
  if arranged.family != "hf-llava":
    return _load(CLIPVisionModel, source if clip is None else clip, dtype)
  read = Published(arranged.steps[-1], dtype).under("vision_tower.vision_model.")
  tower = CLIPVisionModel(AutoConfig.from_pretrained(source).vision_config)
  # transformers 5 has no module of that name, its releases before have.
  names = {name: name.removeprefix("vision_model.") for name in tower.state_dict()}
  tower.load_state_dict({name: read(stem) for name, stem in names.items()})
  return tower.eval()


def hidden_states(tower: CLIPVisionModel, images_bhwc: np.ndarray) -> list[np.ndarray]:
  """[B, 1+N, C] each: after the first norm, then after every block."""
  with torch.no_grad():
    out = tower(torch.tensor(images_bhwc.transpose(0, 3, 1, 2)), output_hidden_states=True)
  return [hidden.numpy() for hidden in out.hidden_states]


def image_tokens(
  arranged: Arranged,
  source: pathlib.Path,
  hidden: Sequence[np.ndarray],
  dtype: np.dtype | None = None,
) -> np.ndarray:
  """[B, N, D]: a LLaVA's or GPT4RoI's projector on the hidden state that its config.json names.

  Args:
    arranged, source, dtype: as for `open_decoder`.
    hidden: of `hidden_states`.
  """
  read = Published(arranged.steps[-1], dtype)
  if arranged.family == "gpt4roi":
    x_bnc = torch.tensor(hidden[select_layer(source)][:, 1:])
    weight, bias = read("model.mm_projector.weight"), read("model.mm_projector.bias")
    return nn.functional.linear(x_bnc, weight, bias).numpy()
  config = AutoConfig.from_pretrained(source)
  projector = LlavaMultiModalProjector(config)
  names = projector.state_dict()
  projector.load_state_dict({name: read(f"multi_modal_projector.{name}") for name in names})
  with torch.no_grad():
    return projector(torch.tensor(hidden[config.vision_feature_layer][:, 1:])).numpy()


def select_layer(source: pathlib.Path) -> int:
  """The hidden state that a GPT4RoI makes image tokens of."""
  fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
  return fields.get("mm_vision_select_layer", -2)


def _llama_fields(source: pathlib.Path) -> dict[str, Any]:
  """GPT4RoI's config.json is a LLaMA's with fields of its own, under the name 'llava'."""
  fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
  return {k: v for k, v in fields.items() if k not in ("model_type", "architectures")}


def _load(kind: Any, folder: pathlib.Path, dtype: np.dtype | None) -> nn.Module:
  """A model by transformers' own reading, rounded as the release is."""
  with _quiet():
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
  if dtype is not None:
    for p in model.parameters():
      p.data = p.data.to(getattr(torch, dtype.name)).float()
  return model


def _in_float32(array: np.ndarray, dtype: np.dtype | None) -> torch.Tensor:
  """A copy, rounded to `dtype` on the way."""
  array = array if dtype is None else array.astype(dtype, copy=False)
  return torch.from_numpy(np.array(array, np.float32))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Without transformers' bars and notes, which say nothing about the conversion."""
  verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
  logging.set_verbosity_error()
  logging.disable_progress_bar()
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)
    if bars:
      logging.enable_progress_bar()

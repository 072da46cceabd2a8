"""Proof of a conversion: bits against the source, numbers against transformers.

Two kinds. `check_bits` brings every parameter of a release back to the published layout and
compares it with the source bit by bit; it streams, and needs nothing but the files. The others run
transformers (with torch) and this program on the same input in float32: each block of a stack is
given what transformers gave its own, so that an error shows in the block that makes it. Errors are
max|a - b| / max|b| of a tensor.

Axes: b rows, n image tokens, t tokens, c vision channels, d decoder channels, h w pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from regionjax.config import DecoderConfig, VisionConfig
from regionjax.weights import leaves as lazy
from regionjax.weights import release
from regionjax.weights.convert import Arranged
from regionjax.weights.tensors import WeightsError

BLOCK, WHOLE = 1e-5, 1e-4  # the errors that a sound conversion stays below
NEW_TOKENS = 64
PROMPT = "The quick brown fox jumps over the lazy dog. In the year 1999,"


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the report.

  Attributes:
    name: what was compared.
    error: max|a - b| / max|b|.
    limit: what it must stay below.
  """

  name: str
  error: float
  limit: float

  @property
  def passed(self) -> bool:
    return bool(self.error <= self.limit)  # not for NaN


@dataclasses.dataclass
class Report:
  """What a check found.

  Attributes:
    rows: numbers against transformers.
    tensors: compared bit by bit.
    wrong: names of tensors whose bits differ.
    tokens: greedy tokens compared; 0 if none were.
    differs_at: index of the first token that differs; None if all are equal.
    left_out: what was not checked, and why.
  """

  rows: list[Row] = dataclasses.field(default_factory=list)
  tensors: int = 0
  wrong: list[str] = dataclasses.field(default_factory=list)
  tokens: int = 0
  differs_at: int | None = None
  left_out: list[str] = dataclasses.field(default_factory=list)

  @property
  def passed(self) -> bool:
    return not self.wrong and self.differs_at is None and all(row.passed for row in self.rows)

  def __str__(self) -> str:
    lines = [f"{self.tensors} tensors brought back: " + self._bits()]
    width = max([len(row.name) for row in self.rows], default=0)
    for row in self.rows:
      verdict = "" if row.passed else f"  ABOVE {row.limit:g}"
      lines.append(f"{row.name:<{width}}  {row.error:.1e}{verdict}")
    if self.tokens:
      same = "all equal" if self.differs_at is None else f"differ from token {self.differs_at} on"
      lines.append(f"{self.tokens} greedy tokens: {same}")
    lines += [f"not checked: {what}" for what in self.left_out]
    return "\n".join([*lines, "check passed" if self.passed else "CHECK FAILED"])

  def _bits(self) -> str:
    if not self.wrong:
      return "every bit is the source's"
    return f"{len(self.wrong)} DIFFER from the source:\n  " + "\n  ".join(self.wrong)


def check(
  arranged: Arranged, made: pathlib.Path, *, log: Callable[[str], None] = lambda _: None
) -> Report:
  """Checks a release against the source that it was converted from.

  Args:
    arranged: the conversion.
    made: the release.
    log: told what is being done.

  Raises:
    WeightsError: torch is not installed.
  """
  opened = release.open_release(made)
  report = Report()
  log("comparing bits")
  check_bits(arranged, opened, report)
  if arranged.family != "gpt4roi":
    log("running transformers beside this program, in float32")
  model = opened.config.model
  path = pathlib.Path(arranged.steps[-1].source.where)
  folder = path if path.is_dir() else path.parent
  with _torch():
    if arranged.family == "hf-clip":
      report.rows += check_tower(load_tower(folder), model.vision, _tree(opened, "vision"))
    elif arranged.family == "gpt4roi":
      report.left_out.append(
        "GPT4RoI's region module and connector in numbers (transformers has none; their bits are)"
      )
    else:
      oracle = load_decoder(arranged, path)
      if arranged.family == "hf-llava":
        tower = oracle.model.vision_tower
        report.rows += check_tower(tower, model.vision, _tree(opened, "vision"))
        report.left_out.append("the projector in numbers (its bits are)")
      check_decoder(oracle, opened, report)
  return report


def check_bits(arranged: Arranged, opened: release.Opened, report: Report) -> None:
  """Compares what the tables make of the release with what the source holds, tensor by tensor."""
  for step in arranged.steps:
    paths = {rule.path for rule in step.table.rules}
    params = {path: leaf for path, leaf in opened.leaves.items() if path in paths}
    named = {step.table.canonical(name): tensor for name, tensor in step.source.items()}
    for key, leaf in step.table.back(params).items():
      report.tensors += 1
      if not _same_bits(leaf, named[key]):
        report.wrong.append(key)


def _same_bits(ours: lazy.Leaf, theirs: Any) -> bool:
  """Equal values, the source's rounded to the release's dtype."""
  a, b = lazy.as_lazy(ours), lazy.as_lazy(theirs)
  equal = a.shape == b.shape and np.array_equal(a.array(), b.array().astype(a.dtype))
  a.release()
  b.release()
  return equal


def check_tower(tower: Any, config: VisionConfig, params: Mapping[str, Any]) -> list[Row]:
  """A vision tower: every hidden state of the same random images.

  Args:
    tower: transformers' CLIPVisionModel in float32.
    config: ours.
    params: ours, {'vision': ...}.
  """
  import torch

  from regionjax.models.vit import VisionTransformer

  images_bhwc = np.random.default_rng(0).normal(size=(2, *config.image_hw, 3)).astype(np.float32)
  with torch.no_grad():
    out = tower(torch.tensor(images_bhwc.transpose(0, 3, 1, 2)), output_hidden_states=True)
  depth = jax.tree.leaves(params["vision"]["layers"])[0].shape[0]
  module = VisionTransformer(config, depth=depth)
  hidden = module.apply({"params": params["vision"]}, images_bhwc)
  names = ["vision embeddings", *(f"vision block {i}" for i in range(depth))]
  return [
    Row(name, relative(ours, theirs.numpy()), WHOLE if i == depth else BLOCK)
    for i, (name, ours, theirs) in enumerate(zip(names, hidden, out.hidden_states))
  ]


def check_decoder(oracle: Any, opened: release.Opened, report: Report) -> None:
  """A decoder: every block on transformers' own input, the logits, and greedy tokens."""
  config = opened.config.model.decoder
  params = _tree(opened, "decoder")
  ids = opened.tokenizer.encode_text(PROMPT)
  ids = [i for i in (opened.tokenizer.bos_id,) if i >= 0] + ids
  report.rows += list(compare_blocks(oracle, config, params["decoder"], ids))
  ours, theirs = greedy(config, params, ids), oracle_greedy(oracle, ids)
  report.tokens = len(theirs)
  differing = [i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b]
  report.differs_at = differing[0] if differing else None


def compare_blocks(
  oracle: Any, config: DecoderConfig, params: Mapping[str, Any], ids: Sequence[int]
) -> Iterator[Row]:
  """One row per block, and one for the logits of the whole.

  Args:
    oracle: transformers' LlamaForCausalLM in float32.
    config: ours.
    params: ours, layers stacked.
    ids: of the prompt.
  """
  import torch

  from regionjax.models.decoder import Decoder, DecoderBlock
  from regionjax.ops import rope

  tokens_bt = np.asarray([ids])
  with torch.no_grad():
    out = oracle(torch.tensor(tokens_bt), output_hidden_states=True, use_cache=False)
  hidden = [h.numpy() for h in out.hidden_states]
  positions_bt = jnp.arange(len(ids), dtype=jnp.int32)[None]
  segments_bt = jnp.ones((1, len(ids)), jnp.int32)
  table = rope.rope_table(
    positions_bt, head_dim=config.head_dim, base=config.rope_base, scaling=config.rope_scaling
  )
  block = jax.jit(
    lambda p, x: DecoderBlock(config).apply({"params": p}, x, table, segments_bt, None, None)[0]
  )
  yield Row("embeddings", relative(params["embed"]["embedding"][tokens_bt], hidden[0]), BLOCK)
  for i in range(config.layers - 1):  # transformers gives the last block's output normed
    layer = jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), params["layers"])
    yield Row(f"block {i}", relative(block(layer, hidden[i]), hidden[i + 1]), BLOCK)

  def whole(module: Decoder, tokens_bt: Any) -> Any:
    x_btd, _ = module(
      module.embed(tokens_bt), positions_bt=positions_bt, segment_ids_bt=segments_bt
    )
    return module.logits(x_btd)

  logits = Decoder(config).apply({"params": params}, tokens_bt, method=whole)
  size = out.logits.shape[-1]
  yield Row("logits", relative(logits[..., :size], out.logits.numpy()), WHOLE)


def greedy(config: DecoderConfig, params: Mapping[str, Any], ids: Sequence[int]) -> list[int]:
  """NEW_TOKENS most probable tokens by this program, with a cache, no stop."""
  from regionjax.models.decoder import Decoder, init_cache
  from regionjax.models.params import unstack_layers

  module = Decoder(config, scan_layers=False)
  placed = jax.tree.map(jnp.asarray, unstack_layers(params["decoder"]))

  @jax.jit
  def step(tokens_bt: Any, cache: Any) -> Any:
    def run(m: Decoder) -> Any:
      positions_bt = cache.length_b[:, None] + jnp.arange(tokens_bt.shape[1])[None]
      x_btd, new = m(
        m.embed(tokens_bt), positions_bt=positions_bt,
        segment_ids_bt=jnp.ones_like(tokens_bt), cache=cache,
      )  # fmt: skip
      return jnp.argmax(m.logits(x_btd[:, -1:])[:, 0], axis=-1), new

    return module.apply({"params": placed}, method=run)

  out: list[int] = []
  cache = init_cache(config, 1, len(ids) + NEW_TOKENS)
  token_b, cache = step(jnp.asarray([ids], jnp.int32), cache)
  while True:
    out.append(int(token_b[0]))
    if len(out) == NEW_TOKENS:
      return out
    token_b, cache = step(token_b[:, None].astype(jnp.int32), cache)


def oracle_greedy(oracle: Any, ids: Sequence[int]) -> list[int]:
  """The same by transformers."""
  import torch

  out = oracle.generate(
    torch.tensor([list(ids)]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
  )
  return out[0, len(ids) :].tolist()


def load_tower(folder: pathlib.Path) -> Any:
  """transformers' vision tower, in float32."""
  import torch
  from transformers import CLIPVisionModel

  return CLIPVisionModel.from_pretrained(folder, dtype=torch.float32).eval()


def load_decoder(arranged: Arranged, path: pathlib.Path) -> Any:
  """transformers' language model of a source (a LLaVA with its tower), in float32."""
  import torch
  from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

  if arranged.family == "gguf":
    return load_gguf(path)
  folder = path if path.is_dir() else path.parent
  if arranged.family == "hf-llava":
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
  return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_gguf(path: pathlib.Path) -> Any:
  """transformers' language model of a GGUF file, in float32.

  `from_pretrained(gguf_file=...)` reads the same, but only where accelerate is installed.
  """
  import torch
  from transformers import AutoConfig, AutoModelForCausalLM
  from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

  config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
  model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
  state = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
  if config.tie_word_embeddings:
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
  model.load_state_dict(state)
  return model.eval()


def relative(ours: Any, theirs: Any) -> float:
  """max|a - b| / max|b|; infinite where shapes differ."""
  a, b = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
  if a.shape != b.shape:
    return float("inf")
  return float(np.abs(a - b).max() / np.abs(b).max())


def _tree(opened: release.Opened, part: str) -> dict[str, Any]:
  """A part's parameters in float32."""
  flat = {path: tensor.array().astype(np.float32) for path, tensor in opened.of(part).items()}
  return release.unflatten(flat)


@contextlib.contextmanager
def _torch() -> Iterator[None]:
  try:
    yield
  except ImportError as error:
    raise WeightsError(
      f"the numbers cannot be checked without transformers' own models ({error}); "
      "pip install torch, and gguf for a GGUF file. The conversion itself is complete"
    ) from None

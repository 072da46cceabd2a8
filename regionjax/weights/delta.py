"""GPT4RoI's delta: published tensors are differences to LLaMA-7B, or whole where that has none.

LLaMA's licence forbade publishing the sum. `apply_delta` is the sum as a source of tensors, each
added when it is read; what cannot be added is said before.
"""

from __future__ import annotations

import re

import numpy as np

from regionjax.config import GPT4ROI_TOKENS
from regionjax.weights.tensors import Tensor, TensorSource, WeightsError

# Stored whole: the base has no such modules.
_WHOLE = re.compile(r"spi_module|^model\.mm_projector\.(?:weight|bias)$")
_NOTHING = re.compile(r"rotary_emb\.inv_freq$")
_TOKEN_ROWS = ("model.embed_tokens.weight", "lm_head.weight")
NORM, EMBED = "model.norm.weight", _TOKEN_ROWS[0]
ADDED = len(GPT4ROI_TOKENS)

# Mean size of the last norm's scale: a trained LLaMA's is above 1, fine-tuning at 2e-5 moves it by
# hundredths.
_LARGEST_DELTA_NORM = 0.25


def is_delta(source: TensorSource) -> bool:
  """Whether a checkpoint is a difference to another: the scale of its last norm is near zero.

  Args:
    source: a GPT4RoI or LLaMA checkpoint; False where it has no last norm.
  """
  if NORM not in source:
    return False
  return float(np.mean(np.abs(source[NORM].array().astype(np.float32)))) < _LARGEST_DELTA_NORM


def apply_delta(base: TensorSource, delta: TensorSource) -> TensorSource:
  """Base plus delta, in the delta's dtype as the original added them.

  The region module and the projector are copied; of the token tables the added rows are; everything
  else is the sum. Rotary frequencies are left out. Closing the result closes both.

  Args:
    base: plain LLaMA of the same sizes, in the Hugging Face layout.
    delta: the published delta.

  Raises:
    WeightsError: `delta` is none; or the base has another width or vocabulary, lacks tensors, or
      has tensors or shapes that the delta does not know (all of them listed).
  """
  if not is_delta(delta):
    raise WeightsError(
      f"{delta.where}: is no delta (its {NORM} is missing or not near zero). A merged checkpoint "
      "is converted as it is, without a base"
    )
  _check_kind(base, delta)
  problems, tensors = [], []
  for name, tensor in delta.items():
    if _NOTHING.search(name):
      continue
    if _WHOLE.search(name):
      tensors.append(tensor)
    elif name not in base:
      problems.append(f"{name} {list(tensor.shape)} is missing from the base")
    elif base[name].shape == tensor.shape or name in _TOKEN_ROWS:
      tensors.append(_Sum(base[name], tensor))
    else:
      problems.append(
        f"{name} is {list(base[name].shape)} in the base and {list(tensor.shape)} in the delta"
      )
  problems += [
    f"{name} {list(tensor.shape)} is only in the base"
    for name, tensor in base.items()
    if name not in delta and not _NOTHING.search(name)
  ]
  if problems:
    raise WeightsError(
      f"{delta.where} is no delta to {base.where}:\n  "
      + "\n  ".join(problems)
      + "\n  The base must be plain LLaMA-7B in the Hugging Face layout."
    )
  return TensorSource(
    tensors, where=f"{delta.where} on {base.where}", metadata=delta.metadata, files=(base, delta)
  )


def _check_kind(base: TensorSource, delta: TensorSource) -> None:
  """Names a base that is another model, before it becomes a list of 300 tensors."""
  for source, what in ((base, "the base"), (delta, "the delta")):
    if EMBED not in source or len(source[EMBED].shape) != 2:
      raise WeightsError(
        f"{source.where}: {what} has no table {EMBED}; expected a LLaMA checkpoint in the Hugging "
        "Face layout (Meta's own files must be converted to it first)"
      )
  (base_rows, base_width), (rows, width) = base[EMBED].shape, delta[EMBED].shape
  if base_width != width:
    raise WeightsError(
      f"{base.where}: the base is {base_width} wide, the delta {width}; LLaMA-7B is 4096 wide and "
      "13B 5120: take the base of the delta's size"
    )
  for name in _TOKEN_ROWS:
    if name not in base or name not in delta:
      continue  # listed with the rest
    base_shape, shape = base[name].shape, delta[name].shape
    if base_shape != (rows - ADDED, width) or shape != (rows, width):
      raise WeightsError(
        f"{base.where}: {name} is {list(base_shape)} in the base and {list(shape)} in the delta, "
        f"which adds {ADDED} rows to {rows - ADDED}. A base with {base_rows} rows is not plain "
        "LLaMA (Vicuna and LLaVA have added tokens of their own): give LLaMA-7B itself"
      )


class _Sum(Tensor):
  """base + delta, the delta's further rows as they are."""

  def __init__(self, base: Tensor, delta: Tensor):
    super().__init__(delta.name, delta.shape, delta.dtype)
    self._base, self._delta = base, delta

  def array(self) -> np.ndarray:
    base, out = self._base.array(), np.array(self._delta.array())
    with np.errstate(over="ignore"):  # what overflows becomes infinite and is named when written
      out[: len(base)] += base.astype(self.dtype, copy=False)
    self.release()
    return out

  def release(self) -> None:
    self._base.release()
    self._delta.release()

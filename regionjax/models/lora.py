"""Merging low-rank updates into the maps that they update, so that generation pays nothing.

Axes: l layers, d input channels, r the update's rank, e output channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from regionjax.config import LoraConfig, ModelConfig

LEAVES = ("lora_a", "lora_b")


def without_lora(config: ModelConfig) -> ModelConfig:
  """The same model with no low-rank updates."""
  decoder = dataclasses.replace(config.decoder, lora=LoraConfig())
  return dataclasses.replace(config, decoder=decoder)


def merge_lora(
  config: ModelConfig, params: Mapping[str, Any], *, dtype: Any = None
) -> tuple[ModelConfig, dict[str, Any]]:
  """W + A @ B * alpha / rank in the place of W, A and B; computed in float32.

  Args:
    config: the model; without LoRA it and `params` come back as they are.
    params: nested mappings of numpy or jax arrays, layers stacked or not; not changed.
    dtype: of the merged kernels; None is each kernel's own. A bfloat16 kernel keeps 8 bits of the
      sum, so give the compute dtype where that is wider.

  Returns:
    The model without LoRA, and its parameters.

  Raises:
    ValueError: a map that the config adapts has no `lora_a` and `lora_b`.
  """
  if not config.decoder.lora.rank:
    return config, dict(params)
  decoder = _merge(params["decoder"], config.decoder.lora, dtype)
  return without_lora(config), {**params, "decoder": decoder}


def _merge(tree: Mapping[str, Any], lora: LoraConfig, dtype: Any) -> dict[str, Any]:
  out: dict[str, Any] = {}
  for name, node in tree.items():
    if not isinstance(node, Mapping):
      out[name] = node
    elif not lora.adapts(name):
      out[name] = _merge(node, lora, dtype)
    else:
      if missing := [leaf for leaf in LEAVES if leaf not in node]:
        raise ValueError(
          f"decoder.lora adapts {name!r}, but its parameters lack {', '.join(missing)} (they hold "
          f"{', '.join(node)}): config and parameters are of different models"
        )
      kernel = _merged(node["kernel"], node["lora_a"], node["lora_b"], lora.scale, dtype)
      out[name] = {k: v for k, v in node.items() if k not in LEAVES} | {"kernel": kernel}
  return out


def _merged(kernel: Any, a: Any, b: Any, scale: float, dtype: Any) -> Any:
  """One map [D, E] or all layers of it [L, D, E]; of numpy arrays one layer after the other."""
  dtype = kernel.dtype if dtype is None else dtype
  if not all(isinstance(leaf, np.ndarray) for leaf in (kernel, a, b)):
    update = jnp.matmul(
      jnp.asarray(a, jnp.float32) * scale,
      jnp.asarray(b, jnp.float32),
      precision=jax.lax.Precision.HIGHEST,
    )
    return (jnp.asarray(kernel, jnp.float32) + update).astype(dtype)
  out = np.empty(kernel.shape, dtype)
  for to_de, kernel_de, a_dr, b_re in zip(*map(_layers, (out, kernel, a, b))):
    update_de = (a_dr.astype(np.float32) * np.float32(scale)) @ b_re.astype(np.float32)
    to_de[...] = kernel_de.astype(np.float32) + update_de
  return out


def _layers(array: np.ndarray) -> np.ndarray:
  """[L, D, E]; one map alone is one layer."""
  return array.reshape(-1, *array.shape[-2:])

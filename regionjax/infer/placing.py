"""A model's parameters onto one device, or onto the devices of a mesh, ready to generate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from regionjax import partition
from regionjax.config import ModelConfig
from regionjax.weights.leaves import Leaf, Padded, as_leaf
from regionjax.weights.placement import place
from regionjax.weights.release import flatten, unflatten


def put_params(
  config: ModelConfig, params: Mapping[str, Any], mesh: Mesh | None, *, dtype: Any
) -> tuple[ModelConfig, dict[str, Any]]:
  """Parameters in the compute dtype where the programs of generation want them.

  Args:
    config: the model.
    params: nested mappings of arrays, layers one by one or stacked. Arrays that are mapped from
      files are read slice by slice: no host and no device holds the whole of a model that a mesh
      shares.
    mesh: None is jax's default device. Where its `tensor` axis doesn't divide the vocabulary, rows
      are added whose logits are masked.
    dtype: of floating-point arrays.

  Returns:
    The config, with the vocabulary as it is now, and the parameters.

  Raises:
    ConfigError: the mesh can't split the model.
  """
  if mesh is None:

    def put(leaf: Any) -> jax.Array:
      floating = jnp.issubdtype(leaf.dtype, jnp.floating)
      return jnp.asarray(leaf, dtype if floating else leaf.dtype)

    return config, jax.tree.map(put, params)
  padded = partition.pad_vocabulary(config, mesh)
  rows = padded.decoder.padded_vocab
  leaves: dict[str, Leaf] = {path: as_leaf(array) for path, array in flatten(params).items()}
  for path, axis in (("decoder/embed/embedding", 0), ("decoder/head/kernel", 1)):
    if path in leaves and leaves[path].shape[axis] < rows:
      leaves[path] = Padded(leaves[path], axis=axis, size=rows)
  lies = partition.shardings(padded, leaves, mesh)
  return padded, unflatten(place(leaves, lies, dtype=dtype))

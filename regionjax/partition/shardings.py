"""The tables of `tables` applied to trees: parameters, optimiser states, gradients."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from regionjax.config import ConfigError, ModelConfig
from regionjax.partition.activations import gather, mesh_sizes
from regionjax.partition.tables import Dim, Rule, Split, match, rules

_LAYER = re.compile(r"/layers(?:_\d+)?/")


def shardings(config: ModelConfig, shapes: Any, mesh: Mesh | AbstractMesh) -> Any:
  """How a tree lies on a mesh.

  Args:
    config: the model.
    shapes: a tree whose leaves have a shape: parameters (layers stacked or not), some of them, or
      anything whose paths end in those of parameters, such as an optimiser's moments. Scalars are
      on every device.
    mesh: with the axes of `mesh.AXES`.

  Returns:
    The tree with a NamedSharding for each leaf.

  Raises:
    ConfigError: an axis of the mesh doesn't divide what it splits.
    ValueError: a leaf that isn't a scalar and has no parameter's path.
  """
  found = specs(config, shapes, dict(mesh.shape))
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec), found, is_leaf=lambda x: isinstance(x, PartitionSpec)
  )


def specs(config: ModelConfig, shapes: Any, sizes: Mapping[str, int]) -> Any:
  """`shardings` as PartitionSpecs; `sizes` are those of the mesh's axes."""
  table = _table(config)

  def spec(path: Any, leaf: Any) -> PartitionSpec:
    if not leaf.shape:
      return PartitionSpec()
    name = _parameter(jax.tree_util.keystr(path, simple=True, separator="/"), table)
    return _spec(name, table[_stacked(name)], tuple(leaf.shape), sizes)

  return jax.tree_util.tree_map_with_path(spec, shapes)


def gathered(config: ModelConfig, params: Any) -> Any:
  """Parameters that are whole over `fsdp` from here on, once and not in each use; for inside jit.

  They are gathered in the compute dtype, and their gradients go back to where they lie: without
  saying so, every device would add up the whole of them. Without a mesh they come back as they are.
  """
  sizes = mesh_sizes()
  if math.prod(sizes.values()) == 1:
    return params
  own, whole = specs(config, params, sizes), specs(config, params, sizes | {"fsdp": 1})
  dtype = jnp.dtype(config.compute_dtype)
  return jax.tree.map(lambda x, *lies: gather(x, *lies, dtype, x.dtype), params, own, whole)


def pad_vocabulary(config: ModelConfig, mesh: Mesh) -> ModelConfig:
  """The model with its vocabulary padded so far that `tensor` divides it."""
  multiple = math.lcm(config.decoder.vocab_multiple, mesh.shape["tensor"])
  decoder = dataclasses.replace(config.decoder, vocab_multiple=multiple)
  return dataclasses.replace(config, decoder=decoder)


def dump(config: ModelConfig) -> str:
  """Path, shape and split of every parameter, a line each.

  `tensor/32` splits 32 things that aren't cut, `tensor?` stays whole where it doesn't divide, `+`
  joins the axes of one dimension.
  """
  lines = []
  for path, (shape, rule) in _table(config).items():
    dims = ((None,) if _LAYER.search(path) else ()) + rule.dims if rule.dims else ()
    dims += (None,) * (len(shape) - len(dims))
    text = ", ".join("+".join(map(str, _splits(dim))) or "-" for dim in dims)
    lines.append(f"{path}  [{', '.join(map(str, shape))}]  {text}")
  return "\n".join(lines) + "\n"


@functools.lru_cache(maxsize=32)
def _table(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], Rule]]:
  """Shape and rule of every parameter by path, layers stacked; strict (see `tables.match`)."""
  from regionjax.models.params import param_shapes  # the models import this package

  stacked = dataclasses.replace(config, scan_layers=True, remat="none")
  leaves, _ = jax.tree_util.tree_flatten_with_path(param_shapes(stacked))
  shapes = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves
  }
  found = match(rules(config), list(shapes))
  return {path: (shape, found[path]) for path, shape in shapes.items()}


def _stacked(name: str) -> str:
  return _LAYER.sub("/layers/", name)


def _parameter(name: str, table: Mapping[str, Any]) -> str:
  """The longest end of a leaf's path that is a parameter's."""
  parts = name.split("/")
  for start in range(len(parts)):
    end = "/".join(parts[start:])
    if _stacked(end) in table:
      return end
  raise ValueError(
    f"{name!r} doesn't end in the path of a parameter of this model (e.g. {next(iter(table))!r}), "
    "so nothing says how it lies on a mesh"
  )


def _spec(
  name: str,
  entry: tuple[tuple[int, ...], Rule],
  shape: tuple[int, ...],
  sizes: Mapping[str, int],
) -> PartitionSpec:
  stacked, rule = entry
  layers = (None,) if "/layers/" in name else ()
  dims = layers + rule.dims if rule.dims else ()
  if len(dims) > len(shape):
    raise ValueError(f"{name} has shape {shape}; the partition table knows it as {stacked}")
  return PartitionSpec(*(_axes(name, shape, at, dim, sizes) for at, dim in enumerate(dims)))


def _axes(
  name: str, shape: tuple[int, ...], at: int, dim: Dim, sizes: Mapping[str, int]
) -> str | tuple[str, ...] | None:
  """The mesh axes of one dimension: those of more than one device that divide it."""
  axes: list[str] = []
  left = shape[at]
  for split in _splits(dim):
    size = sizes[split.axis]
    if size == 1:
      continue
    if (split.units or left) % size == 0 and left % size == 0:
      axes.append(split.axis)
      left //= size
    elif not split.or_whole:
      units = split.units or left
      what = split.what or f"dimension {at} of {name} {list(shape)}"
      fit = [n for n in range(2, min(units, 64) + 1) if units % n == 0]
      raise ConfigError(
        f"mesh {split.axis}={size} can't split {what} ({units}); sizes that can: "
        f"{', '.join(map(str, fit)) or 'only 1'}"
      )
  return tuple(axes) if len(axes) > 1 else axes[0] if axes else None


def _splits(dim: Dim) -> tuple[Split, ...]:
  return () if dim is None else dim if isinstance(dim, tuple) else (dim,)

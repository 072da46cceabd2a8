"""Parameter trees: shapes of a batch, initialisation, counts, and the two layouts of the layers."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from regionjax.config import ModelConfig
from regionjax.models.region_lm import RegionLM
from regionjax.ops.tokens import resize_positions

Array = jax.Array

_NUMBERED = re.compile(r"layers_(\d+)")


def model_for(
  config: ModelConfig,
  *,
  generate: bool = False,
  image_slot_id: int = -1,
  region_slot_id: int = -1,
) -> RegionLM:
  """The model of a config, in the layout for training or for generation.

  Args:
    config: the model.
    generate: layers one by one ('layers_0', ...; see `unstack_layers`) and no remat: an unrolled
      decode reads weights at 20 GB/s on two cores, a scanned one at 12.
    image_slot_id: the tokenizer's `image_slot_id`.
    region_slot_id: the tokenizer's `region_slot_id`.
  """
  if generate:
    config = dataclasses.replace(config, scan_layers=False, remat="none")
  return RegionLM(config, image_slot_id=image_slot_id, region_slot_id=region_slot_id)


def head_params(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
  """The parameters that `RegionLM.logits` reads, nested as in the whole tree."""
  table = "embed" if config.decoder.tie_embeddings else "head"
  return {"decoder": {table: params["decoder"][table]}}


def batch_shapes(
  config: ModelConfig, *, rows: int, tokens: int, images: int, regions: int
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and dtypes of a `data.schema.Batch` for a model.

  Args:
    config: the model; its vision config gives image size and patch count.
    rows: B.
    tokens: T, per row.
    images: K, per row.
    regions: R, slots per row.
  """
  bt, br = (rows, tokens), (rows, regions)
  shapes = dict(
    tokens_bt=(bt, jnp.int32),
    targets_bt=(bt, jnp.int32),
    loss_weights_bt=(bt, jnp.float32),
    segment_ids_bt=(bt, jnp.int32),
    positions_bt=(bt, jnp.int32),
    answer_ids_bt=(bt, jnp.int32),
    images_bkhwc=((rows, images, *config.vision.image_hw, 3), jnp.float32),
    image_mask_bk=((rows, images), jnp.bool_),
    boxes_br4=((*br, 4), jnp.float32),
    box_image_br=(br, jnp.int32),
    region_kind_br=(br, jnp.int32),
    region_mask_br=(br, jnp.bool_),
    region_cover_brn=((*br, config.vision.tokens), jnp.float32),
  )
  return {name: jax.ShapeDtypeStruct(*spec) for name, spec in shapes.items()}


def init_params(config: ModelConfig, rng: Array) -> dict[str, Any]:
  """Fresh f32 parameters {'vision', 'connector', 'regions', 'decoder'}; jit and eval_shape work.

  Layers are stacked when `config.scan_layers`. 'regions' is absent when regions have no features.

  Args:
    config: the model.
    rng: a PRNG key.
  """
  shapes = batch_shapes(config, rows=1, tokens=1, images=1, regions=1)
  batch = {name: jnp.zeros(s.shape, s.dtype) for name, s in shapes.items()}
  return RegionLM(config).init(rng, batch)["params"]


def param_shapes(config: ModelConfig) -> dict[str, Any]:
  """The parameter tree as ShapeDtypeStructs; nothing is allocated."""
  return jax.tree.map(lambda shape: shape, _param_shapes(config))


@functools.lru_cache(maxsize=32)
def _param_shapes(config: ModelConfig) -> dict[str, Any]:
  """Tracing takes a second, and opening an adapter asks for its model's and its base's tree."""
  return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def count_params(config: ModelConfig) -> dict[str, int]:
  """Parameters of each part by eval_shape; their sum is the model's.

  'vision' counts the blocks that run. Rows that pad the vocabulary (`vocab_multiple`) are counted:
  they exist.
  """
  return {
    part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    for part, tree in param_shapes(config).items()
  }


def resize_images(
  config: ModelConfig, params: Mapping[str, Any], image_size: int | tuple[int, int]
) -> tuple[ModelConfig, dict[str, Any]]:
  """The same model for images of another size: only the position table changes.

  Region encoders know their grid from the config, so a model with region features reads another
  size through this; the vision encoder alone takes any size as it is.

  Args:
    config: the model.
    params: its parameters.
    image_size: pixels, as in `VisionConfig.image_size`.

  Returns:
    The config with that image size, and the parameters with the table resampled (bicubic).
  """
  vision = dataclasses.replace(config.vision, image_size=image_size)
  table = jnp.asarray(params["vision"]["positions"])
  table = resize_positions(table, config.vision.grid, vision.grid)
  new = {**params, "vision": {**params["vision"], "positions": table}}
  return dataclasses.replace(config, vision=vision), new


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
  """'layers_0', 'layers_1', ... -> one 'layers' with a leading layer axis, at any depth.

  Args:
    params: nested mappings of numpy or jax arrays. A tree already stacked comes back as it is.
  """
  numbered = {int(m[1]): params[k] for k in params if (m := _NUMBERED.fullmatch(k))}
  out = {
    k: stack_layers(v) if isinstance(v, Mapping) else v
    for k, v in params.items()
    if not _NUMBERED.fullmatch(k)
  }
  if numbered:
    layers = [numbered[i] for i in range(len(numbered))]
    out["layers"] = jax.tree.map(lambda *leaves: _library(leaves[0]).stack(leaves), *layers)
  return out


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `stack_layers`; numpy leaves become views."""
  out: dict[str, Any] = {}
  for key, value in params.items():
    if key == "layers":
      depth = jax.tree.leaves(value)[0].shape[0]
      for i in range(depth):
        out[f"layers_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], value)
    else:
      out[key] = unstack_layers(value) if isinstance(value, Mapping) else value
  return out


def _library(leaf: Any) -> Any:
  return np if isinstance(leaf, np.ndarray) else jnp

"""The device mesh, and how batches lie on it; how parameters do is told in `partition`.

Axes: `data` and `fsdp` split the rows of a batch; `fsdp` splits parameters too, which each layer
gathers when it runs; `tensor` splits heads, hidden channels and the vocabulary. Axis types are
Auto: the compiler propagates shardings from the arguments of `jit` and from `partition.constrain`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from regionjax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(
  *,
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  slices: int = 1,
  devices: Sequence[Any] | None = None,
) -> Mesh:
  """A mesh over all devices (or `devices`) with axes `data`, `fsdp`, `tensor`.

  Args:
    data, fsdp, tensor: sizes; at most one may be -1, which takes the devices that are left.
    slices: how many groups the devices form that only a slow network joins (TPU slices). They
      split `data` alone, its outermost part: what crosses the network is one reduction of the
      gradients a step.
    devices: anything with jax's device attributes, so that a topology without devices will do.

  Raises:
    ConfigError: the sizes don't multiply to the number of devices, or don't fit their slices.
  """
  devices = list(jax.devices()) if devices is None else list(devices)
  shape = [data, fsdp, tensor]
  known = math.prod(size for size in shape if size > 0)
  if shape.count(-1) == 1 and known and len(devices) % known == 0:
    shape[shape.index(-1)] = len(devices) // known
  given = " x ".join(f"{name}={size}" for name, size in zip(AXES, (data, fsdp, tensor)))
  if min(shape) < 1 or math.prod(shape) != len(devices):
    raise ConfigError(
      f"mesh {given} doesn't fit {len(devices)} devices: the sizes must multiply to it, "
      "and at most one may be -1"
    )
  groups = _slices(devices, slices)
  if shape[0] % slices:
    raise ConfigError(
      f"mesh {given} has data={shape[0]}, which {slices} slices can't share: make it a multiple of "
      f"{slices} (fsdp and tensor stay inside a slice)"
    )
  grid = _arranged((shape[0] // slices, *shape[1:]), groups)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def from_config(config: MeshConfig, *, devices: Sequence[Any] | None = None) -> Mesh:
  """`make_mesh` of a config's sizes."""
  return make_mesh(
    data=config.data, fsdp=config.fsdp, tensor=config.tensor, slices=config.slices, devices=devices
  )


def parse_mesh(text: str) -> MeshConfig:
  """`'fsdp=2,tensor=4'` -> MeshConfig, for command lines.

  Raises:
    ConfigError: another key than an axis or `slices`, or a size that is no whole number.
  """
  sizes = {}
  for item in filter(None, (part.strip() for part in text.split(","))):
    name, _, size = item.partition("=")
    if name not in (*AXES, "slices") or not size.removeprefix("-").isdigit():
      raise ConfigError(f"mesh {item!r}: expected axes and sizes, e.g. tensor=8 or fsdp=2,tensor=4")
    sizes[name] = int(size)
  return MeshConfig(**sizes)


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows (the first axis) split over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def row_shards(mesh: Mesh) -> int:
  """Into how many parts a batch's rows are split."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def own_rows(mesh: Mesh, rows: int) -> list[int]:
  """Which rows of a global batch of `rows` this process's devices hold, in order.

  Processes that share rows (where `tensor` reaches over several) each get them.
  """
  parts = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
  return sorted({row for (part,) in parts for row in range(rows)[part]})


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's rows of a batch (`own_rows`) -> global arrays, rows split over the mesh."""
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()
  }


def _slices(devices: Sequence[Any], slices: int) -> list[list[Any]]:
  """The devices of each slice, in the order of their indices."""
  if slices < 1:
    raise ConfigError(f"mesh slices={slices}: expected at least 1")
  groups: dict[int, list[Any]] = {}
  for device in devices:
    groups.setdefault(getattr(device, "slice_index", 0), []).append(device)
  # GPUs have an index per node; any axis may cross the fabric between nodes.
  if slices == 1 and devices[0].platform != "tpu":
    return [list(devices)]
  if len(groups) != slices or len({len(group) for group in groups.values()}) > 1:
    counts = ", ".join(str(len(groups[index])) for index in sorted(groups))
    raise ConfigError(
      f"mesh slices={slices}, but the devices form {len(groups)} (of {counts} devices); set "
      f"slices={len(groups)} and make data a multiple of it: only that axis may cross the network "
      "between slices"
    )
  return [groups[index] for index in sorted(groups)]


def _arranged(shape: tuple[int, ...], groups: Sequence[Sequence[Any]]) -> np.ndarray:
  """The devices in the shape of the mesh: neighbours in the network side by side, slices outermost.

  Args:
    shape: of the mesh inside one slice.
    groups: the devices of each slice.
  """
  # On v5e one axis of the mesh may need a part of an axis of the network.
  split = groups[0][0].device_kind in ("TPU v5 lite", "TPU v5e")
  outer = (len(groups),) + (1,) * (len(shape) - 1)
  try:
    if len(groups) == 1:
      return mesh_utils.create_device_mesh(shape, groups[0], allow_split_physical_axes=split)
    return mesh_utils.create_hybrid_device_mesh(
      shape, outer, [d for group in groups for d in group], allow_split_physical_axes=split
    )
  except NotImplementedError:  # shapes that jax knows no good order for, such as (64, 4) on 16x16
    return np.concatenate([np.array(group).reshape(shape) for group in groups])

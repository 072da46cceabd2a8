"""The device mesh, and how batches and parameters lie on it.

Axes: `data` and `fsdp` split the rows of a batch, `tensor` splits nothing yet; parameters are
replicated. Axis types are Auto: the compiler propagates shardings from the arguments of `jit`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from regionjax.config import ConfigError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(
  *, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list[Any] | None = None
) -> Mesh:
  """A mesh over all devices (or `devices`) with axes `data`, `fsdp`, `tensor`.

  Args:
    data, fsdp, tensor: sizes; at most one may be -1, which takes the devices that are left.

  Raises:
    ConfigError: the sizes don't multiply to the number of devices.
  """
  devices = list(jax.devices()) if devices is None else devices
  shape = [data, fsdp, tensor]
  known = math.prod(size for size in shape if size > 0)
  if shape.count(-1) == 1 and known and len(devices) % known == 0:
    shape[shape.index(-1)] = len(devices) // known
  if min(shape) < 1 or math.prod(shape) != len(devices):
    given = " x ".join(f"{name}={size}" for name, size in zip(AXES, (data, fsdp, tensor)))
    raise ConfigError(
      f"mesh {given} doesn't fit {len(devices)} devices: the sizes must multiply to it, "
      "and at most one may be -1"
    )
  return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows (the first axis) split over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def row_shards(mesh: Mesh) -> int:
  """Into how many parts a batch's rows are split."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's rows of a batch -> global arrays, rows split over the mesh."""
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()
  }

"""Kernels of whole rows and heads, which the compiler can't split, on a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from regionjax.ops import placement

Array = jax.Array


def on_mesh(run: Callable[..., Any], by_head: tuple[Array, ...], segment_ids_bt: Array) -> Any:
  """`run(segment_ids_bt, *by_head)` on every device's own rows and heads.

  Args:
    run: its results have rows and heads as their first axes.
    by_head: queries [B, N, ...], then keys [B, K, ...], then any others of either kind.
    segment_ids_bt: [B, T] int32.
  """
  q_bnth, k_bkth, *_ = by_head
  mesh = placement.mesh_of(q_bnth)
  if mesh is None:
    return run(segment_ids_bt, *by_head)
  rows = placement.row_axes(mesh, q_bnth.shape[0])
  heads = placement.split_axis(mesh, q_bnth.shape[1], k_bkth.shape[1])
  whole = PartitionSpec(rows, heads)
  specs = (PartitionSpec(rows), *(whole for _ in by_head))
  return placement.on_mesh(run, mesh, specs, whole)(segment_ids_bt, *by_head)

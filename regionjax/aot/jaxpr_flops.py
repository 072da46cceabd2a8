"""FLOPs of a traced program, counted in its jaxpr: exact, with the lengths of scans.

The same rules as for the compiled text (`hlo_costs`): dots and convolutions, two per pair, padding
counted and holes not (see `window_pairs`), the costliest branch of a conditional. What both count
in two different ways must agree, or the compiler does work that the program doesn't ask for.
Where a program chooses by platform, only the branch of the platform asked for counts.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval as pe

from regionjax.aot import cudnn_costs, splash_costs
from regionjax.aot.errors import AotError


def flops(
  function: Any, *args: Any, assumed_trips: int | None = None, platform: str | None = None
) -> float:
  """FLOPs of one call, over all devices.

  Args:
    function: to be traced; jitted or not.
    *args: arrays or ShapeDtypeStructs.
    assumed_trips: of loops that end when the data says so.
    platform: 'tpu', 'cuda' or 'cpu', for programs that choose by it; None counts the costliest.

  Raises:
    AotError: such a loop, and no number is assumed.
  """
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  # Traced derivatives hold products that nothing reads; every compiler drops them.
  jaxpr, _ = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return jaxpr_flops(jaxpr, assumed_trips=assumed_trips, platform=platform)


def jaxpr_flops(
  jaxpr: core.Jaxpr, *, assumed_trips: int | None = None, platform: str | None = None
) -> float:
  """As `flops`, of a jaxpr."""
  return sum(_equation(e, assumed_trips, platform) for e in jaxpr.eqns)


def _equation(e: core.JaxprEqn, assumed: int | None, platform: str | None) -> float:
  name, params = e.primitive.name, e.params
  count = functools.partial(jaxpr_flops, assumed_trips=assumed, platform=platform)
  if name == "dot_general":
    return _dot(e)
  if name == "conv_general_dilated":
    return _conv(e)
  if name == "scan":
    return params["length"] * count(params["jaxpr"].jaxpr)
  if name == "cond":
    return max(count(b.jaxpr) for b in _branches(params, platform))
  if name == "while":
    body = count(params["body_jaxpr"].jaxpr)
    if body and assumed is None:
      raise AotError(
        "the program has a loop with matrix products that ends when its data says so; say how many "
        "trips to count"
      )
    return body * (assumed or 1)
  if (direction := cudnn_costs.direction(name)) is not None:
    return cudnn_costs.flops(direction, *(v.aval.shape for v in e.invars[:2]))
  inner = sum(map(count, _inner(params)))
  if name == "shard_map":
    # Older releases of jax named the axes otherwise.
    axes = params.get("newly_manual_axes", params.get("manual_axes", ()))
    return inner * math.prod(params["mesh"].shape[axis] for axis in axes)
  if name == "pallas_call":
    grid = params["grid_mapping"].grid
    return inner * math.prod(grid) * _share_run(str(params["name"]), grid)
  return inner


def _branches(params: dict[str, Any], platform: str | None) -> list[core.ClosedJaxpr]:
  """The branches of a conditional that may run on a platform."""
  branches, platforms = params["branches"], params.get("branches_platforms")
  if platform is None or platforms is None:
    return list(branches)
  for named in (platform, None):  # None stands for the default
    for branch, names in zip(branches, platforms):
      if names is None if named is None else named in (names or ()):
        return [branch]
  return list(branches)


def _share_run(kernel: str, grid: tuple[int, ...]) -> float:
  """Share of a Pallas kernel's grid in which it computes: less than 1 in causal attention."""
  kind = splash_costs.kernel(kernel)
  if kind is None:
    return 1.0
  queries, keys = (grid[-1], grid[-3]) if kind == "dkv" else grid[-2:]
  return splash_costs.causal_share(queries, keys)


def _inner(params: dict[str, Any]) -> list[core.Jaxpr]:
  """The jaxprs of a call, whatever the call names them; a derivative rule isn't run."""
  found = []
  for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
    value = params.get(key)
    if value is not None:
      found.append(getattr(value, "jaxpr", value))
  return found


def _dot(e: core.JaxprEqn) -> float:
  (contracted, _), _ = e.params["dimension_numbers"]
  lhs, out = e.invars[0].aval, e.outvars[0].aval
  return 2.0 * math.prod(out.shape) * math.prod(lhs.shape[d] for d in contracted)


def _conv(e: core.JaxprEqn) -> float:
  p = e.params
  lhs, rhs, out = (v.aval.shape for v in (*e.invars[:2], *e.outvars))
  numbers = p["dimension_numbers"]
  pairs = 1.0
  for axis, (i, k, o) in enumerate(
    zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:])
  ):
    pairs *= window_pairs(
      lhs[i], rhs[k], out[o], stride=p["window_strides"][axis], low=p["padding"][axis][0],
      lhs_dilate=p["lhs_dilation"][axis], rhs_dilate=p["rhs_dilation"][axis],
    )  # fmt: skip
  batch, features = (out[d] for d in numbers.out_spec[:2])
  return 2.0 * batch * features * rhs[numbers.rhs_spec[1]] * pairs


def window_pairs(
  size_in: int, window: int, size_out: int, *, stride: int, low: int, lhs_dilate: int,
  rhs_dilate: int,
) -> int:  # fmt: skip
  """Pairs (output, window position) of one axis of a convolution that are multiplied.

  Args:
    size_in: of the input, before dilation.
    window: positions.
    size_out: of the output.
    stride: of the window.
    low: padding before the input.
    lhs_dilate: cells from one of the input's to the next; what lies between isn't multiplied.
    rhs_dilate: cells from one of the window's positions to the next.
  """
  # Padding is multiplied like any cell, with two exceptions in which only the input's own cells
  # count: a dilated input, where nothing tells padding from holes, and padding by the whole window,
  # with which TPU programs write an axis that only the other operand has.
  if lhs_dilate == 1 and (window == 1 or low < (window - 1) * rhs_dilate):
    return size_out * window
  last = (size_in - 1) * lhs_dilate
  pairs = 0
  for o in range(size_out):
    at = (o * stride - low + k * rhs_dilate for k in range(window))
    pairs += sum(0 <= p <= last and p % lhs_dilate == 0 for p in at)
  return pairs

"""Compiles a program for a machine and measures the result: the numbers of a report."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.interpreters import partial_eval as pe
from jax.sharding import NamedSharding

from regionjax.aot import hlo, hlo_costs, jaxpr_flops, roofline
from regionjax.aot.collectives import Collective, collectives, gathers_per_parameter
from regionjax.aot.errors import AotError
from regionjax.aot.hlo_loops import Executions
from regionjax.aot.programs import Program, bytes_per_device
from regionjax.aot.report import SCHEMA, Report
from regionjax.aot.topology import Topology, places, version_warning, versions
from regionjax.config import to_dict

# Between what the jaxpr asks for and what the compiled text does. A model of toy size may do less:
# libtpu doesn't multiply the padding of maps two cells wide (4/9 of a 3x3 convolution), and where a
# block's recomputation holds that of its attention, scores are asked for twice and made once.
TOLERANCE = 0.03
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def measure(program: Program, topology: Topology, *, keep: list[Any] | None = None) -> Report:
  """Compiles and measures.

  Args:
    program: on a mesh of the topology's devices.
    topology: the machine.
    keep: a list that gets the compiled program, if it compiles.

  Returns:
    A report; one that says how much too large it is, where the compiler finds no room.
  """
  report = _head(program, topology)
  start = time.perf_counter()
  traced = program.trace()
  jaxpr, _ = pe.dce_jaxpr(traced.jaxpr.jaxpr, [True] * len(traced.jaxpr.jaxpr.outvars))
  asked = jaxpr_flops.jaxpr_flops(
    jaxpr, assumed_trips=program.assumed_trips, platform=topology.chip.platform
  )
  with jax.set_mesh(program.mesh):
    lowered = traced.lower()
  report["trace_seconds"] = time.perf_counter() - start
  report["flops"] = {"model": program.model_flops, "jaxpr": asked}
  start, cpu = time.perf_counter(), time.process_time()
  failure = compiled = None
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    failure = error
  report["compile_seconds"] = time.perf_counter() - start
  report["compile_cpu_seconds"] = time.process_time() - cpu  # of all threads
  if compiled is None:
    return Report(report | {"memory": _too_large(failure, program, topology), "fits": False})
  if keep is not None:
    keep.append(compiled)
  memory = _memory(compiled.memory_analysis(), program, topology)
  report |= {"memory": memory, "fits": memory["peak"] <= topology.chip.memory}
  return Report(report | _work(program, topology, compiled.as_text(), report))


def fingerprint(program: Program, topology: Topology) -> str:
  """Differs where two training steps' settings, machines or compilers do."""
  what = [to_dict(program.config), topology.name, topology.slices, versions(topology.chip.platform)]
  return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _head(program: Program, topology: Topology) -> dict[str, Any]:
  config, chip = program.config, topology.chip
  data, found = config.data, versions(chip.platform)
  sizes = {name: int(size) for name, size in program.mesh.shape.items()}
  warning = version_warning(found)
  rows = data.rows if program.name == "train" else program.tokens
  return {
    "schema": SCHEMA,
    "config": config.name,
    "program": program.name,
    "topology": {
      "name": topology.name, "chips": topology.chips, "slices": topology.slices,
      "memory": chip.memory, "memory_bandwidth": chip.memory_bandwidth, "flops": chip.flops,
      "link_bandwidth": chip.link_bandwidth, "network_bandwidth": chip.network_bandwidth,
    },
    "mesh": sizes,
    "rows": rows,
    "rows_per_chip": rows / topology.chips,
    "row": {
      "tokens": data.tokens_per_row, "images": data.images_per_row, "regions": data.regions_per_row,
    },
    "tokens": program.tokens,
    "remat": config.model.remat,
    "accumulate": config.train.accumulate,
    "trainable": list(config.train.trainable),
    "versions": found,
    "warnings": [warning] if warning else [],
  }  # fmt: skip


def _work(
  program: Program, topology: Topology, text: str, report: dict[str, Any]
) -> dict[str, Any]:
  """FLOPs, bytes, collectives and times from the compiled text."""
  module = hlo.parse(text)
  executions = Executions(
    module, lambda c: hlo_costs.computation_flops(module, c), assumed_trips=program.assumed_trips
  )
  kernels = list(hlo_costs.kernels(module, executions))
  talk = collectives(module, executions, devices=program.mesh.size)
  where = places(list(program.mesh.devices.flat))
  seconds = roofline.times(topology, where, kernels, talk)
  hardware = sum(k.times * k.flops for k in kernels) * topology.chips
  asked = report["flops"]["jaxpr"]
  warnings = list(report["warnings"])
  if asked and abs(hardware / asked - 1) > TOLERANCE:
    warnings.append(
      f"the compiled program does {hardware / asked:.3f} x the FLOPs that the traced one asks for: "
      "some work is done on several chips, or shared, or never done"
    )
  step = seconds.step
  return {
    "flops": report["flops"] | {
      "hardware": hardware,
      "hardware_over_model": hardware / program.model_flops,
      "hardware_over_jaxpr": hardware / asked if asked else 0.0,
    },
    "hbm_bytes": sum(k.times * k.bytes for k in kernels),
    "collectives": _collective_rows(talk, program, topology, where),
    "fsdp": _fsdp(talk, program),
    "loops": {name: trips for name, trips in executions.trips.items() if trips > 1},
    "time": {
      "compute": seconds.compute, "hbm": seconds.memory, "kernels": seconds.kernels,
      "ici": seconds.links, "dcn": seconds.network, "step": step, "serial": seconds.serial,
      "bottleneck": seconds.bottleneck, "compiler": seconds.expected,
    },
    "mfu": roofline.mfu(program.model_flops, topology, step),
    "mfu_serial": roofline.mfu(program.model_flops, topology, seconds.serial),
    "tokens_per_second_per_chip": program.tokens / step / topology.chips,
    "warnings": warnings,
  }  # fmt: skip


def _collective_rows(
  talk: Sequence[Collective], program: Program, topology: Topology, where: Sequence[roofline.Place]
) -> list[dict[str, Any]]:
  """Collectives summed by kind and mesh axes, costliest first."""
  sizes = {name: int(size) for name, size in program.mesh.shape.items()}
  rows: dict[tuple[str, str], dict[str, Any]] = {}
  for one in talk:
    axes = "+".join(one.axes(sizes)) or "?"
    row = rows.setdefault(
      (one.kind, axes),
      {
        "kind": one.kind, "axes": axes, "instructions": 0, "times": 0.0, "bytes": 0.0,
        "traffic": 0.0, "ici_seconds": 0.0, "dcn_seconds": 0.0,
      },
    )  # fmt: skip
    links, network = roofline.seconds(topology, where, one)
    row["instructions"] += 1
    row["times"] += one.times
    row["bytes"] += one.times * one.bytes
    row["traffic"] += one.times * one.traffic
    row["ici_seconds"] += one.times * links
    row["dcn_seconds"] += one.times * network
  return sorted(rows.values(), key=lambda r: r["ici_seconds"] + r["dcn_seconds"], reverse=True)


def _fsdp(talk: Sequence[Collective], program: Program) -> dict[str, Any]:
  """How often parameters are gathered and their gradients reduced, in whole parameters a step."""
  if program.name != "train":
    return {}
  state = program.args[0]
  elements: dict[str, int] = {}
  missing: dict[str, int] = {}
  for field in ("trainable", "frozen"):
    leaves = jax.tree_util.tree_flatten_with_path(getattr(state, field))[0]
    for path, leaf in leaves:
      name = f"state.{field}{jax.tree_util.keystr(path)}"
      elements[name] = leaf.size
      missing[name] = _missing(leaf.sharding, leaf.shape)
  gathers = gathers_per_parameter(talk, missing)
  trained = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
  large = [c for c in talk if c.kind in ("all-reduce", "reduce-scatter")]
  whole = sum(elements.values())
  return {
    "gathers_most": max(gathers.values(), default=0.0),
    "gathers_most_of": max(gathers, key=gathers.__getitem__) if gathers else "",
    "gathers_mean": sum(gathers[p] * elements[p] for p in gathers) / whole,
    "gathered_elements_of_no_parameter": sum(
      c.times * c.elements for c in talk if c.kind == "all-gather" and c.parameter not in elements
    ),
    "reductions_mean": sum(c.times * c.elements for c in large) / trained,
    "gathers": dict(sorted(gathers.items(), key=lambda item: -item[1])),
  }


def _missing(sharding: NamedSharding, shape: tuple[int, ...]) -> int:
  """Elements that a device lacks of the part that its place on `tensor` needs."""
  own = math.prod(sharding.shard_shape(shape))
  axes = [name for dim in sharding.spec for name in (dim if isinstance(dim, tuple) else (dim,))]
  return own * (sharding.mesh.shape["fsdp"] - 1) if "fsdp" in axes else 0


def _memory(stats: Any, program: Program, topology: Topology) -> dict[str, Any]:
  parts = {name: bytes_per_device(tree) for name, tree in program.parts.items()}
  peak = (
    stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
  )  # fmt: skip
  return {
    "usable": topology.chip.memory,
    "arguments": stats.argument_size_in_bytes,
    "outputs": stats.output_size_in_bytes,
    "aliased": stats.alias_size_in_bytes,
    "temporaries": stats.temp_size_in_bytes,
    "code": stats.generated_code_size_in_bytes,
    "padding": stats.argument_size_in_bytes - sum(parts.values()),  # of arguments, to whole tiles
    "peak": peak,
    "parts": parts,
  }


def _too_large(error: Exception | None, program: Program, topology: Topology) -> dict[str, Any]:
  """What the compiler says it would need.

  Raises:
    AotError: the compiler failed for another reason.
  """
  text = str(error)
  used = re.search(r"[Uu]sed ([\d.]+)([KMGT]?)B? of [\d.]+[KMGT]?B? hbm", text) or re.search(
    r"required for HLO temporaries \(([\d.]+)([KMGT]?)B?\)", text
  )
  if used is None and "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
    raise AotError(f"the compiler failed on {topology.name}: {text[:2000]}") from error
  return {
    "usable": topology.chip.memory,
    "peak": float(used[1]) * _UNITS[used[2]] if used else 0.0,
    "parts": {name: bytes_per_device(tree) for name, tree in program.parts.items()},
    "message": text[:4000],
  }

"""What the instructions of a compiled program cost: FLOPs of matrix units, bytes of memory.

FLOPs are two per pair that a dot or convolution multiplies. A convolution's padding is counted, as
the chip multiplies it; the holes of a dilated one are not, because TPU programs write every matrix
product as a convolution, batches as a dilated window (see `jaxpr_flops.window_pairs`). Elementwise
work isn't counted.

Bytes are those that a kernel reads from and writes to HBM: operands and results as far as their
layout doesn't put them on the chip, slices in place of what they are cut from.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from regionjax.aot import cudnn_costs, splash_costs
from regionjax.aot.hlo import COLLECTIVES, FUSIONS, HBM, Computation, Instruction, Leaf, Module
from regionjax.aot.hlo_loops import Executions
from regionjax.aot.jaxpr_flops import window_pairs

# Instructions that move nothing, or whose parts are counted by themselves.
_FREE = frozenset((
  "after-all", "bitcast", "call", "conditional", "constant", "get-tuple-element", "opt-barrier",
  "parameter", "partition-id", "replica-id", "tuple", "while", "add-dependency", "send", "recv",
))  # fmt: skip
_NAMES_MEMORY = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # in place; which operand is what is written


class Kernel(NamedTuple):
  """One instruction of the program that the chip runs as a unit.

  Attributes:
    name: of the instruction.
    op_name: where in the traced program it comes from.
    times: in one execution of the program.
    flops: of one run.
    bytes: of one run, read and written.
    cycles: that TPU's compiler expects of one run; 0 where it doesn't say.
    waits: whether the next kernel waits for it; asynchronous copies and communication run beside
      others, as far as the scheduler finds others.
  """

  name: str
  op_name: str
  times: float
  flops: float
  bytes: float
  cycles: float
  waits: bool


def computation_flops(module: Module, computation: Computation) -> float:
  """Of one run of a computation's own dots and convolutions."""
  return sum(instruction_flops(i, computation) for i in computation)


def instruction_flops(i: Instruction, computation: Computation) -> float:
  """Of a dot, a convolution, or a library's call that is one; 0 for others."""
  if i.opcode == "dot":
    contracted = i.integers("lhs_contracting_dims")
    lhs = computation.instructions[i.operands[0]].leaves[0]
    return 2.0 * i.leaves[0].elements * math.prod(lhs.dims[d] for d in contracted)
  if i.opcode == "convolution":
    lhs, rhs = (computation.instructions[name].leaves[0] for name in i.operands[:2])
    return _convolution(i, lhs, rhs, i.leaves[0])
  if i.opcode == "custom-call":
    return _library_call(i, computation)
  if i.opcode == "reduce" and i.op_name.endswith("/dot_general"):
    # A product with a vector: multiplied and summed by vector units.
    return 2.0 * computation.instructions[i.operands[0]].leaves[0].elements
  return 0.0


def _convolution(i: Instruction, lhs: Leaf, rhs: Leaf, out: Leaf) -> float:
  lhs_labels, rhs_labels, out_labels = re.split(r"_|->", i.attribute("dim_labels"))
  window = _window(i)
  pairs = 1.0
  for axis, label in enumerate(sorted(c for c in out_labels if c.isdigit())):
    pairs *= window_pairs(
      lhs.dims[lhs_labels.index(label)], window["size"][axis], out.dims[out_labels.index(label)],
      stride=window["stride"][axis], low=window["pad"][axis],
      lhs_dilate=window["lhs_dilate"][axis], rhs_dilate=window["rhs_dilate"][axis],
    )  # fmt: skip
  batch, features = out.dims[out_labels.index("b")], out.dims[out_labels.index("f")]
  # Where features or batches are in groups, the filters' input width and `out` show it already.
  return 2.0 * batch * features * rhs.dims[rhs_labels.index("i")] * pairs


def _window(i: Instruction) -> dict[str, list[int]]:
  """size, stride, pad (low side), lhs_dilate, rhs_dilate of each spatial axis."""
  text = i.attribute("window")
  found = {k: v.split("x") for k, v in re.findall(r"(\w+)=([\d_\-x]+)", text)}
  axes = len(found.get("size", []))
  window = {k: [int(v) for v in found.get(k, [1] * axes)] for k in (
    "size", "stride", "lhs_dilate", "rhs_dilate",
  )}  # fmt: skip
  window["pad"] = [int(str(v).split("_")[0]) for v in found.get("pad", [0] * axes)]
  return window


def _library_call(i: Instruction, computation: Computation) -> float:
  """cuBLAS, cuDNN and splash by their shapes, other Pallas kernels by the estimate they carry."""
  if (flops := splash_costs.flops(i, computation)) is not None:
    return flops
  target = i.attribute("custom_call_target").strip('"')
  operands = [computation.instructions[name].leaves[0] for name in i.operands]
  if (direction := cudnn_costs.direction(target)) is not None:
    return cudnn_costs.flops(direction, operands[0].dims, operands[1].dims)
  if "gemm" in target or "matmul" in target:
    match = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.attributes)
    axes = [int(n) for n in re.findall(r"\d+", match[1])] if match else []
    return 2.0 * i.leaves[0].elements * math.prod(operands[0].dims[a] for a in axes)
  if "dim_labels=" in i.attributes and "conv" in target.lower():
    out, kernel = i.leaves[0], operands[1]
    if "BackwardInput" in target:
      out = operands[0]
    elif "BackwardFilter" in target:
      out, kernel = operands[1], i.leaves[0]
    labels = re.split(r"_|->", i.attribute("dim_labels"))[1]
    return 2.0 * out.elements * kernel.elements / kernel.dims[labels.index("o")]
  match = re.search(r'"cost_estimate":\{([^}]*)\}', i.attributes)
  if match:
    return float(json.loads("{" + match[1] + "}").get("flops", 0))
  return 0.0


def kernels(module: Module, executions: Executions) -> Iterator[Kernel]:
  """Everything that the chip runs as a unit, with how often and at what cost."""
  fused = {
    name
    for computation in module.computations.values()
    for i in computation
    if i.opcode in FUSIONS
    for name in i.called
  }
  for name, times in executions.count.items():
    if name in fused:
      continue
    computation = module.computations[name]
    for i in computation:
      if i.opcode in _FREE or i.opcode.endswith(("-done", "-update")) or _buffers(i):
        continue
      flops = instruction_flops(i, computation) + sum(
        _deep_flops(module, called) for called in i.called
      )
      beside = i.opcode.endswith("-start") or (not flops and _communicates(module, i))
      traffic = _bytes(module, computation, i)
      yield Kernel(i.name, i.op_name, times, flops, traffic, _cycles(i), not beside)


def _buffers(i: Instruction) -> bool:
  """Whether it only names memory."""
  return i.opcode == "custom-call" and any(f'"{name}"' in i.attributes for name in _NAMES_MEMORY)


def _deep_flops(module: Module, name: str) -> float:
  """Of a fused computation and what is fused into it."""
  computation = module.computations[name]
  inner = sum(_deep_flops(module, called) for i in computation for called in i.called)
  return computation_flops(module, computation) + inner


def _cycles(i: Instruction) -> float:
  match = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
  return float(match[1]) if match else 0.0


def _communicates(module: Module, i: Instruction) -> bool:
  """Whether it is a collective, or one in a fusion's coat."""
  inner = (j for name in i.called for j in module.computations[name])
  return any(j.opcode.removesuffix("-start") in COLLECTIVES for j in (i, *inner))


def _in_hbm(i: Instruction) -> int:
  return sum(leaf.bytes for leaf in i.leaves if leaf.space == HBM)


def _bytes(module: Module, computation: Computation, i: Instruction) -> float:
  """Read and written in HBM by one run of an instruction."""
  if (traffic := splash_costs.traffic(i, computation)) is not None:
    return traffic
  operands = [computation.instructions[name] for name in i.operands]
  if i.opcode == "copy-start":  # its result is (target, source, context)
    return sum(leaf.bytes for leaf in i.leaves[:2] if leaf.space == HBM)
  if i.opcode in FUSIONS:
    fused = module.computations[i.called[0]]
    if (started := _async_collective(fused)) is not None:
      return started
    read = sum(_read(fused, p, operand) for p, operand in zip(fused.parameters, operands))
    # What an asynchronous call returns repeats its operands beside the result.
    outer = i if i.opcode == "fusion" else fused.instructions[fused.root]
    return read + _written(fused, outer)
  if i.opcode in _SLICES:
    return 2.0 * _in_hbm(i) if operands[0].leaves[0].space == HBM else _in_hbm(i)
  if i.opcode in _UPDATES and len(i.leaves) == 1:
    return 2.0 * _in_hbm(operands[_UPDATES[i.opcode]]) if i.leaves[0].space == HBM else 0.0
  if i.opcode.endswith("-start"):
    return _start_bytes(i, operands)
  return float(_in_hbm(i) + sum(map(_in_hbm, operands)))


def _async_collective(fused: Computation) -> float | None:
  """Of a fusion that starts a collective (all of its bytes) or ends one (0); None of others."""
  for i in fused:
    if i.opcode == "custom-call" and "AsyncCollectiveDone" in i.attributes:
      return 0.0
    if i.opcode == "custom-call" and "AsyncCollectiveStart" in i.attributes:
      # Its result is (operand, gathered, flags ...).
      return float(sum(leaf.bytes for leaf in i.leaves[:2] if leaf.space == HBM))
  return None


def _start_bytes(i: Instruction, operands: list[Instruction]) -> float:
  """Of an asynchronous slice or collective, whose result is (operands, results, contexts)."""
  given = [leaf for operand in operands for leaf in operand.leaves]
  results = [leaf for leaf in i.leaves[len(given) :] if leaf.space == HBM or leaf.elements > 1]
  written = sum(leaf.bytes for leaf in results if leaf.space == HBM)
  if i.opcode == "slice-start":
    return written + (results[0].bytes if given[0].space == HBM else 0.0)
  return written + sum(leaf.bytes for leaf in given if leaf.space == HBM)


def _read(fused: Computation, parameter: Instruction, operand: Instruction) -> float:
  """Bytes of an operand that a fusion reads: only the slices, where it takes nothing else."""
  if not any(leaf.space == HBM for leaf in operand.leaves):
    return 0.0
  read, names = 0.0, [parameter.name]
  while names:
    name = names.pop()
    for user in fused.users[name]:
      if user.opcode in _SLICES and user.operands[0] == name:
        read += sum(leaf.bytes for leaf in user.leaves)
      elif user.opcode in _UPDATES and user.operands[0] == name:
        continue  # written in place
      elif user.opcode == "bitcast":
        names.append(user.name)
      elif "chain_id=" in user.attributes or (user.opcode == "tuple" and user.root):
        continue  # a collective under way, counted where it starts; handed on
      else:
        return float(_in_hbm(operand))
  return min(read, float(_in_hbm(operand)))


def _written(fused: Computation, outer: Instruction) -> float:
  """Bytes of a fusion's results: only the update, where one is written into its operand."""
  root = fused.instructions[fused.root]
  parts = [fused.instructions[n] for n in root.operands] if root.opcode == "tuple" else [root]
  if len(parts) != len(outer.leaves):
    return float(_in_hbm(outer))
  total = 0.0
  for part, leaf in zip(parts, outer.leaves):
    if leaf.space != HBM:
      continue
    while part.opcode == "bitcast":
      part = fused.instructions[part.operands[0]]
    if part.opcode == "parameter" or "chain_id=" in part.attributes:
      continue
    if part.opcode in _UPDATES:
      total += fused.instructions[part.operands[_UPDATES[part.opcode]]].leaves[0].bytes
    else:
      total += leaf.bytes
  return total

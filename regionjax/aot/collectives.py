"""Communication of a compiled program: which collective, over which devices, how much, how often.

TPU programs print an asynchronous collective several times, a reduce-scatter as an all-reduce whose
result is only sliced, the gather of small parts as an all-reduce of arrays that are zero elsewhere,
and one between slices as a transfer to the host. All that is undone here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from regionjax.aot.hlo import (
  COLLECTIVES,
  FUSIONS,
  Computation,
  Instruction,
  Module,
  replica_groups,
)
from regionjax.aot.hlo_loops import Executions

_VIEWS = (
  "bitcast", "reshape", "copy", "convert", "transpose", "get-tuple-element", "reduce-precision",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of the program.

  Attributes:
    kind: as in hlo.COLLECTIVES; an all-reduce that is only sliced is a 'reduce-scatter', one of
      parts in zeros an 'all-gather'.
    name: of its instruction.
    op_name: where in the traced program it comes from.
    times: in one execution of the program.
    bytes: of the whole array that a device gathers, reduces, scatters or sends, each time.
    elements: likewise.
    groups: [groups, devices of a group], numbers of devices in the mesh's order.
    parameter: path of the program's argument that is gathered, '' if it is computed.
    as_sum: whether a gather is an all-reduce, which sends twice as much.
  """

  kind: str
  name: str
  op_name: str
  times: float
  bytes: int
  elements: int
  groups: np.ndarray
  parameter: str = ""
  as_sum: bool = False

  @property
  def group_size(self) -> int:
    return 2 if self.kind == "collective-permute" else self.groups.shape[1]

  @property
  def traffic(self) -> float:
    """Bytes that a device sends in one run, by the usual ring algorithms."""
    n = self.group_size
    share = (n - 1) / n
    if self.kind == "all-reduce" or self.as_sum:
      return 2 * self.bytes * share
    if self.kind in ("collective-permute", "collective-broadcast"):
      return float(self.bytes)
    return self.bytes * share

  def axes(self, mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the devices of a group differ."""
    if self.groups.size == 0 or self.groups.max() >= math.prod(mesh_shape.values()):
      return ()
    places = np.stack(np.unravel_index(self.groups, tuple(mesh_shape.values())), axis=-1)
    varies = np.any(places != places[:, :1], axis=(0, 1))
    return tuple(name for name, differs in zip(mesh_shape, varies) if differs)


def collectives(
  module: Module, executions: Executions, *, devices: int | None = None
) -> list[Collective]:
  """All collectives that run between more than one device, each once, costliest first.

  One that gathers several arrays counts for each of them.

  Args:
    module: the program.
    executions: of it.
    devices: of the whole mesh; the text is partitioned for those of one slice.
  """
  slices = 1 if devices is None else devices // module.partitions
  found: list[Collective] = []
  for name, times in executions.count.items():
    computation = module.computations[name]
    for i in computation:
      if i.opcode == "send" and "megascale" in i.attributes:
        found.append(_between_slices(module, computation, i, times, slices))
      elif i.opcode.removesuffix("-start") in COLLECTIVES and not _goes_on(computation, i):
        found += _collectives(module, computation, i, times)
  return sorted((c for c in found if c.group_size > 1), key=_total, reverse=True)


def _total(one: Collective) -> float:
  return one.times * one.traffic


def _goes_on(computation: Computation, i: Instruction) -> bool:
  """Whether this is the middle or the end of an asynchronous collective.

  TPU programs hide one behind computations by writing it into the fusion that starts it, into each
  that runs meanwhile and into the one that waits for it: one chain. (One channel is no sign of one
  collective: the trips that are peeled off a loop share theirs with the loop's body.)
  """
  if "chain_id=" not in i.attributes:
    return False
  users = computation.users[i.name]
  return not any("AsyncCollectiveStart" in user.attributes for user in users)


def _between_slices(
  module: Module, computation: Computation, i: Instruction, times: float, slices: int
) -> Collective:
  """A collective over the data centre's network: sent to the hosts, which reduce or pass it on."""
  match = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)
  payload = computation.instructions[i.operands[0]].leaves[0]
  own = np.arange(module.partitions)[:, None]
  return Collective(
    kind=match[1].lower().replace("_", "-") if match else "send",
    name=i.name,
    op_name=i.op_name,
    times=times,
    bytes=payload.bytes,
    elements=payload.elements,
    groups=own + np.arange(slices)[None] * module.partitions,
  )


def _collectives(
  module: Module, computation: Computation, i: Instruction, times: float
) -> list[Collective]:
  """What one instruction does: each array that is gathered apart, all others together."""
  kind = i.opcode.removesuffix("-start")
  groups = replica_groups(i, module.partitions)
  sums: list[str] = []
  gathers: list[tuple[str, Computation, str]] = []  # an operand, and where what it holds is
  for name in i.operands:
    part = _part_in_zeros(module, computation, name) if kind == "all-reduce" else None
    if part is not None:
      gathers.append((name, *part))
    elif kind == "all-gather":
      gathers.append((name, computation, name))
    else:
      sums.append(name)
  as_sum = kind == "all-reduce"

  def one(kind: str, names: list[str], **more: Any) -> Collective:
    leaves = [leaf for name in names for leaf in computation.instructions[name].leaves]
    # Per device, a gather's operand is a share of its result; the others' operands are the whole.
    whole = groups.shape[1] if kind == "all-gather" and not as_sum else 1
    return Collective(
      kind=kind,
      name=i.name,
      op_name=i.op_name,
      times=times,
      bytes=whole * sum(leaf.bytes for leaf in leaves),
      elements=whole * sum(leaf.elements for leaf in leaves),
      groups=groups,
      **more,
    )

  found = [
    one("all-gather", [name], parameter=parameter_of(module, *place), as_sum=as_sum)
    for name, *place in gathers
  ]
  if sums:
    scattered = kind == "all-reduce" and not gathers and _only_sliced(module, computation, i)
    found.append(one("reduce-scatter" if scattered else kind, sums))
  return found


def _part_in_zeros(
  module: Module, computation: Computation, name: str
) -> tuple[Computation, str] | None:
  """The part that a value consists of besides zeros: where it is and its name; None if it isn't."""
  i, index = computation.instructions[name], 0
  while i.opcode in (*_VIEWS, "copy-done", "copy-start", "fusion"):
    if i.opcode == "get-tuple-element":
      index = int(i.attribute("index"))
    if i.opcode == "fusion":
      computation = module.computations[i.called[0]]
      i = computation.instructions[computation.root]
      if i.opcode == "tuple":
        i = computation.instructions[i.operands[index]]
    else:
      i = computation.instructions[i.operands[0]]
  if i.opcode != "dynamic-update-slice":
    return None
  here, base = computation, computation.instructions[i.operands[0]]
  while base.opcode == "parameter" and module.callers[here.name]:
    here, call = module.callers[here.name][0]
    if call.opcode != "fusion":
      return None
    base = here.instructions[call.operands[int(base.argument)]]
  zeros = base.opcode == "broadcast" and here.instructions[base.operands[0]].opcode == "constant"
  return (computation, i.operands[1]) if zeros else None


def _only_sliced(module: Module, computation: Computation, i: Instruction) -> bool:
  """Whether nothing but slices of a result are read, in its computation and where that is fused."""
  names, sliced = [i.name], False
  while names:
    name = names.pop()
    if name == computation.root:
      return False
    for user in computation.users[name]:
      if user.opcode in ("dynamic-slice", "slice"):
        sliced = True
      elif user.opcode in _VIEWS or user.opcode == "all-reduce-done":
        names.append(user.name)
      elif user.opcode == "fusion":
        fused = module.computations[user.called[0]]
        for parameter, operand in zip(fused.parameters, user.operands):
          if operand == name and not _only_sliced(module, fused, parameter):
            return False
        sliced = True
      else:
        return False
  return sliced


def parameter_of(module: Module, computation: Computation, name: str) -> str:
  """The program's argument that a value is (a part of, in another type); '' if it is computed."""
  at: tuple[Computation, str, int | None] | None = (computation, name, None)
  for _ in range(1000):  # far more steps than any program's nesting
    if at is None:
      return ""
    here, name, index = at
    i = here.instructions[name]
    if i.opcode == "parameter" and here.name == module.entry:
      return i.op_name or i.name
    at = _source(module, here, i, index)
  return ""


_ALIKE = (
  "bitcast", "reshape", "copy", "convert", "transpose", "dynamic-slice", "slice", "copy-start",
  "copy-done", "all-gather", "all-gather-start", "all-gather-done", "opt-barrier", "async-done",
  "async-update", "reduce-precision", "slice-start", "slice-done", "fusion-done",
)  # fmt: skip


def _source(
  module: Module, here: Computation, i: Instruction, index: int | None
) -> tuple[Computation, str, int | None] | None:
  """One step back from a value, or from part `index` of a tuple; None where it is computed."""
  if i.opcode == "get-tuple-element":
    return here, i.operands[0], int(i.attribute("index"))
  if i.opcode == "tuple" and index is not None:
    return here, i.operands[index], None
  if i.opcode == "custom-call" and '"AsyncCollective' in i.attributes:  # ...Start" or ...Done"
    gathers = [n for n in i.operands if here.instructions[n].opcode == "all-gather"]
    return (here, gathers[0], None) if gathers else None
  if i.opcode in _ALIKE or (i.opcode == "custom-call" and '"ConcatBitcast"' in i.attributes):
    return here, i.operands[0], index if i.opcode == "opt-barrier" else None
  if i.opcode in (*FUSIONS, "call"):
    inner = module.computations[i.called[0]]
    return inner, inner.root, index
  if i.opcode == "while" and index is not None:
    body = module.computations[i.called[1]]
    return (here, i.operands[0], index) if _unchanged(body, index) else None
  if i.opcode == "parameter":
    return _argument(module, here, i, index)
  return None


def _argument(
  module: Module, here: Computation, i: Instruction, index: int | None
) -> tuple[Computation, str, int | None] | None:
  """What a computation's caller hands over as this parameter."""
  callers = module.callers[here.name]
  if not callers:
    return None
  outer, call = callers[0]
  if call.opcode == "while":
    changed = index is None or not _unchanged(module.computations[call.called[1]], index)
    return None if changed else (outer, call.operands[0], index)
  if call.opcode == "conditional":
    return outer, call.operands[1 + call.called.index(here.name)], index
  return outer, call.operands[int(i.argument)], index


def _unchanged(body: Computation, index: int) -> bool:
  """Whether a loop's body hands on part `index` of its state as it is."""
  root = body.instructions[body.root]
  if root.opcode != "tuple":
    return False
  i = body.instructions[root.operands[index]]
  while i.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
    i = body.instructions[i.operands[0]]
  same = i.opcode == "get-tuple-element" and int(i.attribute("index")) == index
  return same and i.operands[0] == body.parameters[0].name


def gathers_per_parameter(found: Sequence[Collective], missing: dict[str, int]) -> dict[str, float]:
  """How often each argument of the program is gathered as a whole.

  What a device receives is counted: a gather in two stages (first among the devices of a row of the
  torus, then between the rows) is one.

  Args:
    found: from `collectives`.
    missing: path of an argument -> its elements that a device lacks and gathers to use it.
  """
  counts: dict[str, float] = {}
  for one in found:
    if one.kind == "all-gather" and missing.get(one.parameter):
      received = one.times * one.elements * (1 - 1 / one.group_size)
      counts[one.parameter] = counts.get(one.parameter, 0.0) + received / missing[one.parameter]
  return counts

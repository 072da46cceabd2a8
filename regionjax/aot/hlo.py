"""Reads a compiled program's text: computations, instructions, types, replica groups.

The text is XLA's optimised HLO as `compiled.as_text()` prints it, for TPU, GPU and CPU. Nothing is
interpreted here beyond syntax; `hlo_loops` finds how often things run and `hlo_costs` what they do.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from regionjax.aot.errors import AotError

# Bits of an element. Tokens and opaque values take no memory.
BITS = {
  "pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32,
  "u32": 32, "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64,
  "c128": 128, "f4e2m1fn": 4, "token": 0, "opaque": 0,
}  # fmt: skip
FUSIONS = ("fusion", "fusion-start", "async-start")  # call a computation that is one kernel
COLLECTIVES = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
  "collective-broadcast", "ragged-all-to-all",
)  # fmt: skip
HBM = 0  # the memory space that a type's layout names with S(n); none means HBM

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(")
_LINE = re.compile(r"\s+(ROOT )?%([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")
_LEAF = re.compile(r"(\w+)\[([\d,<= ]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")


class Leaf(NamedTuple):
  """One array of a type.

  Attributes:
    dtype: such as 'bf16'.
    dims: sizes.
    space: memory space, HBM or another.
  """

  dtype: str
  dims: tuple[int, ...]
  space: int = HBM

  @property
  def elements(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    bits = BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else None)
    if bits is None:
      raise AotError(f"HLO text: unknown element type {self.dtype!r}; add it to aot.hlo.BITS")
    return -(-self.elements * bits // 8)


@dataclasses.dataclass
class Instruction:
  """One line of a computation.

  Attributes:
    name: unique in the module.
    type: as printed.
    opcode: such as 'fusion'.
    operands: names.
    argument: what stands in the parentheses (a constant's value, a parameter's number).
    attributes: the rest of the line.
    root: whether it is its computation's result.
  """

  name: str
  type: str
  opcode: str
  operands: list[str]
  argument: str
  attributes: str
  root: bool

  @functools.cached_property
  def leaves(self) -> tuple[Leaf, ...]:
    """The arrays of its result."""
    return tuple(
      Leaf(
        dtype,
        tuple(int(d.strip(" <=")) for d in dims.split(",") if d.strip()),
        int(space[1]) if (space := _SPACE.search(layout)) else HBM,
      )
      for dtype, dims, layout in _LEAF.findall(self.type)
    )

  def attribute(self, name: str) -> str:
    """`name=value` or `name={...}` of the line (without braces); '' if there is none."""
    match = re.search(rf"(?:^|[ ,]){re.escape(name)}=(?:\{{([^}}]*)\}}|([^,\s]+))", self.attributes)
    return (match[1] if match[1] is not None else match[2]) if match else ""

  def integers(self, name: str) -> list[int]:
    """An attribute that is a list of integers."""
    return [int(n) for n in self.attribute(name).split(",") if n.strip()]

  @functools.cached_property
  def called(self) -> list[str]:
    """Computations that it runs: of a fusion, call, loop (condition, body), or branches."""
    if self.opcode == "while":
      return [self.attribute("condition").lstrip("%"), self.attribute("body").lstrip("%")]
    if self.opcode == "conditional":
      names = _NAME.findall(self.attribute("branch_computations"))
      if names:
        return names
      sides = ("true_computation", "false_computation")
      return [self.attribute(side).lstrip("%") for side in sides]
    if self.opcode == "call":
      return [self.attribute("to_apply").lstrip("%")]
    if self.opcode in FUSIONS:
      return [self.attribute("calls").lstrip("%")]
    return []

  @property
  def op_name(self) -> str:
    """Where in the traced program it comes from."""
    match = re.search(r'op_name="([^"]*)"', self.attributes)
    return match[1].replace("\\'", "'") if match else ""


@dataclasses.dataclass
class Computation:
  """A named list of instructions.

  Attributes:
    name: unique in the module.
    instructions: by name, in the order printed.
    root: the name of its result.
  """

  name: str
  instructions: dict[str, Instruction]
  root: str = ""

  def __iter__(self) -> Iterator[Instruction]:
    return iter(self.instructions.values())

  @functools.cached_property
  def parameters(self) -> list[Instruction]:
    """Its parameters in order."""
    found = [i for i in self if i.opcode == "parameter"]
    return sorted(found, key=lambda i: int(i.argument))

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """Name -> the instructions that read it."""
    users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
    for instruction in self:
      for operand in dict.fromkeys(instruction.operands):
        if operand in users:
          users[operand].append(instruction)
    return users


@dataclasses.dataclass
class Module:
  """A program.

  Attributes:
    computations: by name.
    entry: the name of the one that runs.
    partitions: devices that it was partitioned for.
  """

  computations: dict[str, Computation]
  entry: str
  partitions: int

  @functools.cached_property
  def callers(self) -> dict[str, list[tuple[Computation, Instruction]]]:
    """Name of a computation -> where it is called."""
    found: dict[str, list[tuple[Computation, Instruction]]] = {n: [] for n in self.computations}
    for computation in self.computations.values():
      for instruction in computation:
        for name in instruction.called:
          found[name].append((computation, instruction))
    return found


def parse(text: str) -> Module:
  """HLO text -> Module.

  Raises:
    AotError: text that holds no entry computation.
  """
  computations: dict[str, Computation] = {}
  entry, current = "", None
  # A kernel's metadata is printed over several lines.
  for line in re.sub(r"kernel_metadata=\{\n(.*)\n\}", r"kernel_metadata={\1}", text).splitlines():
    if line.startswith((" ", "\t")):
      match = _LINE.match(line)
      if match and current is not None:
        instruction = _instruction(line[match.end() :], match[2], bool(match[1]))
        current.instructions[instruction.name] = instruction
        if instruction.root:
          current.root = instruction.name
    elif line.endswith("{") and " -> " in line and (match := _HEADER.match(line)):
      current = computations[match[2]] = Computation(match[2], {})
      if match[1]:
        entry = match[2]
  if not entry:
    raise AotError("this is no HLO text: it has no ENTRY computation")
  partitions = re.search(r"num_partitions=(\d+)", text[:100000])
  return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(rest: str, name: str, root: bool) -> Instruction:
  """`f32[2]{0} add(%a, %b), metadata=...` -> Instruction."""
  end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
  kind, rest = rest[:end], rest[end:].lstrip()
  start = rest.index("(")
  end = _closing(rest, start)
  argument = rest[start + 1 : end - 1]
  operands = _NAME.findall(argument)
  return Instruction(name, kind, rest[:start], operands, argument, rest[end:].lstrip(", "), root)


_PARENTHESES = re.compile(r"[()]")


def _closing(text: str, start: int) -> int:
  """The index behind the parenthesis that closes the one at `start`."""
  depth = 0
  for match in _PARENTHESES.finditer(text, start):
    depth += 1 if match[0] == "(" else -1
    if depth == 0:
      return match.end()
  raise AotError(f"HLO text: unbalanced parentheses in {text[:80]!r}")


_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")


def replica_groups(instruction: Instruction, partitions: int) -> np.ndarray:
  """The devices that take part in a collective together, [groups, devices of a group].

  Three notations occur: lists; `[groups,size]<=[dims]T(order)`, an iota reshaped and transposed;
  and `mesh['a'=2,'b'=4], device_ids=([dims]T(order)) {'a'}`, the axes of a mesh that a group spans.

  Raises:
    AotError: another notation, or groups of unequal sizes.
  """
  text = instruction.attributes
  if match := re.search(r"source_target_pairs=\{((?:\{[\d,]+\},?)*)\}", text):
    return _lists(match[1])
  if match := re.search(r"replica_groups=\{((?:\{[\d,]*\},?\s*)*)\}", text):
    return _lists(match[1]) if match[1] else np.arange(partitions)[None]
  if match := re.search(r"replica_groups=" + _IOTA.pattern, text):
    groups, dims, order = (_integers(part) for part in match.groups())
    return _iota(dims, order).reshape(groups)
  if match := re.search(r"replica_groups=mesh\[([^\]]*)\]", text):
    return _mesh_groups(match[1], text[match.end() :])
  raise AotError(f"HLO text: replica groups of {instruction.name} in an unknown notation")


def _mesh_groups(axes: str, rest: str) -> np.ndarray:
  """Groups given by the axes of a mesh that they span."""
  sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
  ids = np.arange(math.prod(sizes.values()))
  if match := re.match(r",? ?device_ids=\(" + _IOTA.pattern + r"\) ?", rest):
    dims, _, order = (_integers(part) for part in match.groups())
    ids, rest = _iota(dims, order), rest[match.end() :]
  match = re.match(r",? ?\{([^}]*)\}", rest)
  if match is None:
    raise AotError(f"HLO text: no axes behind a mesh of replica groups: {rest[:80]!r}")
  spans = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", match[1])
  # An axis of which a group spans only a part is three: what is outside, the part, what is inside.
  shape: list[int] = []
  inner: list[int] = []
  for name, size in sizes.items():
    span = next((s for s in spans if s[0] == name), None)
    if span is not None and span[1]:
      before, part = int(span[1]), int(span[2])
      shape += [before, part, size // (before * part)]
      inner.append(len(shape) - 2)
    else:
      shape.append(size)
      if span is not None:
        inner.append(len(shape) - 1)
  outer = [axis for axis in range(len(shape)) if axis not in inner]
  grid = ids.reshape(shape).transpose(outer + inner)
  return grid.reshape(math.prod(shape[axis] for axis in outer), -1)


def _iota(dims: list[int], order: list[int]) -> np.ndarray:
  grid = np.arange(math.prod(dims)).reshape(dims)
  return (grid.transpose(order) if order else grid).reshape(-1)


def _lists(text: str) -> np.ndarray:
  groups = [_integers(group) for group in re.findall(r"\{([\d,]*)\}", text)]
  if len({len(group) for group in groups}) > 1:
    raise AotError(f"HLO text: replica groups of unequal sizes: {text[:80]}")
  return np.array(groups)


def _integers(text: str | None) -> list[int]:
  return [int(n) for n in (text or "").split(",") if n.strip()]

"""How often each computation of a compiled program runs.

XLA's own cost analysis counts a loop's body once. Trip counts stand in the text of CPU and GPU
programs; TPU programs have none, so they are found by running the scalar part of a loop: its
counter, from the initial value through the body's update until the condition fails.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

from regionjax.aot.errors import AotError
from regionjax.aot.hlo import Computation, Instruction, Module

MAX_TRIPS = 1_000_000

_INTEGER = ("s8", "s16", "s32", "s64", "u8", "u16", "u32", "u64", "pred")
_SAME = ("bitcast", "convert", "copy", "copy-done", "copy-start", "opt-barrier", "reshape")
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
  "add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "minimum": min,
  "maximum": max, "and": operator.and_, "or": operator.or_,
}  # fmt: skip
_COMPARE = {
  "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq,
  "NE": operator.ne,
}  # fmt: skip


class _Tuple:
  """A tuple whose parts are evaluated when asked for; most are arrays that nobody asks for."""

  def __init__(self, parts: list[Callable[[], Any]]) -> None:
    self._parts = parts
    self.known: dict[int, Any] = {}

  def __getitem__(self, index: int) -> Any:
    if index not in self.known:
      self.known[index] = self._parts[index]()
    return self.known[index]


class _Scalars:
  """Integer scalars of one computation, given its parameters; None where unknown."""

  def __init__(self, module: Module, computation: Computation, parameters: list[Any]) -> None:
    self.module, self.computation, self.parameters = module, computation, parameters
    self._known: dict[str, Any] = {}

  def __call__(self, name: str) -> Any:
    if name not in self._known:
      self._known[name] = self._value(self.computation.instructions[name])
    return self._known[name]

  def _value(self, i: Instruction) -> Any:
    if i.opcode == "parameter":
      index = int(i.argument)
      return self.parameters[index] if index < len(self.parameters) else None
    if i.opcode == "constant":
      return _constant(i)
    if i.opcode == "tuple":
      return _Tuple([lambda name=name: self(name) for name in i.operands])
    if i.opcode == "get-tuple-element":
      value = self(i.operands[0])
      return value[int(i.attribute("index"))] if isinstance(value, _Tuple) else None
    if i.opcode in _SAME:
      return self(i.operands[0])
    if i.opcode in ("fusion", "call"):
      return self._inner(i)
    if i.opcode == "while":
      return self._after_loop(i)
    return self._arithmetic(i)

  def _inner(self, i: Instruction) -> Any:
    if len(i.leaves) == 1 and not _scalar(i):
      return None
    inner = self.module.computations[i.called[0]]
    return _Scalars(self.module, inner, [self(name) for name in i.operands])(inner.root)

  def _after_loop(self, i: Instruction) -> Any:
    """What a loop leaves: the parts of its state that its body hands on unchanged."""
    before = self(i.operands[0])
    if not isinstance(before, _Tuple):
      return None
    body = self.module.computations[i.called[1]]
    root = body.instructions[body.root]

    def part(index: int) -> Any:
      source = body.instructions[root.operands[index]]
      same = source.opcode == "get-tuple-element" and int(source.attribute("index")) == index
      return before[index] if same and source.operands[0] == body.parameters[0].name else None

    if root.opcode != "tuple":
      return None
    return _Tuple([lambda n=n: part(n) for n in range(len(root.operands))])

  def _arithmetic(self, i: Instruction) -> Any:
    if not _scalar(i) or i.opcode not in (*_BINARY, "compare", "not", "select", "negate"):
      return None
    values = [self(name) for name in i.operands]
    if i.opcode == "select":
      return None if values[0] is None else values[1 if values[0] else 2]
    if any(value is None or isinstance(value, _Tuple) for value in values):
      return None
    if i.opcode == "compare":
      return _COMPARE[i.attribute("direction")](*values)
    if i.opcode == "not":
      return (not values[0]) if i.leaves[0].dtype == "pred" else ~values[0]
    return -values[0] if i.opcode == "negate" else _BINARY[i.opcode](*values)


def _scalar(i: Instruction) -> bool:
  return len(i.leaves) == 1 and i.leaves[0].elements == 1 and i.leaves[0].dtype in _INTEGER


def _constant(i: Instruction) -> Any:
  if not _scalar(i):
    return None
  text = i.argument.strip("{} ")
  if text in ("true", "false"):
    return text == "true"
  return int(text) if re.fullmatch(r"-?\d+", text) else None


def trip_count(module: Module, loop: Instruction, scalars: _Scalars) -> int | None:
  """Trips of a loop, None where its condition depends on data.

  Raises:
    AotError: a loop that doesn't end within MAX_TRIPS.
  """
  printed = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
  if printed:
    return int(printed[1])
  condition, body = (module.computations[name] for name in loop.called)
  state = scalars(loop.operands[0])
  for trips in range(MAX_TRIPS):
    again = _Scalars(module, condition, [state])(condition.root)
    if again is None:
      return None
    if not again:
      return trips
    after = _Scalars(module, body, [state])(body.root)
    if not isinstance(after, _Tuple):
      return None
    # What the condition asked for is computed now, trip by trip: left alone it would nest.
    for index in state.known if isinstance(state, _Tuple) else ():
      after[index]
    state = after
  raise AotError(f"the loop {loop.name} runs more than {MAX_TRIPS} times")


class Executions:
  """How often computations run in one execution of a program.

  Attributes:
    count: name of a computation -> times; of a conditional's branches only the costliest runs.
    trips: name of a while instruction -> its trips.
    assumed: while instructions whose trips depend on data, and took `assumed_trips`.
  """

  def __init__(
    self, module: Module, cost: Callable[[Computation], float], *, assumed_trips: int | None = None
  ) -> None:
    """Walks the program.

    Args:
      module: the program.
      cost: of one run of a computation's own instructions, to choose between branches.
      assumed_trips: of loops that end when the data says so.

    Raises:
      AotError: there is such a loop and no number is assumed.
    """
    self.module = module
    self.trips: dict[str, int] = {}
    self.assumed: list[str] = []
    self.count: dict[str, float] = {}
    self._own = cost
    self._assumed_trips = assumed_trips
    self._costs: dict[str, float] = {}
    entry = module.computations[module.entry]
    self._find_trips(entry, [None] * len(entry.parameters), set())
    self._add(entry, 1.0)

  def _find_trips(self, computation: Computation, parameters: list[Any], seen: set[str]) -> None:
    """Trips of all loops reached from here; a computation is looked at where it is first called."""
    if computation.name in seen:
      return
    seen.add(computation.name)
    scalars = _Scalars(self.module, computation, parameters)
    for i in computation:
      if i.opcode == "while":
        self.trips[i.name] = self._trips(i, scalars)
        self._find_trips(self.module.computations[i.called[1]], [scalars(i.operands[0])], seen)
      elif i.opcode == "conditional":
        for name, operand in zip(i.called, i.operands[1:]):
          self._find_trips(self.module.computations[name], [scalars(operand)], seen)
      elif i.opcode in ("call", "async-start"):
        arguments = [scalars(name) for name in i.operands]
        self._find_trips(self.module.computations[i.called[0]], arguments, seen)

  def _trips(self, loop: Instruction, scalars: _Scalars) -> int:
    trips = trip_count(self.module, loop, scalars)
    if trips is not None:
      return trips
    if self._assumed_trips is None:
      raise AotError(
        f"the loop {loop.name} ({loop.op_name or 'unnamed'}) ends when its data says so; say how "
        "many trips to count"
      )
    self.assumed.append(loop.name)
    return self._assumed_trips

  def _runs(self, i: Instruction) -> list[tuple[str, float]]:
    """(computation, times) that one execution of an instruction runs."""
    if i.opcode == "while":
      return [(i.called[1], self.trips[i.name])]
    if i.opcode == "conditional":
      return [(max(i.called, key=self._cost), 1.0)]
    return [(name, 1.0) for name in i.called]

  def _cost(self, name: str) -> float:
    """Of one run of a computation, with everything that it calls."""
    if name not in self._costs:
      computation = self.module.computations[name]
      inner = (self._cost(c) * times for i in computation for c, times in self._runs(i))
      self._costs[name] = self._own(computation) + sum(inner)
    return self._costs[name]

  def _add(self, computation: Computation, times: float) -> None:
    self.count[computation.name] = self.count.get(computation.name, 0.0) + times
    for i in computation:
      for name, each in self._runs(i):
        self._add(self.module.computations[name], times * each)

"""Where a training step's time goes: `benchmark.py`'s case `training` prints it.

The profiler says how long each instruction of the compiled program ran, the program's text what
each is. Most carry an `op_name`, the path of modules that they come from. What XLA makes itself has
none: conversions of bfloat16 for products that a CPU has only in float32, copies, buffers of zeros.
Such an instruction counts for the part that the nearest named one belongs to, along what reads its
value and what it reads, in and out of loops.
"""

from __future__ import annotations

import collections
import gzip
import json
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from regionjax.aot import hlo

# What an op_name holds -> the part that its time counts for; the first that fits.
PARTS = (
  (r"optimizer|\.opt_state", "optimiser"),
  ("head_loss|decoder.logits|'head'", "output layer and loss"),
  ("decoder.*attention", "decoder: attention"),
  ("decoder", "decoder: maps, norms, MLP"),
  ("vision|encode_images", "vision encoder"),
  ("regions", "region encoder"),
  ("connector|fill_slots|splice", "connector and splice"),
)
OTHER = "other"  # gradients' scale, counts of the batch
UNNAMED = "unnamed"
# What an instruction does, by the operations of which a fusion must hold one; the first that fits.
KINDS = (
  (("dot", "convolution"), "matrix products"),
  (("exponential", "divide", "rsqrt", "tanh", "reduce", "logistic", "power"), "softmax, norms"),
  (("add", "multiply", "subtract", "select", "compare"), "elementwise"),
  (("convert",), "conversions of dtype"),
)
MOVES = "copies, slices, fills"
# Their events last as long as what they call, or some of it, which has events of its own.
_CONTAINERS = ("while", "call", "conditional")


class Profile(NamedTuple):
  """Shares of the computing time of all threads, largest first.

  Attributes:
    parts: by part of the model.
    kinds: by what the instructions do.
  """

  parts: list[tuple[str, float]]
  kinds: list[tuple[str, float]]


def profile(step: Callable[[], object], text: str, *, steps: int = 5) -> Profile:
  """Runs a compiled step under the profiler.

  Args:
    step: runs it and waits for its result; has run before.
    text: its program, as `compiled.as_text()` gives it.
    steps: how often to run it.

  Raises:
    RuntimeError: the profiler saw no instruction of that program.
  """
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(steps):
        step()
    return attribute(_times(_events(Path(folder))), text)


def attribute(times: dict[str, float], text: str) -> Profile:
  """Seconds (or any unit) of each instruction, by its name -> shares by part and by kind."""
  module = hlo.parse(text)
  known = {i.name: (c, i) for c in module.computations.values() for i in c}
  times = {
    name: spent for name, spent in times.items()
    if name in known and known[name][1].opcode not in _CONTAINERS
  }  # fmt: skip
  if not times:
    raise RuntimeError("the profiler saw no instruction of this program")
  part_of = parts(module)
  by_part: dict[str, float] = collections.defaultdict(float)
  by_kind: dict[str, float] = collections.defaultdict(float)
  for name, spent in times.items():
    by_part[part_of.get(name, UNNAMED)] += spent
    by_kind[_kind(module, known[name][1])] += spent
  return Profile(_shares(by_part), _shares(by_kind))


def parts(module: hlo.Module) -> dict[str, str]:
  """The part of the model of each instruction that has one, by name."""
  found: dict[str, str] = {}
  for computation in module.computations.values():
    for instruction in computation:
      if name := _own_name(module, instruction):
        found[instruction.name] = part(name)
  near = _neighbours(module)
  edge = list(found)
  while edge:  # outwards from the named ones; of equally near ones that counts which stands first
    reached = []
    for name in edge:
      for other in near[name]:
        if other not in found:
          found[other] = found[name]
          reached.append(other)
    edge = reached
  for name, computation in module.computations.items():  # what is joined to nothing: by its caller
    for _, caller in module.callers[name]:
      for instruction in computation:
        if instruction.name not in found and caller.name in found:
          found[instruction.name] = found[caller.name]
  return found


def part(op_name: str) -> str:
  """The part of the model that an op_name belongs to."""
  return next((name for pattern, name in PARTS if re.search(pattern, op_name)), OTHER)


def _own_name(module: hlo.Module, instruction: hlo.Instruction) -> str:
  """An instruction's op_name; of a fusion without one the most frequent of what it joins."""
  if instruction.opcode in ("tuple", "get-tuple-element", "constant", *_CONTAINERS):
    return ""  # these join values of several parts
  if instruction.op_name or instruction.opcode != "fusion":
    return instruction.op_name
  (called,) = instruction.called
  inside = collections.Counter(i.op_name for i in module.computations[called] if i.op_name)
  return inside.most_common(1)[0][0] if inside else ""


def _neighbours(module: hlo.Module) -> dict[str, list[str]]:
  """Of each instruction those that read its value, then those whose values it reads."""
  reads: dict[str, list[str]] = collections.defaultdict(list)
  read_by: dict[str, list[str]] = collections.defaultdict(list)
  for computation in module.computations.values():
    for instruction in computation:
      if instruction.opcode in ("tuple", "constant", *_CONTAINERS):
        continue
      if instruction.opcode == "get-tuple-element":
        index = int(instruction.attribute("index"))
        sources = _elements(module, computation, instruction.operands[0], index, set())
      else:
        sources = instruction.operands
      for source in sources:
        reads[instruction.name].append(source)
        read_by[source].append(instruction.name)
  names = [i.name for c in module.computations.values() for i in c]
  return {name: read_by[name] + reads[name] for name in names}


def _elements(
  module: hlo.Module, computation: hlo.Computation, name: str, index: int, seen: set[str]
) -> list[str]:
  """The instructions whose value may be element `index` of the tuple `name`, through loops."""
  if name in seen or name not in computation.instructions:
    return []
  seen.add(name)
  instruction = computation.instructions[name]

  def of(where: hlo.Computation, which: str) -> list[str]:
    return _elements(module, where, which, index, seen)

  if instruction.opcode == "tuple":
    return [instruction.operands[index]]
  if instruction.opcode == "while":
    body = module.computations[instruction.called[1]]
    return of(body, body.root) + of(computation, instruction.operands[0])
  if instruction.opcode in ("conditional", "call"):
    inner = [module.computations[called] for called in instruction.called]
    return [found for c in inner for found in of(c, c.root)]
  if instruction.opcode == "parameter":
    loops = [(c, i) for c, i in module.callers[computation.name] if i.opcode == "while"]
    return [found for c, i in loops for found in of(c, i.name)]
  return []


def _kind(module: hlo.Module, instruction: hlo.Instruction) -> str:
  """What an instruction does, for which a fusion's costliest operation stands."""
  inside: Iterable[hlo.Instruction] = [instruction]
  if instruction.opcode == "fusion":
    inside = module.computations[instruction.called[0]]
  operations = {i.opcode for i in inside}
  return next((kind for some, kind in KINDS if operations & set(some)), MOVES)


def _shares(spent: dict[str, float]) -> list[tuple[str, float]]:
  total = sum(spent.values()) or 1.0
  return sorted(((name, time / total) for name, time in spent.items()), key=lambda p: -p[1])


def _times(events: Iterable[dict[str, Any]]) -> dict[str, float]:
  """Microseconds of each instruction, on all threads."""
  spent: dict[str, float] = collections.defaultdict(float)
  for event in events:
    if name := event.get("args", {}).get("hlo_op"):
      spent[name] += event.get("dur", 0.0)
  return spent


def _events(folder: Path) -> list[dict[str, Any]]:
  (path,) = folder.rglob("*.trace.json.gz")
  with gzip.open(path, "rt", encoding="utf-8") as file:
    return json.load(file)["traceEvents"]


def print_profile(found: Profile, say: Callable[[str], None] = print) -> None:
  """Two tables, of parts and of kinds."""
  for title, rows in (("where our step's time goes", found.parts), ("doing what", found.kinds)):
    say(f"  {title}")
    for name, share in rows:
      say(f"    {name:<28} {share:6.1%}")

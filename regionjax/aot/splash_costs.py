"""What the kernels of jax's splash attention cost, which carry no estimate of their own.

Three kernels go over a grid of blocks of queries and keys: the forward one, and two backward ones
for the gradients of queries and of keys with values. Blocks that causality hides are skipped, and
nothing of them is fetched; what segment ids hide is computed. `ops.attention` uses them causal,
with segment ids and as many keys as queries, and so they are counted.
"""

from __future__ import annotations

import re

from regionjax.aot.hlo import HBM, Computation, Instruction, Leaf

_NAME = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)_segmented")
# Products of a block of queries with one of keys. Forward: scores and values. Backward each scores
# and the weights' gradient once more; then of queries: their own; of keys: theirs and the values'.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
# The operands: two tables for the scalar core, q, k, v, ids of queries and of keys, (softmax
# statistics, gradient of the result, its product with the result,) positions of queries.
_OPERANDS = {"fwd": 8, "dq": 11, "dkv": 11}


def kernel(name: str) -> str | None:
  """'fwd', 'dq' or 'dkv' where an instruction or a kernel is so called; None for others."""
  match = _NAME.search(name)
  return match[1] if match else None


def causal_share(queries: int, keys: int) -> float:
  """Share of a grid's blocks that a causal mask leaves something of.

  Args:
    queries: blocks of queries in a row.
    keys: blocks of keys in the same row.
  """
  seen = sum((i + 1) * keys > j * queries for i in range(queries) for j in range(keys))
  return seen / (queries * keys)


def flops(i: Instruction, computation: Computation) -> float | None:
  """Of one run; None where `i` is no such kernel."""
  if (kind := _kind(i)) is None:
    return None
  table, _, q, *_ = _operands(i, computation)
  return 2.0 * _PRODUCTS[kind] * q.elements * q.dims[-2] * causal_share(*table.dims[-2:])


def traffic(i: Instruction, computation: Computation) -> float | None:
  """Bytes of HBM that one run reads and writes; None where `i` is no such kernel.

  A block is fetched whenever the grid comes to another one than in the step before.
  """
  if (kind := _kind(i)) is None:
    return None
  operands = _operands(i, computation)
  table, _, q, k, *_ = operands
  queries, keys = table.dims[-2:]
  share = causal_share(queries, keys)
  rows, heads = q.elements // (q.dims[-3] * q.dims[-2] * q.dims[-1]), q.dims[-3]
  if kind == "dkv":  # outermost blocks of keys, then heads, then blocks of queries
    by_query = share * keys
    times = [1, 1, by_query, 1, 1, heads * by_query, 1, *[by_query] * 3, rows * heads * by_query]
  else:  # outermost heads, then blocks of queries, then of keys
    by_key = share * queries
    key_times = by_key * heads / k.dims[-3]
    times = [1, 1, 1, key_times, key_times, heads, heads * by_key]
    times += [*[1] * (len(operands) - 8), rows * heads]
  read = sum(n * leaf.bytes for n, leaf in zip(times, operands) if leaf.space == HBM)
  return read + sum(leaf.bytes for leaf in i.leaves if leaf.space == HBM)


def _kind(i: Instruction) -> str | None:
  kind = kernel(i.name) if i.opcode == "custom-call" else None
  return kind if kind and len(i.operands) == _OPERANDS[kind] else None


def _operands(i: Instruction, computation: Computation) -> list[Leaf]:
  return [computation.instructions[name].leaves[0] for name in i.operands]

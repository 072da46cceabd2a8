"""What cuDNN's flash attention costs, which carries no estimate of its own.

It is counted as `ops.attention` uses it: causal, with as many keys as queries, in blocks of which
those that causality hides are skipped. Blocks on the diagonal are counted half, as the model does.
"""

from __future__ import annotations

# Products of queries with keys. Forward: scores and values. Backward: the scores once more, and the
# gradients of weights, queries, keys and values.
_PRODUCTS = {"forward": 2, "backward": 5}


def direction(name: str) -> str | None:
  """'forward' or 'backward' where a traced primitive or a library call is one; None for others."""
  if name.startswith("__cudnn$fmha"):
    return "backward" if name.endswith("Backward") else "forward"
  if name.startswith("dot_product_attention_"):
    return "backward" if "_bwd" in name else "forward"
  return None


def flops(direction: str, queries: tuple[int, ...], keys: tuple[int, ...]) -> float:
  """Of one run on queries [B, T, N, H] and keys [B, S, K, H]."""
  b, t, n, h = queries
  return 2.0 * _PRODUCTS[direction] * b * n * t * keys[1] * h / 2

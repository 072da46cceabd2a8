"""Attention: dense, causal inside packed segments, and over a key-value cache."""

from regionjax.ops.attention.cache import append, cache_mask
from regionjax.ops.attention.dense import MASKED, attend, merge_heads, split_heads
from regionjax.ops.attention.packed import attend_packed, packed_mask

__all__ = [
  "MASKED", "append", "attend", "attend_packed", "cache_mask", "merge_heads", "packed_mask",
  "split_heads",
]  # fmt: skip

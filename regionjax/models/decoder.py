"""LLaMA-family decoder over pure ops: RMSNorm, rotary positions, grouped keys, gated MLP.

Axes: b rows, t tokens, s cache slots, n query heads, k key heads, h channels of a head, d model
channels, v vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from regionjax.config import DecoderConfig
from regionjax.models.leaves import AdaptedKernel, Kernel, Scale, normal, remat, scan
from regionjax.ops import attention, mlp, norms, rope
from regionjax.partition.activations import constrain, whole

Array = jax.Array


class Cache(NamedTuple):
  """Keys and values of the tokens so far, one array per layer.

  Attributes:
    k: per layer [B, K, S, H], rotated.
    v: per layer [B, K, S, H].
    length_b: [B] int32, tokens held by each row. Rows are filled from slot 0 without gaps.
  """

  k: tuple[Array, ...]
  v: tuple[Array, ...]
  length_b: Array


def init_cache(
  config: DecoderConfig, batch: int, length: int, dtype: jnp.dtype = jnp.float32
) -> Cache:
  """An empty cache.

  Args:
    config: the decoder's sizes.
    batch: B, rows.
    length: S, the most tokens that a row can hold.
    dtype: what keys and values are stored in.
  """
  shape = (batch, config.kv_heads, length, config.head_dim)
  layers = range(config.layers)
  return Cache(
    k=tuple(jnp.zeros(shape, dtype) for _ in layers),
    v=tuple(jnp.zeros(shape, dtype) for _ in layers),
    length_b=jnp.zeros((batch,), jnp.int32),
  )


class DecoderBlock(nn.Module):
  """One layer. In a scan x is the carry and the layer's cache both input and output."""

  config: DecoderConfig

  @nn.compact
  def __call__(
    self,
    x_btd: Array,
    table: tuple[Array, Array],
    segment_ids_bt: Array,
    length_b: Array | None,
    cache: tuple[Array, Array] | None,
  ) -> tuple[Array, tuple[Array, Array] | None]:
    cfg = self.config
    d, f = cfg.width, cfg.mlp_width
    residual = (2 * cfg.layers) ** -0.5

    def weights(name: str, shape: tuple[int, int], lies: Any, gain: float = 1.0):
      kernel, bias, update = AdaptedKernel(shape, cfg.lora, gain, name=name)()
      return whole(kernel, x_btd.dtype, *lies), bias, update

    y_btd = norms.rms_norm(x_btd, *Scale(d, name="norm1")(), eps=cfg.eps)
    q, k, v = (
      attention.split_heads(
        mlp.linear(y_btd, *weights(name, (d, n * cfg.head_dim), ("fsdp", ("tensor", n)))), n
      )
      for name, n in (("q", cfg.heads), ("k", cfg.kv_heads), ("v", cfg.kv_heads))
    )
    q, k = rope.apply_rope(q, table), rope.apply_rope(k, table)
    q, k, v = (
      checkpoint_name(constrain(a, "batch", "tensor"), name)
      for a, name in ((q, "q"), (k, "k"), (v, "v"))
    )
    with jax.named_scope("attention"):  # profiles tell it from the maps around it by this
      if cache is None:
        y_bnth = attention.attend_packed(q, k, v, segment_ids_bt)
      else:
        cache = tuple(
          constrain(attention.append(old, new, length_b), "batch", "tensor")
          for old, new in zip(cache, (k, v))
        )
        k, v = (a.astype(x_btd.dtype) for a in cache)
        mask_bts = attention.cache_mask(length_b, new=q.shape[2], size=k.shape[2])
        y_bnth = attention.attend(q, k, v, mask_bts)
    y_bte = attention.merge_heads(y_bnth)
    y_btd = mlp.linear(
      y_bte, *weights("o", (y_bte.shape[-1], d), (("tensor", cfg.heads), "fsdp"), residual)
    )
    y_btd = checkpoint_name(y_btd, "o")
    x_btd = constrain(x_btd + y_btd, "batch")

    y_btd = norms.rms_norm(x_btd, *Scale(d, name="norm2")(), eps=cfg.eps)
    gate, _, gate_ab = weights("gate", (d, f), ("fsdp", "tensor"))
    up, _, up_ab = weights("up", (d, f), ("fsdp", "tensor"))
    down, _, down_ab = weights("down", (f, d), ("tensor", "fsdp"), residual)
    y_btf = mlp.gated(
      y_btd, gate, up, name=cfg.activation, updates=(gate_ab, up_ab), apart=cache is not None
    )
    y_btd = mlp.linear(constrain(y_btf, "batch", None, "tensor"), down, update=down_ab)
    return constrain(x_btd + y_btd, "batch"), cache


class Embedding(nn.Module):
  """The token table, [V, D]; also the output layer when embeddings are tied."""

  config: DecoderConfig

  @nn.compact
  def __call__(self) -> Array:
    shape = (self.config.padded_vocab, self.config.width)
    return self.param("embedding", normal(shape[1] ** -0.5), shape, jnp.float32)


class Decoder(nn.Module):
  """The decoder, in three steps: `embed`, `__call__`, `logits`.

  Attributes:
    config: sizes.
    dtype: compute dtype; norm statistics, rotary angles, softmax and logits are f32.
    scan_layers: stacked parameters under 'layers' instead of 'layers_0', 'layers_1', ...
    remat: see `leaves.remat`.
  """

  config: DecoderConfig
  dtype: jnp.dtype = jnp.float32
  scan_layers: bool = True
  remat: str = "none"

  def setup(self) -> None:
    cfg = self.config
    self.embedding = Embedding(cfg, name="embed")
    block = remat(DecoderBlock, self.remat, scanned=self.scan_layers)
    if self.scan_layers:
      self.layers = scan(block, cfg.layers, in_axes=(nn.broadcast,) * 3 + (0,))(cfg)
    else:
      self.layers = [block(cfg) for _ in range(cfg.layers)]
    self.norm = Scale(cfg.width)
    if not cfg.tie_embeddings:
      self.head = Kernel((cfg.width, cfg.padded_vocab))

  def embed(self, tokens_bt: Array) -> Array:
    """Token ids [B, T] to embeddings [B, T, D] in the compute dtype."""
    x_btd = jnp.take(self.embedding(), tokens_bt, axis=0)
    # Every device looks its channels up for the rows of all. Then rows are exchanged and not the
    # table (4,096 tokens a device against LLaMA's 32,000), and its gradient is where it belongs.
    x_btd = constrain(x_btd, "data", None, "fsdp")
    return constrain(x_btd.astype(self.dtype), "batch")

  def __call__(
    self,
    x_btd: Array,
    *,
    positions_bt: Array,
    segment_ids_bt: Array,
    cache: Cache | None = None,
  ) -> tuple[Array, Cache | None]:
    """Runs all layers and the last norm.

    Args:
      x_btd: [B, T, D] embeddings.
      positions_bt: [B, T] int32 rotary positions.
      segment_ids_bt: [B, T] int32. Without a cache: 1, 2, ... per packed example, attention is
        causal inside each; 0 is padding. With a cache: 1 for a token, 0 for padding, which stands
        only at a row's end.
      cache: tokens before these; each row continues behind its own length.

    Returns:
      ([B, T, D] after the last norm, the cache with these tokens or None).
    """
    cfg = self.config
    x_btd = x_btd.astype(self.dtype)
    table = rope.rope_table(
      positions_bt, head_dim=cfg.head_dim, base=cfg.rope_base, scaling=cfg.rope_scaling
    )
    length_b = per_layer = None
    if cache is not None:
      length_b, per_layer = cache.length_b, list(zip(cache.k, cache.v))
    x_btd, per_layer = self._run(x_btd, table, segment_ids_bt, length_b, per_layer)
    if cache is not None:
      added_b = jnp.sum(segment_ids_bt > 0, axis=1, dtype=jnp.int32)
      k, v = zip(*per_layer)
      cache = Cache(k=k, v=v, length_b=length_b + added_b)
    return norms.rms_norm(x_btd, *self.norm(), eps=cfg.eps), cache

  def _run(self, x_btd, table, segment_ids_bt, length_b, per_layer):
    """All layers; `per_layer` is a list of (k, v) or None."""
    if not self.scan_layers:
      new = []
      for i, layer in enumerate(self.layers):
        x_btd, kv = layer(x_btd, table, segment_ids_bt, length_b, per_layer and per_layer[i])
        new.append(kv)
      return x_btd, new
    if per_layer is not None:
      per_layer = jax.tree.map(lambda *a: jnp.stack(a), *per_layer)
    x_btd, new = self.layers(x_btd, table, segment_ids_bt, length_b, per_layer)
    if new is not None:
      new = [(new[0][i], new[1][i]) for i in range(self.config.layers)]
    return x_btd, new

  def logits(self, x_btd: Array) -> Array:
    """[B, T, D] to f32 logits [B, T, V]; rows that only pad the vocabulary get MASKED."""
    cfg = self.config
    kernel = self.embedding().T if cfg.tie_embeddings else self.head()[0]
    rows_xd = x_btd.reshape(-1, cfg.width)  # one matrix of all rows, as in mlp.linear
    y_xv = jnp.matmul(rows_xd, kernel.astype(x_btd.dtype), preferred_element_type=jnp.float32)
    y_btv = constrain(y_xv.reshape(*x_btd.shape[:2], -1), "batch", None, "tensor")
    if cfg.padded_vocab == cfg.vocab_size:
      return y_btv
    real_11v = (jnp.arange(cfg.padded_vocab) < cfg.vocab_size)[None, None, :]
    return jnp.where(real_11v, y_btv, attention.MASKED)

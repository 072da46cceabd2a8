"""This program's side of a check: each part on what the oracle gave its own, in float32.

An error thus shows in the part that makes it. Beside the oracle's hidden states a block gets this
program's own, which end in the rows of the whole. Weights are read from the release part by part.
Errors are max|a - b| / max|b| of a tensor, and of blocks also of a token (see `block_error`).

Axes: b rows, n image tokens, r regions, t tokens, c vision channels, d decoder channels, h w
pixels, v vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from regionjax.config import DecoderConfig, ModelConfig, VisionConfig
from regionjax.models.decoder import Cache, Decoder, DecoderBlock, init_cache
from regionjax.models.pyramid import PyramidEncoder
from regionjax.models.region_encoders import make_region_encoder
from regionjax.models.region_lm import Connector, region_layers
from regionjax.models.vit import VisionBlock, VisionTransformer
from regionjax.ops import norms, rope
from regionjax.weights import release
from regionjax.weights.tensors import Tensor

BLOCK, WHOLE = 1e-5, 1e-4  # the errors that a sound conversion stays below


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the report.

  Attributes:
    name: what was compared.
    error: max|a - b| / max|b|.
    limit: what it must stay below.
  """

  name: str
  error: float
  limit: float

  @property
  def passed(self) -> bool:
    return bool(self.error <= self.limit)  # not for NaN


class Weights:
  """A release's parameters as float32 arrays of JAX, read when they are asked for."""

  def __init__(self, leaves: Mapping[str, Tensor]):
    self._leaves = leaves

  def tree(self, *paths: str) -> dict[str, Any]:
    """What lies under some paths ('decoder/embed'), nested, without their first name."""
    inside = [p for p in self._leaves if f"{p}/".startswith(tuple(f"{path}/" for path in paths))]
    return self._nested(inside, slice(None), depth=1)

  def layer(self, part: str, index: int) -> dict[str, Any]:
    """One block of a part's stack."""
    return self._nested(self._stack(part), index, depth=2)

  def depth(self, part: str) -> int:
    """Blocks of a part's stack."""
    return next((self._leaves[path].shape[0] for path in self._stack(part)), 0)

  def _stack(self, part: str) -> list[str]:
    return [path for path in self._leaves if path.startswith(f"{part}/layers/")]

  def _nested(self, paths: Sequence[str], index: Any, *, depth: int) -> dict[str, Any]:
    flat = {}
    for path in paths:
      leaf = self._leaves[path]
      # Placed one by one: together they would be in memory twice.
      flat[path.split("/", depth)[-1]] = jnp.asarray(leaf.array()[index].astype(np.float32))
      leaf.release()
    return release.unflatten(flat)


def draw_images(config: VisionConfig) -> np.ndarray:
  """Two random images [2, H, W, 3], as they are after normalisation."""
  return np.random.default_rng(0).normal(size=(2, *config.image_hw, 3)).astype(np.float32)


def compare_tower(
  theirs: Sequence[np.ndarray], images_bhwc: np.ndarray, config: VisionConfig, weights: Weights
) -> Iterator[Row]:
  """A vision tower: its embeddings, each block that the release has, and the whole.

  Args:
    theirs: every hidden state [B, 1+N, C] of the oracle.
    images_bhwc: what they are of.
    config: ours.
    weights: the release.
  """
  stem = weights.tree(*(f"vision/{n}" for n in ("class_token", "positions", "patch", "pre_norm")))
  x_bnc = VisionTransformer(config, depth=0).apply({"params": stem}, images_bhwc)[0]
  yield Row("vision embeddings", relative(x_bnc, theirs[0]), BLOCK)
  depth, b = weights.depth("vision"), len(images_bhwc)
  for i in range(depth):
    both = _vision_block(config, weights.layer("vision", i), jnp.concatenate([theirs[i], x_bnc]))
    error = block_error(both[:b], theirs[i + 1], theirs[i])
    yield Row(f"vision block {i}", error, BLOCK)
    x_bnc = both[b:]
  yield Row("vision tower", relative(x_bnc, theirs[depth]), WHOLE)


def compare_connector(
  theirs: np.ndarray, hidden: Sequence[np.ndarray], model: ModelConfig, weights: Weights
) -> Row:
  """Image tokens from the hidden state that ours selects.

  Args:
    theirs: [B, N, D].
    hidden: every hidden state [B, 1+N, C] of the oracle's tower.
    model: ours.
    weights: the release.
  """
  x_bnc = hidden[model.vision.blocks_used][:, 1:]
  x_bkhwc = x_bnc.reshape(len(x_bnc), 1, *model.vision.grid, -1)
  module = Connector(model.connector, model.decoder.width)
  out = module.apply({"params": weights.tree("connector")}, x_bkhwc)
  return Row("projector", relative(out[:, 0], theirs), BLOCK)


def compare_regions(
  maps: Sequence[np.ndarray],
  tokens_rd: np.ndarray,
  boxes_r4: np.ndarray,
  *,
  hidden: Sequence[np.ndarray],
  model: ModelConfig,
  weights: Weights,
) -> list[Row]:
  """A region encoder in its two halves: the fused levels, and tokens of the oracle's levels.

  Args:
    maps: the oracle's levels [1, C, H, W] of one image.
    tokens_rd: what it made of them.
    boxes_r4: and of these.
    hidden: every hidden state [1, 1+N, C] of its tower.
    model: ours.
    weights: the release.
  """
  encoder = make_region_encoder(dataclasses.replace(model, compute_dtype="float32"))
  params = weights.tree("regions")
  states = [hidden[layer][None, :, 1:] for layer in region_layers(model)]
  levels = _region_maps(encoder, params, states)
  theirs = [level[None].transpose(0, 1, 3, 4, 2) for level in maps]
  error = max(relative(a, b) for a, b in zip(levels, theirs, strict=True))
  tokens_brd = _region_tokens(encoder, params, theirs, boxes_r4[None])
  return [
    Row("region maps", error, WHOLE),
    Row("region tokens", relative(tokens_brd[0], tokens_rd), WHOLE),
  ]


def compare_decoder(
  theirs: Sequence[np.ndarray],
  logits_1tv: np.ndarray,
  ids: Sequence[int],
  *,
  config: DecoderConfig,
  weights: Weights,
) -> tuple[list[Row], list[int]]:
  """A decoder: embeddings, every block, and the logits of the whole.

  Args:
    theirs: the oracle's embeddings and what each of its blocks gave, [1, T, D].
    logits_1tv: the oracle's.
    ids: the prompt, T tokens.
    config: ours.
    weights: the release.

  Returns:
    Rows, and the most probable token behind each of the prompt's.
  """
  module, tokens_bt = Decoder(config), jnp.asarray([ids], jnp.int32)
  positions_bt = jnp.tile(jnp.arange(len(ids), dtype=jnp.int32), (2, 1))
  table = rope.rope_table(
    positions_bt, head_dim=config.head_dim, base=config.rope_base, scaling=config.rope_scaling
  )
  embed = weights.tree("decoder/embed")
  x_btd = module.apply({"params": embed}, tokens_bt, method="embed")
  rows = [Row("embeddings", relative(x_btd, theirs[0]), BLOCK)]
  for i in range(config.layers):
    both = jnp.concatenate([theirs[i], x_btd])
    both = _decoder_block(config, weights.layer("decoder", i), both, table)
    error = block_error(both[:1], theirs[i + 1], theirs[i])
    rows.append(Row(f"block {i}", error, BLOCK))
    x_btd = both[1:]
  ends = weights.tree("decoder/norm", "decoder/head")
  logits_btv = _logits(config, (embed if config.tie_embeddings else {}) | ends, x_btd)
  logits_btv = logits_btv[..., : logits_1tv.shape[-1]]
  rows.append(Row("logits", relative(logits_btv, logits_1tv), WHOLE))
  return rows, np.argmax(logits_btv[0], axis=-1).tolist()


def greedy(
  config: DecoderConfig, params: Mapping[str, Any], ids: Sequence[int], count: int
) -> list[int]:
  """The `count` most probable tokens behind a prompt by this program, with a cache; no stop.

  Args:
    config: the decoder.
    params: its parameters, layers stacked: of a small model, a program of unrolled layers takes
      longer to compile than the tokens to compute.
    ids: of the prompt.
    count: of tokens.
  """
  cache = init_cache(config, 1, len(ids) + count)
  token_b, cache = _greedy_step(config, params, jnp.asarray([ids], jnp.int32), cache)
  out = [int(token_b[0])]
  while len(out) < count:
    token_b, cache = _greedy_step(config, params, token_b[:, None], cache)
    out.append(int(token_b[0]))
  return out


def relative(ours: Any, theirs: Any) -> float:
  """max|a - b| / max|b|; infinite where shapes differ."""
  a, b = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
  if a.shape != b.shape:
    return float("inf")
  return float(np.abs(a - b).max() / np.abs(b).max())


def block_error(ours: Any, theirs: np.ndarray, before: np.ndarray) -> float:
  """The larger of two: the tensor's error, and that of a token by its own largest number.

  A trained LLaMA has a token with numbers hundreds of times larger than all others' (SmolLM2 22,500
  against 70). By the tensor's largest, one head rotated wrongly is an error of 2e-4 there, by the
  token's 0.06. A block may also take those numbers away, so the token's largest is that of what
  goes in or comes out.

  Args:
    ours: what a block gave, [B, T, D].
    theirs: what the oracle's gave.
    before: what both read.
  """
  whole = relative(ours, theirs)
  if not np.isfinite(whole):
    return whole
  largest_bt = np.maximum(np.abs(theirs), np.abs(before)).max(axis=-1)
  a = np.asarray(ours, np.float32)
  return max(whole, float((np.abs(a - theirs).max(axis=-1) / largest_bt).max()))


# Programs, compiled once for all layers. Weights are arguments: closed over they would be
# constants, which XLA folds for minutes.


@functools.partial(jax.jit, static_argnums=0)
def _vision_block(config: VisionConfig, params: Any, x_bnc: Any) -> jax.Array:
  return VisionBlock(config).apply({"params": params}, x_bnc)[0]


@functools.partial(jax.jit, static_argnums=0)
def _decoder_block(config: DecoderConfig, params: Any, x_btd: Any, table: Any) -> jax.Array:
  ones_bt = jnp.ones(x_btd.shape[:2], jnp.int32)
  return DecoderBlock(config).apply({"params": params}, x_btd, table, ones_bt, None, None)[0]


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: DecoderConfig, params: Any, x_btd: Any) -> jax.Array:
  def run(m: Decoder) -> jax.Array:
    return m.logits(norms.rms_norm(x_btd, *m.norm(), eps=config.eps))

  return Decoder(config).apply({"params": params}, method=run)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _greedy_step(
  config: DecoderConfig, params: Any, tokens_bt: Any, cache: Cache
) -> tuple[jax.Array, Cache]:
  def run(m: Decoder) -> tuple[jax.Array, Cache]:
    positions_bt = cache.length_b[:, None] + jnp.arange(tokens_bt.shape[1])[None]
    x_btd, new = m(
      m.embed(tokens_bt), positions_bt=positions_bt, segment_ids_bt=jnp.ones_like(tokens_bt),
      cache=cache,
    )  # fmt: skip
    return jnp.argmax(m.logits(x_btd[:, -1:])[:, 0], axis=-1).astype(jnp.int32), new

  return Decoder(config).apply({"params": params}, method=run)


@functools.partial(jax.jit, static_argnums=0)
def _region_maps(encoder: PyramidEncoder, params: Any, hidden: Any) -> list[jax.Array]:
  return encoder.apply({"params": params}, hidden, method="maps")


@functools.partial(jax.jit, static_argnums=0)
def _region_tokens(encoder: PyramidEncoder, params: Any, maps: Any, boxes_br4: Any) -> jax.Array:
  b, r = boxes_br4.shape[:2]
  zeros_br = jnp.zeros((b, r), jnp.int32)
  exists_br, cover_brn = jnp.ones((b, r), bool), jnp.zeros((b, r, 1))
  boxes = (boxes_br4, zeros_br, zeros_br, exists_br, cover_brn)
  return encoder.apply({"params": params}, maps, *boxes, method="read")

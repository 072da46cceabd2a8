"""The jitted programs of generation: encode_images, prefill, decode.

Each is compiled once per shape; the engine pads to buckets so that there are few shapes.

Axes: b rows, m distinct images, k images of a row, t prompt tokens, r region slots of a row, v
vocabulary, n tokens generated per dispatch.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from regionjax.config import DecoderConfig
from regionjax.infer import sampling
from regionjax.models.decoder import Cache, init_cache
from regionjax.models.region_lm import ImageFeatures, RegionLM
from regionjax.partition.activations import constrain

Array = jax.Array


class PromptArrays(NamedTuple):
  """A padded batch of prompts (or of their next pieces).

  Attributes:
    tokens_bt: int32, padded at the right.
    lengths_b: int32, real tokens of each row; 0 for a row that only pads the batch.
    image_bk: int32, which of the encoded images each image of the row is, in slot order.
    boxes_br4, box_image_br, region_kind_br, region_mask_br, region_cover_brn: as in
      `data.schema.Batch`.
  """

  tokens_bt: Array
  lengths_b: Array
  image_bk: Array
  boxes_br4: Array
  box_image_br: Array
  region_kind_br: Array
  region_mask_br: Array
  region_cover_brn: Array


class Running(NamedTuple):
  """What decoding carries from one dispatch to the next.

  Attributes:
    cache: keys and values of all tokens so far, the generated ones included.
    logits_bv: float32, for each row's next token.
    done_b: bool, rows that have generated a stop id or were told to stop.
    step_b: int32, tokens of this answer so far.
  """

  cache: Cache
  logits_bv: Array
  done_b: Array
  step_b: Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def new_cache(config: DecoderConfig, rows: int, room: int, dtype: Any) -> Cache:
  """`init_cache`, split over the mesh as the decoder's layers leave it."""
  cache = init_cache(config, rows, room, dtype)
  return Cache(
    k=tuple(constrain(k, "batch", "tensor") for k in cache.k),
    v=tuple(constrain(v, "batch", "tensor") for v in cache.v),
    length_b=cache.length_b,
  )


@functools.partial(jax.jit, static_argnums=0)
def encode_images(model: RegionLM, params: Any, images_mhwc: Array) -> ImageFeatures:
  """Encodes images once: leaves [M, 1, ...], to be read by any number of prompts."""
  return model.apply({"params": params}, images_mhwc[:, None], method=RegionLM.encode_images)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def prefill(
  model: RegionLM,
  params: Any,
  features: ImageFeatures,
  prompt: PromptArrays,
  cache: Cache,
) -> tuple[Array, Cache]:
  """Appends prompts to the cache; rows continue behind their own length.

  Returns:
    (float32 [B, V] logits of the token after each row's last one, the cache).
  """

  def run(module: RegionLM) -> tuple[Array, Cache]:
    tokens_bknd, maps = jax.tree.map(lambda x: x[:, 0][prompt.image_bk], features)
    regions_brd = module.encode_regions(maps, *prompt[3:])
    x_btd = module.splice(prompt.tokens_bt, tokens_bknd, regions_brd)
    offset_bt = jnp.arange(prompt.tokens_bt.shape[1], dtype=jnp.int32)[None, :]
    logits, new = module.decode(
      x_btd,
      cache.length_b[:, None] + offset_bt,
      (offset_bt < prompt.lengths_b[:, None]).astype(jnp.int32),
      cache,
      logits_at_b=jnp.maximum(prompt.lengths_b - 1, 0),
    )
    return logits[:, 0], new

  return model.apply({"params": params}, method=run)


@functools.partial(
  jax.jit, static_argnums=(0,), static_argnames=("steps", "greedy"), donate_argnums=2
)
def decode(
  model: RegionLM,
  params: Any,
  running: Running,
  keys_b: Array,
  stop_ids: Array,
  banned: Array,
  limit: Array,
  temperature: Array,
  top_p: Array,
  *,
  steps: int,
  greedy: bool,
) -> tuple[Array, Running]:
  """Generates up to `steps` tokens in one dispatch; ends early when every row is done.

  A generated token is fed back at once, so that after the dispatch the cache holds all of them and
  the next turn's prompt can continue behind it.

  Args:
    running: where decoding stands; donated.
    keys_b: PRNG keys of the rows, see `sampling.row_keys`.
    stop_ids: int32 [any], ids that end an answer.
    banned: int32 [any], ids that are never generated; those past the vocabulary do nothing.
    limit: int32 scalar, at most this many tokens now (a dynamic bound below `steps`).
    temperature, top_p: scalars; unused when `greedy`.
    steps: N, size of the output.
    greedy: take the most probable token instead of drawing one.

  Returns:
    (int32 [B, N] tokens, -1 where a row was done or the loop had ended, the new state).
  """

  def forward(module: RegionLM, token_b: Array, live_b: Array, cache: Cache) -> Any:
    x_b1d = module.splice(token_b[:, None], None, None)
    return module.decode(x_b1d, cache.length_b[:, None], live_b[:, None], cache)

  def step(carry: tuple[Array, Array, Running]) -> tuple[Array, Array, Running]:
    i, out_bn, (cache, logits_bv, done_b, step_b) = carry
    logits_bv = logits_bv.at[:, banned].set(-jnp.inf, mode="drop")
    if greedy:
      token_b = sampling.greedy(logits_bv)
    else:
      token_b = sampling.sample(logits_bv, keys_b, step_b, temperature=temperature, top_p=top_p)
    out_bn = out_bn.at[:, i].set(jnp.where(done_b, -1, token_b))
    live_b = (~done_b).astype(jnp.int32)
    logits, cache = model.apply({"params": params}, token_b, live_b, cache, method=forward)
    done_b = done_b | jnp.isin(token_b, stop_ids)
    return i + 1, out_bn, Running(cache, logits[:, 0], done_b, step_b + live_b)

  start = (jnp.int32(0), jnp.full((running.logits_bv.shape[0], steps), -1, jnp.int32), running)
  _, out_bn, new = jax.lax.while_loop(
    lambda c: (c[0] < jnp.minimum(steps, limit)) & ~jnp.all(c[2].done_b), step, start
  )
  return out_bn, new

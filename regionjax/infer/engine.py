"""The engine: encoded prompts in, ids and text out, on any number of rows.

It pads everything to a few bucket sizes, so that the programs of `infer.programs` are compiled a
few times and never again. It knows ids and arrays; templates and people's texts are `infer.chat`'s.

Axes: b rows, v vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from regionjax.config import ModelConfig
from regionjax.infer import programs
from regionjax.infer.batching import GenerationError, Prompt, bucket, pad_prompts, power
from regionjax.infer.placing import put_params
from regionjax.infer.sampling import Sampling, row_keys
from regionjax.models.decoder import Cache
from regionjax.models.lora import merge_lora
from regionjax.models.params import model_for, unstack_layers
from regionjax.models.region_lm import ImageFeatures

GREEDY = Sampling()
# Rows of one batch in `generate`: more than 64 gain nothing on two cores, and fewer where their
# caches would exceed the bytes (a row of 512 tokens takes 256 MiB in the 7B model).
MAX_ROWS, MAX_CACHE_BYTES = 64, 4 << 30


@dataclasses.dataclass(frozen=True)
class Generation:
  """An answer so far.

  Attributes:
    ids: generated ids, the stop's included.
    text: their text up to the stop.
    finish: 'stop', 'length' (it was cut at the limit) or '' (not finished yet).
  """

  ids: tuple[int, ...] = ()
  text: str = ""
  finish: str = ""


@dataclasses.dataclass
class State:
  """Rows whose prompts are in the cache. Replaced in place; arrays in it may be donated.

  Attributes:
    cache: keys and values.
    logits_bv: float32, for the next token of each row.
    lengths: tokens of each real row in the cache; rows past them pad the batch.
    room: tokens that a row of the cache can hold.
  """

  cache: Cache
  logits_bv: jax.Array
  lengths: np.ndarray
  room: int


class Engine:
  """A model ready to generate.

  Attributes:
    config: the model, low-rank updates merged into it, its vocabulary padded so that the mesh
      divides it.
    params: its parameters on the device or mesh, in the compute dtype, layers one by one.
    mesh: the devices' arrangement; None is one device.
    steps: tokens generated per dispatch; between dispatches stop strings are looked for and text is
      streamed.
  """

  def __init__(
    self,
    config: ModelConfig,
    params: Any,
    tokenizer: Any,
    *,
    stop_sequences: Sequence[Sequence[int]] = (),
    stop_strings: Sequence[str] = (),
    steps: int = 16,
    mesh: Mesh | None = None,
  ) -> None:
    """Puts a model on the device, or on the devices of a mesh.

    Args:
      config: the model.
      params: nested dict of arrays, layers stacked or not.
      tokenizer: decodes ids; gives the slots' ids.
      stop_sequences: sequences of ids, each of which ends an answer.
      stop_strings: texts that end an answer; they may begin and end inside a token.
      steps: tokens per dispatch.
      mesh: splits parameters, key-value cache and work as `partition` says; answers are those of
        one device (up to rounding of the logits).

    Raises:
      regionjax.config.ConfigError: the mesh can't split the model.
    """
    self._dtype = jnp.dtype(config.compute_dtype)
    config, params = merge_lora(config, params, dtype=self._dtype)
    config, self.params = put_params(config, unstack_layers(params), mesh, dtype=self._dtype)
    self.mesh = mesh
    self.config = config
    self.tokenizer = tokenizer
    self.steps = steps
    self.model = model_for(
      config,
      generate=True,
      image_slot_id=tokenizer.image_slot_id,
      region_slot_id=tokenizer.region_slot_id,
    )
    self._stops = tuple(tuple(int(i) for i in stop) for stop in stop_sequences if len(stop))
    self._stop_strings = tuple(stop_strings)
    # Single ids end a row inside a dispatch, longer stops are found between two. -1 is no id.
    single = [stop[0] for stop in self._stops if len(stop) == 1]
    self._single_stops = jnp.asarray(single or [-1], jnp.int32)
    # A slot in an answer would be filled with features when the dialogue is read again.
    slots = [i for i in (tokenizer.image_slot_id, tokenizer.region_slot_id) if i >= 0]
    self._banned = jnp.asarray(slots or [config.decoder.padded_vocab], jnp.int32)

  def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

  def _cache(self, rows: int, room: int) -> Cache:
    """An empty cache; on a mesh each device makes its own heads'."""
    with self._on_mesh():
      return programs.new_cache(self.config.decoder, rows, room, self._dtype)

  def encode_images(self, images: Sequence[np.ndarray]) -> ImageFeatures:
    """Features of images, computed once and read by any number of prompts.

    Args:
      images: float32 [H, W, 3] each, as `images.preprocess` gives them; none is allowed.

    Returns:
      Features with a leading axis of images (padded to a bucket).
    """
    if not images:
      return ImageFeatures(None, None)
    if "vision" not in self.params:
      raise GenerationError(
        "this release is a decoder alone: it reads text and no images. Train a model with a vision "
        "tower from it (train.init_from), and ask that one"
      )
    size = power(len(images))
    batch = np.zeros((size, *images[0].shape), np.float32)
    for slot, image in zip(batch, images):
      slot[:] = image
    with self._on_mesh():
      return programs.encode_images(self.model, self.params, batch)

  def prefill(
    self, prompts: Sequence[Prompt], features: ImageFeatures, *, new_tokens: int
  ) -> State:
    """Runs prompts into a new cache.

    Args:
      prompts: at least one.
      features: of the images that the prompts name.
      new_tokens: tokens that are going to be generated; room is kept for them as far as the
        decoder's `max_length` goes.

    Raises:
      GenerationError: a prompt leaves no room for an answer.
    """
    longest = max(len(p.ids) for p in prompts)
    room = self._room(longest, new_tokens)
    rows = power(len(prompts))
    cache = self._cache(rows, room)
    empty = np.zeros(len(prompts), np.int64)
    return self._append(State(cache, jnp.zeros(()), empty, room), prompts, features)

  def extend(
    self, state: State, prompts: Sequence[Prompt], features: ImageFeatures, *, new_tokens: int
  ) -> State:
    """Continues rows behind what their cache holds; `state` must not be used afterwards.

    Args:
      state: from `prefill` or `extend`, possibly after `decode` and `rewind`.
      prompts: the next ids of each row; their image indices count the row's images from the start,
        their region slots only those of this piece.
      features: of the same images as before.
      new_tokens: as for `prefill`.
    """
    longest = max(int(n) + len(p.ids) for n, p in zip(state.lengths, prompts))
    room = self._room(longest, new_tokens)
    if room > state.room:
      rows = state.cache.length_b.shape[0]
      larger = self._cache(rows, room)
      cache = jax.tree.map(_pad_end, state.cache, larger)
      state = dataclasses.replace(state, cache=cache, room=room)
    return self._append(state, prompts, features)

  def rewind(self, state: State, lengths: Sequence[int]) -> None:
    """Forgets the end of each row: its cache keeps `lengths[b]` tokens. Logits become stale."""
    kept = np.zeros(state.cache.length_b.shape[0], np.int32)
    kept[: len(lengths)] = lengths
    state.lengths = np.asarray(lengths, np.int64)
    state.cache = state.cache._replace(length_b=jnp.asarray(kept))

  def decode(
    self,
    state: State,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    rows: Sequence[int] | None = None,
  ) -> Iterator[list[Generation]]:
    """Generates, yielding every row's answer so far after each dispatch.

    Afterwards `state` holds the prompts and all generated tokens (what followed a stop string
    included: `rewind` before going on).

    Args:
      state: prompts in a cache.
      max_new_tokens: per row; fewer where the decoder's `max_length` comes first.
      sampling: how tokens are drawn.
      rows: numbers that set the rows' random draws apart; by default 0, 1, ...
    """
    count = len(state.lengths)
    padded = state.logits_bv.shape[0]
    numbers = np.arange(padded, dtype=np.int32)
    numbers[:count] = np.arange(count) if rows is None else rows
    keys = row_keys(sampling.seed, jnp.asarray(numbers))
    left = min(max_new_tokens, state.room - int(state.lengths.max()))
    answers = [Generation() for _ in range(count)]
    running = programs.Running(
      state.cache,
      state.logits_bv,
      jnp.arange(padded) >= count,
      jnp.zeros(padded, jnp.int32),
    )
    while left > 0 and any(not a.finish for a in answers):
      done = np.array([bool(a.finish) for a in answers] + [True] * (padded - count))
      running = running._replace(done_b=jnp.asarray(done))
      with self._on_mesh():
        tokens, running = programs.decode(
          self.model, self.params, running, keys, self._single_stops, self._banned,
          np.int32(left), np.float32(sampling.temperature), np.float32(sampling.top_p),
          steps=self.steps, greedy=sampling.temperature == 0,
        )  # fmt: skip
      left -= self.steps
      # Written at once: the old cache was donated, and whoever stops iterating keeps a good state.
      state.cache, state.logits_bv = running.cache, running.logits_bv
      new = np.asarray(tokens)[:count]
      state.lengths = np.asarray(running.cache.length_b, np.int64)[:count]
      answers = [self._grow(a, row[row >= 0], left <= 0) for a, row in zip(answers, new)]
      yield answers

  def generate(
    self,
    prompts: Sequence[Prompt],
    features: ImageFeatures,
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
  ) -> list[Generation]:
    """Answers any number of prompts, in batches of rows of similar length.

    A row's answer does not depend on the batch that it ran in (up to rounding of its logits).

    Args:
      prompts: in any order and of any lengths.
      features: of all images that the prompts name.
      max_new_tokens: per answer.
      sampling: how tokens are drawn.

    Returns:
      One answer per prompt, in the order given.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    answers: list[Generation] = [Generation()] * len(prompts)
    rows = self._rows(max((len(p.ids) for p in prompts), default=0), max_new_tokens)
    for start in range(0, len(order), rows):
      picked = order[start : start + rows]
      state = self.prefill([prompts[i] for i in picked], features, new_tokens=max_new_tokens)
      *_, last = self.decode(state, max_new_tokens=max_new_tokens, sampling=sampling, rows=picked)
      for i, answer in zip(picked, last):
        answers[i] = answer
    return answers

  def _rows(self, longest: int, new_tokens: int) -> int:
    """Rows of a batch whose cache stays within MAX_CACHE_BYTES; a power of two."""
    decoder = self.config.decoder
    token = 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * self._dtype.itemsize
    fit = MAX_CACHE_BYTES // (token * self._room(longest, new_tokens))
    rows = MAX_ROWS
    while rows > max(fit, 1):
      rows //= 2
    return rows

  def _room(self, longest: int, new_tokens: int) -> int:
    limit = self.config.decoder.max_length
    if longest >= limit:
      raise GenerationError(
        f"the prompt takes {longest} tokens (images and regions included) and the model's limit "
        f"is {limit} with the answer; shorten the text, name fewer regions, or start a new dialogue"
      )
    return min(bucket(longest + new_tokens, 64), limit)

  def _append(self, state: State, prompts: Sequence[Prompt], features: ImageFeatures) -> State:
    arrays = pad_prompts(
      prompts, rows=state.cache.length_b.shape[0], patches=self.config.vision.tokens,
      pad_id=self.tokenizer.pad_id, region_slot_id=self.tokenizer.region_slot_id,
    )  # fmt: skip
    # A later turn as a rule shows no image and often no region: then nothing is read for them.
    if not arrays.region_mask_br.any():
      features = features._replace(maps=None)
    if not (arrays.tokens_bt == self.tokenizer.image_slot_id).any():
      features = features._replace(tokens_bknd=None)
    with self._on_mesh():
      logits, cache = programs.prefill(self.model, self.params, features, arrays, state.cache)
    return State(cache, logits, state.lengths + [len(p.ids) for p in prompts], state.room)

  def _grow(self, answer: Generation, new: np.ndarray, last: bool) -> Generation:
    """Adds tokens to an answer; ends it at the first stop, or at the length limit if `last`."""
    if answer.finish:
      return answer
    ids = answer.ids + tuple(int(i) for i in new)
    body, end = find_stop(ids, self._stops)
    text = self.tokenizer.decode(ids[:body])
    found = [at for at in (text.find(s) for s in self._stop_strings) if at >= 0]
    if found:
      return Generation(self._cut(ids), text[: min(found)], "stop")
    finish = "stop" if body < len(ids) else "length" if last else ""
    return Generation(ids[:end], text, finish)

  def _cut(self, ids: tuple[int, ...]) -> tuple[int, ...]:
    """The ids up to the token that completes a stop string; what was generated behind it goes."""
    low, high = 1, len(ids)
    while low < high:  # once complete, a stop string stays found
      middle = (low + high) // 2
      text = self.tokenizer.decode(ids[:middle])
      if any(s in text for s in self._stop_strings):
        high = middle
      else:
        low = middle + 1
    return ids[:low]


def find_stop(ids: Sequence[int], stops: Sequence[tuple[int, ...]]) -> tuple[int, int]:
  """(start, end) of the first stop to be complete in `ids`; both are len(ids) without one."""
  for end in range(1, len(ids) + 1):
    for stop in stops:
      if end >= len(stop) and tuple(ids[end - len(stop) : end]) == stop:
        return end - len(stop), end
  return len(ids), len(ids)


def _pad_end(array: jax.Array, larger: jax.Array) -> jax.Array:
  return jnp.pad(array, [(0, n - m) for m, n in zip(array.shape, larger.shape)])

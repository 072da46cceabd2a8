"""Choosing the next token: greedy, temperature and top-p, inside jit.

Legend: b row of the batch, v vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn.

  Attributes:
    temperature: 0 is greedy (the most probable token, the lowest id on ties).
    top_p: nucleus: the smallest set of most probable tokens whose probability reaches it.
    seed: draws are a function of (seed, row, step) and of nothing else, so a row does not depend
      on which other rows share its batch.
  """

  temperature: float = 0.0
  top_p: float = 1.0
  seed: int = 0

  def __post_init__(self) -> None:
    # `not (a <= x)` also refuses NaN.
    if not 0 <= self.temperature < float("inf"):
      raise ValueError(f"temperature {self.temperature}: expected 0 (greedy) or a positive number")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p {self.top_p}: expected a number in (0, 1]")


def top_p_filter(logits_bv: jax.Array, top_p: jax.Array | float) -> jax.Array:
  """Sets logits outside the nucleus to -inf.

  Args:
    logits_bv: float32 [B, V].
    top_p: scalar in (0, 1]. Kept are the most probable tokens whose preceding cumulated
      probability is below it: at least one, and all of them at 1 (Holtzman et al. 2020, sec. 3.1).
      Tokens tied with the last kept one are kept too.

  Returns:
    float32 [B, V].
  """
  sorted_bv = jnp.flip(jnp.sort(logits_bv, axis=-1), axis=-1)
  probabilities_bv = jax.nn.softmax(sorted_bv, axis=-1)
  before_bv = jnp.cumsum(probabilities_bv, axis=-1) - probabilities_bv
  kept_bv = (before_bv < top_p) | (top_p >= 1.0)
  lowest_b1 = jnp.min(jnp.where(kept_bv, sorted_bv, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits_bv >= lowest_b1, logits_bv, -jnp.inf)


def row_keys(seed: int, rows: jax.Array) -> jax.Array:
  """One PRNG key for each row number, [B]; adding rows leaves the others' keys as they are."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), rows)


def sample(
  logits_bv: jax.Array,
  keys_b: jax.Array,
  step_b: jax.Array,
  *,
  temperature: jax.Array | float,
  top_p: jax.Array | float,
) -> jax.Array:
  """Draws one token for each row.

  Args:
    logits_bv: float32 [B, V].
    keys_b: PRNG keys of the rows, from `row_keys`.
    step_b: int32 [B]; how many tokens of the answer the row already has.
    temperature: scalar, > 0.
    top_p: scalar in (0, 1].

  Returns:
    int32 [B].
  """
  scaled_bv = top_p_filter(logits_bv.astype(jnp.float32) / temperature, top_p)
  keys_b = jax.vmap(jax.random.fold_in)(keys_b, step_b)
  return jax.vmap(jax.random.categorical)(keys_b, scaled_bv).astype(jnp.int32)


def greedy(logits_bv: jax.Array) -> jax.Array:
  """The most probable token of each row, int32 [B]; the lowest id on ties."""
  return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)

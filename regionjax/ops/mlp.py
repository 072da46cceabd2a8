"""Linear maps and the two feed-forward forms: plain (ViT) and gated (LLaMA).

Axes: d input channels, f hidden channels, e output channels; `...` any leading axes.
Weights may be stored in another dtype than the activations; they are cast to the activations'.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from regionjax.ops.lora import LowRank, lora

Array = jax.Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "relu": jax.nn.relu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "silu": jax.nn.silu,
}


def activation(name: str) -> Callable[[Array], Array]:
  """The activation function called `name`.

  Raises:
    ValueError: no activation has that name.
  """
  if name not in ACTIVATIONS:
    raise ValueError(f"activation={name!r}: expected one of {', '.join(ACTIVATIONS)}")
  return ACTIVATIONS[name]


def linear(
  x_d: Array, kernel_de: Array, bias_e: Array | None = None, update: LowRank | None = None
) -> Array:
  """x @ kernel + bias over the last axis, in x's dtype.

  Args:
    x_d: [..., D].
    kernel_de: [D, E].
    bias_e: [E] or None.
    update: low-rank update of the kernel, added without forming it; or None.

  Returns:
    [..., E] in x's dtype.
  """
  # One matrix of all rows: XLA on a CPU transposes operands of higher rank for the weight gradient
  # (an MLP's forward and backward takes 1.3 x).
  y_xe = x_d.reshape(-1, x_d.shape[-1]) @ kernel_de.astype(x_d.dtype)
  if bias_e is not None:
    y_xe += bias_e.astype(x_d.dtype)[None]
  y_e = y_xe.reshape(*x_d.shape[:-1], -1)
  return y_e if update is None else y_e + lora(x_d, update.a_dr, update.b_re, scale=update.scale)


def gated_mlp(
  x_d: Array,
  gate_df: Array,
  up_df: Array,
  down_fd: Array,
  *,
  name: str,
  updates: tuple[LowRank | None, LowRank | None, LowRank | None] = (None, None, None),
) -> Array:
  """(act(x @ gate) * (x @ up)) @ down: SwiGLU when the activation is SiLU.

  Args:
    x_d: [..., D].
    gate_df: [D, F].
    up_df: [D, F].
    down_fd: [F, D].
    name: a key of ACTIVATIONS.
    updates: low-rank updates of gate, up and down.

  Returns:
    [..., D] in x's dtype.
  """
  gate, up, down = updates
  return linear(gated(x_d, gate_df, up_df, name=name, updates=(gate, up)), down_fd, update=down)


def gated(
  x_d: Array,
  gate_df: Array,
  up_df: Array,
  *,
  name: str,
  updates: tuple[LowRank | None, LowRank | None] = (None, None),
  apart: bool = False,
) -> Array:
  """The hidden channels of `gated_mlp`, [..., F]: act(x @ gate) * (x @ up).

  Remat policies can name both products, 'gate' and 'up'.

  Args:
    apart: keep them two products. XLA's GPU compiler joins those of one input where the kernels are
      small, and copies the kernels side by side first: with few tokens that is much of the work (a
      token of 8 rows of the 7B on 8 H100, compiled for: 4.4 GB of memory traffic each, not 2.9).
  """
  gate, up = updates
  gate_f = checkpoint_name(linear(x_d, gate_df, update=gate), "gate")
  if apart:
    x_d = jax.lax.optimization_barrier(x_d)
  up_f = checkpoint_name(linear(x_d, up_df, update=up), "up")
  return activation(name)(gate_f) * up_f

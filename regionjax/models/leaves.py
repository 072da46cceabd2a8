"""Modules that only declare parameters (f32) and hand them to ops, so that names stay regular.

`Kernel` gives `name/kernel` (and `name/bias`), `Scale` gives `name/scale` (and `name/bias`),
`AdaptedKernel` gives `name/kernel` (and `name/lora_a`, `name/lora_b`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from regionjax.config import ConfigError, LoraConfig
from regionjax.ops.lora import LowRank
from regionjax.partition.activations import keep_all_but_gathered, mesh_sizes

Array = jax.Array

# What blocks name by `checkpoint_name`, in the order in which remat levels add it. 'attention' is
# its result and, where a kernel computes it, its softmax's statistics.
REMAT_NAMES: dict[str, tuple[str, ...]] = {
  "attention": ("attention",),
  "qkv": ("attention", "q", "k", "v"),
  "mlp": ("attention", "q", "k", "v", "o", "gate", "up"),
}

REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  **{
    level: jax.checkpoint_policies.save_only_these_names(*names)
    for level, names in REMAT_NAMES.items()
  },
}


def normal(stddev: float) -> Callable[..., Array]:
  """Normal truncated at two standard deviations; `stddev` is that of the untruncated one."""
  return nn.initializers.truncated_normal(stddev)


class Kernel(nn.Module):
  """A linear map's weights.

  Attributes:
    features: input and output width.
    use_bias: whether there is a bias.
    gain: factor on the initial standard deviation 1 / sqrt(input width). Maps that write into the
      residual stream use 1 / sqrt(2 * layers), so that the stream's variance stays near 1.
    stddev: the initial standard deviation itself, of a normal that isn't truncated (the published
      systems' 0.02).
  """

  features: tuple[int, int]
  use_bias: bool = False
  gain: float = 1.0
  stddev: float | None = None

  @nn.compact
  def __call__(self) -> tuple[Array, Array | None]:
    """(kernel [D, E], bias [E] or None)."""
    init = normal(self.gain * self.features[0] ** -0.5)
    if self.stddev is not None:
      init = nn.initializers.normal(self.stddev)
    kernel = self.param("kernel", init, self.features, jnp.float32)
    if not self.use_bias:
      return kernel, None
    return kernel, self.param("bias", nn.initializers.zeros, self.features[1:], jnp.float32)


class AdaptedKernel(nn.Module):
  """A linear map's weights and, where `lora` targets its name, those of a low-rank update.

  Attributes:
    features: input and output width.
    lora: rank, scale and targets. A starts normal with deviation 1 / sqrt(input width), B at zero.
    gain: as in `Kernel`.
  """

  features: tuple[int, int]
  lora: LoraConfig
  gain: float = 1.0

  @nn.compact
  def __call__(self) -> tuple[Array, None, LowRank | None]:
    """(kernel [D, E], no bias, the update or None): what follows x in `mlp.linear`."""
    d, e = self.features
    kernel = self.param("kernel", normal(self.gain * d**-0.5), self.features, jnp.float32)
    if not self.lora.adapts(self.name or ""):
      return kernel, None, None
    rank = self.lora.rank
    a = self.param("lora_a", nn.initializers.normal(d**-0.5), (d, rank), jnp.float32)
    b = self.param("lora_b", nn.initializers.zeros, (rank, e), jnp.float32)
    return kernel, None, LowRank(a, b, self.lora.scale)


class ConvKernel(nn.Module):
  """A square convolution's weights.

  Attributes:
    sizes: side of the window, input and output width.
    use_bias: whether there is a bias.
    stddev: initial standard deviation; None is He's, for a ReLU behind the convolution.
  """

  sizes: tuple[int, int, int]
  use_bias: bool = True
  stddev: float | None = None

  @nn.compact
  def __call__(self) -> tuple[Array, Array | None]:
    """(kernel [S, S, D, E], bias [E] or None)."""
    side, d, e = self.sizes
    init = (
      nn.initializers.he_normal() if self.stddev is None else nn.initializers.normal(self.stddev)
    )
    kernel = self.param("kernel", init, (side, side, d, e), jnp.float32)
    if not self.use_bias:
      return kernel, None
    return kernel, self.param("bias", nn.initializers.zeros, (e,), jnp.float32)


class Scale(nn.Module):
  """A norm's scale and, when asked for, bias."""

  features: int
  use_bias: bool = False

  @nn.compact
  def __call__(self) -> tuple[Array, ...]:
    """(scale [D],) or (scale [D], bias [D])."""
    scale = self.param("scale", nn.initializers.ones, (self.features,), jnp.float32)
    if not self.use_bias:
      return (scale,)
    return scale, self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)


def remat(block: type[nn.Module], policy: str, *, scanned: bool) -> type[nn.Module]:
  """`block` with its backward pass recomputing what the policy does not save.

  Args:
    block: a module class.
    policy: a key of REMAT_POLICIES; what each saves is said at `ModelConfig.remat`.
    scanned: inside a scan XLA cannot merge the recomputation with the forward pass, so the barrier
      that prevents that (and costs fusions) is left out.

  Raises:
    ConfigError: an unknown policy.
  """
  if policy not in REMAT_POLICIES:
    raise ConfigError(f"remat={policy!r}: expected one of {', '.join(REMAT_POLICIES)}")
  if policy == "none":
    if mesh_sizes().get("fsdp", 1) == 1:
      return block
    return nn.remat(block, policy=keep_all_but_gathered, prevent_cse=not scanned)
  return nn.remat(block, policy=REMAT_POLICIES[policy], prevent_cse=not scanned)


def scan(block: type[nn.Module], length: int, *, in_axes: Any) -> Callable[..., nn.Module]:
  """`block` repeated `length` times with its parameters stacked on a leading axis."""
  return nn.scan(
    block,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=in_axes,
    length=length,
  )

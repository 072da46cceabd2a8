"""CLIP-compatible vision transformer over pure ops.

Axes: b images, h w pixels, n tokens of an image (class token first), c channels.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from regionjax.config import VisionConfig
from regionjax.models.leaves import ConvKernel, Kernel, Scale, normal, remat, scan
from regionjax.ops import attention, mlp, norms, tokens
from regionjax.ops.conv import conv2d
from regionjax.partition.activations import constrain

Array = jax.Array


class VisionBlock(nn.Module):
  """Pre-norm attention and MLP; returns its result twice, as a scan wants it (carry, output)."""

  config: VisionConfig

  @nn.compact
  def __call__(self, x_bnc: Array) -> tuple[Array, Array]:
    cfg = self.config
    c = cfg.width
    residual = (2 * cfg.layers) ** -0.5
    y_bnc = norms.layer_norm(x_bnc, *Scale(c, use_bias=True, name="norm1")(), eps=cfg.eps)
    q, k, v = (
      attention.split_heads(mlp.linear(y_bnc, *Kernel((c, c), use_bias=True, name=n)()), cfg.heads)
      for n in ("q", "k", "v")
    )
    q, k, v = (
      checkpoint_name(constrain(a, "batch", "tensor"), name)
      for a, name in ((q, "q"), (k, "k"), (v, "v"))
    )
    y_bnc = attention.merge_heads(checkpoint_name(attention.attend(q, k, v), "attention"))
    y_bnc = mlp.linear(y_bnc, *Kernel((c, c), use_bias=True, gain=residual, name="o")())
    y_bnc = checkpoint_name(y_bnc, "o")
    x_bnc = constrain(x_bnc + y_bnc, "batch")

    y_bnc = norms.layer_norm(x_bnc, *Scale(c, use_bias=True, name="norm2")(), eps=cfg.eps)
    y_bnf = mlp.linear(y_bnc, *Kernel((c, cfg.mlp_width), use_bias=True, name="up")())
    y_bnf = checkpoint_name(y_bnf, "up")
    y_bnf = constrain(mlp.activation(cfg.activation)(y_bnf), "batch", None, "tensor")
    down = Kernel((cfg.mlp_width, c), use_bias=True, gain=residual, name="down")()
    x_bnc = constrain(x_bnc + mlp.linear(y_bnf, *down), "batch")
    return x_bnc, x_bnc


class VisionTransformer(nn.Module):
  """Images to the hidden states of every block that runs.

  Attributes:
    config: sizes. The position table has the config's grid.
    depth: blocks that exist and run; None means all of `config.layers`. CLIP's last block and its
      post-layernorm feed nothing that GPT4RoI reads, so they are neither held nor computed.
    dtype: compute dtype; norms, softmax and position resampling are f32.
    scan_layers: stacked parameters under 'layers' instead of 'layers_0', 'layers_1', ...
    remat: see `leaves.remat`.
  """

  config: VisionConfig
  depth: int | None = None
  dtype: jnp.dtype = jnp.float32
  scan_layers: bool = True
  remat: str = "none"

  @nn.compact
  def __call__(self, images_bhwc: Array) -> list[Array]:
    """Hidden states [B, 1+N, C], class token first.

    Args:
      images_bhwc: [B, H, W, 3] normalised; H and W any multiples of the patch size. Another grid
        than the config's resamples the position table (bicubic).

    Returns:
      depth + 1 arrays: entry 0 after the pre-layernorm, entry k after block k.

    Raises:
      ValueError: image sides that the patch size does not divide.
    """
    cfg = self.config
    c, p = cfg.width, cfg.patch_size
    depth = cfg.layers if self.depth is None else self.depth
    grid = (images_bhwc.shape[1] // p, images_bhwc.shape[2] // p)

    x_bhwc = constrain(images_bhwc.astype(self.dtype), "batch")
    for i, (before, after) in enumerate(zip((3, *cfg.stem), cfg.stem)):
      kernel = ConvKernel((3, before, after), name=f"stem_{i}")()
      x_bhwc = jax.nn.relu(conv2d(x_bhwc, *kernel, stride=2))
    size, last = (1, cfg.stem[-1]) if cfg.stem else (p, 3)
    patches_bnp = tokens.patchify(x_bhwc, size)
    patches_bnc = mlp.linear(patches_bnp, *Kernel((size * size * last, c), name="patch")())
    class_c = self.param("class_token", normal(c**-0.5), (c,), jnp.float32)
    class_b1c = jnp.broadcast_to(class_c.astype(self.dtype), (images_bhwc.shape[0], 1, c))
    table_nc = self.param("positions", normal(c**-0.5), (1 + cfg.tokens, c), jnp.float32)
    positions_nc = tokens.resize_positions(table_nc, cfg.grid, grid).astype(self.dtype)
    x_bnc = jnp.concatenate([class_b1c, patches_bnc], axis=1) + positions_nc[None]
    x_bnc = norms.layer_norm(x_bnc, *Scale(c, use_bias=True, name="pre_norm")(), eps=cfg.eps)
    x_bnc = constrain(x_bnc, "batch")

    block = remat(VisionBlock, self.remat, scanned=self.scan_layers)
    hidden = [x_bnc]
    if self.scan_layers and depth:
      _, rest_lbnc = scan(block, depth, in_axes=())(cfg, name="layers")(x_bnc)
      return hidden + [rest_lbnc[i] for i in range(depth)]
    for i in range(depth):
      x_bnc, _ = block(cfg, name=f"layers_{i}")(x_bnc)
      hidden.append(x_bnc)
    return hidden

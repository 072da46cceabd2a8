"""Region encoders: from the vision tower's hidden states and boxes to one vector per region.

All encoders have the same three methods, so that the language model need not know which one it has:

  maps(hidden, used=None)
                  hidden states -> whatever is computed once per image; `used` may say which images
                  that is wanted of
  read(maps, ...) boxes -> one vector per region
  __call__        read(maps(hidden), ...)

`hidden` is a list with one array [B, K, N, C] per entry of `config.region.layers`, in that order:
the patch tokens (row-major, no class token) of the K images of each row.
"""

from __future__ import annotations

import jax.numpy as jnp

from regionjax.config import ModelConfig
from regionjax.models.pool import PoolEncoder
from regionjax.models.pyramid import PyramidEncoder

ENCODERS = {"pool": PoolEncoder, "pyramid": PyramidEncoder}


def make_region_encoder(config: ModelConfig) -> PoolEncoder | PyramidEncoder | None:
  """The module that fills region slots, or None when regions have no features (`text`, `none`)."""
  kind = config.region.features
  if kind is None:
    return None
  return ENCODERS[kind](
    config=config.region,
    in_width=config.vision.width,
    out_width=config.decoder.width,
    grid=config.vision.grid,
    dtype=jnp.dtype(config.compute_dtype),
    remat=config.remat,
  )

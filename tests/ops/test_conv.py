"""Convolutions against torch's."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from regionjax.ops.conv import conv2d


@pytest.mark.parametrize(("stride", "pad"), [(1, (1, 1, 1, 1)), (2, (0, 1, 0, 1))])
def test_conv_is_torchs_on_the_padded_image(stride, pad):
  rng = np.random.default_rng(0)
  x, kernel, bias = (rng.normal(size=s).astype(np.float32) for s in ((2, 8, 6, 3), (3, 3, 3, 5), 5))
  theirs = torch.nn.functional.conv2d(
    torch.nn.functional.pad(torch.tensor(x).permute(0, 3, 1, 2), pad),
    torch.tensor(kernel).permute(3, 2, 0, 1), torch.tensor(bias), stride=stride,
  ).permute(0, 2, 3, 1)  # fmt: skip
  ours = conv2d(jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(bias), stride=stride)
  np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
  bare = conv2d(jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel), stride=stride)
  assert bare.dtype == jnp.bfloat16 and bare.shape == ours.shape

"""Remat policies: what each keeps, what it computes again, and that gradients stay the same."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regionjax.config import DecoderConfig, VisionConfig
from regionjax.models.decoder import Decoder
from regionjax.models.leaves import REMAT_NAMES, REMAT_POLICIES
from regionjax.models.vit import VisionTransformer

TOKENS = 128  # enough for the kernel, whose statistics are kept too
SIZES = dict(vocab_size=16, width=16, heads=2, kv_heads=1, head_dim=8, mlp_width=24)


def decoder(policy, *, layers, scan_layers):
  """(loss of (params, x), params, x)."""
  module = Decoder(DecoderConfig(layers=layers, **SIZES), scan_layers=scan_layers, remat=policy)
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((2, TOKENS, SIZES["width"])), jnp.float32)
  ids = jnp.asarray(np.repeat([[1, 2, 0]], [70, 40, 18], axis=1).repeat(2, axis=0), jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(TOKENS), (2, TOKENS))
  run = functools.partial(module.apply, positions_bt=positions, segment_ids_bt=ids)
  key = jax.random.key(0)
  params = module.init(key, x, positions_bt=positions, segment_ids_bt=ids)
  return (lambda params, x: jnp.sum(run(params, x)[0] ** 2)), params, x


def vision(policy):
  config = VisionConfig(
    image_size=16, patch_size=8, width=16, layers=1, heads=2, mlp_width=24, select_layer=-1
  )
  module = VisionTransformer(config, scan_layers=False, remat=policy)
  x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 16, 16, 3)), jnp.float32)
  return (lambda p, x: jnp.sum(module.apply(p, x)[-1] ** 2)), module.init(jax.random.key(0), x), x


def kept(capsys, loss, params, x) -> list[str]:
  """Names of the residuals that have one."""
  capsys.readouterr()
  jax.ad_checkpoint.print_saved_residuals(loss, params, x)
  return sorted(re.findall(r"named '(\w+)'", capsys.readouterr().out))


@pytest.mark.parametrize("policy", REMAT_POLICIES)
def test_a_policy_keeps_what_it_names(policy, capsys):
  found = kept(capsys, *decoder(policy, layers=1, scan_layers=False))
  if policy in REMAT_NAMES:  # attention's result and its softmax's statistics have one name
    assert found == sorted([*REMAT_NAMES[policy], "attention"])
  elif policy != "none":
    assert found == []


@pytest.mark.parametrize("policy", ["full", *REMAT_NAMES])
def test_the_vision_transformer_has_the_same_names_but_the_gate(policy, capsys):
  expected = sorted(set(REMAT_NAMES.get(policy, ())) - {"gate"})
  assert kept(capsys, *vision(policy)) == expected


def count(jaxpr, *, weights: set[tuple[int, ...]]) -> tuple[int, int]:
  """(products with a layer's weights, runs of splash's forward kernel), those of calls included."""
  products = kernels = 0
  for e in jaxpr.eqns:
    if e.primitive.name == "dot_general":
      products += any(v.aval.shape in weights for v in e.invars)
    kernels += e.primitive.name == "pallas_call" and "_fwd_" in str(e.params["name"])
    for value in e.params.values():
      for inner in value if isinstance(value, tuple | list) else [value]:
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          more = count(inner, weights=weights)
          products, kernels = products + more[0], kernels + more[1]
  return products, kernels


def test_policies_compute_again_what_they_do_not_keep():
  found = {}
  for policy in REMAT_POLICIES:
    loss, params, x = decoder(policy, layers=1, scan_layers=False)
    shapes = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim == 2}
    found[policy] = count(jax.make_jaxpr(jax.grad(loss))(params, x).jaxpr, weights=shapes)
  # Forward 7 products with weights and as many for their inputs' gradients. `full` computes all but
  # the last again; levels spare q, k, v and then o, gate, up. The last has no reader in `full`
  # either.
  assert {policy: products - found["none"][0] for policy, (products, _) in found.items()} == {
    "none": 0, "full": 6, "dots": 0, "attention": 6, "qkv": 3, "mlp": 0,
  }  # fmt: skip
  assert {policy: kernels for policy, (_, kernels) in found.items()} == {
    "none": 1, "full": 2, "dots": 2, "attention": 1, "qkv": 1, "mlp": 1,
  }  # fmt: skip


@functools.cache
def gradients(policy):
  loss, params, x = decoder(policy, layers=2, scan_layers=True)
  return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x))


@pytest.mark.parametrize(
  "policy",
  [p if p == "mlp" else pytest.param(p, marks=pytest.mark.slow)
   for p in REMAT_POLICIES if p != "none"],
)  # fmt: skip
def test_gradients_are_those_of_no_remat(policy):
  for ours, theirs in zip(gradients(policy), gradients("none")):
    assert float(jnp.abs(ours - theirs).max() / jnp.abs(theirs).max()) < 1e-5

"""The whole model: splice, packing, several images, the cached path, gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regionjax.config import ConfigError, ConnectorConfig, ModelConfig
from regionjax.models.decoder import init_cache
from regionjax.models.params import (
  batch_shapes,
  init_params,
  model_for,
  param_shapes,
  resize_images,
  unstack_layers,
)
from regionjax.models.region_lm import region_layers, vision_depth
from regionjax.ops.losses import cross_entropy

IMAGE_SLOT, REGION_SLOT = 5, 6


def relative(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.max(np.abs(a - b)) / np.max(np.abs(b))


def small(kind="pool", **kw) -> ModelConfig:
  """The tiny preset with 2x2 patches and two layers of everything."""
  base = ModelConfig.tiny(kind)
  region = dataclasses.replace(base.region, layers=(1, 2), upsample=(2, 1), rounds=1)
  return dataclasses.replace(
    base,
    vision=dataclasses.replace(base.vision, image_size=16, patch_size=8, width=16, layers=2),
    region=region,
    decoder=dataclasses.replace(base.decoder, vocab_size=40, width=24, layers=2, head_dim=8),
    **({"connector": ConnectorConfig()} | kw),
  )


@functools.cache
def model_and_params(kind="pool", connector="linear"):
  config = small(kind, connector=ConnectorConfig(connector))
  model = model_for(config, image_slot_id=IMAGE_SLOT, region_slot_id=REGION_SLOT)
  return model, random_like(param_shapes(config))


def random_like(shapes):
  """Parameters drawn with numpy: compiling the initialisation would take most of a test's time."""
  rng = np.random.default_rng(0)

  def draw(s):
    scale = s.shape[-2] ** -0.5 if len(s.shape) > 1 else 0.1
    return jnp.asarray(rng.normal(size=s.shape) * scale + (len(s.shape) < 2) * 0.5, s.dtype)

  return jax.tree.map(draw, shapes)


def apply(model, params, batch):
  return jax.jit(lambda p, b: model.apply({"params": p}, b))(params, batch)


def segment(seed, *, images, regions):
  """Tokens of one example with its images and regions, as a dict of unpadded arrays."""
  rng = np.random.default_rng(seed)
  tokens = list(rng.integers(10, 40, 3))
  for _ in range(images):
    tokens += [IMAGE_SLOT] * 4 + list(rng.integers(10, 40, 1))
  for _ in range(regions):
    tokens += [REGION_SLOT, *rng.integers(10, 40, 1)]
  low = rng.uniform(0, 0.5, (regions, 2))
  return dict(
    tokens=np.asarray(tokens),
    images=rng.normal(size=(images, 16, 16, 3)),
    boxes=np.concatenate([low, low + rng.uniform(0.1, 0.5, (regions, 2))], -1),
    box_image=rng.integers(0, max(images, 1), regions),
    kind=rng.integers(1, 4, regions),
    cover=rng.random((regions, 4)),
  )


def pack(rows, *, tokens, images, regions):
  """Rows of segments to a Batch."""
  config = small()
  shapes = batch_shapes(config, rows=len(rows), tokens=tokens, images=images, regions=regions)
  batch = {name: np.zeros(s.shape, s.dtype) for name, s in shapes.items()}
  for b, segments in enumerate(rows):
    t = k = r = 0
    for index, s in enumerate(segments):
      end = t + len(s["tokens"])
      batch["tokens_bt"][b, t:end] = s["tokens"]
      batch["segment_ids_bt"][b, t:end] = index + 1
      batch["positions_bt"][b, t:end] = np.arange(end - t)
      batch["targets_bt"][b, t : end - 1] = s["tokens"][1:]
      batch["loss_weights_bt"][b, t : end - 1] = 1
      batch["images_bkhwc"][b, k : k + len(s["images"])] = s["images"]
      batch["image_mask_bk"][b, k : k + len(s["images"])] = True
      here = slice(r, r + len(s["boxes"]))
      batch["boxes_br4"][b, here] = s["boxes"]
      batch["box_image_br"][b, here] = s["box_image"] + k
      batch["region_kind_br"][b, here] = s["kind"]
      batch["region_mask_br"][b, here] = True
      batch["region_cover_brn"][b, here] = s["cover"]
      t, k, r = end, k + len(s["images"]), r + len(s["boxes"])
  return {name: jnp.asarray(value) for name, value in batch.items()}


@pytest.mark.parametrize("kind", ["pool", "pyramid+text"])
def test_packed_rows_equal_single_rows(kind):
  model, params = model_and_params(kind)
  parts = [
    segment(0, images=1, regions=2),
    segment(1, images=2, regions=1),
    segment(2, images=0, regions=0),
  ]
  packed = pack([parts, parts[::-1]], tokens=48, images=4, regions=5)
  together = apply(model, params, packed)
  assert together.shape == (2, 48, 40) and together.dtype == jnp.float32
  assert bool(jnp.isfinite(together).all())
  alone = apply(model, params, pack([[part] for part in parts], tokens=20, images=2, regions=3))
  for b, order in enumerate(((0, 1, 2), (2, 1, 0))):
    start = 0
    for i in order:
      length = len(parts[i]["tokens"])
      assert relative(together[b, start : start + length], alone[i, :length]) < 1e-5
      start += length


def test_slots_take_the_features_of_their_own_image_and_region():
  model, params = model_and_params()
  part = segment(1, images=2, regions=2)
  base = pack([[part]], tokens=24, images=2, regions=3)

  def spliced(batch):
    def run(m):
      features = m.encode_images(batch["images_bkhwc"])
      names = ("boxes_br4", "box_image_br", "region_kind_br", "region_mask_br", "region_cover_brn")
      regions = m.encode_regions(features.maps, *(batch[n] for n in names))
      x = m.splice(batch["tokens_bt"], features.tokens_bknd, regions)
      return x, features.tokens_bknd, regions

    return model.apply({"params": params}, method=run)

  run = jax.jit(spliced)
  x, image_tokens, regions = run(base)
  ids = np.asarray(base["tokens_bt"][0])
  np.testing.assert_array_equal(x[0, ids == IMAGE_SLOT], image_tokens[0].reshape(8, -1))
  np.testing.assert_array_equal(x[0, ids == REGION_SLOT], regions[0, :2])
  assert not np.asarray(regions[0, 2]).any()
  table = params["decoder"]["embed"]["embedding"]
  plain = (ids != IMAGE_SLOT) & (ids != REGION_SLOT)
  np.testing.assert_array_equal(x[0, plain], table[ids[plain]])

  # Another second image changes its own four slots and the regions that lie on it, nothing else.
  other = dict(base, images_bkhwc=base["images_bkhwc"].at[0, 1].add(1.0))
  changed = np.any(np.asarray(run(other)[0] != x), axis=-1)[0]
  want = np.zeros(24, bool)
  want[np.flatnonzero(ids == IMAGE_SLOT)[4:]] = True
  want[np.flatnonzero(ids == REGION_SLOT)] = part["box_image"] == 1
  np.testing.assert_array_equal(changed, want)


def test_a_model_without_images_or_regions_reads_text():
  model, params = model_and_params()
  batch = pack([[segment(2, images=0, regions=0)]], tokens=8, images=0, regions=0)
  logits = apply(model, params, batch)
  text, text_params = model_and_params("none")
  text_params = {**text_params, "decoder": params["decoder"]}
  assert relative(logits, apply(text, text_params, batch)) < 1e-6


@pytest.mark.parametrize(
  "kind, connector",
  [pytest.param("pool", "linear", marks=pytest.mark.slow), ("pyramid", "mlp")],
)
def test_prefill_in_pieces_and_decode_equal_the_forward_pass(kind, connector):
  model, params = model_and_params(kind, connector)
  parts = [segment(0, images=2, regions=2), segment(3, images=1, regions=1)]
  batch = pack([[p] for p in parts], tokens=24, images=2, regions=2)
  whole = apply(model, params, batch)
  lengths = np.asarray([len(p["tokens"]) for p in parts])

  engine = model_for(small(kind, connector=ConnectorConfig(connector)), generate=True)
  engine = engine.clone(image_slot_id=IMAGE_SLOT, region_slot_id=REGION_SLOT)
  own = unstack_layers(params)

  def embed(m):
    features = m.encode_images(batch["images_bkhwc"])
    names = ("boxes_br4", "box_image_br", "region_kind_br", "region_mask_br", "region_cover_brn")
    regions = m.encode_regions(features.maps, *(batch[n] for n in names))
    return m.splice(batch["tokens_bt"], features.tokens_bknd, regions)

  x = jax.jit(lambda p: engine.apply({"params": p}, method=embed))(own)
  step = jax.jit(
    lambda p, *a: engine.apply({"params": p}, *a[:4], logits_at_b=a[4], method="decode")
  )
  cache = init_cache(engine.config.decoder, 2, 24)
  done = np.zeros(2, np.int64)
  for width in (7, 1, 16):
    count = np.minimum(lengths - done, [width, max(width - 2, 1)])
    inside = np.arange(width)[None] < count[:, None]
    index = np.minimum(done[:, None] + np.arange(width)[None], 23)
    piece = jnp.take_along_axis(x, jnp.asarray(index)[:, :, None], axis=1)
    last = jnp.asarray(count - 1)
    logits, cache = step(
      own, piece, jnp.asarray(index), jnp.asarray(inside, jnp.int32), cache, last
    )
    done += count
    assert logits.shape == (2, 1, 40)
    for b in range(2):
      assert relative(logits[b, 0], whole[b, done[b] - 1]) < 1e-5
  assert done.tolist() == lengths.tolist()


def test_every_parameter_gets_a_gradient_and_remat_keeps_it():
  model, params = model_and_params("pool", "mlp")
  rows = [[segment(0, images=2, regions=3), segment(1, images=0, regions=0)]]
  batch = pack(rows, tokens=32, images=2, regions=4)
  grads = {}
  for remat in ("none", "full"):
    m = model.clone(config=dataclasses.replace(model.config, remat=remat))

    def loss(p, m=m):
      total, weight = cross_entropy(
        m.apply({"params": p}, batch), batch["targets_bt"], batch["loss_weights_bt"]
      )
      return total / weight

    grads[remat] = jax.jit(jax.grad(loss))(params)
  flat, _ = jax.tree_util.tree_flatten_with_path(grads["none"])
  dead = [jax.tree_util.keystr(path) for path, g in flat if not np.asarray(g).any()]
  assert not [d for d in dead if "'k'" not in d or "bias" not in d]  # softmax cancels key biases
  for a, b in zip(jax.tree.leaves(grads["full"]), jax.tree.leaves(grads["none"])):
    assert np.max(np.abs(np.asarray(a) - b)) < 1e-5 * max(float(jnp.abs(b).max()), 1e-3)


def test_parameters_have_the_documented_parts_and_stay_float32():
  for kind, parts in (("pool", {"regions"}), ("none", set())):
    config = small(kind, compute_dtype="bfloat16")
    shapes = jax.eval_shape(lambda c=config: init_params(c, jax.random.key(0)))
    assert set(shapes) == {"vision", "connector", "decoder"} | parts
    assert set(shapes["decoder"]) == {"embed", "layers", "norm"}  # tiny ties its embeddings
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))


def test_bfloat16_compute_stays_near_float32():
  model, params = model_and_params()
  batch = pack([[segment(0, images=1, regions=2)]], tokens=16, images=1, regions=2)
  half = model.clone(config=dataclasses.replace(model.config, compute_dtype="bfloat16"))
  logits = apply(half, params, batch)
  assert logits.dtype == jnp.float32
  assert relative(logits, apply(model, params, batch)) < 0.05


def test_another_image_size_needs_another_position_table_only():
  model, params = model_and_params("pyramid")
  batch = pack([[segment(0, images=1, regions=2)]], tokens=16, images=1, regions=2)
  wide = jnp.zeros((1, 1, 16, 32, 3))
  with pytest.raises(ValueError, match=r"16x32 pixels.*made for 16.*resize_images"):
    jax.eval_shape(lambda: model.apply({"params": params}, wide, method="encode_images"))
  config, resized = resize_images(model.config, params, (16, 32))
  assert config.vision.grid == (2, 4)
  assert jax.tree.map(np.shape, resized) == jax.tree.map(np.shape, param_shapes(config))
  batch = {**batch, "images_bkhwc": wide, "region_cover_brn": jnp.zeros((1, 2, 8))}
  assert jax.eval_shape(model.clone(config=config).apply, {"params": resized}, batch).shape == (
    1,
    16,
    40,
  )
  plain, plain_params = model_and_params("text")
  features = jax.eval_shape(
    lambda: plain.apply({"params": plain_params}, wide, method="encode_images")
  )
  assert features.tokens_bknd.shape == (1, 1, 8, 24)


def test_layers_are_counted_from_the_end_and_checked():
  config = small()
  negative = dataclasses.replace(config, region=dataclasses.replace(config.region, layers=(-2, -1)))
  assert region_layers(negative) == (1, 2)
  early = dataclasses.replace(
    config,
    vision=dataclasses.replace(config.vision, select_layer=-3),
    region=dataclasses.replace(config.region, layers=(0, 1)),
  )
  assert vision_depth(early) == 1
  with pytest.raises(ConfigError, match=r"holds 14.*0 to 2"):
    region_layers(dataclasses.replace(config, region=ModelConfig.gpt4roi_7b().region))


def test_an_unknown_connector_names_the_known_ones():
  config = small(connector=ConnectorConfig("cubic"))
  with pytest.raises(ConfigError, match=r"connector.kind='cubic'.*linear or mlp"):
    param_shapes(config)

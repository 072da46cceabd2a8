"""Batches outside of the stream: held-out batches, single prompts, arrays of regions."""

import numpy as np
import pytest
from pipeline_cases import Listed, Pictures, assert_same, joined, make_config

from regionjax.conversation import Renderer
from regionjax.data.errors import DataError
from regionjax.data.pipeline import (
  encode_region_arrays,
  make_eval_batches,
  single_batch,
)
from regionjax.data.sources import load_image
from regionjax.images import preprocess
from regionjax.regions import Region


def test_eval_batches_hold_each_example_once(pictures, tokenizer):
  config = make_config()
  renderer = Renderer(config.prompt, config.model, tokenizer)
  source = Pictures(pictures, 40)
  whole = make_eval_batches(source, renderer, config, 17)
  assert_same(make_eval_batches(source, renderer, config, 17), whole)
  ids = [m["id"] for _, meta in whole for row in meta for m in row]
  assert set(ids) == {f"pictures/{i}" for i in range(17)}
  assert len(ids) == sum(t.role == "assistant" for i in range(17) for t in source[i].turns)
  assert all(batch["tokens_bt"].shape == (4, 288) for batch, _ in whole)
  parts = [make_eval_batches(source, renderer, config, 17, host=h, hosts=2) for h in range(2)]
  assert_same(joined(parts), whole)
  assert len(make_eval_batches(source, renderer, config, 1)) == 1
  with pytest.raises(DataError, match="none of 5 examples"):
    make_eval_batches(Listed([]), renderer, config, 5)


def test_region_arrays_follow_the_slots():
  image = np.zeros((20, 40, 3), np.uint8)
  _, squash = preprocess(image, rule="chatspot", size_hw=(32, 32), mean=(0.5,) * 3, std=(1.0,) * 3)
  regions = (Region.box(0.0, 0.0, 0.5, 0.5), Region.point(0.75, 0.25))
  out = encode_region_arrays(regions, (1, 0, 1), (0, 1), [squash] * 2, (2, 2), image_slots=(1, 0))
  np.testing.assert_allclose(
    out.boxes_r4, [[0.75, 0.25, 0.75, 0.25], [0, 0, 0.5, 0.5], [0.75, 0.25, 0.75, 0.25]]
  )
  np.testing.assert_array_equal(out.box_image_r, [0, 1, 0])
  np.testing.assert_array_equal(out.kind_r, [1, 2, 1])
  np.testing.assert_allclose(out.cover_rn, [[0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]], atol=1e-6)
  with pytest.raises(DataError, match="image 1, which the text doesn't show"):
    encode_region_arrays(regions, (1,), (0, 1), [squash] * 2, (2, 2), image_slots=(0,))
  none = encode_region_arrays((), (), (), (), (2, 2))
  assert none.boxes_r4.shape == (0, 4) and none.cover_rn.shape == (0, 4)


def test_single_batch_is_padded_to_the_given_sizes(pictures, tokenizer):
  config = make_config()
  renderer = Renderer(config.prompt, config.model, tokenizer)
  example = Pictures(pictures)[4]
  encoded = renderer.encode(example)
  pixels = [load_image(ref) for ref in example.images]
  batch = single_batch(
    encoded, example, pixels, config, tokens=256, image_slots=4, region_slots=16, pad_id=3
  )
  assert batch["tokens_bt"].shape == (1, 256) and batch["tokens_bt"][0, -1] == 3
  assert batch["images_bkhwc"].shape[1] == 4 and batch["image_mask_bk"].sum() == 1
  assert batch["boxes_br4"].shape == (1, 16, 4)
  assert batch["region_mask_br"].sum() == len(encoded.region_slots)
  with pytest.raises(DataError, match=r"takes \d+ tokens but the row was given 8"):
    single_batch(encoded, example, pixels, config, tokens=8)
  with pytest.raises(DataError, match="0 images given for an example of 1"):
    single_batch(encoded, example, [], config)

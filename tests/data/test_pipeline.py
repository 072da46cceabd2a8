"""The input pipeline: same batches whatever the hosts, workers and interruptions."""

import functools
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from pipeline_cases import Pictures, assert_same, joined, make_config, take

from regionjax.config import (
  SourceConfig,
)
from regionjax.conversation import Renderer
from regionjax.data import decode_pool
from regionjax.data.errors import DataError
from regionjax.data.pipeline import (
  single_batch,
)
from regionjax.data.shards import merge_states
from regionjax.data.sources import load_image
from regionjax.data.stream import draw_index


@pytest.mark.parametrize("kind", ["pool", "text", "none", "pyramid+text"])
def test_slots_images_and_regions_of_a_row_belong_together(make, tokenizer, kind):
  pipeline = make(kind=kind)
  kinds = set()
  for batch, meta in take(pipeline, 4):
    shapes = {name: array.shape for name, array in batch.items()}
    assert shapes["tokens_bt"] == (4, 288)
    assert shapes["images_bkhwc"] == (4, 3, 32, 32, 3)
    assert shapes["boxes_br4"] == (4, 8, 4)
    assert shapes["region_cover_brn"] == (4, 8, 16)
    for b in range(4):
      tokens, segments = batch["tokens_bt"][b], batch["segment_ids_bt"][b]
      images, regions = batch["image_mask_bk"][b].sum(), batch["region_mask_br"][b].sum()
      patch_segments = segments[tokens == tokenizer.image_slot_id]
      assert len(patch_segments) == 16 * images
      slot_segments = segments[tokens == tokenizer.region_slot_id]
      assert len(slot_segments) == regions
      assert kind != "text" or regions == 0
      # Slots come first and hold what their mask says; the rest is zero.
      assert batch["image_mask_bk"][b, :images].all()
      assert batch["region_mask_br"][b, :regions].all()
      assert not batch["images_bkhwc"][b, images:].any()
      assert not batch["region_cover_brn"][b, regions:].any()
      # A region lies in an image of its own example.
      image_segments = patch_segments[::16]
      of = batch["box_image_br"][b, :regions]
      np.testing.assert_array_equal(image_segments[of], slot_segments)
      assert (batch["region_cover_brn"][b, :regions].sum(-1) > 0).all()
      kinds |= set(batch["region_kind_br"][b, :regions].tolist())
      assert batch["answer_ids_bt"][b].max() == len(meta[b])
      assert {m["task"] for m in meta[b]} == {"sum"}
  assert kinds == (set() if kind in ("text", "none") else {1, 2, 3})


def test_a_row_is_its_examples_one_after_the_other(make, pictures, tokenizer):
  config = make_config()
  renderer = Renderer(config.prompt, config.model, tokenizer)
  source = Pictures(pictures)
  rows = 0
  for batch, meta in take(make(), 2):
    for b in range(4):
      ids = list(dict.fromkeys(m["id"] for m in meta[b]))
      token = image = region = answers = 0
      for segment, name in enumerate(ids, 1):
        example = source[int(name.split("/")[1])]
        encoded = renderer.encode(example)
        pixels = [load_image(ref) for ref in example.images]
        one = single_batch(encoded, example, pixels, config)
        here = slice(token, token + len(encoded.ids))
        for field in ("tokens_bt", "targets_bt", "loss_weights_bt", "positions_bt"):
          np.testing.assert_array_equal(batch[field][b, here], one[field][0])
        assert (batch["segment_ids_bt"][b, here] == segment).all()
        shift = answers * (one["answer_ids_bt"][0] > 0)
        np.testing.assert_array_equal(
          batch["answer_ids_bt"][b, here], one["answer_ids_bt"][0] + shift
        )
        k = slice(image, image + len(encoded.image_slots))
        np.testing.assert_array_equal(batch["images_bkhwc"][b, k], one["images_bkhwc"][0])
        r = slice(region, region + len(encoded.region_slots))
        for field in ("boxes_br4", "region_kind_br", "region_cover_brn"):
          np.testing.assert_array_equal(batch[field][b, r], one[field][0])
        np.testing.assert_array_equal(batch["box_image_br"][b, r], one["box_image_br"][0] + image)
        token, image, region = here.stop, k.stop, r.stop
        answers += len(encoded.answers)
      rows += 1
  assert rows == 8


def of_all(parts):
  return merge_states(part.get_state() for part in parts)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_hosts_share_the_same_global_batches(shards, make):
  whole = make(shards=shards)
  want = take(whole, 5)
  for hosts in (2, 4):
    parts = [make(host=h, hosts=hosts, shards=shards) for h in range(hosts)]
    assert_same(joined([take(part, 5) for part in parts]), want)
    assert of_all(parts) == whole.get_state()
    assert parts[0].stats(of_all(parts)) == whole.stats()
    own = [list(part.get_state()["shards"]) for part in parts]
    assert own == [[str(s) for s in sorted({r * shards // 4 for r in rows})] for rows in
                   np.arange(4).reshape(hosts, -1)]  # fmt: skip


@pytest.mark.parametrize("shards", [1, 4, 64])
def test_every_draw_is_one_shard_s(shards):
  turns = [sorted(draw_index(t, s, shards) for s in range(shards)) for t in range(100)]
  assert np.concatenate(turns).tolist() == list(range(100 * shards))
  for period in (2, 3, 5, 7, 13) if shards > 1 else ():  # of a mixture
    places = [[draw_index(t, s, shards) % period for t in range(2000)] for s in (0, 1, shards - 1)]
    for taken in places:
      share = np.bincount(taken, minlength=period) / 2000
      assert abs(share * period - 1).max() < 0.3


def test_shards_share_the_draws_out(make, pictures):
  both = (SourceConfig("pictures"), SourceConfig("pictures"))
  pipeline = make(shards=4, sources=both, given=[Pictures(pictures, 50)] * 2)
  take(pipeline, 12)
  for shard, one in pipeline.get_state()["shards"].items():
    used = one["counts"]["examples"] + sum(map(len, one["open"]))
    assert one["turn"] == used
    drawn = {draw_index(t, int(shard), 4) for t in range(used)}
    assert drawn >= {index for row in one["open"] for index in row}
    odd = np.mean([index % 2 for index in drawn])  # the second source
    assert 0.2 < odd < 0.8
  assert pipeline.stats()["batches"] == 12 and pipeline.stats()["rows"] == 48


def test_with_shards_a_host_writes_down_its_own_text_alone(make, monkeypatch):
  written = []
  encode = Renderer.encode
  monkeypatch.setattr(
    Renderer, "encode", lambda *args, **kw: [written.append(1), encode(*args, **kw)][1]
  )

  def work(**kw):
    written.clear()
    with make(prefetch=1, packing_bins=1, **kw) as pipeline:
      take(pipeline, 6)
    return len(written)

  assert work(host=1, hosts=4, shards=4) < 0.6 * work(host=1, hosts=4)


def test_a_state_of_one_host_alone_is_no_state_of_all(make):
  half = make(host=0, hosts=2, shards=2).get_state()
  with pytest.raises(DataError, match=r"lacks the shards 1; .*merge_states"):
    make(shards=2).set_state(half)


@pytest.mark.parametrize("shards", [1, 4])
def test_resume_after_any_batch_on_other_numbers_of_hosts(shards, make):
  # 13 examples: 10 batches of 4 rows go through several epochs.
  make = functools.partial(make, shards=shards)
  whole = make()
  want, states = [], [json.dumps(whole.get_state())]
  for _ in range(10):
    want.append(next(whole))
    states.append(json.dumps(whole.get_state()))
  assert all(one["turn"] > 5 * 13 // shards for one in json.loads(states[-1])["shards"].values())
  for done, hosts in ((0, 2), (1, 4), (4, 1), (7, 2), (9, 4)):
    parts = [make(host=h, hosts=hosts) for h in range(hosts)]
    for part in parts:
      part.set_state(json.loads(states[done]))
    assert_same(joined([take(part, 10 - done) for part in parts]), want[done:])
    assert json.dumps(of_all(parts)) == states[-1]


def test_one_pipeline_can_be_set_back(make):
  pipeline = make()
  take(pipeline, 2)
  state = pipeline.get_state()
  want = take(pipeline, 3)
  pipeline.set_state(state)
  assert pipeline.get_state() == state
  assert_same(take(pipeline, 3), want)


def test_epochs_are_complete_and_shuffled_anew(pictures, tokenizer):
  from regionjax.data.mixing import Mixture

  mixture = Mixture((SourceConfig("pictures"),), [Pictures(pictures)], seed=3)
  epochs = [[mixture[13 * e + i].example.meta["id"] for i in range(13)] for e in range(3)]
  assert all(len(set(epoch)) == 13 for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2]
  other = Mixture((SourceConfig("pictures"),), [Pictures(pictures)], seed=4)
  assert [other[i].example.meta["id"] for i in range(13)] != epochs[0]


def test_weights_are_met_exactly_and_endless_sources_run_in_order(pictures):
  from regionjax.data.mixing import Mixture

  class Endless(Pictures):
    def __len__(self):
      return 2**62

  configs = (SourceConfig("a", 3.0), SourceConfig("b", 1.0))
  mixture = Mixture(configs, [Pictures(pictures, 5), Endless(pictures)], seed=0)
  draws = [mixture[i] for i in range(400)]
  for start in range(0, 400, 40):
    assert sum(d.source == "a" for d in draws[start : start + 40]) == 30
  numbers = [d.example.meta["id"] for d in draws if d.source == "b"]
  assert numbers == [f"pictures/{i}" for i in range(100)]


def test_two_sources_of_one_length_have_their_own_order(pictures):
  from regionjax.data.mixing import Mixture

  configs = (SourceConfig("a"), SourceConfig("b"))
  mixture = Mixture(configs, [Pictures(pictures, 50), Pictures(pictures, 50)], seed=0)
  draws = [mixture[i] for i in range(100)]
  order = {n: [d.example.meta["id"] for d in draws if d.source == n] for n in "ab"}
  assert order["a"] != order["b"]


def test_worker_processes_give_the_same_batches_and_states(make):
  alone, helped = make(workers=0), make(workers=2)
  for _ in range(2):
    assert_same(take(alone, 2), take(helped, 2))
    assert alone.get_state() == helped.get_state()
  processes = list(helped._end.peek()[2][3]._pool._processes.values())
  assert len(processes) >= 1
  helped.close()
  assert not any(process.is_alive() for process in processes)


def test_a_host_decodes_the_images_of_its_own_rows_alone(make, pictures, monkeypatch):
  decoded = []

  def counting(ref):
    decoded.append(ref.key)
    return load_image(ref)

  monkeypatch.setattr(decode_pool, "load_image", counting)
  source = Pictures(pictures)
  for host in range(2):
    decoded.clear()
    pipeline = make(host=host, hosts=2)
    batches = take(pipeline, 3)
    pipeline.close()
    rows = [row for _, meta in batches for row in meta]
    ids = [name for row in rows for name in dict.fromkeys(m["id"] for m in row)]
    wanted = [ref.key for name in ids for ref in source[int(name.split("/")[1])].images]
    assert len(wanted) == sum(int(batch["image_mask_bk"].sum()) for batch, _ in batches) > 6
    # Batches are decoded in order, a few of them ahead of what was handed out.
    assert decoded[: len(wanted)] == wanted


def test_state_is_that_of_the_last_batch_handed_out(make):
  near, far = make(prefetch=1), make(prefetch=6)
  next(near), next(far)
  deadline = time.monotonic() + 90
  while far._queue.qsize() < 6:
    assert time.monotonic() < deadline
    time.sleep(0.01)
  assert far.get_state() == near.get_state()
  assert far.stats()["batches"] == 1


def test_a_batch_that_was_only_looked_at_is_still_to_come(make):
  seen, other = make(), make()
  want = take(other, 3)
  before = seen.get_state()
  seen.peek()
  seen.peek()
  assert seen.get_state() == before
  assert_same(take(seen, 1), want[:1])
  seen.peek()
  seen.set_state(before)
  assert_same(take(seen, 3), want)


def test_stats_report_the_padding(make):
  pipeline = make()
  batches = [batch for batch, _ in take(pipeline, 6)]
  stats = pipeline.stats()
  used = {
    "tokens": np.mean([b["segment_ids_bt"] > 0 for b in batches]),
    "images": np.mean([b["image_mask_bk"] for b in batches]),
    "regions": np.mean([b["region_mask_br"] for b in batches]),
  }
  for name, share in used.items():
    assert stats["waste"][name] == pytest.approx(1 - share)
  examples = sum(int(b["segment_ids_bt"].max(1).sum()) for b in batches)
  assert (stats["rows"], stats["examples"]) == (24, examples)
  assert stats["examples_per_row"] == pytest.approx(examples / 24)
  assert stats["targets"] == sum(int(b["loss_weights_bt"].sum()) for b in batches)
  assert stats["skipped"] == {}
  assert stats["draws"]["pictures"] >= examples


def test_the_pipeline_can_be_imported_without_jax():
  code = (
    "import sys, regionjax.data.decode_pool, regionjax.data.rows\n"
    "assert not {'jax', 'grain', 'sklearn', 'transformers'} & set(sys.modules)\n"
    "import regionjax.data.pipeline\n"
    "assert 'jax' not in sys.modules"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr

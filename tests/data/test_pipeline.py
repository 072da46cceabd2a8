"""The input pipeline: same batches whatever the hosts, workers and interruptions."""

import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
from PIL import Image

from regionjax.config import (
  Config,
  ConfigError,
  ConnectorConfig,
  DataConfig,
  ModelConfig,
  PromptConfig,
  SourceConfig,
  VisionConfig,
)
from regionjax.conversation import Renderer
from regionjax.data import decode_pool
from regionjax.data.decode_pool import result
from regionjax.data.errors import DataError
from regionjax.data.pipeline import (
  Pipeline,
  encode_region_arrays,
  make_eval_batches,
  single_batch,
)
from regionjax.data.schema import Example, ImageRef, Turn
from regionjax.data.sources import load_image
from regionjax.images import preprocess
from regionjax.regions import Region
from regionjax.tokenizer import load_tokenizer

SIZES = ((40, 30), (32, 32), (25, 50), (64, 48))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
  """Paths of a few small images of different shapes."""
  folder = tmp_path_factory.mktemp("pictures")
  rng = np.random.default_rng(0)
  for k, (w, h) in enumerate(SIZES):
    Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)).save(folder / f"{k}.png")
  return folder


@pytest.fixture(scope="session")
def tokenizer():
  return load_tokenizer("tiny")


class Pictures:
  """`n` examples: text only, one image with one to three regions, or two images to compare."""

  name = "pictures"

  def __init__(self, folder, n=13):
    self.folder, self.n = folder, n

  def __len__(self):
    return self.n

  def __getitem__(self, i):
    rng = np.random.default_rng(i)
    k = int(rng.integers(len(SIZES)))
    images = [ImageRef("file", str(self.folder / f"{(k + j) % 4}.png")) for j in range(i % 3)]
    mask = np.zeros((10, 10), bool)
    mask[2:5, 3:9] = True
    regions = [
      Region.box(0.1, 0.2, 0.5, 0.9),
      Region.point(*rng.random(2)),
      Region.from_mask(mask),
    ][: 1 + i % 3]
    if not images:
      regions = []
    turns = []
    for q in range(int(rng.integers(1, 4))):
      about = f"What is {{region:{q % len(regions)}}}?" if regions else f"What is {q} + {i}?"
      turns += [Turn("user", about), Turn("assistant", f"It is {i * q}.", True, "sum")]
    return Example(
      images=tuple(images),
      regions=tuple(regions),
      region_images=tuple(j % len(images) for j in range(len(regions))),
      turns=tuple(turns),
      meta={"task": "sum", "source": self.name, "id": f"pictures/{i}"},
    )


class Listed:
  """A source of given examples."""

  name = "listed"

  def __init__(self, examples):
    self.examples = examples

  def __len__(self):
    return len(self.examples)

  def __getitem__(self, i):
    return self.examples[i]


def dialogue(name, *, images=(), pairs=1, supervise=True, answer="Yes."):
  turns = [Turn("user", "Is it?"), Turn("assistant", answer, supervise, "yesno")] * pairs
  return Example(images=tuple(images), turns=tuple(turns), meta={"id": name, "task": "yesno"})


def make_config(*, kind="pool", model=None, **data):
  """Images of 32 pixels, 16 tokens each."""
  settings = dict(
    sources=(SourceConfig("pictures"),), rows=4, tokens_per_row=288, images_per_row=3,
    regions_per_row=8, packing_bins=3, prefetch=2,
  )  # fmt: skip
  model = ModelConfig.tiny(kind)
  vision = VisionConfig.tiny(image_size=32, patch_size=8)
  model = dataclasses.replace(model, vision=vision, connector=ConnectorConfig())
  return Config(model=model, prompt=PromptConfig(), data=DataConfig(**(settings | data)))


@pytest.fixture
def make(pictures, tokenizer):
  """Pipelines over the pictures, closed at the end."""
  made = []

  def build(*, kind="pool", host=0, hosts=1, given=None, **data):
    config = make_config(kind=kind, **data)
    renderer = Renderer(config.prompt, config.model, tokenizer)
    made.append(
      Pipeline(config, renderer, sources=given or [Pictures(pictures)], host=host, hosts=hosts)
    )
    return made[-1]

  yield build
  for pipeline in made:
    pipeline.close()


def take(pipeline, n):
  return [next(pipeline) for _ in range(n)]


def assert_same(a, b):
  """Two lists of (batch, meta) are bit-identical."""
  assert len(a) == len(b)
  for (batch, meta), (other, other_meta) in zip(a, b):
    assert meta == other_meta
    assert batch.keys() == other.keys()
    for name in batch:
      np.testing.assert_array_equal(batch[name], other[name], err_msg=name)
      assert batch[name].dtype == other[name].dtype


def joined(parts):
  """Batches of several hosts -> global batches."""
  out = []
  for shares in zip(*parts):
    names = shares[0][0].keys()
    batch = {name: np.concatenate([share[0][name] for share in shares]) for name in names}
    out.append((batch, [row for share in shares for row in share[1]]))
  return out


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


def test_hosts_share_the_same_global_batches(make):
  whole = make()
  want = take(whole, 5)
  for hosts in (2, 4):
    parts = [make(host=h, hosts=hosts) for h in range(hosts)]
    assert_same(joined([take(part, 5) for part in parts]), want)
    for part in parts:
      assert part.get_state() == whole.get_state()
      assert part.stats() == whole.stats()


def test_resume_after_any_batch_on_other_numbers_of_hosts(make):
  # 13 examples: 10 batches of 4 rows go through several epochs.
  whole = make()
  want, states = [], [json.dumps(whole.get_state())]
  for _ in range(10):
    want.append(next(whole))
    states.append(json.dumps(whole.get_state()))
  assert json.loads(states[-1])["next"] > 5 * 13
  for done, hosts in ((0, 2), (1, 4), (4, 1), (7, 2), (9, 4)):
    parts = [make(host=h, hosts=hosts) for h in range(hosts)]
    for part in parts:
      part.set_state(json.loads(states[done]))
    assert_same(joined([take(part, 10 - done) for part in parts]), want[done:])
    assert all(json.dumps(part.get_state()) == states[-1] for part in parts)


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


def test_examples_that_cannot_fit_are_skipped_and_counted(make, pictures, caplog):
  image = ImageRef("file", str(pictures / "0.png"))
  good = [dialogue(f"good/{i}") for i in range(4)]
  bad = [
    dialogue("long", answer="No. " * 400),
    dialogue("album", images=[image] * 4),
    dialogue("silent", supervise=False),
  ]
  turns = [dialogue("chatty", pairs=80)]
  pipeline = make(given=[Listed(good + bad + turns)])
  batches = take(pipeline, 6)
  stats = pipeline.stats()
  assert set(stats["skipped"]) == {"tokens", "images", "unsupervised"}
  assert stats["truncated"] > 0
  seen = {m["id"] for _, meta in batches for row in meta for m in row}
  assert seen == {e.meta["id"] for e in good + turns}
  said = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
  assert len(said) == 3
  assert any("'album'" in s and "data.images_per_row" in s for s in said)


def test_a_region_that_the_crop_cuts_away_skips_its_example(make, pictures):
  image = ImageRef("file", str(pictures / "2.png"), SIZES[2])  # 25 x 50: 'hf' keeps the middle half

  def about(name, y):
    turns = (Turn("user", "What is {region:0}?"), Turn("assistant", "A tree.", True, "name"))
    region = Region.point(0.5, y)
    return Example(
      images=(image,), regions=(region,), region_images=(0,), turns=turns, meta={"id": name}
    )

  sources = [Listed([about("middle", 0.5), about("top", 0.1)])]
  pipeline = make(given=sources, resize="hf")
  batches = take(pipeline, 2)
  assert {m["id"] for _, meta in batches for row in meta for m in row} == {"middle"}
  assert set(pipeline.stats()["skipped"]) == {"cropped"}
  whole = make(given=sources, resize="letterbox")
  assert {m["id"] for _, meta in take(whole, 2) for row in meta for m in row} == {"middle", "top"}


def test_nothing_that_fits_is_an_error(make):
  pipeline = make(given=[Listed([dialogue("long", answer="No. " * 400)])])
  with pytest.raises(DataError, match=r"1000 examples in a row.*'long'"):
    next(pipeline)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named_after_the_batches_before_it(make, pictures, workers):
  gone = ImageRef("file", str(pictures / "gone.png"))

  class Later(Pictures):
    """Fails from the draw after the first hundred on."""

    def __len__(self):
      return 2**62

    def __getitem__(self, i):
      return super().__getitem__(i) if i < 100 else dialogue(f"bad/{i}", images=[gone])

  pipeline = make(given=[Later(pictures)], workers=workers)
  handed = 0
  with pytest.raises(DataError, match=r"'bad/1\d\d' of source 'pictures' \(draw 1\d\d\).*gone.png"):
    for _ in range(100):
      next(pipeline)
      handed += 1
  assert handed >= 5
  assert pipeline.stats()["batches"] == handed
  with pytest.raises(DataError, match=r"gone\.png"):
    next(pipeline)


def test_an_example_that_cannot_be_drawn_is_named(make, pictures):
  class Broken(Pictures):
    def __getitem__(self, i):
      if i == 7:
        raise KeyError("bbox")
      return super().__getitem__(i)

  pipeline = make(given=[Broken(pictures)])
  with pytest.raises(DataError, match="source 'pictures', example 7: KeyError: 'bbox'"):
    take(pipeline, 20)


def test_an_interrupted_wait_loses_no_batch(make, pictures):
  asked, gate = threading.Event(), threading.Event()

  class Slow(Pictures):
    def __getitem__(self, i):
      asked.set()
      gate.wait()
      return super().__getitem__(i)

  def press_ctrl_c():
    asked.wait()  # by then the main thread is inside next()
    time.sleep(0.2)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    time.sleep(0.2)
    gate.set()

  want = take(make(), 2)
  pipeline = make(given=[Slow(pictures)])
  threading.Thread(target=press_ctrl_c).start()
  with pytest.raises(KeyboardInterrupt):
    next(pipeline)
  assert_same(take(pipeline, 2), want)


def test_a_dead_worker_is_explained():
  future = Future()
  future.set_exception(BrokenProcessPool("gone"))
  with pytest.raises(DataError, match=r"data\.workers=0"):
    result(future)


def test_a_dropped_pipeline_ends_its_thread(pictures, tokenizer):
  def threads():
    return [thread for thread in threading.enumerate() if thread.name == "regionjax-data"]

  config = make_config()
  pipeline = Pipeline(
    config, Renderer(config.prompt, config.model, tokenizer), sources=[Pictures(pictures)]
  )
  next(pipeline)
  assert len(threads()) == 1
  del pipeline
  assert threads() == []


def test_a_state_of_other_settings_is_refused(make, pictures):
  state = make().get_state()
  with pytest.raises(DataError, match="tokens_per_row was 288, is 300"):
    make(tokens_per_row=300).set_state(state)
  with pytest.raises(DataError, match=r"source lengths was \[13\], is \[14\]"):
    make(given=[Pictures(pictures, 14)]).set_state(state)


@pytest.mark.parametrize(
  "host, hosts, data, message",
  [
    (0, 3, {}, "data.rows=4 cannot be shared by 3 hosts"),
    (2, 2, {}, "host 2 of 2"),
    (0, 1, {"prefetch": 0}, "data.prefetch=0"),
    (0, 1, {"packing_bins": 0}, "data.packing_bins=0"),
    (0, 1, {"sources": ()}, "data.sources is empty"),
    (0, 1, {"sources": (SourceConfig("pictures", 0.0),)}, "weight 0.0 must be positive"),
  ],
)
def test_settings_that_cannot_run_are_refused(make, host, hosts, data, message):
  with pytest.raises(ConfigError, match=message):
    make(host=host, hosts=hosts, **data)


def test_an_empty_source_is_refused(make):
  with pytest.raises(DataError, match="holds no examples"):
    make(given=[Listed([])])


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


def test_the_pipeline_can_be_imported_without_jax():
  code = (
    "import sys, regionjax.data.decode_pool, regionjax.data.rows\n"
    "assert not {'jax', 'grain', 'sklearn', 'transformers'} & set(sys.modules)\n"
    "import regionjax.data.pipeline\n"
    "assert 'jax' not in sys.modules"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr

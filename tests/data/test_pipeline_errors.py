"""The input pipeline: what it skips and counts, what it refuses, what ends it and how."""

import signal
import threading
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import pytest
from pipeline_cases import SIZES, Listed, Pictures, assert_same, dialogue, make_config, take

from regionjax.config import (
  ConfigError,
  SourceConfig,
)
from regionjax.conversation import Renderer
from regionjax.data.decode_pool import result
from regionjax.data.errors import DataError
from regionjax.data.pipeline import (
  Pipeline,
)
from regionjax.data.schema import Example, ImageRef, Turn
from regionjax.regions import Region


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
    (0, 1, {"shards": 3}, "data.rows=4 cannot be split into data.shards=3"),
    (0, 1, {"shards": 0}, "data.shards=0: expected at least 1"),
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

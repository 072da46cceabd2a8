"""The engine against the model's plain forward pass, and its batching, stops and limits."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from regionjax.data.rows import single_batch
from regionjax.data.schema import Example, ImageRef, Turn
from regionjax.infer import programs
from regionjax.infer.batching import GenerationError, bucket
from regionjax.infer.engine import Engine, find_stop
from regionjax.infer.prompts import make_prompt
from regionjax.infer.sampling import Sampling
from regionjax.models.params import model_for
from regionjax.regions import Region

# Each kind compiles three programs, 10 s of CPU time.
KINDS = ["pool", *(pytest.param(k, marks=pytest.mark.slow) for k in ("text", "pool+text", "none"))]


def picture(seed: int) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)


def example(text: str, *regions: Region) -> Example:
  return Example(
    images=(ImageRef("memory", "0", (64, 48)),),
    regions=regions,
    region_images=(0,) * len(regions),
    turns=(Turn("user", text),),
  )


BOX, POINT = Region.box(0.1, 0.2, 0.6, 0.9), Region.point(0.7, 0.3)
POLYGON = Region.polygon([(0.2, 0.1), (0.9, 0.4), (0.3, 0.8)])
EXAMPLES = [
  example("What is {region:0}?", BOX),
  example("Is {region:0} larger than {region:1}, and do you see {region:2} there?",
          BOX, POINT, POLYGON),
  example("How many?"),
  example("Which of {region:0} and {region:1} is red? Say so in a few words, please.",
          POLYGON, BOX),
  example("Where is it?"),
]  # fmt: skip


def inputs(chat, examples=EXAMPLES):
  """(prompts, features) of examples, each with an image of its own."""
  prepared = [chat.frame.prepare(picture(i)) for i in range(len(examples))]
  features = chat.engine.encode_images([image for image, _ in prepared])
  prompts = [
    make_prompt(
      chat.renderer.prompt(e), e.regions, e.region_images, [prepared[i][1]],
      grid=chat.frame.grid, region_slot_id=chat.tokenizer.region_slot_id, images=[i],
    )
    for i, e in enumerate(examples)
  ]  # fmt: skip
  return prompts, features


def free_running(chat, steps=4):
  """An engine over the same weights that nothing stops."""
  return Engine(chat.config.model, chat.engine.params, chat.tokenizer, steps=steps)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_follows_the_forward_pass(make_chat, kind):
  """Every generated token is the arg-max of the training forward pass over all ids before it."""
  chat = make_chat(kind)
  prompts, features = inputs(chat)
  answers = free_running(chat).generate(prompts[:2], features, max_new_tokens=6)
  tokenizer = chat.tokenizer
  model = model_for(
    chat.config.model, generate=True,
    image_slot_id=tokenizer.image_slot_id, region_slot_id=tokenizer.region_slot_id,
  )  # fmt: skip
  forward = jax.jit(lambda batch: model.apply({"params": chat.engine.params}, batch))
  for i, answer in enumerate(answers):
    encoded = chat.renderer.prompt(EXAMPLES[i])
    more = dataclasses.replace(
      encoded,
      ids=np.concatenate([encoded.ids, np.asarray(answer.ids, np.int32)]),
      mask=np.zeros(len(encoded.ids) + 6, bool),
      answer_ids=np.zeros(len(encoded.ids) + 6, np.int32),
    )
    batch = single_batch(more, EXAMPLES[i], [picture(i)], chat.config, tokens=128)
    logits = np.array(forward(batch))[0, len(encoded.ids) - 1 : len(encoded.ids) + 5]
    logits[:, [tokenizer.image_slot_id, tokenizer.region_slot_id]] = -np.inf
    assert answer.ids == tuple(logits.argmax(-1)), f"example {i}"
    assert answer.finish == "length"


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 0.9, seed=3)])
def test_ragged_batch_equals_single_rows(make_chat, sampling):
  chat = make_chat("pool")
  prompts, features = inputs(chat)
  engine = free_running(chat)
  together = engine.generate(prompts, features, max_new_tokens=9, sampling=sampling)
  for i, prompt in enumerate(prompts):
    state = engine.prefill([prompt], features, new_tokens=9)
    *_, (alone,) = engine.decode(state, max_new_tokens=9, sampling=sampling, rows=[i])
    assert alone == together[i], f"example {i}"
  assert len({a.ids for a in together}) > 1


def test_order_does_not_matter(make_chat):
  chat = make_chat("pool")
  prompts, features = inputs(chat)
  engine = free_running(chat)
  forward = engine.generate(prompts, features, max_new_tokens=5)
  assert engine.generate(prompts[::-1], features, max_new_tokens=5)[::-1] == forward


def test_regions_and_images_are_read(make_chat):
  """Another region, or another image, gives other logits for the same ids."""
  chat = make_chat("pool")
  shown = [EXAMPLES[0], example("What is {region:0}?", POINT)]
  prompts, features = inputs(chat, shown)
  other_image = dataclasses.replace(prompts[0], images=(1,))
  other_region = dataclasses.replace(prompts[1], images=(0,))
  state = chat.engine.prefill([prompts[0], other_image, other_region], features, new_tokens=1)
  logits = np.asarray(state.logits_bv)
  assert np.abs(logits[0] - logits[1]).max() > 1e-4
  assert np.abs(logits[0] - logits[2]).max() > 1e-4


def test_extending_equals_one_prefill(make_chat):
  """Pieces of any lengths, a region in a later one, and a cache that grows on the way."""
  chat = make_chat("pool")
  prompts, features = inputs(chat, [EXAMPLES[1]])
  encoded = chat.renderer.prompt(EXAMPLES[1])
  whole = chat.engine.prefill(prompts, features, new_tokens=300)
  frame = chat.frame.prepare(picture(0))[1]
  state = None
  cuts = [0, 30, 31, len(encoded.ids)]
  for start, end in itertools.pairwise(cuts):
    ids = encoded.ids[:end]
    slots = int((ids == chat.tokenizer.region_slot_id).sum())
    part = dataclasses.replace(encoded, ids=ids, region_slots=encoded.region_slots[:slots])
    piece = make_prompt(
      part, EXAMPLES[1].regions, (0, 0, 0), [frame], grid=chat.frame.grid,
      region_slot_id=chat.tokenizer.region_slot_id, images=[0], start=start,
    )  # fmt: skip
    if state is None:
      state = chat.engine.prefill([piece], features, new_tokens=1)
      assert state.room == 64
    else:
      state = chat.engine.extend(state, [piece], features, new_tokens=end)
  assert state.room > 64
  difference = np.abs(np.asarray(whole.logits_bv - state.logits_bv)).max()
  assert difference / np.abs(np.asarray(whole.logits_bv)).max() < 1e-5


def test_stops(make_chat):
  """Stops of one id, of several ids, and strings that begin and end inside tokens."""
  chat = make_chat("pool")
  prompts, features = inputs(chat)
  prompt = prompts[2]
  sampling = Sampling(temperature=2.0, seed=5)  # a greedy answer repeats itself

  def answer(**stops):
    engine = Engine(
      chat.config.model, chat.engine.params, chat.tokenizer, steps=4, **stops
    )  # fmt: skip
    return engine.generate([prompt], features, max_new_tokens=12, sampling=sampling)[0]

  free = answer()
  assert (len(free.ids), free.finish) == (12, "length")
  assert free.text == chat.tokenizer.decode(free.ids)
  one = answer(stop_sequences=[(free.ids[5],)])
  first = free.ids.index(free.ids[5])
  assert (one.ids, one.finish) == (free.ids[: first + 1], "stop")
  assert one.text == chat.tokenizer.decode(free.ids[:first])
  two = answer(stop_sequences=[free.ids[7:9], (free.ids[8], free.ids[7], free.ids[8])])
  assert (two.ids, two.finish) == (free.ids[:9], "stop")
  assert two.text == chat.tokenizer.decode(free.ids[:7])
  ascii_ids = [i for i in range(1, 11) if chat.tokenizer.decode(free.ids[i - 1 : i + 2]).isascii()]
  middle = ascii_ids[len(ascii_ids) // 2]
  left, right = (chat.tokenizer.decode([free.ids[k]]) for k in (middle, middle + 1))
  word = left[-1:] + right[:1]
  cut = answer(stop_strings=[word])
  assert cut.finish == "stop"
  assert cut.text == free.text[: free.text.index(word)]
  assert cut.ids == free.ids[: len(cut.ids)]
  assert word in chat.tokenizer.decode(cut.ids)
  assert word not in chat.tokenizer.decode(cut.ids[:-1])


def test_find_stop():
  assert find_stop([5, 1, 2, 3], [(2, 3), (1,)]) == (1, 2)
  assert find_stop([5, 1, 2, 3], [(2, 3)]) == (2, 4)
  assert find_stop([5, 2], [(2, 3)]) == (2, 2)
  assert find_stop([], [(2,)]) == (0, 0)


def test_slots_are_never_generated(make_chat):
  """Even when a slot's logit is by far the largest."""
  chat = make_chat("pool")
  prompts, features = inputs(chat)
  engine = free_running(chat)
  state = engine.prefill(prompts[:1], features, new_tokens=1)
  slots = np.array([chat.tokenizer.region_slot_id, chat.tokenizer.image_slot_id])
  state.logits_bv = state.logits_bv.at[:, slots].set(1e4)
  *_, (answer,) = engine.decode(state, max_new_tokens=1)
  assert answer.ids[0] not in slots


def test_other_lengths_in_a_bucket_compile_nothing(make_chat):
  chat = make_chat("pool")
  engine = free_running(chat)

  def ask(size):
    prompts, features = inputs(chat, [example("z" * size)] * 2)
    assert 32 < len(prompts[0].ids) + 9 <= 64
    engine.generate(prompts, features, max_new_tokens=9)

  ask(16)
  before = programs.prefill._cache_size(), programs.decode._cache_size()
  for size in range(17, 36, 3):
    ask(size)
  assert (programs.prefill._cache_size(), programs.decode._cache_size()) == before


@pytest.mark.parametrize(
  ("size", "expected"),
  [(1, 32), (32, 32), (33, 64), (64, 64), (65, 96), (96, 96), (97, 128), (129, 192), (2000, 2048)],
)
def test_buckets(size, expected):
  assert bucket(size) == expected


def test_a_prompt_that_is_too_long_is_refused(make_chat):
  chat = make_chat("pool")
  prompts, features = inputs(chat, [example("word " * 600)])
  with pytest.raises(GenerationError, match="the model's limit is 512"):
    chat.engine.generate(prompts, features, max_new_tokens=4)


def test_an_answer_ends_at_the_models_limit(make_chat):
  chat = make_chat("pool")
  prompts, features = inputs(chat, [example("a")])
  filler = np.full(505 - len(prompts[0].ids), prompts[0].ids[-1], np.int32)
  long = dataclasses.replace(prompts[0], ids=np.concatenate([prompts[0].ids, filler]))
  (answer,) = free_running(chat).generate([long], features, max_new_tokens=50)
  assert (len(answer.ids), answer.finish) == (7, "length")


def test_slots_without_regions_are_refused(make_chat):
  chat = make_chat("pool")
  prompts, features = inputs(chat)
  with pytest.raises(GenerationError, match="1 region slots in its ids but 0 regions"):
    chat.engine.generate([dataclasses.replace(prompts[0], regions=None)], features)


def test_batches_shrink_to_what_their_caches_need(make_chat, monkeypatch):
  chat = make_chat("pool")
  assert chat.engine._rows(40, 20) == 64
  room = 64 * 2 * 2 * 2 * 16 * 4  # tokens, k and v, layers, heads, channels, bytes
  monkeypatch.setattr("regionjax.infer.engine.MAX_CACHE_BYTES", 9 * room)
  assert chat.engine._rows(40, 20) == 8
  monkeypatch.setattr("regionjax.infer.engine.MAX_CACHE_BYTES", 1)
  assert chat.engine._rows(40, 20) == 1

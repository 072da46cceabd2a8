"""Training LoRA on a frozen base: the base keeps its bits, the adapter holds what was trained."""

import dataclasses
import io
import json
import signal
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from regionjax import cli
from regionjax.config import ConfigError, LoraConfig
from regionjax.config_files import load_config
from regionjax.mesh import make_mesh
from regionjax.models.lora import merge_lora
from regionjax.models.params import param_shapes
from regionjax.tokenizer import load_tokenizer
from regionjax.train import loop
from regionjax.train.finish import check_form
from regionjax.train.initial import given_params, read_origin
from regionjax.train.progress import Progress
from regionjax.train.state import flatten_paths, merge, trainable_paths, unflatten_paths
from regionjax.weights import adapter, release

PATTERNS = (".*lora_.*", "regions/.*", "connector/.*")
EXTRA = ("<extra>",)
ROOT = Path(__file__).parents[2]


def drawn(model, seed=0):
  rng = np.random.default_rng(seed)

  def draw(s):
    scale = s.shape[-2] ** -0.5 if len(s.shape) > 1 else 0.1
    return (rng.normal(size=s.shape) * scale + (len(s.shape) < 2)).astype(np.float32)

  return jax.tree.map(draw, param_shapes(model))


@pytest.fixture(scope="module")
def base_config(micro):
  vocab = load_tokenizer("tiny").vocab_size
  decoder = dataclasses.replace(micro.model.decoder, vocab_size=vocab)
  return dataclasses.replace(micro, model=dataclasses.replace(micro.model, decoder=decoder))


@pytest.fixture(scope="module")
def base(tmp_path_factory, base_config):
  folder = tmp_path_factory.mktemp("base") / "llm"
  return release.save(folder, base_config, drawn(base_config.model), load_tokenizer("tiny"), "")


def on_base(base_config, init_from, **train):
  """The run: LoRA, one more token, the region encoder and connector; 4 steps."""
  decoder = dataclasses.replace(
    base_config.model.decoder,
    lora=LoraConfig(rank=2, alpha=4.0),
    vocab_size=base_config.model.decoder.vocab_size + len(EXTRA),
  )
  settings = dict(
    trainable=PATTERNS, init_from=str(init_from), steps=4, warmup_steps=1, eval_every=0,
    save_every=2, log_every=1,
  )  # fmt: skip
  return dataclasses.replace(
    base_config,
    name="seeing",
    model=dataclasses.replace(base_config.model, decoder=decoder),
    prompt=dataclasses.replace(base_config.prompt, added_tokens=EXTRA),
    train=dataclasses.replace(base_config.train, **settings | train),
  )


class Stopping(Progress):
  """Raises SIGINT when a step is reported."""

  def __init__(self, at=None):
    super().__init__(io.StringIO())
    self._at = at

  def update(self, step, *args):
    super().update(step, *args)
    if step == self._at:
      signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_config, base):
  """A straight run, and one that was stopped after step 2 and resumed."""
  folder = tmp_path_factory.mktemp("runs")
  config = on_base(base_config, base)
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = [getattr(jax.config, name) for name in names]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "peak_flops", lambda devices: 1e11)
    for name, value in zip(names, (str(folder / "xla"), 0.2)):
      jax.config.update(name, value)
    for name, stop in (("straight", None), ("parts", 1), ("parts", None)):
      mesh = make_mesh(devices=jax.devices()[:1])
      outcome = loop.train(config, folder / name, mesh=mesh, progress=Stopping(stop))
      assert outcome.finished == (stop is None)
  for name, value in zip(names, before):
    jax.config.update(name, value)
  return config, folder


def state_of(workdir):
  """(trainable, frozen) by path, of the last checkpoint, read without the trainer."""
  import orbax.checkpoint as ocp

  state = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / "4" / "state")
  return flatten_paths(state["trainable"]), flatten_paths(state["frozen"])


def test_the_base_keeps_its_bits_and_the_rest_moves(runs, base):
  _, folder = runs
  trainable, frozen = state_of(folder / "straight")
  assert trainable.keys() == trainable_paths([*trainable, *frozen], PATTERNS)
  theirs = flatten_paths(release.load(base)[1])
  assert frozen.keys() == theirs.keys() - trainable.keys()
  for path, leaf in frozen.items():
    got = np.asarray(leaf)[: theirs[path].shape[0]]  # the table has one more token
    assert got.tobytes() == theirs[path].astype(np.float32).tobytes(), path
  updates = [path for path in trainable if path.endswith("lora_b")]
  assert len(updates) == 7 and all(np.any(trainable[path]) for path in updates)
  for path in trainable.keys() & theirs.keys():
    assert not np.array_equal(trainable[path], theirs[path].astype(np.float32)), path


def test_a_resumed_run_equals_a_straight_one_bit_by_bit(runs):
  _, folder = runs
  for ours, theirs in zip(state_of(folder / "straight"), state_of(folder / "parts")):
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
      assert np.asarray(leaf).tobytes() == np.asarray(theirs[path]).tobytes(), path


def test_the_work_folder_names_the_base(runs, base):
  _, folder = runs
  origin = read_origin(folder / "straight")
  assert origin.base == adapter.describe_base(base)
  assert set(origin.of_base) == set(flatten_paths(release.load(base)[1]))
  assert (folder / "straight" / "base.json").read_bytes() == (
    folder / "parts" / "base.json"
  ).read_bytes()


def test_the_adapter_alone_is_saved_and_gives_the_trained_model(runs, base, tmp_path):
  config, folder = runs
  out = tmp_path / "eyes"
  assert cli.main(["export", str(folder / "straight"), str(out), "--adapter"]) == 0
  trainable, frozen = state_of(folder / "straight")
  held = release.read_arrays(out / release.ADAPTER)
  assert held.keys() == trainable.keys()
  got_config, params, _ = release.load(out)
  assert got_config == config
  params = flatten_paths(params)
  assert params.keys() == trainable.keys() | frozen.keys()
  for path, leaf in (trainable | frozen).items():
    np.testing.assert_array_equal(params[path].astype(np.float32), leaf, err_msg=path)
  card = (out / "README.md").read_text()
  assert "## Its base" in card and adapter.weights_sha256(base) in card


def test_full_and_merged_exports(runs, tmp_path):
  config, folder = runs
  workdir = str(folder / "straight")
  assert cli.main(["export", workdir, str(tmp_path / "full")]) == 0
  assert cli.main(["export", workdir, str(tmp_path / "merged"), "--merge"]) == 0
  saved, params, _ = release.load(tmp_path / "full")
  assert saved == config and "lora_a" in params["decoder"]["layers"]["q"]
  saved, merged, _ = release.load(tmp_path / "merged")
  model, want = merge_lora(config.model, merge(*map(_nested, state_of(folder / "straight"))))
  assert saved.model == model and not model.decoder.lora.rank
  flat = flatten_paths(merged)
  for path, leaf in flatten_paths(want).items():
    np.testing.assert_array_equal(flat[path], np.asarray(leaf).astype(ml_dtypes.bfloat16), path)
  assert cli.main(["export", workdir, str(tmp_path / "x"), "--merge", "--adapter"]) == 2


def _nested(flat):
  return unflatten_paths({path: np.asarray(leaf) for path, leaf in flat.items()})


def test_a_run_can_go_on_from_an_adapter(runs, base, base_config, tmp_path):
  config, folder = runs
  out = tmp_path / "eyes"
  assert cli.main(["export", str(folder / "straight"), str(out), "--adapter"]) == 0
  given, said = given_for(dataclasses.replace(config, train=dataclasses.replace(
    config.train, init_from=str(out))))  # fmt: skip
  trainable, frozen = state_of(folder / "straight")
  assert flatten_paths(given.params).keys() == trainable.keys() | frozen.keys() and not said
  assert set(given.of_base) == set(frozen)  # what the first adapter holds, the second must hold


def given_for(config):
  said = []
  tokenizer = load_tokenizer("tiny", config.prompt.added_tokens)
  given = given_params(config, param_shapes(config.model), tokenizer, log=said.append)
  return given, said


def test_parts_of_several_releases(base, base_config, tmp_path):
  other = release.save(
    tmp_path / "sees", base_config, drawn(base_config.model, 5), load_tokenizer("tiny"), ""
  )
  first, second = (flatten_paths(release.load(p)[1]) for p in (base, other))
  config = on_base(base_config, f"{base}:decoder/.*,{other}:vision/.*|connector/.*")
  given, said = given_for(config)
  flat = flatten_paths(given.params)
  for path, leaf in flat.items():
    source = first if path.startswith("decoder") else second
    np.testing.assert_array_equal(leaf[: source[path].shape[0]], source[path], err_msg=path)
  assert {p.split("/")[0] for p in flat} == {"decoder", "vision", "connector"}
  assert set(given.of_base) == {p for p in first if p.startswith("decoder")}
  assert said[0].endswith("decoder/embed/embedding: 1 tokens added, each the mean of the others")
  assert "starts fresh: decoder/layers/down/lora_a" in said[-1] and "regions/.*" in said[-1]
  assert len(said) == 2
  _, said = given_for(on_base(base_config, f"{base}:decoder/.*,{other}"))
  assert "starts fresh: decoder/layers/down/lora_a" in said[-2]
  assert said[-1] == f"train.init_from={other}: of the release not used: decoder/.*"


@pytest.mark.parametrize(
  "entry, message",
  [
    (":visoin/.*", "'visoin/.*' matches no parameter of"),
    (":(", "is not a regex"),
    (",", "expected release folders with commas between"),
  ],
)
def test_bad_sources_are_named(base, base_config, entry, message):
  with pytest.raises(ConfigError, match=message):
    given_for(on_base(base_config, f"{base}{entry}"))


def test_another_tokenizer_is_refused_where_its_table_is_used(base, base_config):
  config = on_base(base_config, base)
  other = load_tokenizer("tiny", ("<other>",))
  with pytest.raises(ConfigError, match="its embeddings mean other tokens"):
    given_params(config, param_shapes(config.model), other, log=lambda _: None)
  config = on_base(base_config, f"{base}:vision/.*")
  given_params(config, param_shapes(config.model), other, log=lambda _: None)


def test_exports_that_a_run_cannot_have(base_config):
  with pytest.raises(ConfigError, match=r"started from no release .train.init_from is empty"):
    check_form("adapter", base_config, None)
  with pytest.raises(ConfigError, match=r"no LoRA to merge .model.decoder.lora.rank=0"):
    check_form("merged", base_config, None)
  with pytest.raises(ConfigError, match="expected one of full, merged, adapter"):
    check_form("half", base_config, None)


def test_the_summary_counts_what_trains(runs):
  _, folder = runs
  summary = json.loads((folder / "straight" / "summary.json").read_text())
  trainable, _ = state_of(folder / "straight")
  assert summary["parameters"]["trainable"] == sum(np.size(a) for a in trainable.values())
  assert summary["parameters"]["total"] > summary["parameters"]["trainable"]


def test_the_recipe_freezes_the_decoder_and_takes_the_shipped_eyes(base, base_config):
  config = load_config(f"{ROOT}/configs/smollm2_scenes.py:base={base},rank=4")
  decoder = config.model.decoder  # its tokenizer has both slots already
  assert dataclasses.replace(decoder, lora=LoraConfig()) == base_config.model.decoder
  assert decoder.lora.rank == 4
  given, _ = given_for(config)
  flat = flatten_paths(given.params)
  shapes = flatten_paths(param_shapes(config.model))
  fresh = shapes.keys() - flat.keys()
  assert all(
    "lora_" in p or p.startswith(("connector/", "regions/output/", "regions/position_output/"))
    for p in fresh
  )
  trained = trainable_paths(list(shapes), config.train.trainable)
  assert set(given.of_base) == {p for p in shapes if p not in trained}
  seen = flatten_paths(release.load("tiny")[1])
  np.testing.assert_array_equal(flat["vision/stem_0/kernel"], seen["vision/stem_0/kernel"])
  blind = load_config(f"{ROOT}/configs/smollm2_scenes.py:base={base},vision=")
  assert blind.train.init_from == f"{base}:decoder/.*" and blind.model.vision == config.model.vision


def test_updates_of_another_rank_are_merged_before_new_ones_start(base_config, tmp_path):
  tuned = on_base(base_config, "")
  params, tokenizer = drawn(tuned.model, 3), load_tokenizer("tiny", EXTRA)
  folder = release.save(tmp_path / "tuned", tuned, params, tokenizer, "", dtype="float32")
  want = flatten_paths(merge_lora(tuned.model, params)[1])
  config = on_base(base_config, folder)
  decoder = dataclasses.replace(config.model.decoder, lora=LoraConfig(rank=4, targets="q"))
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder))
  given, said = given_for(config)
  assert "its low-rank updates are merged into the maps that they update" in said[0]
  flat = flatten_paths(given.params)
  assert flat.keys() == want.keys() == set(given.of_base)
  for path, leaf in want.items():
    np.testing.assert_array_equal(flat[path], leaf, err_msg=path)
  # An adapter on top of it opens with the same numbers.
  shapes = flatten_paths(param_shapes(config.model))
  own = {path: np.ones(s.shape, np.float32) for path, s in shapes.items() if "lora_" in path}
  found = adapter.describe_base(folder)
  out = adapter.save_adapter(
    tmp_path / "more", config, unflatten_paths(own), tokenizer, "", base=found
  )
  opened = flatten_paths(release.load(out)[1])
  assert opened.keys() == want.keys() | own.keys()
  for path, leaf in (want | own).items():
    np.testing.assert_array_equal(opened[path], leaf, err_msg=path)
  # An adapter whose own updates were merged is no longer its base's maps.
  given, _ = given_for(
    dataclasses.replace(
      config,
      model=dataclasses.replace(
        config.model, decoder=dataclasses.replace(decoder, lora=LoraConfig(rank=3))
      ),
      train=dataclasses.replace(config.train, init_from=str(out)),
    )
  )
  assert "decoder/layers/q/kernel" not in given.of_base
  assert "decoder/layers/k/kernel" in given.of_base

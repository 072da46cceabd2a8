"""`regionjax convert --check`: what it says of sound conversions, and which rows see an error."""

import dataclasses
import functools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hf_folders import write_clip, write_gguf, write_llama, write_llava

from regionjax import weights
from regionjax.cli import main
from regionjax.weights import check, check_oracle, convert, release
from regionjax.weights import leaves as lazy
from regionjax.weights.families import gguf, llama

WRITERS = {
  "hf-llama": write_llama, "hf-clip": write_clip, "hf-llava": write_llava, "gguf": write_gguf,
}  # fmt: skip
# A region module that is tested here as a whole takes 20 s: the rest is in test_check_regions.py.
GPT4ROI = pytest.param("gpt4roi", marks=pytest.mark.slow)
SLOW = [*(pytest.param(name, marks=pytest.mark.slow) for name in ("hf-llama", "gguf")), GPT4ROI]
ROWS = {
  "hf-llama": ["embeddings", "block 0", "block 1", "logits"],
  "hf-clip": ["vision embeddings", *(f"vision block {i}" for i in range(3)), "vision tower"],
}
ROWS["gguf"] = ROWS["hf-llama"]
ROWS["hf-llava"] = [
  "vision embeddings", "vision block 0", "vision block 1", "vision tower", "projector",
  *ROWS["hf-llama"],
]  # fmt: skip
ROWS["gpt4roi"] = [
  "vision embeddings", *(f"vision block {i}" for i in range(10)), "vision tower", "projector",
  "region maps", "region tokens", "embeddings", "block 0", "block 1", "block 2", "logits",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Made:
  """A conversion: what it was arranged from, and the release."""

  arranged: convert.Arranged
  folder: Path
  source: Path
  clip: Path | None = None

  def check(self, folder: Path | None = None) -> check.Report:
    folder = self.folder if folder is None else folder
    return check.check(self.arranged, folder, source=self.source, clip=self.clip)


@pytest.fixture(scope="module")
def made(request, tmp_path_factory):
  """A function: the conversion of a family."""
  root = tmp_path_factory.mktemp("made")

  @functools.cache
  def make(family: str) -> Made:
    clip = None
    if family == "gpt4roi":
      published = request.getfixturevalue("published")
      source, clip = published.merged, published.clip
    else:
      source = WRITERS[family](root / "sources" / family)
    arranged = convert.arrange(family, source, convert.Options(clip=clip))
    return Made(arranged, convert.write(arranged, root / family), source, clip)

  return make


@pytest.fixture(autouse=True)
def short(monkeypatch):
  """Fewer tokens than the command's: what is tested here doesn't hang on their number."""
  monkeypatch.setattr(check, "NEW_TOKENS", 8)


def failed(report):
  return {row.name for row in report.rows if not row.passed}


@pytest.mark.parametrize("family", ["hf-clip", "hf-llava", *SLOW])
def test_a_sound_conversion_passes_and_nothing_is_left_out(family, made):
  report = made(family).check()
  assert report.passed, str(report)
  assert [row.name for row in report.rows] == ROWS[family]
  steps = made(family).arranged.steps
  assert report.tensors == sum(len(step.source) - len(step.plan.ignored) for step in steps)
  assert str(report).endswith("check passed")
  assert ("8 greedy tokens: all equal" in str(report)) == (family != "hf-clip")


def test_the_command_generates_64_tokens(made, tmp_path, capsys, monkeypatch):
  monkeypatch.undo()
  words = ["convert", "--from", "gguf", str(made("gguf").source), "--to", str(tmp_path / "out")]
  assert main([*words, "--check"]) == 0
  told = capsys.readouterr()
  assert "every bit is the source's" in told.out and "64 greedy tokens: all equal" in told.out
  assert told.out.strip().endswith("check passed")
  assert "generating 64 tokens here ..." in told.err and "it/s" not in told.err  # no bars


# Errors, and the rows that see them.


def mirrored(kernel):
  return kernel[..., ::-1]


def turned(kernel):
  return kernel.swapaxes(-1, -2)


ERRORS = {
  "rotary channels": (
    "hf-llama", "decoder/layers/q/kernel", 0, mirrored, {"block 0", "logits"}
  ),
  "rotary channels of a later layer": (
    "gguf", "decoder/layers/k/kernel", 1, mirrored, {"block 1", "logits"}
  ),
  "last norm": ("hf-llama", "decoder/norm/scale", None, mirrored, {"logits"}),
  "token table": ("hf-llama", "decoder/embed/embedding", None, mirrored, {"embeddings", "logits"}),
  "vision block": (
    "hf-clip", "vision/layers/v/kernel", 1, turned, {"vision block 1", "vision tower"}
  ),
  "patches": (
    "hf-llava", "vision/patch/kernel", None, lambda kernel: kernel[::-1],
    {"vision embeddings", "vision tower"},
  ),
  "projector": ("hf-llava", "connector/linear2/kernel", None, turned, {"projector"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_shows_in_its_part_alone(name, made, tmp_path):
  family, path, layer, change, rows = ERRORS[name]
  folder = changed(made(family).folder, tmp_path / "changed", path, layer, change)
  report = made(family).check(folder)
  assert failed(report) == rows
  assert len(report.wrong) == 1  # and so do its bits
  assert not report.passed and "CHECK FAILED" in str(report) and "ABOVE" in str(report)


def changed(folder, to, path, layer, change):
  """A copy of a release with one parameter (of one layer) changed."""
  shutil.copytree(folder, to)
  opened = release.open_release(folder)
  arrays = {name: np.array(tensor.array()) for name, tensor in opened.leaves.items()}
  where = slice(None) if layer is None else layer
  arrays[path][where] = change(arrays[path][where]).copy()
  payload = release.make_payload(opened.config, parts=opened.parts)
  release.write_leaves(
    to, release.to_leaves(arrays, "float32"), payload, tokenizer=opened.tokenizer, card="",
    spare={key: lazy.as_leaf(tensor) for key, tensor in opened.spare.items()},
  )  # fmt: skip
  return to


def test_a_table_that_is_wrong_in_both_directions(made, tmp_path, monkeypatch):
  """Such bits come back as they went: only numbers tell."""
  right = llama.rules

  def swapped(*args, **kw):
    names = {"gate": "up", "up": "gate"}
    for rule in right(*args, **kw):
      *path, name, leaf = rule.path.split("/")
      path = "/".join([*path, names.get(name, name), leaf])
      yield llama.Rule(rule.key, path, rule.transform)

  source = made("hf-llama").source
  monkeypatch.setattr(llama, "rules", lambda *args, **kw: tuple(swapped(*args, **kw)))
  arranged = convert.arrange("hf-llama", source)
  report = Made(arranged, convert.write(arranged, tmp_path / "out"), source).check()
  assert not report.wrong and report.differs_at is not None
  assert failed(report) == {"block 0", "block 1", "logits"}


def test_a_gguf_whose_rotary_layout_stays_llama_cpps(made, tmp_path, monkeypatch):
  source = made("gguf").source
  monkeypatch.setattr(gguf, "half_split", lambda rows, heads: rows)
  arranged = convert.arrange("gguf", source)
  report = Made(arranged, convert.write(arranged, tmp_path / "out"), source).check()
  assert not report.wrong and failed(report) == {"block 0", "block 1", "logits"}


def test_spare_tensors_are_compared_too(made, tmp_path):
  folder = shutil.copytree(made("hf-clip").folder, tmp_path / "out")
  data = bytearray((folder / release.SPARE).read_bytes())
  data[-1] ^= 1
  (folder / release.SPARE).write_bytes(data)
  report = made("hf-clip").check(folder)
  assert len(report.wrong) == 1 and "post_layernorm" in report.wrong[0]


# Models that don't fit into memory.


@pytest.fixture
def little_memory(monkeypatch):
  def refuse(*_):
    raise AssertionError("a whole model was asked for")

  monkeypatch.setattr(check, "available_bytes", lambda: 200_000.0)
  monkeypatch.setattr(check_oracle.DecoderOracle, "whole", refuse)
  monkeypatch.setattr(check.numbers, "greedy", refuse)


@pytest.mark.parametrize("family", ["hf-llama", "hf-llava", "gguf", GPT4ROI])
def test_choices_are_compared_where_a_model_does_not_fit(family, made, little_memory):
  report = made(family).check()
  assert report.passed and report.tokens >= 64
  assert f"GB available: choices at {report.tokens} positions of one text: all equal" in str(report)


def test_choices_that_differ(made, tmp_path, little_memory):
  folder = changed(made("hf-llama").folder, tmp_path / "out", "decoder/norm/scale", None, mirrored)
  report = made("hf-llama").check(folder)
  assert report.differs_at is not None and not report.passed
  assert f"the first that differs is at {report.differs_at}\n" in str(report)


def test_one_module_at_a_time_has_weights(made, monkeypatch):
  """Most of a model's parameters would otherwise be there at its last module."""
  oracle = check_oracle.open_decoder(made("hf-llama").arranged, made("hf-llama").source)
  model = oracle._empty()
  monkeypatch.setattr(oracle, "_empty", lambda: model)
  held, fill = [], oracle._fill

  def held_after(name, module, args=None):
    fill(name, module, args)
    held.append(sum(p.numel() for p in model.parameters() if p.device.type != "meta"))

  monkeypatch.setattr(oracle, "_fill", held_after)
  trace = oracle.run([5, 6, 7])
  assert len(trace.hidden) == 3 and len(held) == 2 * 9 + 3
  assert max(held) == max(p.numel() for p in model.parameters())
  assert all(p.device.type == "meta" for p in model.parameters())


def test_memory_that_is_left():
  assert 1e6 < check.available_bytes() < 1e15
  assert check.too_large(1000) == ""
  assert check.too_large(10**16).startswith("model of 10000000.0 GB in float32, ")


# Sources whose folders say more than weights, and releases in fewer bits.


def test_a_folder_whose_generation_stops_and_punishes(made, tmp_path):
  source = shutil.copytree(made("hf-llama").source, tmp_path / "llama")
  told = dict(repetition_penalty=9.0, eos_token_id=list(range(500)), do_sample=True, max_length=20)
  (source / "generation_config.json").write_text(json.dumps(told))
  arranged = convert.arrange("hf-llama", source)
  report = Made(arranged, convert.write(arranged, tmp_path / "out"), source).check()
  assert report.passed and report.tokens == 8


@pytest.mark.parametrize("family", ["hf-llama", "gguf", "hf-clip", GPT4ROI])
def test_a_release_in_bfloat16_of_a_source_in_float32(family, made, tmp_path):
  folder = convert.write(made(family).arranged, tmp_path / "out", dtype="bfloat16")
  report = made(family).check(folder)
  assert report.passed, str(report)


def test_without_torch(made, monkeypatch):
  one = made("hf-llama")
  monkeypatch.setitem(sys.modules, "regionjax.weights.check_oracle", None)
  monkeypatch.delattr(weights, "check_oracle")
  with pytest.raises(convert.WeightsError, match="pip install torch"):
    one.check()


@pytest.mark.release
@pytest.mark.parametrize("family", [*WRITERS, "gpt4roi"])
def test_what_the_command_says(family, made, tmp_path, capsys, monkeypatch):
  """The reports in tests/release/convert_check.log."""
  monkeypatch.undo()
  one = made(family)
  words = ["convert", "--from", family, str(one.source), "--to", str(tmp_path / "out"), "--check"]
  assert main([*words, *(["--clip", str(one.clip)] if one.clip else [])]) == 0
  with capsys.disabled():
    print(f"\n== --from {family}, a tiny random model\n{capsys.readouterr().out}")

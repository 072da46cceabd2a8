"""`regionjax convert`: whole folders in, releases out, and the way back."""

import json
import shutil

import numpy as np
import pytest
import torch
from hf_folders import IMAGE, write_clip, write_gguf, write_llama, write_llava, write_tokenizer
from PIL import Image
from transformers import (
  AutoTokenizer,
  CLIPImageProcessor,
  CLIPVisionModel,
  LlamaForCausalLM,
  LlavaForConditionalGeneration,
)

import regionjax
from regionjax.cli import main
from regionjax.data.schema import Example, ImageRef, Turn
from regionjax.infer.batching import GenerationError
from regionjax.regions import Region
from regionjax.weights import release
from regionjax.weights.release import ReleaseError
from regionjax.weights.sources import open_weights


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
  folder = tmp_path_factory.mktemp("published")
  return {
    "hf-llama": write_llama(folder / "llama"),
    "hf-clip": write_clip(folder / "clip"),
    "hf-llava": write_llava(folder / "llava"),
    "gguf": write_gguf(folder / "gguf"),
  }


@pytest.fixture(scope="module")
def releases(sources, tmp_path_factory):
  """Made by the command."""
  folder = tmp_path_factory.mktemp("releases")
  out = {}
  for family, source in sources.items():
    out[family] = folder / family
    assert main(["convert", "--from", family, str(source), "--to", str(out[family])]) == 0
  return out


def arrays(folder):
  return {name: tensor.array() for name, tensor in open_weights(folder).items()}


def test_a_decoder_alone_answers_text_and_refuses_images(releases):
  chat = regionjax.load(releases["hf-llama"])
  assert chat.config.prompt.template == "vicuna_v1"
  answer = chat.ask(None, "What is a lion?", max_new_tokens=8)
  assert 0 < len(answer.ids) <= 8
  with pytest.raises(GenerationError, match="a decoder alone"):
    chat.ask(np.zeros((8, 8, 3), np.uint8), "What is this?")


def test_a_vision_tower_has_no_tokenizer(releases):
  opened = release.open_release(releases["hf-clip"])
  assert opened.parts == ("vision",) and opened.tokenizer is None
  assert opened.config.model.vision.mean == (0.4, 0.5, 0.6)
  assert len(opened.spare) == 2  # the last norm
  with pytest.raises(ReleaseError, match="vision tower alone"):
    regionjax.load(releases["hf-clip"])


def test_llava_answers_about_boxes_as_transformers_would(sources, releases, tmp_path):
  """Image, template and coordinates together: the prompt's logits are those of transformers."""
  chat = regionjax.load(releases["hf-llava"])
  picture = tmp_path / "picture.png"
  pixels = np.random.default_rng(0).integers(0, 256, (40, 20, 3), np.uint8)
  Image.fromarray(pixels).save(picture)
  answer = chat.ask(
    str(picture), "What is <region1>?", [Region.box(0.1, 0.3, 0.5, 0.7)], max_new_tokens=12
  )
  theirs = LlavaForConditionalGeneration.from_pretrained(sources["hf-llava"]).eval()
  example = Example(
    images=(ImageRef("memory", "0", (20, 40)),),
    regions=(Region.box(0.1, 0.3, 0.5, 0.7),),
    region_images=(0,),
    turns=(Turn("user", "What is {region:0}?"),),
  )
  ids = list(chat.renderer.prompt(example).ids)
  assert chat.tokenizer.decode(ids) == (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: "
    + IMAGE * 16
    + "\nWhat is [0.10, 0.30, 0.50, 0.70]? ASSISTANT:"
  )
  processor = CLIPImageProcessor.from_pretrained(sources["hf-llava"])
  values = processor(Image.open(picture), return_tensors="pt")["pixel_values"]
  with torch.no_grad():
    out = theirs.generate(
      input_ids=torch.tensor([ids]), pixel_values=values, max_new_tokens=12, do_sample=False,
      attention_mask=torch.ones(1, len(ids), dtype=torch.long),
    )  # fmt: skip
  assert list(answer.ids) == out[0, len(ids) :].tolist()[: len(answer.ids)]


@pytest.mark.parametrize(
  "family, kind",
  [("hf-llama", LlamaForCausalLM), ("hf-clip", CLIPVisionModel),
   ("hf-llava", LlavaForConditionalGeneration)],
)  # fmt: skip
def test_the_way_back_is_what_transformers_loads(family, kind, sources, releases, tmp_path):
  out = tmp_path / "back"
  assert main(["convert", "--to-hf", str(releases[family]), "--to", str(out)]) == 0
  theirs = kind.from_pretrained(sources[family]).state_dict()
  model, info = kind.from_pretrained(out, output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"], info
  ours = model.state_dict()
  assert ours.keys() == theirs.keys()
  assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
  if family != "hf-clip":
    loaded = AutoTokenizer.from_pretrained(out)
    assert (
      loaded("a red star")["input_ids"]
      == AutoTokenizer.from_pretrained(sources[family])("a red star")["input_ids"]
    )


def test_names_on_the_way_back_are_the_published_ones(releases, tmp_path):
  out = tmp_path / "back"
  assert main(["convert", "--to-hf", str(releases["hf-clip"]), "--to", str(out)]) == 0
  assert all(name.startswith("vision_model.") for name in arrays(out))
  out = tmp_path / "llava"
  assert main(["convert", "--to-hf", str(releases["hf-llava"]), "--to", str(out)]) == 0
  kinds = {name.split(".")[0] for name in arrays(out)}
  assert kinds == {"vision_tower", "multi_modal_projector", "language_model"}


def test_a_part_of_a_trained_model_goes_back(tmp_path):
  """The shipped model has no twin in transformers; its decoder does not either (ReLU): named."""
  out = tmp_path / "back"
  assert main(["convert", "--to-hf", "tiny", "--to", str(out)]) == 2
  assert not out.exists()


def test_padding_rows_come_and_go(sources, tmp_path):
  source = sources["hf-llama"]
  out, back = tmp_path / "padded", tmp_path / "back"
  command = ["convert", "--from", "hf-llama", str(source), "--vocab-multiple", "96"]
  assert main([*command, "--to", str(out), "--check"]) == 0
  assert release.open_release(out).config.model.decoder.padded_vocab % 96 == 0
  assert main(["convert", "--to-hf", str(out), "--to", str(back)]) == 0
  theirs, ours = arrays(source), arrays(back)
  assert theirs.keys() == ours.keys()
  assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_dtypes_are_kept_or_cast(tmp_path):
  source = write_llama(tmp_path / "half", dtype=torch.float16)
  for dtype, want in (("keep", "float16"), ("bfloat16", "bfloat16")):
    out = tmp_path / dtype
    command = ["convert", "--from", "hf-llama", str(source), "--dtype", dtype, "--to", str(out)]
    assert main(command) == 0
    opened = release.open_release(out)
    assert {leaf.dtype.name for leaf in opened.leaves.values()} == {want}
    assert opened.config.model.compute_dtype == "bfloat16"


def refused(capsys, *words):
  assert main(["convert", *map(str, words)]) == 2
  return capsys.readouterr().err


def test_bad_sources_are_named_and_write_nothing(sources, tmp_path, capsys):
  out = tmp_path / "out"
  llama = sources["hf-llama"]
  to = ("--to", out)
  assert "no config.json there" in refused(capsys, "--from", "hf-llama", tmp_path, *to)
  assert "model_type" in refused(capsys, "--from", "hf-clip", llama, *to)
  assert "takes none" in refused(capsys, "--from", "hf-llama", llama, "--base", llama, *to)
  assert "--template" in refused(capsys, "--from", "hf-llama", llama, "--template", "chatml", *to)
  assert "--vocab-multiple 0" in refused(
    capsys, "--from", "hf-llama", llama, "--vocab-multiple", 0, *to
  )
  broken = shutil.copytree(llama, tmp_path / "broken")
  data = (broken / "model.safetensors").read_bytes()
  (broken / "model.safetensors").write_bytes(data[:-100])
  assert "100" in refused(capsys, "--from", "hf-llama", broken, *to)
  other = shutil.copytree(llama, tmp_path / "other")
  config = json.loads((other / "config.json").read_text())
  (other / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
  told = refused(capsys, "--from", "hf-llama", other, *to)
  assert "of another shape" in told and "model.layers.1.mlp.down_proj.weight" in told
  swapped = shutil.copytree(llama, tmp_path / "swapped")
  (swapped / "config.json").write_text(json.dumps(config | {"vocab_size": 2000}))
  assert "model.embed_tokens.weight" in refused(capsys, "--from", "hf-llama", swapped, *to)
  assert not out.exists()
  assert "not a release" in refused(capsys, "--to-hf", llama, *to)


def test_a_tokenizer_of_another_size(tmp_path, capsys):
  source = write_llama(tmp_path / "wide", vocab_size=5000)
  write_tokenizer(source)
  told = refused(capsys, "--from", "hf-llama", source, "--to", tmp_path / "out")
  assert "5,000 rows" in told and "not of one model" in told
  assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_leave_nothing(sources, tmp_path, capsys):
  from safetensors.numpy import save_file

  source = shutil.copytree(sources["hf-llama"], tmp_path / "nan")
  values = {name: np.array(a) for name, a in arrays(source).items()}
  values["model.layers.1.self_attn.k_proj.weight"][3, 4] = np.nan
  save_file(values, source / "model.safetensors")
  told = refused(capsys, "--from", "hf-llama", source, "--to", tmp_path / "out")
  assert "decoder/layers/k/kernel, layer 1" in told
  assert list(tmp_path.glob("*out*")) == [] and list(tmp_path.glob(".*out*")) == []


def test_what_stands_at_the_destination_is_kept(sources, releases, tmp_path, capsys):
  (tmp_path / "notes.txt").write_text("mine")
  told = refused(capsys, "--from", "hf-llama", sources["hf-llama"], "--to", tmp_path)
  assert "no release" in told
  told = refused(capsys, "--to-hf", releases["hf-llama"], "--to", tmp_path)
  assert "choose a new or empty folder" in told
  assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

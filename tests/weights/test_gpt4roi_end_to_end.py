"""GPT4RoI from its published files to an answer: delta, base and CLIP against torch, and the CLI.

The checkpoint is one of width 128, in the published layout: two torch shards with an index, a base
of its own in safetensors, CLIP in a third folder, and LLaMA's real vocabulary.
"""

import dataclasses
import importlib.util
import json
import lzma
import math
import os
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
import pytest
import sentencepiece
import sklearn
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

import regionjax
from regionjax import cli
from regionjax.conversation import user_to_internal
from regionjax.data.rows import single_batch
from regionjax.data.schema import Example, ImageRef, Turn
from regionjax.infer.chat import read_image
from regionjax.regions import Region
from regionjax.tokenizer import GPT4ROI_TOKENS
from regionjax.weights import convert, release, to_hf
from regionjax.weights.sources import open_weights

DATA = Path(__file__).parents[1] / "data"
PHOTO = Path(sklearn.__file__).parent / "datasets" / "images" / "china.jpg"  # 640 x 427
PIXELS = ((60, 40, 320, 400), (300.5, 10.25, 330, 420), (0, 0, 640, 427))
ASKED = "What differs between <region1> and <region2>, and what is <region3>?"
PROMPT = (  # the same, as the original writes it
  "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
  "helpful, detailed, and polite answers to the human's questions.\n\n"
  "### Human: The <image> provides an overview of the picture.\n"
  "What differs between region1 <bbox> and region2 <bbox>, and what is region3 <bbox>?\n"
  "### Assistant:"
)
WIDTH, LAYERS, ROWS, NEW_TOKENS = 128, 3, 32000, 32
MODULE = dict(width=128, position=48, token=96)
LLAMA = dict(
  hidden_size=WIDTH, intermediate_size=176, num_hidden_layers=LAYERS, num_attention_heads=4,
  rms_norm_eps=1e-6, max_position_embeddings=2048, tie_word_embeddings=False,
)  # fmt: skip
CLIP = dict(  # 11 blocks: regions are read from hidden states 1, 4, 7, 10
  hidden_size=WIDTH, intermediate_size=160, num_hidden_layers=11, num_attention_heads=4,
  image_size=224, patch_size=14, hidden_act="quick_gelu",
)  # fmt: skip
SHARDS = tuple(f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2))
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def load_twin():
  path = Path(__file__).with_name("gpt4roi_twin.py")
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


gpt4roi = load_twin()


def relative(a, b) -> float:
  a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
  assert a.shape == b.shape
  return float(np.abs(a - b).max() / np.abs(b).max())


# The published files.


@dataclasses.dataclass(frozen=True)
class Published:
  """Folders, and the model that they are made of.

  Attributes:
    base, delta, merged, clip: as they are downloaded.
    twin: the merged model in torch.
    state: the merged checkpoint.
  """

  base: Path
  delta: Path
  merged: Path
  clip: Path
  twin: "gpt4roi.Twin"
  state: Mapping[str, torch.Tensor]


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
  """Stronger weights than those of transformers, under which attention is nearly uniform."""
  draw = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, p in model.named_parameters():
      noise = torch.randn(p.shape, generator=draw)
      if p.ndim == 1:
        p.add_(0.1 * noise)
      else:
        p.copy_(noise if "embed_tokens" in name else noise / math.sqrt(p[0].numel()))
  return model.eval()


def llama_vocabulary() -> bytes:
  """LLaMA-1's tokenizer.model: scores fall with the id, as in every sentencepiece BPE."""
  text = lzma.decompress((DATA / "llama1_vocab.txt.xz").read_bytes()).decode()
  model = sentencepiece_model_pb2.ModelProto()
  for i, piece in enumerate(text.split("\n")):
    kind = 2 if i == 0 else 3 if i < 3 else 6 if i < 259 else 1  # unknown, control, byte, normal
    model.pieces.add(piece=piece, score=min(0, 259 - i), type=kind)
  model.trainer_spec.model_type = model.trainer_spec.BPE
  model.trainer_spec.byte_fallback = True
  model.normalizer_spec.name = "identity"
  model.normalizer_spec.remove_extra_whitespaces = False
  return model.SerializeToString()


def save_checkpoint(folder: Path, state: Mapping[str, torch.Tensor]) -> Path:
  """What the hub has of a GPT4RoI: two shards, their index, configuration and tokenizer."""
  folder.mkdir()
  names = list(state)
  homes = {name: SHARDS[2 * i // len(names)] for i, name in enumerate(names)}
  for shard in SHARDS:
    part = {name: state[name].clone() for name in names if homes[name] == shard}
    torch.save(part, folder / shard)
  index = {"metadata": {"total_size": 0}, "weight_map": homes}
  (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
  config = {k: v for k, v in LLAMA.items() if k != "tie_word_embeddings"} | dict(
    architectures=["LlavaLlamaForCausalLM"], model_type="llava", vocab_size=ROWS + 6,
    hidden_act="silu", bos_token_id=1, eos_token_id=2, pad_token_id=0, mm_hidden_size=WIDTH,
    mm_use_im_start_end=True, mm_vision_select_layer=-2, use_mm_proj=True, torch_dtype="float32",
    transformers_version="4.29.2",
  )  # fmt: skip
  (folder / "config.json").write_text(json.dumps(config))
  (folder / "tokenizer.model").write_bytes(llama_vocabulary())
  added = {token: ROWS + i for i, token in enumerate(GPT4ROI_TOKENS)}
  (folder / "added_tokens.json").write_text(json.dumps(added))
  return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Published:
  root = tmp_path_factory.mktemp("hub")
  base = randomise(LlamaForCausalLM(LlamaConfig(vocab_size=ROWS, **LLAMA)), seed=0)
  base.save_pretrained(root / "llama-7b")
  tower = CLIPVisionModel(CLIPVisionConfig(**CLIP, attn_implementation="eager"))
  llama = LlamaForCausalLM(
    LlamaConfig(vocab_size=ROWS + 6, **LLAMA, attn_implementation="eager")
  )  # fmt: skip
  twin = randomise(gpt4roi.Twin(tower, llama, **MODULE), seed=1)
  tower.save_pretrained(root / "clip")

  draw, delta = torch.Generator().manual_seed(2), {}
  state, plain = dict(twin.state()), base.state_dict()
  for name in plain:
    delta[name] = 0.05 * torch.randn(state[name].shape, generator=draw)
    if name in TABLES:
      delta[name][ROWS:] = state[name][ROWS:]
    state[name] = delta[name].clone()
    state[name][: len(plain[name])] += plain[name]
  llama.load_state_dict({name: state[name] for name in plain})
  frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": i for i in range(LAYERS)}
  delta |= {name: value for name, value in state.items() if name not in plain}
  delta |= {name: torch.zeros(WIDTH // 8) for name in frequencies}
  assert len(delta) == 368 - 10 * (32 - LAYERS)
  old = {name: torch.rand(WIDTH // 8, generator=draw) for name in frequencies}
  return Published(
    base=root / "llama-7b",
    delta=save_checkpoint(root / "GPT4RoI-7B-delta-V0", delta),
    merged=save_checkpoint(root / "GPT4RoI-7B", state | old),
    clip=root / "clip",
    twin=twin,
    state=state,
  )


def command(source: Path, to: Path, *options: str | Path) -> list[str]:
  words = ["convert", "--from", "gpt4roi", source, "--to", to, "--vocab-multiple", "64", *options]
  return [str(word) for word in words]


@pytest.fixture(scope="module")
def folder(published, tmp_path_factory) -> Path:
  """The release that the command line makes of delta, base and CLIP."""
  to = tmp_path_factory.mktemp("runs") / "gpt4roi"
  words = command(published.delta, to, "--base", published.base, "--clip", published.clip)
  assert cli.main([*words, "--check"]) == 0
  return to


# The oracle.


def test_the_twin_computes_the_originals_own_figures():
  """`region_module_128.npz` holds what the original module gives for two images."""
  with np.load(DATA / "region_module_128.npz") as z:
    golden = dict(z)
  module = gpt4roi.SpiModule(channels=128, width=128, position=256, token=1024, out=4096)
  state = module.state_dict()
  assert len(state) == 43
  for name, value in state.items():  # its parameters are drawn from their names
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    noise = torch.from_numpy(rng.standard_normal(tuple(value.shape), dtype=np.float32))
    if name.endswith("bias"):
      value.copy_(0.02 * noise)
    elif value.ndim == 1:
      value.copy_(1 + 0.1 * noise)
    else:
      value.copy_(noise / math.sqrt(value[0].numel()))
  for i in range(2):
    features = [torch.from_numpy(golden[f"features_{l}"][i]) for l in range(4)]
    maps = [x_nc.T.reshape(1, 128, 16, 16) for x_nc in features]
    boxes = torch.from_numpy(golden["boxes"][i])
    boxes = boxes[torch.isfinite(boxes).all(dim=1)]
    with torch.no_grad():
      tokens = module(maps, boxes)
    assert relative(tokens, golden[f"tokens_{i}"]) < 1e-4


@dataclasses.dataclass(frozen=True)
class Run:
  """One prompt through either program.

  Attributes:
    ids: of the prompt.
    pixels_hwc: the image after its pipeline, normalised.
    image_nd, regions_rd: what stands in the slots.
    logits_tv: of the whole prompt.
    generated: greedily.
  """

  ids: list[int]
  pixels_hwc: np.ndarray
  image_nd: np.ndarray
  regions_rd: np.ndarray
  logits_tv: np.ndarray
  generated: list[int]


@pytest.fixture(scope="module")
def theirs(published) -> Run:
  from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

  photo = Image.open(PHOTO)
  processor = CLIPImageProcessorPil(do_center_crop=False)
  squashed = torch.nn.functional.interpolate(
    processor(photo.convert("RGB"), return_tensors="pt")["pixel_values"],
    size=(224, 224), mode="bilinear", align_corners=False,
  )  # fmt: skip
  words = sentencepiece.SentencePieceProcessor(model_proto=llama_vocabulary())
  ids = gpt4roi.encode_slowly(PROMPT, words.encode)
  boxes = torch.tensor(PIXELS) / torch.tensor(photo.size * 2)
  twin = published.twin
  with torch.no_grad():
    image, regions = twin.see(squashed, boxes)
    x_1td = twin.splice(ids, image, regions)
    logits = twin.llama(inputs_embeds=x_1td).logits[0]
    swapped = twin.llama(inputs_embeds=twin.splice(ids, image, regions[[1, 0, 2]])).logits[0]
    assert relative(swapped, logits) > 0.01  # or the comparison below would show nothing
    generated = twin.greedy(x_1td, NEW_TOKENS)
  pixels = squashed[0].permute(1, 2, 0).numpy()
  return Run(ids, pixels, image.numpy(), regions.numpy(), logits.numpy(), generated)


@pytest.fixture(scope="module")
def chat(folder):
  return regionjax.load(folder)


@pytest.fixture(scope="module")
def ours(chat) -> Run:
  image = read_image(PHOTO)
  height, width = image.shape[:2]
  shares = np.array(PIXELS) / (width, height, width, height)
  regions = tuple(Region.box(*box) for box in shares)
  example = Example(
    images=(ImageRef("memory", "0", (width, height)),),
    regions=regions,
    region_images=(0, 0, 0),
    turns=(Turn("user", user_to_internal(ASKED, 3)),),
  )
  encoded = chat.renderer.prompt(example)
  batch = single_batch(encoded, example, [image], chat.config)

  @jax.jit
  def forward(params, batch):
    def run(model):
      features = model.encode_images(batch["images_bkhwc"])
      regions_brd = model.encode_regions(
        features.maps, batch["boxes_br4"], batch["box_image_br"], batch["region_kind_br"],
        batch["region_mask_br"], batch["region_cover_brn"],
      )  # fmt: skip
      x_btd = model.splice(batch["tokens_bt"], features.tokens_bknd, regions_brd)
      logits_btv, _ = model.decode(x_btd, batch["positions_bt"], batch["segment_ids_bt"])
      return features.tokens_bknd[0, 0], regions_brd[0], logits_btv[0]

    return chat.engine.model.apply({"params": params}, method=run)

  out = forward(chat.engine.params, batch)
  answer = chat.ask(PHOTO, ASKED, regions, max_new_tokens=NEW_TOKENS)
  pixels = batch["images_bkhwc"][0, 0]
  return Run(encoded.ids.tolist(), pixels, *map(np.asarray, out), list(answer.ids))


# What both say.


def test_ids_of_the_prompt(ours, theirs):
  assert ours.ids == theirs.ids
  assert [ours.ids.count(i) for i in (gpt4roi.PATCH, gpt4roi.BBOX)] == [256, 3]


def test_the_image_is_that_of_clips_processor_and_torch(chat, ours, theirs):
  std = np.array(chat.config.model.vision.std)
  assert np.abs((ours.pixels_hwc - theirs.pixels_hwc) * std).max() < 1 / 255


def test_image_and_region_tokens(ours, theirs):
  assert relative(ours.image_nd, theirs.image_nd) < 1e-4
  assert relative(ours.regions_rd, theirs.regions_rd) < 1e-4


def test_logits_of_the_whole_prompt(chat, ours, theirs):
  assert chat.config.model.compute_dtype == "float32"
  logits, padding = np.split(ours.logits_tv, [ROWS + 6], axis=1)
  assert relative(logits, theirs.logits_tv) < 1e-4
  assert padding.shape[1] == 58 and not np.exp(padding - logits.max()).any()


def test_32_greedy_tokens(ours, theirs):
  assert len(ours.generated) == NEW_TOKENS, "this random model happens to stop; take another seed"
  assert ours.generated == theirs.generated
  assert len(set(theirs.generated)) > NEW_TOKENS // 2


# Other ways to the same release, and back.


def values(folder: Path) -> dict[str, bytes]:
  """A release's files without configuration and card, which name the source."""
  files = [path for path in folder.iterdir() if path.name not in ("config.json", "README.md")]
  return {path.name: path.read_bytes() for path in files}


def make(source: Path, clip: Path, to: Path) -> Path:
  options = convert.Options(clip=clip, vocab_multiple=64)
  return convert.write(convert.arrange("gpt4roi", source, options), to)


def test_the_merged_checkpoint_gives_the_same_release(published, folder, tmp_path):
  merged = make(published.merged, published.clip, tmp_path / "merged")
  assert values(merged) == values(folder)
  assert {"model.safetensors", "spare.safetensors", "tokenizer.json"} <= values(folder).keys()
  a, b = release.open_release(folder).config, release.open_release(merged).config
  assert (a.model, a.data) == (b.model, b.data)
  assert dataclasses.replace(a.prompt, tokenizer="") == dataclasses.replace(b.prompt, tokenizer="")
  written = (a.prompt.template, a.prompt.mention, a.data.resize)
  assert written == ("vicuna_v0", "name+slot", "gpt4roi")


def test_the_way_back_gives_the_published_tensors(published, folder, tmp_path):
  assert cli.main(["convert", "--to-hf", str(folder), "--to", str(tmp_path / "back")]) == 0
  back = tmp_path / "back"
  with open_weights(back) as source:
    assert set(source) == set(published.state)
    for name, want in published.state.items():
      np.testing.assert_array_equal(source[name].array(), want.numpy(), err_msg=name)
  tower, info = CLIPVisionModel.from_pretrained(back / to_hf.TOWER, output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"]
  for name, want in published.twin.clip.state_dict().items():
    assert torch.equal(tower.state_dict()[name], want), name  # the unread block and norm, too
  again = make(back, back / to_hf.TOWER, tmp_path / "again")
  assert values(again) == values(folder)


# Bad input, through the command line.


def narrow_base(at: Path) -> None:
  other = LlamaForCausalLM(LlamaConfig(vocab_size=ROWS, **LLAMA | dict(hidden_size=64)))
  other.save_pretrained(at / "other")


def vicuna_as_base(at: Path) -> None:
  state = load_file(at / "base" / "model.safetensors")
  for name in TABLES:
    state[name] = torch.cat((state[name], state[name][:1]))
  put(at / "base", "model.safetensors", lambda path: save_file(state, path))


def narrow_clip(at: Path) -> None:
  CLIPVisionModel(CLIPVisionConfig(**CLIP | dict(hidden_size=64))).save_pretrained(at / "other")


class Malicious:
  def __reduce__(self):
    return os.system, ("touch ran",)


def malicious_shard(at: Path) -> None:
  state = {"model.norm.weight": torch.zeros(WIDTH), "lm_head.weight": Malicious()}
  put(at / "delta", SHARDS[1], lambda path: torch.save(state, path))


def truncated_shard(at: Path) -> None:
  data = (at / "delta" / SHARDS[1]).read_bytes()
  put(at / "delta", SHARDS[1], lambda path: path.write_bytes(data[: len(data) // 2]))


def truncated_base(at: Path) -> None:
  data = (at / "base" / "model.safetensors").read_bytes()
  put(at / "base", "model.safetensors", lambda path: path.write_bytes(data[:-1000]))


def missing_shard(at: Path) -> None:
  (at / "delta" / SHARDS[0]).unlink()


def diverged_shard(at: Path) -> None:
  """Seen only while it is written, when most of the release is."""
  state = torch.load(at / "delta" / SHARDS[1])
  state["model.spi_module.roi_align.updims.bias"][3] = math.nan
  put(at / "delta", SHARDS[1], lambda path: torch.save(state, path))


def mixed_up_tokens(at: Path) -> None:
  mixed = {token: ROWS + 5 - i for i, token in enumerate(GPT4ROI_TOKENS)}
  put(at / "delta", "added_tokens.json", lambda path: path.write_text(json.dumps(mixed)))


def nothing(at: Path) -> None:
  pass


def put(folder: Path, name: str, write: Callable[[Path], object]) -> None:
  """A file in the place of the link to the published one."""
  (folder / name).unlink()
  write(folder / name)


BASE, TOWER = {"--base": "base"}, {"--clip": "clip"}
BOTH = BASE | TOWER
REFUSALS = {  # (what is done to the folders, the source, options, the message)
  "no base": (nothing, "delta", TOWER, r"is a delta.*LLaMA-7B.*--base FOLDER"),
  "no clip": (nothing, "delta", BASE, r"without their vision tower.*--clip FOLDER"),
  "merged, with a base": (nothing, "merged", BOTH, r"merged.*is no delta.*without a base"),
  "base of another width": (
    narrow_base, "delta", {"--base": "other"} | TOWER, r"the base is 64 wide, the delta 128",
  ),
  "Vicuna as base": (
    vicuna_as_base, "delta", BOTH, r"A base with 32001 rows is not plain LLaMA \(Vicuna",
  ),
  "clip of another width": (
    narrow_clip, "delta", BASE | {"--clip": "other"}, r"mm_hidden_size=128: the CLIP.*64 wide",
  ),
  "malicious shard": (
    malicious_shard, "delta", BOTH, rf"{SHARDS[1]} holds \w+\.system.*nothing of it was run",
  ),
  "truncated shard": (truncated_shard, "delta", BOTH, rf"{SHARDS[1]}: truncated or damaged"),
  "truncated base": (truncated_base, "delta", BOTH, r"base/model.safetensors: truncated: 1000 of"),
  "missing shard": (missing_shard, "delta", BOTH, rf"{SHARDS[0]} is missing, with \d+ tensors"),
  "diverged": (diverged_shard, "delta", BOTH, r"regions/output/bias holds NaN.*\[3\]"),
  "mixed-up tokens": (mixed_up_tokens, "delta", BOTH, r"<bbox> has id 32003, expected 32002"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(published, tmp_path, monkeypatch, capsys, case):
  """Exit code 2, one message that names the cause, and nothing at the destination or beside it."""
  change, source, options, message = REFUSALS[case]
  at = tmp_path / "in"
  for name in ("base", "delta", "merged", "clip"):
    (at / name).mkdir(parents=True)
    for path in getattr(published, name).iterdir():
      (at / name / path.name).symlink_to(path)
  change(at)
  out = tmp_path / "out"
  out.mkdir()
  monkeypatch.chdir(tmp_path)
  words = [word for option, name in options.items() for word in (option, at / name)]
  assert cli.main(command(at / source, out / "gpt4roi", *words)) == 2
  error = capsys.readouterr().err
  assert re.search(message, error, re.DOTALL), error
  assert not list(out.iterdir())
  assert not (tmp_path / "ran").exists()

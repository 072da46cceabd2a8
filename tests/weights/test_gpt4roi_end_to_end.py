"""GPT4RoI from its published files to an answer, against torch; the merged checkpoint; and back.

`gpt4roi_published` writes the files, `gpt4roi_twin` is the model in torch.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import sentencepiece
import sklearn
import torch
from PIL import Image
from region_module import draw, figures
from transformers import CLIPVisionModel

import regionjax
from regionjax import cli
from regionjax.conversation import user_to_internal
from regionjax.data.rows import single_batch
from regionjax.data.schema import Example, ImageRef, Turn
from regionjax.infer.chat import read_image
from regionjax.regions import Region
from regionjax.weights import convert, release, to_hf
from regionjax.weights.sources import open_weights

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
ROWS, NEW_TOKENS = 32000, 32

pytestmark = pytest.mark.slow  # half a minute to make both models


def relative(a, b) -> float:
  a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
  assert a.shape == b.shape
  return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.fixture(scope="module")
def folder(published, tmp_path_factory) -> Path:
  """The release that the command line makes of delta, base and CLIP."""
  to = tmp_path_factory.mktemp("runs") / "gpt4roi"
  words = ["convert", "--from", "gpt4roi", published.delta, "--base", published.base]
  words += ["--clip", published.clip, "--to", to, "--vocab-multiple", "64", "--check"]
  assert cli.main([str(word) for word in words]) == 0
  return to


# The oracle.


def test_the_twin_computes_the_originals_own_figures(gpt4roi_twin):
  golden = figures()
  module = gpt4roi_twin.SpiModule(channels=128, width=128, position=256, token=1024, out=4096)
  state = module.state_dict()
  assert len(state) == 43
  for name, value in state.items():  # its parameters are drawn from their names
    value.copy_(torch.from_numpy(draw(name, tuple(value.shape))))
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
def theirs(published, gpt4roi_twin) -> Run:
  from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

  photo = Image.open(PHOTO)
  processor = CLIPImageProcessorPil(do_center_crop=False)
  squashed = torch.nn.functional.interpolate(
    processor(photo.convert("RGB"), return_tensors="pt")["pixel_values"],
    size=(224, 224), mode="bilinear", align_corners=False,
  )  # fmt: skip
  words = sentencepiece.SentencePieceProcessor(model_proto=published.vocabulary)
  ids = gpt4roi_twin.encode_slowly(PROMPT, words.encode)
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


def test_ids_of_the_prompt(ours, theirs, gpt4roi_twin):
  assert ours.ids == theirs.ids
  assert [ours.ids.count(i) for i in (gpt4roi_twin.PATCH, gpt4roi_twin.BBOX)] == [256, 3]


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

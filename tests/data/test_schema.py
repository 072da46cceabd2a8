"""Example serves each of the data sets that the project is for, without change."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from regionjax.config import ModelConfig, PromptConfig
from regionjax.data.schema import Example, ImageRef, Turn
from regionjax.mentions import escape
from regionjax.regions import Region
from regionjax.renderer import Renderer
from regionjax.tokenizer import load_tokenizer


def _photo(name: str, width: int, height: int) -> ImageRef:
  return ImageRef("file", name, (width, height))


def _ask(question: str, answer: str, task: str = "") -> tuple[Turn, Turn]:
  return Turn("user", question), Turn("assistant", answer, supervise=True, task=task)


def _xywh(x: float, y: float, w: float, h: float, size: tuple[int, int]) -> Region:
  return Region.box(x, y, x + w, y + h, size=size)


def coco() -> Example:
  """One turn per box; a crowd's run lengths are a mask."""
  size = (500, 375)
  crowd = np.zeros((375, 500), bool)
  crowd[100:160, 40:300] = True
  regions = (_xywh(333.72, 284.51, 23.8, 32.21, size), Region.from_mask(crowd))
  return Example(
    images=(_photo("val2017/000000547503.jpg", *size),),
    regions=regions,
    region_images=(0, 0),
    turns=_ask("What is {region:0}?", "bottle") + _ask("What is {region:1}?", "person"),
    meta={"source": "coco", "annotation_ids": [84596, 900100087038]},
  )


def refcoco() -> Example:
  """Both directions: an expression for a box, and a box for an expression."""
  region = _xywh(104.2, 51.0, 220.5, 300.1, (640, 428))
  return Example(
    images=(_photo("COCO_train2014_000000133436.jpg", 640, 428),),
    regions=(region,),
    region_images=(0,),
    turns=_ask("Describe {region:0}.", "the man in the red hat", "refer")
    + _ask("Where is the man in the red hat?", "{region:0}", "ground"),
    references=("the man in the red hat", "man wearing a red cap", "left guy"),
    meta={"source": "refcocog", "ref_id": 1, "split": "umd/val"},
  )


def visual_genome() -> Example:
  size = (800, 600)
  return Example(
    images=(_photo("VG_100K/1.jpg", *size),),
    regions=(_xywh(421, 57, 82, 139, size), _xywh(194, 372, 182, 109, size)),
    region_images=(0, 0),
    turns=_ask("Describe {region:0}.", "the clock is green in colour")
    + _ask("How do {region:0} and {region:1} relate?", "the clock stands over the shade"),
    meta={"source": "visual_genome", "region_ids": [1382, 1383]},
  )


def flickr30k_entities() -> Example:
  """A grounded caption: one phrase has two boxes, and a phrase without a box stands alone."""
  size = (333, 500)
  corners = [(159, 125, 219, 335), (197, 110, 261, 373), (1, 220, 211, 473), (276, 215, 332, 337)]
  return Example(
    images=(_photo("1000092795.jpg", *size),),
    regions=tuple(Region.box(*c, size=size) for c in corners),
    region_images=(0,) * 4,
    turns=_ask(
      "Describe the image with boxes.",
      "Two men {region:0}{region:1} are outside near many bushes {region:2}{region:3} and chat",
    ),
    meta={"phrases": [["Two men", [0, 1]], ["many bushes", [2, 3]], ["chat", []]]},
  )


def vcr() -> Example:
  """All objects are listed first, then named in words; four choices, then four rationales."""
  size = (1920, 797)
  boxes = [(10, 20, 400, 790), (500, 60, 800, 790), (900, 300, 1800, 700)]
  choices = (
    "No, 1 lives nowhere close.",
    "Yes, 1 works there.",
    "No, 1 is a visitor.",
    "Yes, 3 is.",
  )
  listed = "{region:0} is a person, {region:1} is a person, {region:2} is a car. "
  options = " ".join(f"({'ABCD'[k]}) {c}" for k, c in enumerate(choices))
  return Example(
    images=(_photo("lsmdc_1054/00.01.46.736-00.01.50.168@0.jpg", *size),),
    regions=tuple(Region.box(*b, size=size) for b in boxes),
    region_images=(0, 0, 0),
    turns=_ask(listed + "Does person {region:0} live in this house? " + options, "(C)", "choice"),
    choices=choices,
    answer=2,
    references=("(C)",),
    meta={"source": "vcr", "split": "val", "answer_orig": "No, 1 is a visitor."},
  )


def llava() -> Example:
  """No regions; the image stands at the end of the question; two turns."""
  return Example(
    images=(_photo("coco/train2017/000000033471.jpg", 640, 480),),
    turns=_ask("What are the colors of the bus in the image?\n{image:0}", "White and red.")
    + _ask("What feature can be seen on the back of the bus?", "An advertisement."),
    meta={"source": "llava_150k", "id": "000000033471"},
  )


def objects365() -> Example:
  size = (768, 512)
  return Example(
    images=(_photo("images/v1/patch8/objects365_v1_00420917.jpg", *size),),
    regions=(_xywh(0.0, 12.5, 768.0, 499.5, size),),
    region_images=(0,),
    turns=_ask("{region:0}: what is it?", "Cabinet/shelf"),
  )


def coco_text() -> Example:
  """Any string may be the answer, even one that looks like markup."""
  size = (640, 480)
  return Example(
    images=(_photo("COCO_train2014_000000217925.jpg", *size),),
    regions=(_xywh(20.5, 30.1, 80.0, 22.2, size),),
    region_images=(0,),
    turns=_ask("Read {region:0}.", escape("{region:0} </s> <bbox>"), "read"),
    meta={"legibility": "legible", "class": "machine printed"},
  )


def hiertext() -> Example:
  """Words, lines and paragraphs as polygons of four or more vertices."""
  size = (1024, 768)
  word = Region.polygon([(10, 10), (90, 14), (89, 40), (50, 38), (9, 36)], size=size)
  line = Region.polygon([(10, 10), (400, 20), (398, 48), (9, 36)], size=size)
  return Example(
    images=(_photo("train/0006289e4f292bcd.jpg", *size),),
    regions=(word, line),
    region_images=(0, 0),
    turns=_ask("Read {region:0}.", "Tweed") + _ask("Read the line {region:1}.", "Tweed & Sons"),
  )


def pointqa() -> Example:
  """A point in the question; the same word names several objects of the image."""
  size = (640, 480)
  return Example(
    images=(_photo("VG_100K/2377371.jpg", *size),),
    regions=(Region.point(190, 249, size=size), _xywh(150, 200, 90, 120, size)),
    region_images=(0, 0),
    turns=_ask("How many of these animals are there? {region:0}", "3", "count"),
    references=("3", "three"),
    meta={"obj_type": "sheep", "object_region": 1},
  )


def regionchat() -> Example:
  """Several turns, each tied to regions; an answer names a place."""
  boxes = [(0.1, 0.2, 0.4, 0.9), (0.5, 0.1, 0.9, 0.6)]
  return Example(
    images=(_photo("VG_100K_2/7.jpg", 500, 333),),
    regions=tuple(Region.box(*b) for b in boxes),
    region_images=(0, 0),
    turns=_ask("What is the man in {region:0} doing?", "He holds the umbrella {region:1}.")
    + _ask("Is {region:1} open, and does {region:0} hold it?", "Yes, it is open and he holds it."),
  )


def vqa() -> Example:
  """Ten people's answers; test splits without one are asked without supervision."""
  return Example(
    images=(_photo("train_images/003a8ae2ef43b901.jpg", 1024, 664),),
    turns=(Turn("user", "what is the brand of this camera?"), Turn("assistant", "", task="vqa")),
    references=("dakota", "dakota", "nous les gosses", "unanswerable"),
    meta={"question_id": 34602},
  )


def nlvr_like() -> Example:
  """Two images, a region in each."""
  return Example(
    images=(_photo("left.png", 300, 200), _photo("right.png", 200, 300)),
    regions=(Region.box(0.1, 0.1, 0.5, 0.5), Region.scribble([(0.2, 0.2), (0.8, 0.7)])),
    region_images=(0, 1),
    turns=_ask("{image:0} {image:1} Is {region:0} the same dog as {region:1}?", "no"),
  )


def text_only() -> Example:
  return Example(
    turns=(
      Turn("system", "Answer briefly."),
      *_ask("What is 2 + 2?", "4"),
      *_ask("And twice that?", "8"),
    )
  )


FORMS = (
  coco, refcoco, visual_genome, flickr30k_entities, vcr, llava, objects365, coco_text, hiertext,
  pointqa, regionchat, vqa, nlvr_like, text_only,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
  return load_tokenizer("tiny")


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("region", ["pool", "text", "pool+text", "none"])
def test_each_data_set_becomes_ids(form, region, tokenizer):
  example = form()
  model = ModelConfig.tiny(region)
  renderer = Renderer(PromptConfig(template="plain"), model, tokenizer)
  encoded = renderer.encode(example)
  supervised = [turn for turn in example.turns if turn.supervise]
  assert len(encoded.answers) == len(supervised)
  assert encoded.image_slots == tuple(range(len(example.images)))
  asked = {
    k for t in example.turns for k in range(len(example.regions))
    if t.role == "user" and f"{{region:{k}}}" in t.text
  }  # fmt: skip
  assert set(encoded.region_slots) == (asked if region.startswith("pool") else set())
  if supervised:
    assert encoded.mask.any()


def test_a_grounded_answer_holds_every_box_of_its_phrase(tokenizer):
  renderer = Renderer(PromptConfig(template="plain"), ModelConfig.tiny("text"), tokenizer)
  encoded = renderer.encode(flickr30k_entities())
  answer = tokenizer.decode(encoded.ids[encoded.mask].tolist())
  assert answer.count("[") == 4


def test_text_that_looks_like_a_region_stays_text(tokenizer):
  renderer = Renderer(PromptConfig(template="plain"), ModelConfig.tiny("pool"), tokenizer)
  encoded = renderer.encode(coco_text())
  assert encoded.region_slots == (0,)
  answer = tokenizer.decode(encoded.ids[encoded.mask].tolist())
  assert answer.strip().startswith("{region:0} </s> <bbox>")


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"region_images": ()}, "2 regions but 0 region_images"),
    ({"region_images": (0, 1)}, "names image 1, but there are 1 images"),
    ({"turns": (Turn("user", "What is {region:2}?"),)}, "mentions {region:2} but there are 2"),
    ({"turns": (Turn("user", "{image:1} What?"),)}, "mentions {image:1} but there are 1"),
    ({"turns": (Turn("human", "Hello"),)}, "'human': expected user, assistant or system"),
    ({"choices": ("a", "b"), "answer": 2}, "answer 2 is not one of 2 choices"),
  ],
)
def test_what_does_not_fit_together_is_refused(change, said):
  with pytest.raises(ValueError, match=said.replace("{", r"\{").replace("?", r"\?")):
    dataclasses.replace(coco(), **change)

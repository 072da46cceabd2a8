"""COCO-format files: what is asked of them, and what they get away with."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regionjax.config import SourceConfig
from regionjax.data import phrases
from regionjax.data.errors import DataError
from regionjax.data.schema import ImageRef
from regionjax.data.sources import load_image, make_source
from regionjax.data.sources.coco import CocoSource
from regionjax.images import ImageError
from regionjax.mentions import escape

PHOTOS = Path(__file__).parent / "photos"
WIDTH, HEIGHT = 60, 40


@pytest.fixture
def folder(tmp_path):
  for name in ("a.jpg", "b.jpg"):
    Image.new("RGB", (WIDTH, HEIGHT), "grey").save(tmp_path / name)
  return tmp_path


def _image(image_id, name="a.jpg", **more):
  return {"id": image_id, "file_name": name, "width": WIDTH, "height": HEIGHT, **more}


def _box(bbox=(5, 5, 20, 10), **more):
  return {"id": 1, "image_id": 1, "category_id": 1, "bbox": list(bbox), **more}


def _write(folder, annotations, *, images=None, categories=None, encoding="utf-8", **more):
  path = folder / "boxes.json"
  data = {
    "images": images if images is not None else [_image(1)],
    "annotations": annotations,
    "categories": categories if categories is not None else [{"id": 1, "name": "cat"}],
    **more,
  }
  path.write_text(json.dumps(data), encoding=encoding)
  return path


def _open(folder, annotations, *, strict=False, text="auto", references=("box",), **more):
  path = _write(folder, annotations, **more)
  return CocoSource(path, folder, strict=strict, text=text, references=references)


def test_photographs_become_conversations():
  source = make_source(
    SourceConfig(
      "coco",
      args={
        "annotations": str(PHOTOS / "annotations.json"), "images": str(PHOTOS), "strict": True,
        "max_regions": 3,
      },
    )
  )  # fmt: skip
  examples = [source[i] for i in range(len(source))]
  data = json.loads((PHOTOS / "annotations.json").read_text())
  names = {c["id"]: c["name"] for c in data["categories"]}
  assert source.report.used == {"images": 8, "boxes": len(data["annotations"])}
  asked = [turn.text for e in examples for turn in e.turns if turn.role == "assistant"]
  # Images with more than three boxes give several examples: no box is lost.
  assert sorted(asked) == sorted(names[a["category_id"]] for a in data["annotations"])
  forms = {form.replace("{r}", "") for form in phrases.NAME}
  for example in examples:
    assert len(example.regions) <= 3 and len(example.turns) == 2 * len(example.regions)
    for k, turn in enumerate(example.turns[::2]):
      assert turn.text.replace(f"{{region:{k}}}", "") in forms
    image = load_image(example.images[0])
    assert image.shape[1::-1] == example.images[0].size
  assert source[1] == source[1]


def test_boxes_lie_where_the_file_says():
  data = json.loads((PHOTOS / "annotations.json").read_text())
  source = CocoSource(PHOTOS / "annotations.json", PHOTOS, max_regions=1)
  found = {tuple(np.round(source[i].regions[0].box_xyxy, 4)) for i in range(len(source))}
  sizes = {i["id"]: (i["width"], i["height"]) for i in data["images"]}
  for a in data["annotations"]:
    (x, y, w, h), (width, height) = a["bbox"], sizes[a["image_id"]]
    right, bottom = min((x + w) / width, 1), min((y + h) / height, 1)
    assert tuple(np.round([x / width, y / height, right, bottom], 4)) in found


def test_captions_are_answers_where_there_are_any(folder):
  records = [_box(caption=" a  grey cat\n"), _box((1, 1, 9, 9), id=2)]
  source = _open(folder, records)
  assert sorted(t.text for t in source[0].turns[1::2]) == ["a grey cat", "cat"]
  assert {t.task for t in source[0].turns[1::2]} == {"caption", "name"}
  by_category = _open(folder, records, text="category")
  assert {t.text for t in by_category[0].turns[1::2]} == {"cat"}
  by_caption = _open(folder, records, text="caption")
  assert len(by_caption[0].regions) == 1
  assert by_caption.report.counts["box without caption"] == 1


def test_markup_in_a_caption_stays_text(folder):
  source = _open(folder, [_box(caption="{region:0} and {region:7}")])
  assert source[0].turns[1].text == escape("{region:0} and {region:7}")


DEFECTS = {
  "missing image": dict(images=[_image(1), _image(2, "gone.jpg")], annotations=[_box()]),
  "box of a missing image": dict(
    images=[_image(1), _image(2, "gone.jpg")], annotations=[_box(), _box(image_id=2)]
  ),
  "unknown image id": dict(annotations=[_box(), _box(image_id=77)]),
  "unknown category id": dict(annotations=[_box(), _box((1, 1, 5, 5), category_id=99)]),
  "zero-area box": dict(annotations=[_box(), _box((5, 5, 0, 10))]),
  "box outside the image": dict(annotations=[_box(), _box((70, 5, 10, 10))]),
  "box clipped at the border (used)": dict(annotations=[_box((-8, 5, 30, 60))]),
  "malformed box": dict(
    annotations=[_box(), *(_box(b) for b in ((1, 2, 3), (1, 2, "x", 4), (0, 0, float("nan"), 4)))]
  ),
  "image id used twice": dict(images=[_image(1), _image(1, "b.jpg")], annotations=[_box()]),
}  # fmt: skip


@pytest.mark.parametrize("reason", list(DEFECTS))
def test_defects_are_skipped_and_counted_or_an_error(reason, folder):
  source = _open(folder, **DEFECTS[reason])
  assert len(source) == 1 and len(source[0].regions) == 1
  assert source.report.counts[reason] >= 1
  assert reason in str(source.report) and "first: " in str(source.report)
  with pytest.raises(DataError, match="defect") as caught:
    _open(folder, strict=True, **DEFECTS[reason])
  assert reason in str(caught.value)


def test_opening_a_faulty_file_again_warns_once(folder, caplog):
  with caplog.at_level(logging.WARNING):
    for _ in range(2):
      source = _open(folder, [_box(), _box((5, 5, 0, 10)), _box(image_id=77)])
      assert source.report.defects == 2
  (said,) = caplog.messages
  assert said.startswith(f"{folder / 'boxes.json'}: 2 faulty records")
  caplog.clear()
  _open(folder, [_box(), _box(id=2)])  # a duplicate is no fault
  assert caplog.messages == []


def test_clipped_boxes_end_at_the_border(folder):
  source = _open(folder, [_box((-8, 5, 30, 60))])
  assert source[0].regions[0].box_xyxy == pytest.approx((0, 5 / HEIGHT, 22 / WIDTH, 1))
  within_rounding = _open(folder, [_box((-0.4, 0, 30, HEIGHT + 0.6))], strict=True)
  assert within_rounding[0].regions[0].box_xyxy == pytest.approx((0, 0, 29.6 / WIDTH, 1))


def test_legitimate_oddities_pass_under_strict(folder):
  crowd = _box(iscrowd=1, segmentation={"size": [HEIGHT, WIDTH], "counts": [10, 2390]})
  annotations = [_box(id=900100087038, segmentation=[]), _box(id=2), crowd]
  images = [_image(1, width=str(WIDTH), height=str(HEIGHT)), _image(2, "b.jpg")]
  source = _open(
    folder, annotations, images=images, strict=True, info=None, licenses=[], encoding="utf-8-sig"
  )
  assert len(source) == 1 and len(source[0].regions) == 1
  assert source.report.counts == {"crowd": 1, "duplicate": 1, "image without boxes": 1}


def test_ids_may_be_strings_or_numbers(folder):
  source = _open(
    folder, [_box(image_id="1", category_id="1", bbox=["5", "5", "20", "10"])], strict=True
  )
  assert source[0].turns[1].text == "cat"


def test_files_are_found_under_other_names(folder):
  names = {
    1: {"file_name": "train2014/a.jpg"},
    2: {"file_name": "COCO_train2014_b.jpg"},
    3: {"file_name": None, "coco_url": "http://images.cocodataset.org/val2017/a.jpg"},
  }
  images = [_image(k) | extra for k, extra in names.items()]
  source = _open(folder, [_box(image_id=k) for k in names], images=images, strict=True)
  assert [Path(source[i].images[0].key).name for i in range(3)] == ["a.jpg", "b.jpg", "a.jpg"]


def test_sizes_come_from_the_file_when_not_given(folder):
  lying = Image.new("RGB", (HEIGHT, WIDTH))
  exif = Image.Exif()
  exif[0x0112] = 6  # turn by a quarter to see it upright
  lying.save(folder / "lying.jpg", exif=exif)
  images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "lying.jpg", "width": 0}]
  source = _open(folder, [_box(), _box(image_id=2)], images=images, strict=True)
  for i in range(2):
    assert source[i].images[0].size == (WIDTH, HEIGHT)
    assert load_image(source[i].images[0]).shape == (HEIGHT, WIDTH, 3)


def test_references_follow_the_segmentation(folder):
  ring = [5, 5, 25, 5, 5, 15]  # the upper left half of the box
  mask = np.zeros((HEIGHT, WIDTH), bool)
  mask[5:15, 5:10] = True
  flat = mask.ravel(order="F").astype(int)
  runs = np.diff([0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]).tolist()
  rle = {"size": [HEIGHT, WIDTH], "counts": runs}
  kinds = ("box", "point", "polygon", "mask")
  for segmentation, inside in (([ring], None), (rle, mask)):
    for kind in kinds:
      source = _open(folder, [_box(segmentation=segmentation)], references=(kind,))
      region = source[0].regions[0]
      assert region.kind == kind == source[0].meta["turns"][0]["ref"]
      if kind == "point":
        x, y = region.points[0]
        x, y = x * WIDTH, y * HEIGHT
        assert inside[int(y), int(x)] if inside is not None else (x - 5) / 20 + (y - 5) / 10 < 1.05
      if kind == "mask" and inside is not None:
        assert (region.rasterize(HEIGHT, WIDTH) == inside).all()
  for broken in (None, [], [[1, 2]], [["x"] * 6], {"size": [4, 4], "counts": [1]}, "?"):
    source = _open(folder, [_box(segmentation=broken)], references=("mask", "polygon"))
    assert source[0].regions[0].kind == "box"


def test_chance_counts_the_other_boxes(folder):
  cats = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
  records = [_box((i, i, 9, 9), id=i, category_id=1 + (i == 3)) for i in range(4)]
  source = _open(folder, records, categories=cats)
  for turn, note in zip(source[0].turns[1::2], source[0].meta["turns"]):
    assert note["region_dependent"]
    assert note["chance"] == (0.75 if turn.text == "cat" else 0.25)


@pytest.mark.parametrize(
  ("content", "said"),
  [
    ("{", "not a JSON file"),
    ("[]", "got a JSON list"),
    ('{"images": []}', "no list 'annotations'"),
    ('{"images": [], "annotations": []}', "no box of this file can be used"),
  ],
)
def test_other_files_are_refused(content, said, folder):
  path = folder / "boxes.json"
  path.write_text(content)
  with pytest.raises(DataError, match=said):
    CocoSource(path, folder)


def test_wrong_arguments_are_named(folder):
  path = _write(folder, [_box()])
  with pytest.raises(DataError, match="No such file"):
    CocoSource(folder / "no.json", folder)
  with pytest.raises(DataError, match="no such folder"):
    CocoSource(path, folder / "no")
  with pytest.raises(DataError, match="expected one of auto, category, caption"):
    CocoSource(path, folder, text="label")
  with pytest.raises(DataError, match="at least 1"):
    CocoSource(path, folder, max_regions=0)
  with pytest.raises(DataError, match="expected some of box, point"):
    CocoSource(path, folder, references=["circle"])


def test_images_that_are_broken_or_of_another_shape(folder):
  source = _open(folder, [_box()])
  whole = (folder / "a.jpg").read_bytes()
  (folder / "a.jpg").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ImageError, match=r"a\.jpg"):
    load_image(source[0].images[0])
  Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "a.jpg")
  with pytest.raises(DataError, match="40x60 pixels, but its annotations are for 60x40"):
    load_image(source[0].images[0])
  shutil.copy(PHOTOS / "cat.jpg", folder / "a.jpg")
  assert load_image(ImageRef("file", str(folder / "a.jpg"))).shape[2] == 3

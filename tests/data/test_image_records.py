"""Pictures in ArrayRecord files: the same pixels as from the folder, and what can go wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from regionjax import cli
from regionjax.data import image_records
from regionjax.data.errors import DataError
from regionjax.data.image_records import ImageRecords, pack_images, read_record
from regionjax.data.schema import ImageRef
from regionjax.data.sources import load_image
from regionjax.data.sources.coco import CocoSource
from regionjax.images import ImageError

PHOTOS = Path(__file__).parent / "photos"


@pytest.fixture
def packed(tmp_path):
  out = tmp_path / "packed"
  pack_images(PHOTOS, out, files=3)
  image_records._reader.cache_clear()  # a test may replace the files
  return out


def _source(images, annotations=PHOTOS / "annotations.json"):
  return CocoSource(annotations, images, strict=True)


def test_packed_pictures_give_the_same_examples_and_pixels(packed):
  plain, records = _source(PHOTOS), _source(packed)
  assert len(records) == len(plain) and records.report.used == plain.report.used
  for i in range(len(plain)):
    ours, theirs = records[i], plain[i]
    assert ours.turns == theirs.turns and ours.regions == theirs.regions
    assert [r.kind for r in ours.images] == ["record"]
    assert ours.images[0].size == theirs.images[0].size
    np.testing.assert_array_equal(load_image(ours.images[0]), load_image(theirs.images[0]))


def test_the_verb_packs_subfolders_and_names_what_it_leaves_out(tmp_path, capsys):
  folder, out = tmp_path / "in", tmp_path / "out"
  (folder / "train2017").mkdir(parents=True)
  shutil.copy(PHOTOS / "cat.jpg", folder / "train2017")
  shutil.copy(PHOTOS / "china.jpg", folder)
  (folder / "notes.txt").write_text("no picture")
  assert cli.main(["pack", str(folder), str(out), "--files", "5"]) == 0
  said = capsys.readouterr().out
  assert "packed 2 pictures" in said and "first notes.txt" in said
  # Not more files than pictures.
  assert len(list(out.glob("*.array_record"))) == 2
  records = ImageRecords(out)
  assert records.sizes == {"china.jpg": (256, 171), "train2017/cat.jpg": (256, 170)}
  data = (PHOTOS / "cat.jpg").read_bytes()
  assert read_record(records.key("train2017/cat.jpg")) == data


def test_sizes_come_from_the_index_where_the_annotations_have_none(packed, tmp_path):
  data = json.loads((PHOTOS / "annotations.json").read_text())
  for image in data["images"]:
    del image["width"], image["height"]
  path = tmp_path / "boxes.json"
  path.write_text(json.dumps(data))
  with_sizes, without = _source(packed), _source(packed, path)
  assert [without[i].images for i in range(4)] == [with_sizes[i].images for i in range(4)]


def test_a_picture_that_is_not_packed_is_missing(packed, tmp_path):
  data = json.loads((PHOTOS / "annotations.json").read_text())
  data["images"][0]["file_name"] = "elsewhere.jpg"
  path = tmp_path / "boxes.json"
  path.write_text(json.dumps(data))
  with pytest.raises(DataError, match=r"missing image +1 .*elsewhere\.jpg"):
    _source(packed, path)


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda p: p.unlink(), "no such file; check that its folder is complete"),
    (lambda p: p.write_bytes(p.read_bytes()[:-70_000]), "not a whole ArrayRecord file"),
    (lambda p: p.write_bytes(b""), "not a whole ArrayRecord file"),
  ],
)
def test_a_damaged_file_is_told_when_it_is_read(packed, change, message):
  ref = _source(packed)[0].images[0]
  change(Path(ref.key.rpartition("#")[0]))
  for _ in range(2):  # and again: the failure isn't remembered as a reader
    with pytest.raises(DataError, match=message):
      load_image(ref)


def test_damaged_bytes_and_foreign_records_are_told(packed, tmp_path):
  records = ImageRecords(packed)
  path, _, number = records.key("cat.jpg").rpartition("#")
  data = bytearray(Path(path).read_bytes())
  at = bytes(data).index((PHOTOS / "cat.jpg").read_bytes()[100:200])
  data[at] ^= 0xFF
  Path(path).write_bytes(data)
  with pytest.raises(DataError, match="damaged"):
    read_record(f"{path}#{number}")
  with pytest.raises(DataError, match="record 99 is asked for"):
    read_record(f"{path}#99")
  with pytest.raises(DataError, match="expected FILE#NUMBER"):
    read_record(path)
  (tmp_path / "bad").mkdir()
  (tmp_path / "bad" / "a.jpg").write_bytes((PHOTOS / "cat.jpg").read_bytes()[:3000])
  pack_images(tmp_path / "bad", tmp_path / "badpack")  # its header is sound
  key = ImageRecords(tmp_path / "badpack").key("a.jpg")
  with pytest.raises(ImageError, match=r"record .*#0.*truncated or damaged"):
    load_image(ImageRef("record", key))


def test_an_index_that_cannot_be_used_is_told(packed):
  index = packed / image_records.INDEX
  good = json.loads(index.read_text())
  next(packed.glob("*00001*")).unlink()
  with pytest.raises(DataError, match="1 files that are not there"):
    _source(packed)
  for bad in ("{", "[]", json.dumps(good | {"format": "x"}), json.dumps(good | {"files": [1]})):
    index.write_text(bad)
    with pytest.raises(DataError, match="again"):
      _source(packed)


def test_what_cannot_be_packed_is_refused(tmp_path):
  with pytest.raises(DataError, match="no such folder"):
    pack_images(tmp_path / "nowhere", tmp_path / "out")
  (tmp_path / "a.txt").write_text("x")
  with pytest.raises(DataError, match="none of its 1 files is a picture"):
    pack_images(tmp_path, tmp_path / "out")
  with pytest.raises(DataError, match="not empty"):
    pack_images(PHOTOS, tmp_path)
  with pytest.raises(DataError, match="at least 1"):
    pack_images(PHOTOS, tmp_path / "out", files=0)

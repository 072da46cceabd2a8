"""GGUF files: values of each type, and everything that is no sound GGUF file by name."""

import json
import struct
import sys

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from regionjax.weights.gguf_file import open_gguf
from regionjax.weights.gguf_header import Fields
from regionjax.weights.tensors import WeightsError

VALUES = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)


def write(path, tensors, fields=(), arch="llama"):
  """Writes {name: (array, type)} with metadata {key: (value, type)}."""
  writer = gguf.GGUFWriter(path, arch)
  for key, (value, kind) in dict(fields).items():
    writer.add_key_value(key, value, kind)
  for name, (array, kind) in tensors.items():
    writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.fixture
def small(tmp_path):
  """Three tensors, some metadata."""
  return write(
    tmp_path / "small.gguf",
    {
      "a": (VALUES, Kind.Q8_0),
      "b": (VALUES[0], Kind.F32),
      "c": (np.stack([VALUES, 2 * VALUES]), Kind.Q4_1),
    },
    {
      "x.count": (7, gguf.GGUFValueType.UINT32),
      "x.share": (1e-5, gguf.GGUFValueType.FLOAT32),
      "x.on": (True, gguf.GGUFValueType.BOOL),
      "x.name": ("é", gguf.GGUFValueType.STRING),
      "x.words": (["a", "", "c d"], gguf.GGUFValueType.ARRAY),
      "x.numbers": ([1.5, -2.0], gguf.GGUFValueType.ARRAY),
    },
  )


def q8_0_by_hand(blocks):
  """Per 32 values a scale in f16 and 32 signed bytes."""
  rows = blocks.reshape(-1, 34)
  return rows[:, :2].view(np.float16).astype(np.float32) * rows[:, 2:].view(np.int8)


def q4_1_by_hand(blocks):
  """Per 32 values a scale and a minimum in f16, and 16 bytes: low halves first, then high ones."""
  rows = blocks.reshape(-1, 20)
  scale, least = (rows[:, k : k + 2].view(np.float16).astype(np.float32) for k in (0, 2))
  return scale * np.concatenate([rows[:, 4:] & 15, rows[:, 4:] >> 4], axis=1) + least


@pytest.mark.parametrize(
  ("kind", "by_hand"), [(Kind.Q8_0, q8_0_by_hand), (Kind.Q4_1, q4_1_by_hand)]
)
def test_quantised_values(tmp_path, kind, by_hand):
  path = write(tmp_path / "x.gguf", {"first": (2 * VALUES, kind), "w": (VALUES, kind)})
  want = by_hand(gguf.quants.quantize(VALUES, kind)).reshape(VALUES.shape)
  got = open_gguf(path)["w"].array()
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got, want)
  assert np.abs(got - VALUES).max() < 0.3


@pytest.mark.parametrize(
  ("kind", "error"),
  [(Kind.F32, 0), (Kind.F16, 2e-3), (Kind.BF16, 2e-2), (Kind.Q4_0, 0.5), (Kind.Q5_0, 0.2),
   (Kind.Q5_1, 0.15), (Kind.Q8_0, 0.02)],
)  # fmt: skip
def test_every_plain_type_comes_as_float32(tmp_path, kind, error):
  tensor = open_gguf(write(tmp_path / "x.gguf", {"w": (VALUES, kind)}))["w"]
  assert (tensor.shape, tensor.dtype) == ((6, 64), np.float32)
  array = tensor.array()
  assert array.dtype == np.float32 and np.abs(array - VALUES).max() <= error
  tensor.release()
  np.testing.assert_array_equal(tensor.array(), array)


def test_names_axes_and_metadata(small):
  with open_gguf(small) as source:
    assert list(source) == ["a", "b", "c"]
    assert [source[n].shape for n in source] == [(6, 64), (64,), (2, 6, 64)]
    np.testing.assert_allclose(source["c"].array()[1], 2 * VALUES, atol=0.5)
    fields = source.fields
    assert fields["general.architecture"] == "llama"
    assert (fields.take("x.count", int), fields.take("x.on", bool)) == (7, True)
    assert fields.take("x.share", float) == 1e-5  # and not 9.99999974e-06
    assert (fields["x.name"], fields["x.words"]) == ("é", ["a", "", "c d"])
    assert fields["x.numbers"] == [1.5, -2.0]
    assert source.metadata["x.count"] == "7" and "x.words" not in source.metadata
    kept = source["b"].array()
  np.testing.assert_array_equal(kept, VALUES[0])
  with pytest.raises(WeightsError, match="was closed"):
    source["b"].array()


def test_agrees_with_the_packages_own_reader(small):
  theirs = gguf.GGUFReader(small)
  ours = open_gguf(small)
  for tensor in theirs.tensors:
    want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    np.testing.assert_array_equal(ours[tensor.name].array(), want)
  for name, field in theirs.fields.items():
    if not name.startswith("GGUF."):
      assert ours.fields[name] == field.contents(), name


def test_fields_have_types():
  fields = Fields({"n": 3, "s": "x", "f": 0.5, "b": True}, where="m.gguf")
  assert fields.take("n", float) == 3.0 and fields.take("none", int, 5) == 5
  for key, kind in (("s", int), ("f", int), ("b", int), ("b", float), ("n", bool), ("n", list)):
    with pytest.raises(WeightsError, match=rf"m.gguf: {key} is .*; expected {kind.__name__}"):
      fields.take(key, kind)
  with pytest.raises(WeightsError, match=r"m.gguf: its metadata has no 'none'"):
    fields.take("none", int)


def test_a_truncated_file_says_how_much_is_missing(small):
  data = small.read_bytes()
  small.write_bytes(data[:-100])
  missing = 100 - (len(data) - last_byte(data))  # the writer pads behind the last tensor
  with pytest.raises(WeightsError, match=rf"small.gguf: truncated: {missing} bytes are missing"):
    open_gguf(small)


def last_byte(data):
  """Where the last tensor of `small` ends: it starts at a multiple of 32."""
  body = gguf.quants.quantize(np.stack([VALUES, 2 * VALUES]), Kind.Q4_1).tobytes()
  return data.rindex(body) + len(body)


def test_a_file_that_ends_in_its_header(small):
  """Wherever it is cut, it is named and nothing else goes wrong."""
  data = small.read_bytes()
  for length in range(1, data.index(VALUES[0].tobytes()), 7):
    small.write_bytes(data[:length])
    with pytest.raises(WeightsError, match=r"small\.gguf"):
      open_gguf(small)


def test_damaged_bytes_are_an_error_of_ours_or_harmless(small):
  data = bytearray(small.read_bytes())
  rng = np.random.default_rng(0)
  header = data.index(gguf.quants.quantize(VALUES, Kind.Q8_0).tobytes())
  refused = 0
  for _ in range(300):
    broken = bytearray(data)
    for at in rng.integers(4, header, 3):
      broken[at] = rng.integers(256)
    small.write_bytes(broken)
    try:
      source = open_gguf(small)
    except WeightsError as error:
      refused += 1
      assert "small.gguf" in str(error)
    else:
      with np.errstate(all="ignore"):
        assert all(t.array().shape == t.shape for t in source.values())
  assert refused > 50


HEAD = b"GGUF" + struct.pack("<IQQ", 3, 0, 0)
TENSOR = struct.pack("<Q", 1) + b"w" + struct.pack("<IQIQ", 1, 32, 0, 0)
FOREIGN = {
  "empty": (b"", "is empty"),
  "pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
  "page": (b"<!DOCTYPE html><html>", "a web page"),
  "pytorch": (b"PK\x03\x04" + bytes(40), "a zip archive"),
  "safetensors": (struct.pack("<Q", 60) + b'{"a": ', "no GGUF file"),
  "text": (json.dumps({"a": 1}).encode(), "no GGUF file"),
  "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1; read are versions 2 and"),
  "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "a big-endian file"),
  "five axes": (HEAD[:8] + struct.pack("<QQ", 1, 0) + struct.pack("<Q1sI", 1, b"w", 5), "5 axes"),
  "no values": (HEAD[:8] + struct.pack("<QQ", 1, 0) + TENSOR.replace(b"\x20", b"\0"), "is empty"),
  "twice": (HEAD[:8] + struct.pack("<QQ", 2, 0) + 2 * TENSOR + bytes(300), "listed twice: .*'w'"),
  "endless text": (HEAD[:8] + struct.pack("<QQQ", 0, 1, 2**62), "wants 4611686018427387904 bytes"),
  "endless list": (
    HEAD[:8] + struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 6, 2**60) + bytes(99), "truncated or dam"
  ),
  "list of lists": (HEAD[:8] + struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 9, 2), "list of type 9"),
  "no text": (HEAD[:8] + struct.pack("<QQQ", 0, 1, 2) + b"\xff\xff", "no UTF-8 text at byte 32"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_gguf_file_is_named(name, tmp_path):
  data, match = FOREIGN[name]
  (tmp_path / "m.gguf").write_bytes(data)
  with pytest.raises(WeightsError, match=match) as caught:
    open_gguf(tmp_path / "m.gguf")
  assert "m.gguf" in str(caught.value)


def test_rows_must_be_of_whole_blocks(tmp_path):
  path = write(tmp_path / "x.gguf", {"w": (VALUES, Kind.Q8_0)})
  data = path.read_bytes()
  shape, broken = (struct.pack("<QQ", a, 6) for a in (64, 63))
  path.write_bytes(data.replace(shape, broken))
  with pytest.raises(WeightsError, match=r"'w' of type Q8_0 has shape \[6, 63\].*blocks of 32"):
    open_gguf(path)


def test_types_that_cannot_be_dequantised_are_listed(tmp_path):
  path = tmp_path / "x.gguf"
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tensor("fine", VALUES)
  writer.add_tensor("odd", np.zeros((2, 32), np.int16))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(WeightsError, match=r"can't dequantise \(I16: odd, ...\)"):
    open_gguf(path)


def test_parts_and_folders(tmp_path, small):
  assert list(open_gguf(tmp_path)) == ["a", "b", "c"]
  write(
    tmp_path / "part.gguf",
    {"a": (VALUES, Kind.F32)},
    {"split.count": (3, gguf.GGUFValueType.UINT16)},
  )
  with pytest.raises(WeightsError, match=r"one of 3 parts.*llama-gguf-split --merge"):
    open_gguf(tmp_path / "part.gguf")
  with pytest.raises(WeightsError, match=r"expected one .*found part.gguf, small.gguf"):
    open_gguf(tmp_path)
  with pytest.raises(WeightsError, match="no such file"):
    open_gguf(tmp_path / "absent.gguf")


def test_without_the_package_it_says_what_to_install(small, monkeypatch):
  monkeypatch.setitem(sys.modules, "gguf", None)
  with pytest.raises(WeightsError, match="pip install gguf"):
    open_gguf(small)

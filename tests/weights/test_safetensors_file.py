"""Our .safetensors reader against the library, every way a file can be broken, and its memory."""

import json
import mmap
import pathlib
import re

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from regionjax.weights.safetensors_file import open_safetensors
from regionjax.weights.tensors import WeightsError


def make(path, header, data=b"", length=None):
  """A file with any header: a dict, or text as it is."""
  text = (header if isinstance(header, str) else json.dumps(header)).encode()
  path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
  return path


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
  return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def rss_file():
  """Resident bytes of mapped files of this process."""
  status = pathlib.Path("/proc/self/status").read_text()
  return int(re.search(r"RssFile:\s+(\d+) kB", status)[1]) * 1024


@pytest.fixture(scope="module")
def arrays():
  rng = np.random.default_rng(0)
  return {
    "bf16": rng.normal(size=(3, 4)).astype(ml_dtypes.bfloat16),
    "f16": rng.normal(size=(5,)).astype(np.float16),
    "f32": rng.normal(size=(2, 3, 2)).astype(np.float32),
    "f64": rng.normal(size=(2,)).astype(np.float64),
    "i64": rng.integers(-9, 9, (4,)),
    "u8": np.arange(3, dtype=np.uint8),
    "bool": np.array([True, False, True]),
    "scalar": np.array(3.5, np.float32),
    "empty": np.zeros((0, 7), np.float32),
    "last": np.arange(4, dtype=np.int32),
  }


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "ä": "ö"}])
def test_reads_what_the_library_writes(tmp_path, arrays, metadata):
  safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors", metadata=metadata)
  with open_safetensors(tmp_path / "a.safetensors") as source:
    assert source.metadata == (metadata or {})
    assert set(source) == set(arrays) and len(source) == len(arrays)
    for name, tensor in source.items():
      got, wanted = tensor.array(), arrays[name]
      assert (tensor.name, tensor.shape, tensor.dtype) == (name, wanted.shape, wanted.dtype)
      assert got.shape == wanted.shape and got.dtype == wanted.dtype
      assert tensor.nbytes == wanted.nbytes
      assert got.tobytes() == wanted.tobytes()
      assert not got.flags.writeable


def test_eight_bit_floats(tmp_path):
  dtypes = {
    "a": (torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn),
    "b": (torch.float8_e5m2, ml_dtypes.float8_e5m2),
  }
  values = {name: torch.linspace(-3, 3, 9).to(dtype) for name, (dtype, _) in dtypes.items()}
  safetensors.torch.save_file(values, tmp_path / "a.safetensors")
  source = open_safetensors(tmp_path / "a.safetensors")
  for name, (_, wanted) in dtypes.items():
    assert source[name].dtype == wanted
    got = source[name].array().astype(np.float32)
    np.testing.assert_array_equal(got, values[name].float().numpy())


def test_order_is_that_of_the_values(tmp_path):
  header = {"b": entry(offsets=(8, 16)), "a": entry(offsets=(0, 8)), "e": entry((0,), (8, 8))}
  path = make(tmp_path / "a.safetensors", header, np.arange(4, dtype=np.float32).tobytes())
  source = open_safetensors(path)
  assert list(source) == ["a", "e", "b"]
  np.testing.assert_array_equal(source["b"].array(), [2, 3])


def test_values_at_an_odd_offset(tmp_path):
  header = {"a": entry((1,), (0, 1), "U8"), "b": entry(offsets=(1, 9))}
  path = make(tmp_path / "a.safetensors", header, b"\7" + np.float32([1, 2]).tobytes())
  np.testing.assert_array_equal(open_safetensors(path)["b"].array(), [1, 2])


HUGE = 2**62
HOSTILE = {
  "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, "b begins at byte 4 and overlaps a"),
  "gap": ({"a": entry(), "b": entry(offsets=(12, 20))}, "b begins at byte 12 and leaves a gap"),
  "gap at the start": ({"a": entry(offsets=(4, 12))}, "a gap after the header"),
  "trailing": ({"a": entry()}, "12 bytes stand after the last tensor"),
  "shape overflow": ({"a": entry((HUGE, HUGE), (0, 0))}, "no array can have"),
  "overflow beside zero": ({"a": entry((0, HUGE, HUGE), (0, 0))}, "no array can have"),
  "wraps to 8 bytes": ({"a": entry((HUGE + 2,), (0, 8))}, "no array can have"),
  "too many axes": ({"a": entry((1,) * 40 + (2,))}, "no array can have"),
  "negative shape": ({"a": entry((-2, -1))}, "no array can have"),
  "shape of floats": ({"a": entry((2.0,))}, "no array can have"),
  "shape of truths": ({"a": entry((True, 2))}, "no array can have"),
  "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, "has shape None"),
  "wrong size": ({"a": entry((3,))}, "takes 12 bytes, but its data_offsets.*span 8"),
  "backwards": ({"a": entry(offsets=(8, 0))}, "span -8"),
  "negative offset": ({"a": entry(offsets=(-8, 0))}, "not negative"),
  "three offsets": ({"a": entry(offsets=(0, 8, 8))}, r"expected \[begin, end\]"),
  "offsets of text": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": "08"}}, "begin, end"),
  "unknown dtype": ({"a": entry(dtype="F4")}, "a has dtype 'F4'; readable are BOOL, U8"),
  "dtype no text": ({"a": entry(dtype=["F32"])}, "has dtype \\['F32'\\]"),
  "entry no object": ({"a": [1, 2]}, "has dtype None"),
  "metadata no text": ({"__metadata__": {"a": 1}, "a": entry()}, "expected text for each"),
  "no object": ("[1, 2]", "is a JSON list"),
  "no JSON": ("{'a': 1}", "no readable JSON"),
  "no UTF-8": ('{"\udcff": 1}', "no readable JSON"),
  "twice": ('{"a": %s, "a": %s}' % ((json.dumps(entry()),) * 2), "'a' stands there twice"),
  "deep": ("[" * 100_000, "no readable JSON"),
  "huge number": ('{"a": %s}' % ("9" * 5000), "no readable JSON"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_headers(tmp_path, kind):
  header, message = HOSTILE[kind]
  text = (header if isinstance(header, str) else json.dumps(header)).encode(
    errors="surrogateescape"
  )
  path = tmp_path / "a.safetensors"
  path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(20))
  with pytest.raises(WeightsError, match=message) as caught:
    open_safetensors(path)
  assert str(path) in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize("length", [100_000_001, 2**60, 2**64 - 1])
def test_a_header_that_announces_too_much(tmp_path, length):
  path = make(tmp_path / "a.safetensors", {"a": entry()}, bytes(8), length=length)
  with pytest.raises(WeightsError, match=f"announce a header of {length} bytes"):
    open_safetensors(path)


def test_truncated_anywhere(tmp_path, arrays):
  whole = safetensors.numpy.save({k: arrays[k] for k in ("bf16", "f32", "last")})
  start = 8 + int.from_bytes(whole[:8], "little")
  path = tmp_path / "a.safetensors"
  for size in [1, 7, 8, 9, start // 2, start - 1, start, start + 1, len(whole) - 1]:
    path.write_bytes(whole[:size])
    with pytest.raises(WeightsError, match="truncated") as caught:
      open_safetensors(path)
    missing = 8 - size if size < 8 else start - size if size < start else len(whole) - size
    assert re.search(rf"\b{missing}\b", str(caught.value)), (size, str(caught.value))
  path.write_bytes(whole[:-1])
  with pytest.raises(WeightsError, match=r"1 of 88 bytes of values are missing, from \w+ on"):
    open_safetensors(path)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "empty"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    (b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
    (b"PK\x03\x04\x00\x00\x08\x08" + bytes(50), "a zip archive"),
    (b"GGUF\x03\x00\x00\x00" + bytes(50), "--from gguf"),
  ],
)
def test_other_files(tmp_path, content, message):
  (tmp_path / "a.safetensors").write_bytes(content)
  with pytest.raises(WeightsError, match=message):
    open_safetensors(tmp_path / "a.safetensors")


def test_missing_files_and_folders(tmp_path):
  with pytest.raises(WeightsError, match="no such file"):
    open_safetensors(tmp_path / "none.safetensors")
  with pytest.raises(WeightsError, match="cannot be read"):
    open_safetensors(tmp_path)


def test_a_view_outlives_its_source(tmp_path, arrays):
  path = tmp_path / "a.safetensors"
  safetensors.numpy.save_file({"a": arrays["f32"]}, path)
  with open_safetensors(path) as source:
    tensor = source["a"]
    view = tensor.array().T[1]
  source.close()  # a second time does no harm
  path.unlink()
  np.testing.assert_array_equal(view, arrays["f32"].T[1])
  tensor.release()
  with pytest.raises(WeightsError, match="was closed"):
    tensor.array()


def test_closing_unmaps(tmp_path, arrays):
  path = tmp_path / "unmapped.safetensors"
  safetensors.numpy.save_file({"a": arrays["f32"]}, path)
  maps = pathlib.Path("/proc/self/maps")
  source = open_safetensors(path)
  view = source["a"].array()
  source.close()
  assert path.name in maps.read_text()
  del view
  assert path.name not in maps.read_text()


@pytest.fixture
def large(tmp_path):
  """256 MB of zeros that take no room on disk: [32768, 2048] float32 between two small ones."""
  size = 32768 * 2048 * 4
  header = {"a": entry(), "large": entry((32768, 2048), (8, 8 + size))}
  header["z"] = entry(offsets=(8 + size, 16 + size))
  path = make(tmp_path / "large.safetensors", header)
  with open(path, "r+b") as file:
    file.truncate(path.stat().st_size + 16 + size)
  return path


def test_reading_is_lazy_and_pages_go_back(large):
  before = rss_file()
  source = open_safetensors(large)
  tensor = source["large"]
  view = tensor.array().T  # a transform is a view, and costs nothing
  assert view.shape == (2048, 32768)
  assert rss_file() - before < 2e6
  assert view[:, 100:164].copy().shape == (2048, 64)  # 64 rows of the file: 512 KB
  assert rss_file() - before < 4e6
  assert not tensor.array().reshape(-1)[::1024].any()  # one value of each page
  assert rss_file() - before > 250e6
  tensor.release()
  assert rss_file() - before < 4e6
  np.testing.assert_array_equal(view[:, 5], np.zeros(2048))  # the view is good, and reads again
  assert source["z"].array().shape == (2,)


def test_release_keeps_to_its_pages(large, monkeypatch):
  """Ranges start at whole pages and end inside the mapping, as madvise demands."""
  source = open_safetensors(large)
  for name in ("a", "large", "z"):  # the last page of the file is not whole
    source[name].array()[-1:].sum()
    source[name].release()
  monkeypatch.delattr(mmap, "MADV_DONTNEED")  # as on Windows
  source["large"].release()


def sharded(folder, shards, weight_map=None, metadata=None):
  for name, arrays in shards.items():
    safetensors.numpy.save_file(arrays, folder / name, metadata={"format": "pt"})
  weight_map = weight_map or {key: name for name, arrays in shards.items() for key in arrays}
  path = folder / "model.safetensors.index.json"
  path.write_text(json.dumps({"metadata": metadata or {}, "weight_map": weight_map}))
  return path


ONE = {"a": np.ones(2, np.float32), "b": np.zeros(3, np.float32)}
TWO = {"c": np.full(2, 7, np.int32)}


def test_shards(tmp_path):
  path = sharded(tmp_path, {"1.safetensors": ONE, "2.safetensors": TWO}, metadata={"total_size": 9})
  with open_safetensors(path) as source:
    assert list(source) == ["a", "b", "c"] and source.where == str(path)
    assert source.metadata == {"format": "pt", "total_size": "9"}
    for name, wanted in (ONE | TWO).items():
      np.testing.assert_array_equal(source[name].array(), wanted)
  with pytest.raises(WeightsError, match="was closed"):
    source["c"].array()


def test_a_tensor_beyond_the_index_is_not_lost(tmp_path):
  path = sharded(tmp_path, {"1.safetensors": ONE}, {"a": "1.safetensors"})
  assert list(open_safetensors(path)) == ["a", "b"]


def test_every_fault_of_a_set_in_one_message(tmp_path):
  shards = {"1.safetensors": ONE, "2.safetensors": TWO | {"b": ONE["b"]}, "4.safetensors": TWO}
  weight_map = {
    "a": "1.safetensors",
    "b": "1.safetensors",
    "c": "1.safetensors",
    "d": "2.safetensors",
    "e": "3.safetensors",
    "f": "4.safetensors",
  }
  path = sharded(tmp_path, shards, weight_map)
  cut = (tmp_path / "4.safetensors").read_bytes()[:-3]
  (tmp_path / "4.safetensors").write_bytes(cut)
  with pytest.raises(WeightsError) as caught:
    open_safetensors(path)
  message = str(caught.value)
  for part in (
    "3.safetensors is missing, with 1 tensors",
    "c is not in 1.safetensors, where the index has it; it is in 2.safetensors",
    "d is not in 2.safetensors, where the index has it\n",
    "b is in 2 shards: 1.safetensors, 2.safetensors",
    "4.safetensors: truncated: 3 of 8 bytes",
  ):
    assert part in message + "\n", part


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "no readable index"),
    ("[]", "has no 'weight_map'"),
    ('{"weight_map": {}}', "has no 'weight_map'"),
    ('{"weight_map": {"a": 3}}', "plain name of a file"),
    ('{"weight_map": {"a": "../secret.safetensors"}}', "plain name of a file"),
    ('{"weight_map": {"a": "/etc/passwd"}}', "plain name of a file"),
    ('{"weight_map": {"a": ".."}}', "plain name of a file"),
    ('{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}', "twice"),
  ],
)
def test_broken_indices(tmp_path, text, message):
  path = tmp_path / "model.safetensors.index.json"
  path.write_text(text)
  with pytest.raises(WeightsError, match=message):
    open_safetensors(path)
  path.unlink()
  with pytest.raises(WeightsError, match="no such file"):
    open_safetensors(path)

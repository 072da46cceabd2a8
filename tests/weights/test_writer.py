"""Streamed writing: read back by the library, divided into shards, one piece at a time."""

import errno
import gc
import json
import re
import tracemalloc
import weakref

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from regionjax.weights import writer
from regionjax.weights.safetensors_file import DTYPES, open_safetensors
from regionjax.weights.sources import open_weights
from regionjax.weights.tensors import WeightsError
from regionjax.weights.writer import write_safetensors


class Rows:
  """A leaf that is given out `step` rows at a time."""

  def __init__(self, array, step=1):
    self.array, self.step = np.asarray(array), step
    self.shape, self.dtype = self.array.shape, self.array.dtype

  def pieces(self):
    if not self.shape:
      yield 0, self.array
    for start in range(0, self.shape[0] if self.shape else 0, self.step):
      yield start, self.array[start : start + self.step]

  def read(self, index):
    return self.array[index]


def random(dtype, *shape):
  values = np.random.default_rng(len(shape)).normal(size=shape) * 3
  return (values > 0 if dtype == np.bool_ else np.abs(values)).astype(dtype)


def same(got, wanted):
  assert got.dtype == wanted.dtype and got.shape == wanted.shape
  assert np.asarray(got).tobytes() == wanted.tobytes()


@pytest.fixture(scope="module")
def arrays():
  dtypes = [np.uint8, ml_dtypes.bfloat16, np.float32, np.int64, np.bool_, np.float16, np.float64]
  arrays = {f"{np.dtype(d).name}": random(d, 3, 5) for d in dtypes}
  arrays |= {"scalar": random(np.float32), "empty": np.zeros((0, 4), np.float16)}
  return arrays | {"ä/layers/q": random(ml_dtypes.bfloat16, 4, 2, 3), "no rows": random("f", 2, 0)}


@pytest.mark.parametrize("step", [1, 2, 100])
def test_the_library_reads_it(tmp_path, arrays, step):
  leaves = {name: Rows(array, step) for name, array in arrays.items()}
  files = write_safetensors(tmp_path, leaves, metadata={"format": "pt", "ß": "ü"})
  assert files == [tmp_path / "model.safetensors"] == list(tmp_path.iterdir())
  read = safetensors.numpy.load_file(files[0])
  assert set(read) == set(arrays)
  for name, array in arrays.items():
    same(read[name], array)
  with safetensors.safe_open(files[0], framework="np") as file:
    assert file.metadata() == {"format": "pt", "ß": "ü"}
  ours = open_safetensors(files[0])
  for name, array in arrays.items():
    same(ours[name].array(), array)
    assert ours[name].array().flags.aligned


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_goes_both_ways(tmp_path, code):
  array = random(DTYPES[code], 2, 3)
  write_safetensors(tmp_path, {"a": Rows(array)})
  same(open_safetensors(tmp_path / "model.safetensors")["a"].array(), array)


def test_nothing_to_write(tmp_path):
  (file,) = write_safetensors(tmp_path, {}, prefix="adapter")
  assert file.name == "adapter.safetensors" and safetensors.numpy.load_file(file) == {}


def test_views_are_written_in_their_own_order(tmp_path, monkeypatch):
  monkeypatch.setattr(writer, "_BLOCK", 64)  # smaller than a piece and than a row of one
  base = random(np.float32, 6, 5, 4)
  views = {"t": base.T, "back": base[::-1, 1:, ::2], "wide": base.reshape(2, 60)[:, ::-1]}
  write_safetensors(tmp_path, {name: Rows(view, 2) for name, view in views.items()})
  read = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  for name, view in views.items():
    np.testing.assert_array_equal(read[name], view)


def test_shards(tmp_path):
  arrays = {name: random(np.float32, n) for name, n in [("a", 10), ("b", 10), ("c", 30), ("d", 1)]}
  leaves = {name: Rows(array, 4) for name, array in arrays.items()}
  files = write_safetensors(tmp_path, leaves, shard_bytes=80, metadata={"format": "pt"}, prefix="m")
  shards = [f"m-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
  assert [file.name for file in files] == [*shards, "m.safetensors.index.json"]
  assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in files)
  read = [safetensors.numpy.load_file(file) for file in files[:3]]
  assert [set(shard) for shard in read] == [{"a", "b"}, {"c"}, {"d"}]  # c exceeds a shard: alone
  index = json.loads(files[3].read_text())
  assert index["metadata"] == {"total_size": 204}
  assert index["weight_map"] == {"a": shards[0], "b": shards[0], "c": shards[1], "d": shards[2]}
  source = open_weights(tmp_path)
  for name, array in arrays.items():
    same(source[name].array(), array)


class Fresh:
  """A leaf that makes each piece anew and sees whether the one before is still there."""

  def __init__(self, count, shape):
    self.shape, self.dtype = (count, *shape), np.dtype(np.float32)
    self.alive = []

  def pieces(self):
    before = lambda: None  # noqa: E731
    for i in range(self.shape[0]):
      self.alive.append(before() is not None)
      piece = np.full((1, *self.shape[1:]), i, np.float32)
      before = weakref.ref(piece)
      yield i, piece
      del piece


def test_one_piece_at_a_time(tmp_path):
  leaf = Fresh(16, (1024, 256))  # 1 MB each
  gc.disable()  # or a collection could hide what is still held
  tracemalloc.start()
  try:
    write_safetensors(tmp_path, {"stacked": leaf})
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
    gc.enable()
  assert leaf.alive == [False] * 16
  assert peak < 1.7 * 2**20  # a piece, and a truth value for each of its elements
  array = open_safetensors(tmp_path / "model.safetensors")["stacked"].array()
  np.testing.assert_array_equal(array[:, 5, 7], np.arange(16))


def test_a_large_piece_is_copied_in_parts(tmp_path, monkeypatch):
  monkeypatch.setattr(writer, "_BLOCK", 2**18)
  view = random(np.float32, 1024, 512).T  # 2 MB, given out as one piece
  tracemalloc.start()
  try:
    write_safetensors(tmp_path, {"a": Rows(view, 9999)})
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < 2 * 2**18
  read = open_safetensors(tmp_path / "model.safetensors")["a"].array()
  np.testing.assert_array_equal(read, view)


def test_progress(tmp_path, arrays):
  seen = []
  leaves = {name: Rows(array) for name, array in arrays.items()}
  write_safetensors(tmp_path, leaves, shard_bytes=100, progress=lambda *call: seen.append(call))
  total = sum(array.nbytes for array in arrays.values())
  assert seen[-1][1:] == (total, total)
  done = [call[1] for call in seen]
  assert done == sorted(done) and {call[0] for call in seen} >= {"float32", "scalar"}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.complex64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("block", [2**20, 16, 8])
def test_values_that_are_not_finite(tmp_path, monkeypatch, dtype, value, block):
  monkeypatch.setattr(writer, "_BLOCK", block)
  array = np.ones((4, 3, 2), dtype)
  array[2, 1, 1] = value
  leaves = {"fine": Rows(np.ones(9, "f")), "decoder/layers/q": Rows(array, 2)}
  place = r"decoder/layers/q, layer 2 holds NaN or infinity, first at \[2, 1, 1\]"
  with pytest.raises(WeightsError, match=place):
    write_safetensors(tmp_path, leaves)
  assert not list(tmp_path.iterdir())


def test_a_scalar_that_is_not_finite(tmp_path):
  with pytest.raises(WeightsError, match=r"^scale holds NaN or infinity, first at \[\];"):
    write_safetensors(tmp_path, {"scale": Rows(np.float32(np.nan))})


class Given:
  """A leaf with any pieces."""

  def __init__(self, shape, *pieces):
    self.shape, self.dtype, self.given = shape, np.dtype(np.float32), pieces

  def pieces(self):
    for start, rows in self.given:
      if isinstance(rows, BaseException):
        raise rows
      yield start, rows if isinstance(rows, np.ndarray) else np.zeros((rows, 2), np.float32)


@pytest.mark.parametrize(
  ("pieces", "message"),
  [
    ([(0, 2)], "its pieces end at 2"),
    ([(0, 2), (2, 3)], "its pieces end at 5"),
    ([(0, 2), (3, 1)], r"got a piece \[1, 2\] float32 for 3, expected .* for 2"),
    ([(0, np.zeros((4, 3), np.float32))], r"got a piece \[4, 3\] .*expected \[4, 2\]"),
    ([(0, np.zeros((4, 2), np.float64))], r"got a piece \[4, 2\] float64 .*expected .*float32"),
    ([], "its pieces end at 0"),
  ],
)
def test_pieces_that_do_not_fit(tmp_path, pieces, message):
  with pytest.raises(WeightsError, match=message):
    write_safetensors(tmp_path, {"a": Given((4, 2), *pieces)})
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "error",
  [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt("stop"), ValueError("odd")],
)
def test_nothing_half_written_stays(tmp_path, error):
  leaves = {"a": Rows(np.ones((4, 2), "f")), "b": Given((4, 2), (0, 2), (2, error))}
  kind = WeightsError if isinstance(error, OSError) else type(error)
  with pytest.raises(kind, match=re.escape(str(error))):
    write_safetensors(tmp_path, leaves, shard_bytes=10)
  assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
  usage = writer.shutil.disk_usage(tmp_path)._replace(free=100)
  monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage)
  with pytest.raises(WeightsError, match=r"0\.0 GB are needed and 0\.0 GB are free"):
    write_safetensors(tmp_path, {"a": Rows(np.ones(100, "f"))})
  assert not list(tmp_path.iterdir())


def test_an_old_file_is_not_overwritten(tmp_path):
  leaves = {"a": Rows(np.ones((4, 2), "f"))}
  write_safetensors(tmp_path, leaves)
  source = open_weights(tmp_path)
  with pytest.raises(WeightsError, match=r"model\.safetensors exists"):
    write_safetensors(tmp_path, {"a": Rows(2 * source["a"].array())})
  np.testing.assert_array_equal(source["a"].array(), 1)
  with pytest.raises(WeightsError, match="cannot be written"):
    write_safetensors(tmp_path / "none", leaves)


def test_what_the_format_has_no_name_for(tmp_path):
  with pytest.raises(WeightsError, match=r"^a is complex128; safetensors files hold bool, uint8"):
    write_safetensors(tmp_path, {"a": Rows(np.ones(2, complex))})

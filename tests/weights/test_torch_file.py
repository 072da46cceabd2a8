"""Our reader of torch checkpoints against torch.save, and on damaged archives."""

import collections
import io
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch
from torch_archives import Calls, archive, save

from regionjax.weights.tensors import WeightsError
from regionjax.weights.torch_file import open_torch

DTYPES = {
  torch.float32: np.float32,
  torch.float16: np.float16,
  torch.bfloat16: ml_dtypes.bfloat16,
  torch.float64: np.float64,
  torch.int64: np.int64,
  torch.int32: np.int32,
  torch.int16: np.int16,
  torch.int8: np.int8,
  torch.uint8: np.uint8,
  torch.bool: np.bool_,
  torch.complex64: np.complex64,
  torch.uint16: np.uint16,
  torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
  torch.float8_e5m2: ml_dtypes.float8_e5m2,
}


def test_every_dtype(tmp_path):
  values = {str(d): (torch.arange(6).reshape(2, 3) - 1).to(d) for d in DTYPES}
  source = open_torch(save(tmp_path / "a.pt", values))
  assert list(source) == list(values) and source.metadata == {}
  for dtype, wanted in DTYPES.items():
    tensor, value = source[str(dtype)], values[str(dtype)]
    assert tensor.dtype == wanted and tensor.shape == (2, 3)
    assert tensor.array().tobytes() == value.contiguous().view(torch.uint8).numpy().tobytes()
    assert not tensor.array().flags.writeable


def test_views_and_shapes(tmp_path):
  base = torch.arange(60.0).reshape(5, 12)
  values = {
    "transposed": base.T,
    "offset": base[2:, 3:7],
    "steps": base[::2, 1::3],
    "expanded": base[1, :1].expand(4, 3),
    "permuted": base.reshape(5, 3, 4).permute(2, 0, 1),
    "row of a matrix": base[3:4, ::5],
    "scalar": base[4, 11],
    "empty": base[:0],
    "nothing": torch.zeros(0, 3),
    "new": torch.full((2,), 3.0),
  }
  source = open_torch(save(tmp_path / "a.bin", values))
  for name, value in values.items():
    got = source[name].array()
    assert got.shape == tuple(value.shape), name
    np.testing.assert_array_equal(got, value.numpy(), err_msg=name)
    source[name].release()
  assert np.shares_memory(source["transposed"].array(), source["offset"].array())
  assert (tmp_path / "a.bin").stat().st_size < 6000  # so that sharing was on the disk, too


def test_modules_and_parameters(tmp_path):
  layer = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).half()
  tied = layer.state_dict() | {"tied": layer[0].weight}
  tied["tagged"] = torch.nn.Parameter(torch.ones(2))
  tied["tagged"].note = "a Python attribute goes along"
  source = open_torch(save(tmp_path / "a.pt", tied))
  assert "0.weight" in source and "1.num_batches_tracked" in source
  for name, value in tied.items():
    np.testing.assert_array_equal(source[name].array(), value.detach().numpy())
  plain = open_torch(save(tmp_path / "b.pt", layer.state_dict()))  # carries `_metadata`
  assert list(plain) == list(layer.state_dict())


@pytest.mark.parametrize(
  ("keys", "entered"),
  [
    (["state_dict"], "state_dict"),
    (["model"], "model"),
    (["model", "module"], "model/module"),
  ],
)
def test_training_checkpoints(tmp_path, keys, entered):
  inner = collections.OrderedDict(w=torch.ones(2), step=torch.tensor(7), name="x", extra={"a": 1})
  for key in reversed(keys):
    moments = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}
    inner = {key: inner, "epoch": 3, "loss": torch.tensor(0.5), "optimizer": moments, 5: None}
  inner |= {"shape": torch.Size([2]), "dtype": torch.float16, "device": torch.device("cpu")}
  source = open_torch(save(tmp_path / "a.ckpt", inner))
  assert list(source) == ["w", "step"]
  assert source.metadata == {"entered": entered, "ignored": "name, extra"}


@pytest.mark.parametrize(
  ("obj", "message"),
  [
    ({"vision": {"w": torch.ones(1)}}, "a dict with the keys .'vision'.; expected tensors by name"),
    ({}, "a dict with the keys"),
    ([torch.ones(1)], "holds a list"),
    (torch.ones(1), "holds a single tensor"),
    ({3: torch.ones(1)}, "has the key 3"),
    ({"a": torch.ones(2, dtype=torch.complex64).conj()}, "awaits its conjugation"),
    ({"a": torch.ones(2).to_sparse()}, "holds torch._utils._rebuild_sparse_tensor"),
    (torch.nn.Linear(1, 1), "holds torch.nn.modules.linear.Linear"),
    ({"a": torch.ones(1), "scale": np.float32(3)}, "holds numpy"),
  ],
)
def test_what_is_no_state_dict(tmp_path, obj, message):
  with pytest.raises(WeightsError, match=message):
    open_torch(save(tmp_path / "a.pt", obj))


def test_a_dict_that_holds_itself(tmp_path):
  loop = {"epoch": 1}
  loop["model"] = loop
  with pytest.raises(WeightsError, match="expected tensors by name"):
    open_torch(save(tmp_path / "a.pt", loop))


def test_legacy_files_are_named(tmp_path):
  path = save(tmp_path / "a.bin", {"a": torch.ones(1)}, _use_new_zipfile_serialization=False)
  with pytest.raises(WeightsError, match=r"before 1\.6 .*_use_new_zipfile_serialization=False"):
    open_torch(path)


class Pieces(pickle.Pickler):
  """Pickles tensors from (offset, shape, stride, elements) as torch.save would."""

  def persistent_id(self, obj):
    return ("storage", torch.FloatStorage, "0", "cpu", obj.n) if isinstance(obj, Lump) else None


class Lump:
  def __init__(self, n):
    self.n = n


def with_tensor(path, offset, shape, stride, *, count=6, stored=24):
  rebuild = torch._utils._rebuild_tensor_v2
  call = Calls(rebuild, Lump(count), offset, shape, stride, False, collections.OrderedDict())
  file = io.BytesIO()
  Pieces(file, 2).dump({"good": 1, "w": call})
  return archive(path, file.getvalue(), [("data/0", bytes(range(stored)))])


def test_a_tensor_made_by_hand(tmp_path):
  source = open_torch(with_tensor(tmp_path / "a.pt", 1, (1, 2, 2), (2**80, 2, 1)))
  wanted = np.frombuffer(bytes(range(24)), np.float32)[[[[1, 2], [3, 4]]]]
  np.testing.assert_array_equal(source["w"].array(), wanted)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ((0, (7,), (1,)), "reaches element 6, its storage has 6"),
    ((1, (2, 3), (3, 1)), "reaches element 6"),
    ((0, (2, 2), (5, 1)), "reaches element 6"),
    ((2**62, (1,), (1,)), "reaches element"),
    ((0, (2,), (2**62,)), "reaches element"),
    ((0, (2**40, 2**40), (0, 0)), "no array can have"),
    ((0, (-1,), (1,)), "no array can have"),
    ((0, (1.5,), (1,)), "no array can have"),
    ((0, 3, (1,)), "no array can have"),
    ((-1, (1,), (1,)), "not negative"),
    ((0, (2,), (-1,)), "not negative"),
    ((0, (2, 2), (1,)), "one for each axis"),
    ((0, (2,), [1]), "one for each axis"),
    ((None, (2,), (1,)), "one for each axis"),
  ],
)
def test_tensors_that_reach_out(tmp_path, given, message):
  with pytest.raises(WeightsError, match=message) as caught:
    open_torch(with_tensor(tmp_path / "a.pt", *given))
  assert ": w " in str(caught.value)


def test_storages_that_are_too_short_or_absent(tmp_path):
  with pytest.raises(WeightsError, match=r"w lies in a storage of 28 bytes, but data/0 has 24"):
    open_torch(with_tensor(tmp_path / "a.pt", 0, (6,), (1,), count=7))
  path = with_tensor(tmp_path / "b.pt", 0, (6,), (1,))
  data = path.read_bytes().replace(b"m/data/0", b"m/data/9")
  path.write_bytes(data)
  with pytest.raises(WeightsError, match="has no member data/0"):
    open_torch(path)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
  path = tmp_path_factory.mktemp("good") / "a.bin"
  return save(path, {f"w{i}": torch.randn(50, 8) for i in range(3)})


def test_truncated_anywhere(tmp_path, good):
  whole = good.read_bytes()
  with zipfile.ZipFile(good) as archive_:
    table = archive_.start_dir
  ends = [1, 3, 4, 20, 60, table // 2, table - 1, table, table + 1, table + 40]
  tail = [len(whole) - n for n in (1, 5, 21, 22, 23, 40)]
  for size in [*ends, *range(table, len(whole), 97), *tail]:
    (tmp_path / "a.bin").write_bytes(whole[:size])
    with pytest.raises(WeightsError, match=r"truncated|no PyTorch checkpoint") as caught:
      open_torch(tmp_path / "a.bin")
    assert size < 4 or f"{size} bytes" in str(caught.value)


def test_a_hole_in_the_middle(tmp_path, good):
  """Bytes that were lost on the way shift everything behind them."""
  whole = good.read_bytes()
  (tmp_path / "a.bin").write_bytes(whole[:2000] + whole[2100:])
  with pytest.raises(WeightsError, match="download it again"):
    open_torch(tmp_path / "a.bin")


def test_a_member_that_claims_more_than_the_file_has(tmp_path):
  path = with_tensor(tmp_path / "a.pt", 0, (6,), (1,))
  data = bytearray(path.read_bytes())
  at = data.rindex(b"PK\x01\x02")  # the entry of data/0 in the table of contents
  data[at + 20 : at + 28] = struct.pack("<II", 10**9, 10**9)
  path.write_bytes(data)
  with pytest.raises(WeightsError, match=r"data/0 claims 1000000000 bytes from byte \d+ on"):
    open_torch(path)
  data[at + 20 : at + 28] = struct.pack("<II", 4, 24)
  path.write_bytes(data)
  with pytest.raises(WeightsError, match="data/0 claims 24 bytes"):
    open_torch(path)


def test_other_archives(tmp_path, good):
  empty = pickle.dumps({}, 2)
  path = tmp_path / "a.bin"
  with pytest.raises(WeightsError, match="compressed or encrypted"):
    open_torch(archive(path, empty + bytes(999), compression=zipfile.ZIP_DEFLATED))
  with pytest.raises(WeightsError, match="big-endian"):
    open_torch(archive(path, empty, [("byteorder", b"big")]))
  with pytest.raises(WeightsError, match="TorchScript"):
    open_torch(archive(path, empty, [("constants.pkl", b"")]))
  with pytest.raises(WeightsError, match=r"no PyTorch checkpoint.*found 0"):
    open_torch(archive(path, empty, root="m/n"))
  with pytest.raises(WeightsError, match="same name"), pytest.warns(UserWarning, match="Duplicate"):
    open_torch(archive(path, empty, [("data.pkl", empty)]))
  for content, message in [
    (b"", "empty"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    (b"\x1f\x8b\x08 something", "which is a zip archive"),
  ]:
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
      open_torch(path)


def test_a_pickle_of_unusual_size(tmp_path, monkeypatch):
  monkeypatch.setattr("regionjax.weights.torch_file._MAX_PICKLE", 100)
  with pytest.raises(WeightsError, match=r"data\.pkl has \d+ bytes, expected at most 100"):
    open_torch(archive(tmp_path / "a.bin", pickle.dumps({"a": "b" * 200}, 2)))


def test_a_view_outlives_its_source(good):
  with open_torch(good) as source:
    view = source["w1"].array()
    tensor = source["w1"]
  assert np.isfinite(view).all()
  with pytest.raises(WeightsError, match="was closed"):
    tensor.array()


def test_shards(tmp_path):
  save(tmp_path / "1.bin", {"a": torch.ones(2)})
  save(tmp_path / "2.bin", {"b": torch.zeros(3)})
  path = tmp_path / "pytorch_model.bin.index.json"
  path.write_text('{"weight_map": {"a": "1.bin", "b": "2.bin"}}')
  with open_torch(path) as source:
    assert {k: v.shape for k, v in source.items()} == {"a": (2,), "b": (3,)}
  (tmp_path / "1.bin").write_bytes((tmp_path / "1.bin").read_bytes()[:-9])
  (tmp_path / "2.bin").unlink()
  with pytest.raises(WeightsError, match=r"(?s)1\.bin: truncated.*2\.bin is missing") as caught:
    open_torch(path)
  assert str(path) in str(caught.value)

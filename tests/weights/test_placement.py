"""Leaves on a mesh: every device has its slice, and every element is read once."""

import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hf_folders import write_llama

import regionjax

SHIPPED = Path(regionjax.__file__).parent / "assets" / "tiny"
AXES = {"data": 2, "fsdp": 2, "tensor": 2}
ALL = ("data", "fsdp", "tensor")

COUNTED = """
from regionjax.weights.leaves import as_leaf

class Counted:
  def __init__(self, values):
    self.leaf, self.reads = as_leaf(values), []
    self.shape, self.dtype = self.leaf.shape, self.leaf.dtype

  def read(self, index):
    self.reads.append([(part.start, part.stop) for part in index])
    return self.leaf.read(index)

  def pieces(self):
    raise AssertionError("read as a whole")
"""

EIGHT = f"""
import pickle, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from regionjax.mesh import make_mesh
from regionjax.weights import convert, leaves as lazy, release
from regionjax.weights.placement import place
{COUNTED}
hf, cases, wrong = pickle.load(sys.stdin.buffer)
assert jax.device_count() == 8
mesh = make_mesh(data=2, fsdp=2, tensor=2)
options = convert.Options(vocab_multiple=96)
sources = {{
  "release": release.open_release("tiny").leaves,
  "hf": convert.arrange("hf-llama", hf, options).leaves,
  "memory": {{"number": lazy.ArrayLeaf(np.float32(2.5))}},
}}
out = {{}}
for name, (source, path, spec, dtype) in cases.items():
  leaf = Counted(sources[source][path])
  array = place({{path: leaf}}, {{path: NamedSharding(mesh, P(*spec))}}, dtype=dtype)[path]
  where = {{d: tuple(int(i) for i in np.argwhere(mesh.devices == d)[0]) for d in jax.devices()}}
  shards = {{where[s.device]: np.asarray(s.data) for s in array.addressable_shards}}
  out[name] = shards, leaf.reads, np.asarray(array)
errors = {{}}
for name, (path, spec) in wrong.items():
  leaf = Counted(sources["release"][path])
  sound = Counted(sources["release"]["decoder/layers/q/kernel"])
  split = NamedSharding(mesh, P(*spec))
  try:
    place({{"sound": sound, path: leaf}}, {{"sound": NamedSharding(mesh, P()), path: split}})
  except ValueError as error:
    errors[name] = str(error), sound.reads, leaf.reads
told = []
every = place(
  sources["release"], NamedSharding(mesh, P()), dtype=np.float32, progress=lambda *a: told.append(a)
)
every = {{path: np.asarray(array) for path, array in every.items()}}
pickle.dump((out, errors, told, every), sys.stdout.buffer)
"""

Q, GATE, EMBED = (
  "decoder/layers/q/kernel", "decoder/layers/gate/kernel", "decoder/embed/embedding",
)  # fmt: skip
CASES = {  # source, path, axes, dtype
  "replicated": ("release", Q, (), None),
  "one axis": ("release", Q, (None, "tensor"), None),
  "one axis, the first": ("release", EMBED, ("fsdp",), None),
  "two axes": ("release", GATE, (None, "fsdp", "tensor"), None),
  "all devices on one axis": ("release", EMBED, (ALL,), None),
  "two names of a mesh": ("release", EMBED, (("tensor", "data"), "fsdp"), None),
  "a vector": ("release", "decoder/norm/scale", (ALL,), None),
  "another dtype": ("release", "vision/positions", (None, "data"), np.float32),
  "another dtype, replicated": ("release", "vision/positions", (), np.float16),
  "layers of a folder": ("hf", Q, (None, "fsdp", "tensor"), None),
  "layers of a folder, each elsewhere": ("hf", "decoder/layers/down/kernel", ("data",), None),
  "layers of a folder, cast": ("hf", GATE, (None, None, ALL), ml_dtypes.bfloat16),
  "rows that pad a table": ("hf", EMBED, (ALL,), None),
  "columns that pad a head": ("hf", "decoder/head/kernel", ("tensor", ("fsdp", "data")), None),
  "a number": ("memory", "number", (), None),
}
WRONG = {
  "an odd axis": ("vision/positions", ("fsdp",)),
  "too many axes": ("decoder/norm/scale", (None, "fsdp")),
}


def run(script: str, *argv: str, devices: int) -> subprocess.Popen:
  flags = f"--xla_force_host_platform_device_count={devices}"
  return subprocess.Popen(
    [sys.executable, "-c", script, *argv],
    env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_llama(tmp_path_factory.mktemp("hf") / "llama")


@pytest.fixture(scope="module")
def placed(folder):
  """(arrays and reads by case, errors, progress, the whole release), from eight devices."""
  process = run(EIGHT, devices=8)
  out, told = process.communicate(pickle.dumps((folder, CASES, WRONG)))
  assert process.returncode == 0, told.decode()
  return pickle.loads(out)


@pytest.fixture(scope="module")
def values(folder):
  """What the leaves should be, by the safetensors library and transposes."""
  state = safetensors.numpy.load_file(folder / "model.safetensors")

  def stacked(name):
    return np.stack([state[f"model.layers.{i}.{name}.weight"].T for i in range(2)])

  padding = ((0, 1056 - 1024), (0, 0))
  hf = {
    Q: stacked("self_attn.q_proj"),
    GATE: stacked("mlp.gate_proj"),
    "decoder/layers/down/kernel": stacked("mlp.down_proj"),
    EMBED: np.pad(state["model.embed_tokens.weight"], padding),
    "decoder/head/kernel": np.pad(state["lm_head.weight"], padding).T,
  }
  shipped = safetensors.numpy.load_file(SHIPPED / "model.safetensors")
  return {"hf": hf, "release": shipped, "memory": {"number": np.float32(2.5)}}


def part_of(values: np.ndarray, spec: tuple, place: tuple[int, ...]) -> np.ndarray:
  """The slice of the device at `place` in the mesh, by the definition of a PartitionSpec."""
  at = dict(zip(AXES, place))
  index = []
  for size, names in zip(values.shape, spec):
    names = (names,) if isinstance(names, str) else names or ()
    number, count = 0, 1
    for name in names:  # the first name varies slowest
      number, count = number * AXES[name] + at[name], count * AXES[name]
    index.append(slice(number * size // count, (number + 1) * size // count))
  return values[tuple(index)]


@pytest.mark.parametrize("name", CASES)
def test_every_device_has_its_slice(name, placed, values):
  source, path, spec, dtype = CASES[name]
  shards, _, whole = placed[0][name]
  wanted = np.asarray(values[source][path])
  wanted = wanted if dtype is None else wanted.astype(dtype)
  assert whole.dtype == wanted.dtype
  np.testing.assert_array_equal(whole, wanted)
  assert len(shards) == 8
  for place, shard in shards.items():
    assert shard.dtype == wanted.dtype
    np.testing.assert_array_equal(shard, part_of(wanted, spec, place), err_msg=str(place))


@pytest.mark.parametrize("name", CASES)
def test_every_element_is_read_once(name, placed):
  _, reads, whole = placed[0][name]
  count = np.zeros(whole.shape, int)
  for bounds in reads:
    count[tuple(slice(*pair) for pair in bounds)] += 1
  assert (count == 1).all()
  if not any(CASES[name][2]):
    assert len(reads) == 1  # however many devices want it


def test_shapes_that_cannot_be_divided(placed):
  """In jax's own words and with the leaf's name, before anything is read."""
  assert placed[1].keys() == WRONG.keys()
  told, sound, wrong = placed[1]["an odd axis"]
  assert told.startswith("vision/positions: ") and "dimension size is 257" in told
  assert not sound and not wrong
  told, sound, wrong = placed[1]["too many axes"]
  assert told.startswith("decoder/norm/scale: ") and "rank at least 2" in told
  assert not sound and not wrong


def test_one_sharding_for_all_and_progress(placed, values):
  _, _, told, every = placed
  assert every.keys() == values["release"].keys()
  for path, array in every.items():
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, values["release"][path].astype(np.float32))
  count = len(every)
  assert told == [(path, done, count) for done, path in enumerate(every, 1)]


def test_a_leaf_without_a_sharding():
  import jax

  from regionjax.weights.leaves import ArrayLeaf
  from regionjax.weights.placement import place

  leaves = {"a": ArrayLeaf(np.zeros(3, np.float32)), "b": ArrayLeaf(np.ones(3, np.float32))}
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  with pytest.raises(KeyError, match="b"):
    place(leaves, {"a": here})
  assert place(leaves, {"a": here, "b": here})["b"].tolist() == [1, 1, 1]


# Two hosts, the first with one of eight devices.

HOST = f"""
import json, re, sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from regionjax.weights import release, tensors
from regionjax.weights.leaves import Viewed
from regionjax.weights.placement import place
from regionjax.weights.safetensors_file import open_safetensors
{COUNTED}
number, port, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(
  f"localhost:{{port}}", num_processes=2, process_id=number, initialization_timeout=120
)
assert len(jax.devices()) == 8 and len(jax.local_devices()) == (1, 7)[number]
mesh = Mesh(np.array(jax.devices()), ("fsdp",))

def resident():
  status = open("/proc/self/status").read()
  return int(re.search(r"RssFile:\\s+(\\d+) kB", status)[1]) * 1024

split, everywhere = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
leaves = release.open_release("tiny").leaves
sharded = Counted(leaves["decoder/embed/embedding"])
whole = Counted(leaves["decoder/norm/scale"])
arrays = place({{"a": sharded, "b": whole}}, {{"a": split, "b": everywhere}})
same = all(
  np.array_equal(shard.data, leaf.leaf.read(shard.index))
  for leaf, array in zip((sharded, whole), arrays.values()) for shard in array.addressable_shards
)
out = dict(sharded=sharded.reads, whole=whole.reads, same=same)
if number == 0:
  tensors.MappedTensor.release = lambda self: None  # what was read stays resident
  leaf = Viewed(open_safetensors(path)["large"], np.transpose)
  before = resident()
  column = NamedSharding(mesh, P(None, "fsdp"))
  out["shape"] = place({{"large": leaf}}, column)["large"].addressable_data(0).shape
  out["resident"] = resident() - before
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
  """A sparse file of 256 MB."""
  path = tmp_path_factory.mktemp("large") / "large.safetensors"
  size = 32768 * 2048 * 4
  entry = {"dtype": "F32", "shape": [32768, 2048], "data_offsets": [0, size]}
  header = json.dumps({"large": entry}).encode()
  with open(path, "wb") as file:
    file.write(len(header).to_bytes(8, "little") + header)
    file.truncate(8 + len(header) + size)
  return path


def test_a_host_reads_what_its_devices_hold(large):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  processes = [run(HOST, str(i), port, str(large), devices=(1, 7)[i]) for i in range(2)]
  try:
    told = [process.communicate(timeout=300) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert not any(process.returncode for process in processes), b"".join(t[1] for t in told).decode()
  first, second = (json.loads(out.decode()) for out, _ in told)
  assert first["same"] and second["same"]
  assert first["sharded"] == [[[0, 128], [0, 160]]]
  assert second["sharded"] == [[[128 * i, 128 * (i + 1)], [0, 160]] for i in range(1, 8)]
  assert first["whole"] == second["whole"] == [[[0, 160]]]
  assert first["shape"] == [2048, 4096]
  share = 256 * 2**20 // 8
  assert share <= first["resident"] < share + 4e6

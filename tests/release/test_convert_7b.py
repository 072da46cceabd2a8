"""GPT4RoI-7B at its full width through the converter, and the memory that this takes.

  pytest -m release tests/release/test_convert_7b.py -s 2>&1 | tee tests/release/convert_7b.log

Delta, base and CLIP have the published names and shapes: 28 GB of float16 in shards. They are made
as torch writes them, but sparse: each tensor has some stretches of random values, and the zeros
between them take no disk. (A shard could not be deleted on the way: a stacked parameter takes a
tensor of every layer, so both shards are read until the end.) To the converter they are files like
any other: holes are mapped and read as pages of zeros. The release itself is written out; 16 GB
have to be free where pytest keeps its temporary files (--basetemp).

The conversion runs in a process of its own. What is asserted is its peak resident memory as the
kernel counts it, mapped pages of files included, and that every tensor of the release is the sum
that it should be, bit by bit.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from regionjax.tokenizer import GPT4ROI_TOKENS
from regionjax.weights import release
from regionjax.weights.families import clip, gpt4roi
from regionjax.weights.leaves import as_lazy

ROOT = Path(__file__).parents[2]
LIMIT = 3 << 30  # bytes of resident memory
DISK = 16 << 30
STRETCH = 2000  # random values at a time
HOLE = 1 << 24  # values from one stretch to the next: 16 million
ROWS, VISION_DEPTH = 32000, 23
SHARD = 9_980_000_000  # bytes of the delta's first shard, as published
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def load(name: str):
  """Another test's module: published names and LLaMA's vocabulary stand there."""
  path = ROOT / "tests" / name
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


Shapes = Mapping[str, tuple[int, ...]]


def stretches(kind: str, name: str, count: int, dtype: type) -> Iterator[tuple[int, np.ndarray]]:
  """(first index, values) of what a tensor holds between its zeros, counted flat."""
  rng = np.random.default_rng(zlib.crc32(f"{kind} {name}".encode()))
  size = 0.01 if kind == "delta" else 1.0
  starts = {*range(0, count, HOLE), max(count - STRETCH, 0), *rng.integers(0, count, 3)}
  last = 0
  for start in sorted(map(int, starts)):
    start = max(start, last)
    last = min(start + STRETCH, count)
    yield start, (size * rng.standard_normal(last - start, np.float32)).astype(dtype)


def dense(kind: str, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
  """The same as an array."""
  out = np.zeros(shape, dtype)
  for start, values in stretches(kind, name, out.size, dtype):
    out.reshape(-1)[start : start + len(values)] = values
  return out


def save_sparse(path: Path, kind: str, shapes: Shapes, dtype: torch.dtype) -> None:
  """A checkpoint of `torch.save` whose zeros are holes in the file."""
  with FakeTensorMode():
    state = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
  with torch.serialization.skip_data(materialize_fake_tensors=True):
    torch.save(state, path)
  with zipfile.ZipFile(path) as archive:
    members = {info.filename: info.header_offset for info in archive.infolist()}
  numbers = np.dtype(str(dtype).removeprefix("torch."))
  with open(path, "r+b") as file:
    for i, (name, tensor) in enumerate(state.items()):
      header = members[f"{path.stem}/data/{i}"]  # storages are numbered in the order of the dict
      file.seek(header + 26)
      lengths = np.frombuffer(file.read(4), "<u2")  # of the name and of the extra field
      first = header + 30 + int(lengths.sum())
      for start, values in stretches(kind, name, tensor.numel(), numbers.type):
        file.seek(first + start * numbers.itemsize)
        file.write(values.tobytes())


def save_shards(folder: Path, kind: str, shapes: Shapes, *, count: int, limit: float) -> None:
  """Shards and index; a new shard begins where `limit` bytes would be exceeded."""
  folder.mkdir(parents=True)
  shards: list[dict[str, tuple[int, ...]]] = [{}]
  room = limit
  for name, shape in shapes.items():
    size = 2 * int(np.prod(shape))
    if size > room:
      shards.append({})
      room = limit
    shards[-1][name] = shape
    room -= size
  assert len(shards) == count
  homes = {}
  for i, shard in enumerate(shards, 1):
    path = folder / f"pytorch_model-{i:05d}-of-{count:05d}.bin"
    save_sparse(path, kind, shard, torch.float16)
    homes |= {name: path.name for name in shard}
  index = {"metadata": {"total_size": 0}, "weight_map": homes}
  (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def save_tokenizer(folder: Path) -> None:
  data = load("test_tokenizer.py").llama_model().SerializeToString()
  (folder / "tokenizer.model").write_bytes(data)
  added = {token: ROWS + i for i, token in enumerate(GPT4ROI_TOKENS)}
  (folder / "added_tokens.json").write_text(json.dumps(added))


@contextlib.contextmanager
def made(root: Path) -> Iterator[tuple[Path, Path, Path]]:
  """(delta, base, CLIP) as folders; removed at the end."""
  names, towers = load("weights/test_gpt4roi.py"), load("weights/test_clip.py")
  delta = names.published(names.PUBLISHED)
  base = {n: s for n, s in delta.items() if "spi_module" not in n and "mm_projector" not in n}
  base |= {name: (ROWS, base[name][1]) for name in TABLES}
  tower = towers.published_tower(1024, 4096, layers=24, patch=14, tokens=257)
  del tower["vision_model.embeddings.position_ids"]
  folders = root / "delta", root / "base", root / "clip"
  try:
    save_shards(folders[0], "delta", delta, count=2, limit=SHARD)
    (folders[0] / "config.json").write_text(json.dumps(names.PUBLISHED.hf))
    save_tokenizer(folders[0])
    save_shards(folders[1], "base", base, count=2, limit=SHARD)
    folders[2].mkdir()
    save_sparse(folders[2] / "pytorch_model.bin", "clip", tower, torch.float32)
    vision = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16,
                  num_hidden_layers=24, patch_size=14, image_size=224)  # fmt: skip
    config = {"model_type": "clip", "vision_config": vision}
    (folders[2] / "config.json").write_text(json.dumps(config))
    yield folders
  finally:
    for folder in folders:
      shutil.rmtree(folder, ignore_errors=True)


def watch(words: list[str]) -> tuple[int, dict[str, int]]:
  """Runs a program: (exit code, its peaks in bytes). 'whole' is the kernel's own account."""
  child = subprocess.Popen(words, cwd=ROOT)
  peaks = {"RssAnon": 0, "RssFile": 0}
  while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
    with contextlib.suppress(OSError):
      for line in Path(f"/proc/{child.pid}/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in peaks:
          peaks[name] = max(peaks[name], int(rest.split()[0]) << 10)
    time.sleep(0.05)
  _, status, usage = os.wait4(child.pid, 0)
  child.returncode = os.waitstatus_to_exitcode(status)
  return child.returncode, {"whole": usage.ru_maxrss << 10} | peaks


def expected(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A tensor of the merged checkpoint, in its layout."""
  if name.startswith("vision_model."):
    return dense("clip", name, shape, np.float32)
  out = dense("delta", name, shape, np.float16)
  if "spi_module" not in name and "mm_projector" not in name:
    rows = ROWS if name in TABLES else shape[0]
    out[:rows] += dense("base", name, (rows, *shape[1:]), np.float16)
  return out


@pytest.mark.release
def test_memory_and_bits_of_the_full_width(tmp_path):
  assert shutil.disk_usage(tmp_path).free > DISK, f"{DISK} bytes are needed in {tmp_path}"
  out = tmp_path / "release"
  try:
    with made(tmp_path) as (delta, base, tower):
      size = sum(file.stat().st_size for file in (*delta.iterdir(), *base.iterdir()))
      start = time.monotonic()
      code, peaks = watch(
        [sys.executable, "-m", "regionjax", "convert", "--from", "gpt4roi", str(delta), "--to",
         str(out), "--base", str(base), "--clip", str(tower), "--vocab-multiple", "128"]
      )  # fmt: skip
      seconds = time.monotonic() - start
    assert code == 0
    written = sum(file.stat().st_size for file in out.iterdir())
    print(f"\nread {size / 1e9:.2f} GB (delta and base), wrote {written / 1e9:.2f} GB in "
          f"{seconds:.0f} s")  # fmt: skip
    print(f"peak resident memory: {peaks['whole'] / 2**30:.2f} GiB, mapped pages of files included")
    print(f"  of it never more than {peaks['RssAnon'] / 2**30:.2f} GiB of the program's own and "
          f"{peaks['RssFile'] / 2**30:.2f} GiB of files (each at its own peak)")  # fmt: skip
    assert peaks["whole"] <= LIMIT

    opened = release.open_release(out)
    model = opened.config.model
    tables = (
      clip.table(model.vision, depth=VISION_DEPTH).back(opened.of("vision")),
      gpt4roi.table(model).back(opened.of(*gpt4roi.PARTS)),
    )
    leaves = {name: leaf for table in tables for name, leaf in table.items()}
    assert len(leaves) == 336 + 5 + 16 * VISION_DEPTH
    for name, leaf in leaves.items():
      lazy = as_lazy(leaf)
      np.testing.assert_array_equal(lazy.array(), expected(name, lazy.shape), err_msg=name)
      lazy.release()
    print(f"{len(leaves)} tensors are what they should be, bit by bit")
  finally:
    shutil.rmtree(out, ignore_errors=True)

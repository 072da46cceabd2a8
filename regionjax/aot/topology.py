"""Machines by name, `v5e:8x8` or `h100:8`, as abstract devices to compile for."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from regionjax.aot.errors import AotError
from regionjax.chips import CHIPS, Chip, chip_of

GPUS_PER_NODE = 8

# What libtpu asks a TPU VM's metadata server for, and must be told where there is none. Several
# processes may compile at once. The variables are read when libtpu is loaded.
TPU_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# XLA's description of an H100 SXM, so that it can tune for one that isn't there.
H100_TARGET = """\
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
  """A number of equal slices of chips.

  Attributes:
    chip: of all of them.
    shape: chips along each axis of one slice's torus, or (number of chips,) behind a switch.
    slices: joined by the data centre's network.
  """

  chip: Chip
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def name(self) -> str:
    return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

  @property
  def chips(self) -> int:
    return math.prod(self.shape) * self.slices

  def devices(self) -> list[Any]:
    """Abstract devices to build a mesh of; they can compile and not run.

    Raises:
      AotError: the compiler is not installed, or doesn't know this shape.
    """
    from jax.experimental import topologies

    use_cpu()
    options: dict[str, Any] = {}
    if self.chip.platform == "tpu":
      require_libtpu()
      name = self.name
      if self.slices > 1:
        options["num_slices"] = self.slices
    else:
      require_cuda()
      name = ""
      options |= {"topology": f"{self.slices}x1x{self.shape[0]}", "target_config": H100_TARGET}
    try:
      return list(topologies.get_topology_desc(name, self.chip.platform, **options).devices)
    except Exception as error:  # the plugins raise their own types
      raise AotError(f"the {self.chip.platform} compiler refuses {self.name}: {error}") from error

  def here(self) -> list[Any]:
    """This machine's devices, which must be the topology's.

    Raises:
      AotError: they are others, or another number.
    """
    import jax

    try:
      devices = jax.devices()
    except RuntimeError as error:  # a platform that JAX_PLATFORMS asks for and that isn't there
      raise AotError(f"--run needs {self.chips} x {self.chip.name}: {error}") from error
    kind = devices[0].device_kind
    if chip_of(kind) is not self.chip or len(devices) != self.chips or self.slices > 1:
      raise AotError(
        f"--run measures on the machine that --topology names, {self.chips} x {self.chip.name} on "
        f"one host, and this one has {len(devices)} x {kind!r}; without --run it is compiled only"
      )
    return list(devices)


def parse(name: str, slices: int = 1) -> Topology:
  """`'v5e:8x8'`, `'v5p:4x4x4'`, `'h100:8'` -> Topology.

  v5p's own names count cores: v5p-128 is `v5p:4x4x4`.

  Raises:
    AotError: an unknown chip, or a shape with another number of axes than the chip's torus.
  """
  match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
  if match is None or match[1] not in CHIPS:
    raise AotError(
      f"topology {name!r}: expected CHIP:SHAPE with a chip of {', '.join(CHIPS)}, "
      "e.g. v5e:8x8, v5p:4x4x4 or h100:8"
    )
  chip, shape = CHIPS[match[1]], tuple(map(int, match[2].split("x")))
  if len(shape) != (chip.dims or 1) or min(shape) < 1:
    wanted = f"{chip.dims} sizes, as in {chip.name}:{'x'.join(['4'] * chip.dims)}"
    raise AotError(
      f"topology {name!r}: expected {wanted if chip.dims else 'a number of chips, as in h100:8'}"
    )
  if not chip.dims and shape[0] > GPUS_PER_NODE:
    raise AotError(
      f"topology {name!r}: a node has {GPUS_PER_NODE} GPUs; write {chip.name}:{GPUS_PER_NODE} "
      f"--slices {-(-shape[0] // GPUS_PER_NODE)} for several nodes"
    )
  if slices < 1:
    raise AotError(f"--slices {slices}: expected at least 1")
  return Topology(chip, shape, slices)


def use_cpu() -> None:
  """Sets the environment of a machine that compiles for others; call it before any computation."""
  for key, value in TPU_ENVIRONMENT.items():
    os.environ.setdefault(key, value)
  os.environ["JAX_PLATFORMS"] = "cpu"
  if "jax" in sys.modules:
    import jax

    jax.config.update("jax_platforms", "cpu")


def pinned_libtpu() -> str:
  """The version pattern that this jax's `tpu` extra asks for, such as '0.0.42.*'; '' if none."""
  for line in importlib.metadata.requires("jax") or ():
    match = re.match(r"libtpu\s*==\s*([\w.*]+)", line)
    if match:
      return match[1]
  return ""


def require_libtpu() -> None:
  """Raises AotError where libtpu isn't installed."""
  if importlib.util.find_spec("libtpu") is None:
    raise AotError(
      "compiling for a TPU needs its compiler, libtpu, which is not installed: "
      f"pip install 'libtpu=={pinned_libtpu() or '*'}' (part of regionjax[tpu]; no TPU needed)"
    )


def require_cuda() -> None:
  """Raises AotError where jax's CUDA plugin isn't installed."""
  if not any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13)):
    raise AotError(
      "compiling for a GPU needs jax's CUDA plugin and libraries, which are not installed: "
      "pip install 'regionjax[cuda12]' (about 5 GB; no GPU needed)"
    )


def versions(platform: str) -> dict[str, str]:
  """Versions of what made the executable: sizes and speeds depend on them.

  Returns:
    `jax`, `jaxlib`, the compiler's package, and for a TPU `libtpu_pinned`, which jax asks for.
  """
  names = ["jax", "jaxlib"]
  names += ["libtpu"] if platform == "tpu" else [f"jax-cuda{m}-plugin" for m in (12, 13)]
  found = {}
  for name in names:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  if platform == "tpu":
    found["libtpu_pinned"] = pinned_libtpu()
  return found


def version_warning(found: dict[str, str]) -> str:
  """What to say where libtpu is another than jax asks for; '' where all is well."""
  pinned, have = found.get("libtpu_pinned", ""), found.get("libtpu", "")
  if not pinned or not have or _matches(have, pinned):
    return ""
  return (
    f"libtpu {have} is not the {pinned} that jax {found.get('jax')} asks for, and sizes differ "
    f"between versions; pip install 'libtpu=={pinned}'"
  )


def _matches(version: str, pattern: str) -> bool:
  prefix = pattern.removesuffix(".*")
  return version == pattern or (pattern.endswith(".*") and f"{version}.".startswith(f"{prefix}."))


def places(devices: Sequence[Any]) -> list[tuple[int, tuple[int, ...]]]:
  """(slice, position in its torus) of each device; GPUs have no position."""
  return [
    (getattr(d, "slice_index", 0) or 0, tuple(getattr(d, "coords", ()) or ())) for d in devices
  ]

"""RoIAlign compiled for TPUs that aren't there, and the kernels on a mesh of eight CPU devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from mesh_cases import run_source

from regionjax.aot import topology
from regionjax.mesh import BATCH_AXES, make_mesh
from regionjax.ops.conv import conv2d
from regionjax.ops.roi_align import roi_align

ROW_MAJOR = Layout((0, 1, 2, 3, 4))


def devices(name):
  topology.use_cpu()
  return topology.parse(name).devices()


def crop(x, boxes, image, implementation=None):
  return roi_align(
    x, boxes, output_size=14, sampling_ratio=2, box_image=image, implementation=implementation
  )


def specs(x, r, sharding, rows):
  """What `crop` takes, as shapes."""
  b = x.shape[0]
  return (
    x,
    jax.ShapeDtypeStruct((b, r, 4), jnp.float32, sharding=rows or sharding),
    jax.ShapeDtypeStruct((b, r), jnp.int32, sharding=rows or sharding),
  )


def big_operations(hlo: str, size: int) -> list[str]:
  """Opcodes of the entry computation's operations that give an array of at least `size` elements.

  Those that only name an array (parameters, bitcasts, elements of tuples) are left out.
  """
  found = []
  for line in hlo[hlo.index("\nENTRY") :].splitlines():
    match = re.match(r"\s+(?:ROOT )?%\S+ = (\(.*?\)|\S+) ([\w-]+)\(", line)
    if match and match[2] not in ("parameter", "bitcast", "get-tuple-element", "tuple"):
      shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
      elements = [int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes]
      if max(elements, default=0) >= size:
        found.append(match[2])
  return found


@pytest.mark.parametrize(
  "name, dtype, shape",
  [
    ("v5e:2x2", jnp.bfloat16, (16, 16, 1024)),
    ("v5e:2x2", jnp.float32, (128, 128, 1024)),
    ("v5e:2x2", jnp.bfloat16, (112, 112, 256)),
    ("v5p:2x2x1", jnp.bfloat16, (128, 128, 1024)),
    ("v6e:2x2", jnp.bfloat16, (128, 128, 1024)),
  ],
)
def test_kernels_compile_and_nothing_is_copied_around_them(name, dtype, shape):
  one = SingleDeviceSharding(devices(name)[0])
  big = Format(ROW_MAJOR, one)
  x = jax.ShapeDtypeStruct((1, 2, *shape), dtype, sharding=big)
  g = jax.ShapeDtypeStruct((1, 8, 14, 14, shape[-1]), dtype, sharding=big)
  _, *boxes = specs(x, 8, one, None)

  def pull(g, *boxes):
    return jax.vjp(lambda x: crop(x, *boxes), jnp.zeros(x.shape, dtype))[1](g)[0]

  for program, operand in ((crop, x), (pull, g)):
    compiled = jax.jit(program, out_shardings=big).lower(operand, *boxes).compile()
    size = min(np.prod(g.shape), np.prod(x.shape))
    assert big_operations(compiled.as_text(), size) == ["custom-call"]
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20


def test_a_convolution_reads_the_crops_as_they_lie():
  """The pyramid's next step: no copy between the two, and none of the maps."""
  one = SingleDeviceSharding(devices("v5e:2x2")[0])
  x = jax.ShapeDtypeStruct((1, 2, 32, 32, 256), jnp.bfloat16, sharding=Format(ROW_MAJOR, one))
  kernel = jax.ShapeDtypeStruct((3, 3, 256, 256), jnp.bfloat16, sharding=one)

  def program(kernel, *args):
    crops = crop(*args)
    return conv2d(crops.reshape(16, *crops.shape[2:]), kernel)

  text = jax.jit(program).lower(kernel, *specs(x, 16, one, None)).compile().as_text()
  operations = big_operations(text, 16 * 14 * 14 * 256)
  assert operations.count("custom-call") == 1
  before = operations[: operations.index("custom-call") + 2]
  assert "copy" not in before and "transpose" not in before, operations


@pytest.mark.parametrize("axes", [dict(data=2, tensor=2), dict(fsdp=4)])
def test_kernels_on_a_mesh_of_chips(axes):
  mesh = make_mesh(**({"data": 1} | axes), devices=devices("v5e:2x2"))
  whole = NamedSharding(mesh, PartitionSpec(BATCH_AXES, None, None, None, "tensor"))
  rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
  x = jax.ShapeDtypeStruct((4, 2, 16, 16, 1024), jnp.bfloat16, sharding=whole)

  def program(x, *boxes):
    out, transpose = jax.vjp(lambda x: crop(x, *boxes), x)
    return out, transpose(out)[0]

  text = jax.jit(program).lower(*specs(x, 8, rows, rows)).compile().as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 2
  assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", text)


EIGHT = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from regionjax.mesh import BATCH_AXES, make_mesh
from regionjax.ops.roi_align import roi_align
rng = np.random.default_rng(0)
x = rng.standard_normal((4, 2, 6, 5, 8), dtype=np.float32)
boxes = np.sort(rng.uniform(-0.2, 1.2, (4, 3, 2, 2)), axis=2).reshape(4, 3, 4).astype(np.float32)
image = rng.integers(-1, 2, (4, 3))
g = rng.standard_normal((4, 3, 2, 2, 8), dtype=np.float32)

def both(implementation):
  def program(x, boxes, image, g):
    out, transpose = jax.vjp(
      lambda x: roi_align(
        x, boxes, output_size=2, sampling_ratio=2, box_image=image, implementation=implementation
      ), x
    )
    return out, transpose(g)[0]
  return jax.jit(program)

expected = both("einsum")(x, boxes, image, g)
mesh = make_mesh(data=2, fsdp=2, tensor=2)
whole = NamedSharding(mesh, PartitionSpec(BATCH_AXES, None, None, None, "tensor"))
rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
args = [jax.device_put(a, s) for a, s in zip((x, boxes, image, g), (whole, rows, rows, whole))]
for context in (True, False):
  if context:
    with jax.set_mesh(mesh):
      actual = both("pallas")(*args)
  else:  # the arguments tell
    actual = both("pallas")(*args)
  for a, e in zip(actual, expected):
    assert a.sharding.is_equivalent_to(whole, 5), a.sharding
    np.testing.assert_allclose(a, e, atol=1e-5)
inside = jax.shard_map(
  both("pallas"), mesh=mesh, in_specs=tuple(s.spec for s in (whole, rows, rows, whole)),
  out_specs=(whole.spec, whole.spec), check_vma=False,
)
for a, e in zip(jax.jit(inside)(*args), expected):
  np.testing.assert_allclose(a, e, atol=1e-5)
# Three rows and seven channels: neither is split, all devices compute the same.
odd = [a[:3] for a in (x[..., :7], boxes, image, g[..., :7])]
with jax.set_mesh(mesh):
  for a, e in zip(both("pallas")(*odd), both("einsum")(*odd)):
    np.testing.assert_allclose(a, e, atol=1e-5)
"""


def test_eight_devices_equal_one():
  run_source(EIGHT)

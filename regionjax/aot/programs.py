"""The programs of a config as the compiler sees them: jitted functions and abstract arguments.

Nothing is allocated, no tokenizer and no data set is opened: a step's shapes follow from the config
alone. On a mesh of abstract devices no operation may run outside of a trace, not even a constant.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from regionjax import flops, partition
from regionjax import mesh as meshes
from regionjax.aot.errors import AotError
from regionjax.aot.made_up import made_up_batch
from regionjax.config import Config
from regionjax.infer import programs as generation
from regionjax.infer.sampling import row_keys
from regionjax.models.decoder import init_cache
from regionjax.models.lora import without_lora
from regionjax.models.params import batch_shapes, init_params, model_for, unstack_layers
from regionjax.train.optim import make_optimizer
from regionjax.train.start import model_functions
from regionjax.train.state import abstract, cast, make_init
from regionjax.train.step import make_train_step

# Slots are ids that tokens are compared with: any two that differ give the same program.
SLOTS = types.SimpleNamespace(image_slot_id=0, region_slot_id=1)
DISPATCH = 16  # tokens of a row that decoding makes before the host looks at them


@dataclasses.dataclass(frozen=True)
class Program:
  """A jitted function with abstract arguments on a mesh, and how to run it where the mesh is real.

  Attributes:
    name: 'train' or 'decode'.
    config: of the run, rows as they are here.
    mesh: of abstract devices.
    function: jitted.
    args: ShapeDtypeStructs with shardings.
    parts: the arguments by what they are, for the memory split.
    model_flops: that the model needs for one step, over all chips.
    tokens: that one step sees or makes, over all rows.
    make: () -> arguments to run it with, made up, where the mesh's devices can run.
    follow: (arguments, result) -> the arguments of the next run; the first ones are donated.
    steps: of one execution that is run with these.
    assumed_trips: of loops that end when the data says so; None where there is none.
  """

  name: str
  config: Config
  mesh: Mesh
  function: Any
  args: tuple[Any, ...]
  parts: dict[str, Any]
  model_flops: float
  tokens: int
  make: Callable[[], tuple[Any, ...]]
  follow: Callable[[tuple[Any, ...], Any], tuple[Any, ...]]
  steps: int = 1
  assumed_trips: int | None = None

  def trace(self) -> Any:
    """Traced for the mesh; the result has `.jaxpr` and `.lower()`."""
    with jax.set_mesh(self.mesh):
      return self.function.trace(*self.args)


def train(config: Config, mesh: Mesh) -> Program:
  """One step of training.

  Args:
    config: its data config gives rows, tokens, images and regions; sources aren't read.
    mesh: of any devices, abstract ones included.

  Raises:
    AotError: rows that the mesh can't split.
    regionjax.config.ConfigError: the mesh can't split the model.
  """
  data, shards = config.data, meshes.row_shards(mesh) * config.train.accumulate
  if data.rows % shards:
    raise AotError(
      f"data.rows={data.rows} cannot be split over {meshes.row_shards(mesh)} parts of the mesh and "
      f"train.accumulate={config.train.accumulate}; make it a multiple of {shards}, or give "
      "--rows-per-chip"
    )
  forward, init = model_functions(config, SLOTS)
  optimizer = make_optimizer(config.train)
  build = make_init(config, init, optimizer)
  state = abstract(build, lambda shapes: partition.shardings(config.model, shapes, mesh))
  lies = _shardings(state)
  shapes = batch_shapes(
    config.model, rows=data.rows, tokens=data.tokens_per_row, images=data.images_per_row,
    regions=data.regions_per_row,
  )  # fmt: skip
  batch = _lying(shapes, meshes.batch_sharding(mesh))
  progress = _lying(jax.ShapeDtypeStruct((), jnp.float32), meshes.replicated(mesh))
  row = flops.flops_per_example(
    config.model, tokens=data.tokens_per_row, images=data.images_per_row,
    regions=data.regions_per_row, trainable=config.train.trainable,
  )  # fmt: skip

  def make() -> tuple[Any, ...]:
    with jax.set_mesh(mesh):
      made = jax.jit(build, out_shardings=lies)(jax.random.key(config.train.seed), {})
    rows = made_up_batch(shapes, vocab=config.model.decoder.vocab_size, **vars(SLOTS))
    return made, *jax.device_put((rows, np.float32(0)), _shardings((batch, progress)))

  return Program(
    name="train",
    config=config,
    mesh=mesh,
    function=make_train_step(config, forward, optimizer, mesh, shardings=lies),
    args=(state, batch, progress),
    parts={
      "trainable": state.trainable, "frozen": state.frozen, "optimiser": state.opt_state,
      "batch": batch,
    },
    model_flops=row * data.rows,
    tokens=data.rows * data.tokens_per_row,
    make=make,
    follow=lambda args, result: (result[0], *args[1:]),
  )  # fmt: skip


def decode(config: Config, mesh: Mesh, *, rows: int, length: int) -> Program:
  """One token of every row, behind `length` tokens of room in the cache.

  The program is the engine's, which generates several tokens in a loop that ends when all rows are
  done; one trip is counted. All parameters of the model are held, its vision encoder too.

  Args:
    config: the model.
    mesh: as for `train`.
    rows: in the batch.
    length: slots of the key-value cache.
  """
  model_config = partition.pad_vocabulary(without_lora(config.model), mesh)
  dtype = jnp.dtype(model_config.compute_dtype)
  model = model_for(
    model_config, generate=True, image_slot_id=SLOTS.image_slot_id,
    region_slot_id=SLOTS.region_slot_id,
  )  # fmt: skip

  def build() -> Any:
    return unstack_layers(cast(init_params(model_config, jax.random.key(0)), dtype))

  params = jax.eval_shape(build)
  params = jax.tree.map(_lying, params, partition.shardings(model_config, params, mesh))
  with jax.set_mesh(mesh):
    cache = jax.eval_shape(lambda: init_cache(model_config.decoder, rows, length, dtype))
  same = meshes.replicated(mesh)
  running = generation.Running(
    cache=_cache(cache, mesh),
    logits_bv=_lying(
      jax.ShapeDtypeStruct((rows, model_config.decoder.padded_vocab), jnp.float32), same
    ),
    done_b=_lying(jax.ShapeDtypeStruct((rows,), jnp.bool_), same),
    step_b=_lying(jax.ShapeDtypeStruct((rows,), jnp.int32), same),
  )

  def settings() -> tuple[Any, ...]:
    """Keys, ids that stop and ids that are banned (none), and the most tokens now."""
    none = jnp.full(2, -1, jnp.int32)
    keys = row_keys(0, jnp.arange(rows, dtype=jnp.int32))
    beyond = jnp.full(2, model_config.decoder.padded_vocab, jnp.int32)
    return keys, none[:1], beyond, jnp.int32(DISPATCH), jnp.float32(1), jnp.float32(1)

  rest = _lying(jax.eval_shape(settings), same)

  def make() -> tuple[Any, ...]:
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), running)  # noqa: E731
    with jax.set_mesh(mesh):
      return (
        tuple(
          jax.jit(f, out_shardings=_shardings(like))()
          for f, like in ((build, params), (zeros, running))
        )
        + jax.jit(settings, out_shardings=_shardings(rest))()
      )

  function: Callable[..., Any] = functools.partial(
    generation.decode.__wrapped__, model, steps=DISPATCH, greedy=True
  )
  return Program(
    name="decode",
    config=config,
    mesh=mesh,
    function=jax.jit(function, donate_argnums=1, keep_unused=True),
    args=(params, running, *rest),
    parts={"parameters": params, "cache": running.cache},
    model_flops=decode_flops(config, rows=rows, length=length),
    tokens=rows,
    make=make,
    # The cache fills up and then stays full: all of it is read in every step.
    follow=lambda args, result: (args[0], result[1], *args[2:]),
    steps=DISPATCH,
    assumed_trips=1,
  )


def decode_flops(config: Config, *, rows: int, length: int) -> float:
  """Of one token in each of `rows` rows that look back at `length` tokens."""
  d = config.model.decoder
  one = flops.flops_by_part(config.model, tokens=1, images=0, regions=0, training=False)
  looks = 4.0 * d.layers * d.heads * d.head_dim * length
  return rows * (one["decoder"] + one["head"] + looks)


def bytes_per_device(tree: Any) -> int:
  """What a tree of abstract arrays takes on the device that holds most of it."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    dtype = leaf.dtype
    size = 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else np.dtype(dtype).itemsize
    total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * size
  return total


def _shardings(tree: Any) -> Any:
  return jax.tree.map(lambda x: x.sharding, tree)


def _lying(tree: Any, sharding: Any) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _cache(cache: Any, mesh: Mesh) -> Any:
  """The cache as `infer.programs.new_cache` lays it out."""
  sizes = dict(mesh.shape)

  def lie(x: Any) -> Any:
    names: list[Any] = [None] * len(x.shape)
    if len(x.shape) == 4:
      if x.shape[0] % meshes.row_shards(mesh) == 0:
        names[0] = meshes.BATCH_AXES
      if x.shape[1] % sizes["tensor"] == 0:
        names[1] = "tensor"
    return jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*names))
    )

  return jax.tree.map(lie, cache)

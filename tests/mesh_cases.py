"""Models small enough to compile for many meshes, and programs that run them on one of these.

Run as a program it reads a pickled (function's name, arguments) from its input, calls that function
of this file and pickles the result to its output: tests start it with eight CPU devices.
"""

import dataclasses
import pickle
import re
import sys
import types

import numpy as np

from regionjax.config import (
  Config,
  ConnectorConfig,
  DataConfig,
  DecoderConfig,
  LoraConfig,
  ModelConfig,
  RegionConfig,
  TrainConfig,
  VisionConfig,
)

IMAGE_SLOT, REGION_SLOT, VOCABULARY = 5, 6, 203
SHAPES = ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2))
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
# On a busy machine the threads of eight devices may come late; XLA ends a process after 40 s. The
# programs run for milliseconds: what makes them fast costs time for nothing.
XLA_FLAGS = (
  f"{EIGHT_DEVICES} "
  "--xla_cpu_collective_call_terminate_timeout_seconds=600 "
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
COLLECTIVES = r"all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def eight_heads() -> Config:
  """Everything divides by eight but the vocabulary, which is padded; two layers; a pyramid."""
  model = ModelConfig(
    name="eight",
    vision=VisionConfig.tiny(
      image_size=32, patch_size=16, stem=(), width=64, layers=2, heads=8, mlp_width=64
    ),
    connector=ConnectorConfig("mlp"),
    region=dataclasses.replace(
      RegionConfig.tiny("pyramid"), layers=(1, 2), upsample=(2, 1), width=32, rounds=1,
      output_size=2, position_width=16, token_width=32,
    ),
    decoder=DecoderConfig.tiny(
      vocab_size=VOCABULARY, vocab_multiple=8, width=64, layers=2, heads=8, kv_heads=8, head_dim=8,
      mlp_width=64, max_length=128, tie_embeddings=False,
    ),
    compute_dtype="float32",
  )  # fmt: skip
  data = DataConfig(rows=16, tokens_per_row=48, images_per_row=2, regions_per_row=4)
  # The trace of the first step is the gradient, and nothing scales it.
  return Config(name="eight", model=model, data=data, train=TrainConfig(clip_norm=0.0))


def two_key_heads() -> Config:
  """Grouped queries whose two key heads four or eight devices can't share; pooling, LoRA, tied."""
  config = eight_heads()
  decoder = dataclasses.replace(
    config.model.decoder, kv_heads=2, tie_embeddings=True, lora=LoraConfig(4, targets="q|v|o|down")
  )
  region = dataclasses.replace(
    RegionConfig.tiny("pool"), layers=(1,), width=32, output_size=2, position_width=16
  )
  model = dataclasses.replace(
    config.model, name="grouped", decoder=decoder, region=region, connector=ConnectorConfig()
  )
  return dataclasses.replace(config, name="grouped", model=model)


CONFIGS = {"eight heads": eight_heads, "two key heads": two_key_heads}


def random_params(config: Config, seed: int = 0):
  """Parameters of which none is zero, as LoRA's B would be, without compiling an initialiser."""
  import jax

  from regionjax.models.params import param_shapes

  rng = np.random.default_rng(seed)

  def draw(leaf):
    if len(leaf.shape) < 2:
      return (1 + 0.1 * rng.normal(size=leaf.shape)).astype(np.float32)
    return (rng.normal(size=leaf.shape) * leaf.shape[-2] ** -0.5).astype(np.float32)

  return jax.tree.map(draw, param_shapes(config.model))


def random_batch(config: Config, seed: int = 0):
  """Rows of two segments, one image, two regions; some supervise twice as much as others."""
  rng = np.random.default_rng(seed)
  data, vision = config.data, config.model.vision
  b, t, r = data.rows, data.tokens_per_row, data.regions_per_row
  tokens = rng.integers(10, VOCABULARY, (b, t)).astype(np.int32)
  tokens[:, 1 : 1 + config.model.image_tokens] = IMAGE_SLOT
  tokens[:, 10:12] = REGION_SLOT
  segments = np.ones((b, t), np.int32)
  segments[:, t // 2 :], segments[:, -5:] = 2, 0
  answers = np.zeros((b, t), np.int32)
  answers[:, 14:18], answers[1::2, 20:23], answers[:, t // 2 + 4 : t // 2 + 9] = 1, 2, 3
  corner = rng.uniform(0, 0.5, (b, r, 2))
  boxes = np.concatenate([corner, corner + rng.uniform(0.1, 0.5, (b, r, 2))], -1)
  mask = np.arange(r)[None] < np.full((b, 1), 2)
  positions = np.concatenate([np.arange(t // 2), np.arange(t - t // 2)])
  images = rng.normal(size=(b, data.images_per_row, *vision.image_hw, 3))
  return {
    "tokens_bt": tokens,
    "targets_bt": np.roll(tokens, -1, 1),
    "loss_weights_bt": (answers > 0).astype(np.float32),
    "segment_ids_bt": segments,
    "positions_bt": np.broadcast_to(positions, (b, t)).astype(np.int32),
    "answer_ids_bt": answers,
    "images_bkhwc": images.astype(np.float32),
    "image_mask_bk": np.arange(data.images_per_row)[None] < np.ones((b, 1)),
    "boxes_br4": boxes.astype(np.float32),
    "box_image_br": np.zeros((b, r), np.int32),
    "region_kind_br": np.where(mask, 2, 0).astype(np.int32),
    "region_mask_br": mask,
    "region_cover_brn": np.full((b, r, vision.tokens), 0.5, np.float32),
  }


def mesh_of(shape):
  """A mesh of the first devices; None is one device."""
  import jax

  from regionjax.mesh import make_mesh

  data, fsdp, tensor = shape or (1, 1, 1)
  devices = jax.devices()[: data * fsdp * tensor]
  return make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices)


def train_program(config: Config, shape):
  """(state, compiled step, shardings, mesh): the train step whose optimiser keeps the gradient."""
  import jax
  import optax

  from regionjax import partition
  from regionjax.mesh import put_batch
  from regionjax.train.start import model_functions
  from regionjax.train.state import TrainState, cast, split
  from regionjax.train.step import make_train_step

  mesh = mesh_of(shape)
  slots = types.SimpleNamespace(image_slot_id=IMAGE_SLOT, region_slot_id=REGION_SLOT)
  forward, _ = model_functions(config, slots)
  trainable, frozen = split(random_params(config), config.train.trainable)
  optimizer = optax.trace(decay=0.5)
  zeros = jax.tree.map(np.zeros_like, trainable)
  state = TrainState(np.int32(0), trainable, cast(frozen, np.float32), optax.TraceState(zeros))
  shardings = partition.shardings(config.model, state, mesh)
  step = make_train_step(config, forward, optimizer, mesh, shardings=shardings)
  state = jax.device_put(state, shardings)
  batch = put_batch(random_batch(config), mesh)
  return step.lower(state, batch, np.float32(0.5)).compile(), state, batch


def loss_and_gradients(name: str, shape):
  """(loss, {path: gradient}, {path: shape of a device's part}, loops of the loss that talk)."""
  from regionjax.train.state import flatten_paths

  config = CONFIGS[name]()
  compiled, state, batch = train_program(config, shape)
  new, metrics = compiled(state, batch, np.float32(0.5))
  gradients = flatten_paths(new.opt_state.trace)
  parts = {path: leaf.addressable_shards[0].data.shape for path, leaf in gradients.items()}
  return (
    float(metrics["loss_sum"] / metrics["weight_sum"]),
    {path: np.asarray(leaf) for path, leaf in gradients.items()},
    parts,
    collectives_in_loops(compiled.as_text(), "head_loss"),
  )


def head_collectives(trained: bool, shape):
  """(collectives in the loops of an output layer's loss, reductions of its weights' gradient)."""
  import jax
  import jax.numpy as jnp
  from jax.sharding import NamedSharding, PartitionSpec

  from regionjax.mesh import batch_sharding
  from regionjax.ops.losses import head_cross_entropy
  from regionjax.partition.activations import gather

  mesh = mesh_of(shape)
  split = NamedSharding(mesh, PartitionSpec("fsdp"))
  whole = NamedSharding(mesh, PartitionSpec())
  rng = np.random.default_rng(0)
  x = rng.normal(size=(16, 24, 64)).astype(np.float32)
  targets, weights = rng.integers(0, 207, (16, 24)), (rng.random((16, 24)) < 0.3).astype(np.float32)

  def loss(x, kernel):
    kernel = gather(kernel, split.spec, whole.spec, np.dtype("float32"), np.dtype("float32"))
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return head_cross_entropy(
      lambda kernel, x: jnp.matmul(x, kernel), kernel, x, targets, weights, shards=shards
    )[0]

  rows = batch_sharding(mesh)
  out = (whole, (rows, split) if trained else rows)
  gradient = jax.value_and_grad(loss, (0, 1) if trained else 0)
  program = jax.jit(gradient, in_shardings=(rows, split), out_shardings=out)
  with jax.set_mesh(mesh):
    text = program.lower(x, np.zeros((64, 207), np.float32)).compile().as_text()
  reductions = re.findall(r"= .*\b(?:all-reduce|reduce-scatter)(?:-start)?\(.*", text)
  return collectives_in_loops(text, "head_loss"), [r for r in reductions if ",207]" in r]


def pyramid_maps(shape):
  """(images used, maps where used, gradients, collectives in the loops over images).

  What isn't used is NaN. The kernels are split as the partition tables say.
  """
  import jax
  import jax.numpy as jnp
  from jax.sharding import NamedSharding, PartitionSpec

  from regionjax.mesh import batch_sharding
  from regionjax.models.pyramid_maps import MapWeights, Sizes, maps_where_used

  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  sizes = Sizes((3, 3), (2, 1), 2, jnp.float32, "full")
  weights = MapWeights(
    tuple((draw(1, 1, 6, 8), draw(8)) for _ in range(2)),
    tuple((draw(3, 3, 8, 8), draw(8), draw(8)) for _ in range(2)),
  )
  used = rng.random((8, 3)) < 0.5
  used[0] = False
  hidden = [np.where(used[:, :, None, None, None], draw(8, 3, 3, 3, 4), np.nan) for _ in "ab"]
  mesh = mesh_of(shape)
  rows, channels = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec("tensor"))
  kernels = NamedSharding(mesh, PartitionSpec(None, None, "fsdp", "tensor"))
  lies = MapWeights(
    ((NamedSharding(mesh, PartitionSpec(None, None, None, ("tensor", "fsdp"))), channels),) * 2,
    ((kernels, channels, channels),) * 2,
  )

  def loss(weights, hidden, used):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      maps = maps_where_used(weights, hidden, used, sizes)
    return sum(jnp.sum(jnp.sin(x)) for x in maps), maps

  gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
  run = jax.jit(gradient, in_shardings=(lies, [rows, rows], rows))
  compiled = run.lower(weights, hidden, used).compile()
  gradients, maps = jax.tree.map(
    np.asarray, compiled(*jax.device_put((weights, hidden, used), (lies, [rows, rows], rows)))
  )
  talk = collectives_in_loops(compiled.as_text(), "images_one_by_one")
  return used, maps, jax.tree.leaves(gradients), talk


def generated(name: str, shape):
  """Tokens of three answers of a batch, greedy and drawn, and those of a second turn."""
  from regionjax.data.rows import RegionArrays
  from regionjax.infer.batching import Prompt
  from regionjax.infer.engine import Engine
  from regionjax.infer.sampling import Sampling

  config = CONFIGS[name]()
  tokenizer = types.SimpleNamespace(
    image_slot_id=IMAGE_SLOT, region_slot_id=REGION_SLOT, pad_id=0, decode=lambda ids: ""
  )
  mesh = None if shape is None else mesh_of(shape)
  engine = Engine(config.model, random_params(config), tokenizer, steps=4, mesh=mesh)
  rng = np.random.default_rng(1)
  images = [rng.normal(size=(*config.model.vision.image_hw, 3)).astype(np.float32) for _ in "ab"]
  features = engine.encode_images(images)
  prompts = []
  for row, length in enumerate((20, 27, 24)):
    ids = rng.integers(10, VOCABULARY, length).astype(np.int32)
    ids[1 : 1 + config.model.image_tokens] = IMAGE_SLOT
    ids[12:14] = REGION_SLOT
    corner = rng.uniform(0, 0.5, (2, 2)).astype(np.float32)
    regions = RegionArrays(
      np.concatenate([corner, corner + 0.3], -1), np.zeros(2, np.int32), np.full(2, 2, np.int32),
      np.full((2, config.model.vision.tokens), 0.5, np.float32),
    )  # fmt: skip
    prompts.append(Prompt(ids, (row % 2,), regions))
  answers = [engine.generate(prompts, features, max_new_tokens=8, sampling=s)
             for s in (Sampling(), Sampling(1.0, 0.9, 3))]  # fmt: skip
  state = engine.prefill(prompts, features, new_tokens=8)
  more = [Prompt(rng.integers(10, VOCABULARY, 5).astype(np.int32)) for _ in prompts]
  state = engine.extend(state, more, features, new_tokens=60)
  *_, last = engine.decode(state, max_new_tokens=4)
  heads = {str(k.sharding.shard_shape(k.shape)[1]) for k in state.cache.k}
  return [[a.ids for a in batch] for batch in (*answers, last)], heads


def collectives_in_loops(text: str, scope: str) -> list[str]:
  """Collectives in the bodies and conditions of the while loops of a scope, whatever they call."""
  computations, name = {}, None
  for line in text.splitlines():
    if line.endswith("{") and "->" in line:
      name = line.split()[1 if line.startswith("ENTRY") else 0].lstrip("%")
      computations[name] = []
    elif name is not None:
      computations[name].append(line)
  calls = re.compile(r"(?:body|condition|calls|to_apply|\w+_computation)=%?([\w.\-]+)")
  branches = re.compile(r"branch_computations=\{([^}]*)\}")
  loops = [
    line for lines in computations.values() for line in lines
    if re.search(r"\bwhile\(", line) and scope in line
  ]  # fmt: skip
  if not loops:
    raise ValueError(f"no while loop has {scope!r} in its name")
  left, seen, found = list(loops), set(), []
  while left:
    line = left.pop()
    if re.search(rf"= .*\b({COLLECTIVES})(-start)?\(", line):
      found.append(line.strip())
    names = calls.findall(line)
    for group in branches.findall(line):
      names += [part.strip().lstrip("%") for part in group.split(",")]
    for called in names:
      if called not in seen:
        seen.add(called)
        left += computations.get(called, [])
  return found


def run_on_eight(name: str, *args):
  """Calls a function of this file in a process with eight CPU devices."""
  return pickle.loads(_output([__file__], pickle.dumps((name, args)), XLA_FLAGS))


def run_source(source: str, given: bytes = b"") -> bytes:
  """What Python code writes to its output, in a process with eight CPU devices."""
  return _output(["-c", source], given, EIGHT_DEVICES)


def _output(words: list[str], given: bytes, flags: str) -> bytes:
  import os
  import subprocess
  from pathlib import Path

  root = Path(__file__).parents[1]
  path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
  done = subprocess.run(
    [sys.executable, *words],
    input=given,
    env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
    capture_output=True,
    check=False,
  )
  if done.returncode:
    raise RuntimeError(done.stderr.decode())
  return done.stdout


def each(calls):
  """{(function's name, *arguments): result} of several calls, in one process."""
  return {call: globals()[call[0]](*call[1:]) for call in calls}


if __name__ == "__main__":
  import jax

  jax.config.update("jax_numpy_rank_promotion", "raise")
  jax.config.update("jax_default_matmul_precision", "highest")
  function, arguments = pickle.load(sys.stdin.buffer)
  result = globals()[function](*arguments)
  sys.stdout.buffer.write(pickle.dumps(result))

"""Programs that run where they were compiled, on made-up arguments."""

import dataclasses

import jax
import numpy as np
import pytest
from mesh_cases import eight_heads

from regionjax import cli
from regionjax.aot import made_up, programs, running, topology
from regionjax.config import RegionConfig
from regionjax.mesh import make_mesh
from regionjax.models.params import batch_shapes


def small():
  """A model that reads coordinates: it compiles in seconds."""
  config = eight_heads()
  model = dataclasses.replace(config.model, region=RegionConfig(kind="text"))
  return dataclasses.replace(config, model=model)


def compiled(program, seen):
  """The executable, which notes what it is given and gives."""
  with jax.set_mesh(program.mesh):
    run = program.trace().lower().compile()

  def call(*args):
    # Arguments are donated: only what is read now can be read.
    before = jax.tree.map(np.asarray, args[1].cache.length_b if len(args) > 3 else args[0].step)
    result = run(*args)
    seen.append((before, jax.tree.map(np.asarray, result[1 if len(args) <= 3 else 0])))
    return result

  return call


def test_steps_of_training_follow_each_other_and_learn():
  program, seen = programs.train(small(), make_mesh(devices=jax.devices()[:1])), []
  taken = running.seconds(program, compiled(program, seen), runs=2)
  assert len(taken) == 2 and min(taken) > 0
  assert [int(step) for step, _ in seen] == [0, 1, 2]
  sums = [metrics["loss_sum"] / metrics["weight_sum"] for _, metrics in seen]
  assert np.isfinite(sums).all() and sums[2] < sums[0]


def test_decoding_goes_on_where_it_stood():
  program = programs.decode(small(), make_mesh(devices=jax.devices()[:1]), rows=2, length=64)
  seen = []
  running.seconds(program, compiled(program, seen), runs=2)
  assert [list(length) for length, _ in seen] == [[0, 0], [16, 16], [32, 32]]
  assert all((tokens >= 0).all() and tokens.shape == (2, 16) for _, tokens in seen)


def test_what_was_measured():
  program = programs.train(small(), make_mesh(devices=jax.devices()[:1]))
  machine = topology.parse("v5e:2x2")
  found = running.measured(program, machine, [2.0, 4.0, 3.0])
  assert (found["seconds"], found["least"], found["most"], found["runs"]) == (3.0, 2.0, 4.0, 3)
  assert found["mfu"] == pytest.approx(program.model_flops / (3.0 * 4 * 1.97e14))


def test_a_made_up_batch_leaves_nothing_out():
  model = eight_heads().model
  patches = model.vision.tokens
  shapes = batch_shapes(model, rows=2, tokens=2 * patches + 20, images=2, regions=7)
  batch = made_up.made_up_batch(shapes, vocab=50, image_slot_id=3, region_slot_id=4)
  assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
    name: (s.shape, s.dtype) for name, s in shapes.items()
  }
  assert ((batch["tokens_bt"] == 3).sum(1) == 2 * patches).all()
  assert ((batch["tokens_bt"] == 4).sum(1) == 7).all()
  assert batch["image_mask_bk"].all() and batch["region_mask_br"].all()
  assert set(batch["box_image_br"].flat) == {0, 1}
  assert (batch["loss_weights_bt"].sum(1) == 20).all()
  with pytest.raises(ValueError, match=r"tokens_per_row"):
    shapes = batch_shapes(model, rows=2, tokens=2 * patches + 6, images=2, regions=7)
    made_up.made_up_batch(shapes, vocab=50, image_slot_id=3, region_slot_id=4)


def test_running_on_another_machine_is_refused(tmp_path, capsys):
  config = tmp_path / "eight.py"
  config.write_text(
    "from mesh_cases import eight_heads\nfrom ml_collections import ConfigDict\n"
    "from regionjax.config import to_dict\n\n"
    "def get_config(arg=None):\n  return ConfigDict(to_dict(eight_heads()))\n"
  )
  words = ["compile", str(config), "--topology", "h100:1", "--run"]
  assert cli.main([*words, "2"]) == 2
  assert "1 x h100 on one host, and this one has 1 x 'cpu'" in capsys.readouterr().err
  assert cli.main([*words, "-1"]) == 2
  assert "expected a number of runs" in capsys.readouterr().err


def test_a_stage_that_trains_a_part():
  """What is made is what the program takes, the frozen parameters in its compute dtype."""
  config = small()
  config = dataclasses.replace(
    config, train=dataclasses.replace(config.train, trainable=("connector/.*",))
  )
  program = programs.train(config, make_mesh(devices=jax.devices()[:1]))
  state, *_ = program.make()
  made = jax.tree.map(lambda x: (x.shape, x.dtype), state)
  assert made == jax.tree.map(lambda x: (x.shape, x.dtype), program.args[0])

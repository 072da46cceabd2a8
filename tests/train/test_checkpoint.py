import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regionjax.train.checkpoint import CheckpointError, Checkpoints, checksum

# TensorStore leaves futures behind when a read fails half-way.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def state():
  return {
    "a": jax.random.normal(jax.random.key(0), (64, 256)),
    "b": {"c": jnp.ones((8, 8), jnp.bfloat16)},
    "step": jnp.int32(0),
    "nothing": (),
  }


@pytest.fixture
def like(state):
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)


@pytest.fixture
def messages():
  return []


@pytest.fixture
def folder(tmp_path, state):
  """Checkpoints of steps 1, 2 and 3; two are kept."""
  checkpoints = Checkpoints(tmp_path, keep=2)
  for step in (1, 2, 3):
    checkpoints.save(step, state | {"step": jnp.int32(step)}, {"n": step})
  checkpoints.close()
  return tmp_path


def reopen(folder, messages):
  return Checkpoints(folder, keep=2, log=messages.append)


def test_the_newest_is_restored_bit_by_bit(folder, state, like, messages, bits):
  checkpoints = reopen(folder, messages)
  assert checkpoints.steps() == [2, 3]
  restored, record = checkpoints.restore_latest(like)
  assert record == {"n": 3}
  assert bits(restored) == bits(state | {"step": jnp.int32(3)})
  assert messages == []


def test_nothing_to_restore(tmp_path, like):
  assert Checkpoints(tmp_path, keep=1).restore_latest(like) is None


def test_the_state_may_be_donated_while_it_is_written(tmp_path, state, like, bits):
  checkpoints = Checkpoints(tmp_path, keep=1)
  add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
  expected = bits(state)
  checkpoints.save(1, state, {})
  for _ in range(50):
    state = add(state)
  jax.block_until_ready(state)
  checkpoints.wait()
  assert bits(checkpoints.restore_latest(like)[0]) == expected


def files(folder):
  found = [p for p in sorted((folder / "checkpoints" / "3").rglob("*")) if p.is_file()]
  return {str(p.relative_to(folder / "checkpoints" / "3")): p for p in found}


def largest(folder):
  return max(files(folder).values(), key=lambda p: p.stat().st_size)


def garble(path):
  size = path.stat().st_size
  with path.open("r+b") as file:
    file.seek(size // 2)
    file.write(b"\x55\xaa\x55\xaa")


DAMAGE = {
  "truncated array": lambda folder: os.truncate(largest(folder), 1000),
  "garbled array": lambda folder: garble(largest(folder)),
  "missing array": lambda folder: largest(folder).unlink(),
  "missing manifest": lambda folder: files(folder)["state/manifest.ocdbt"].unlink(),
  "missing arrays": lambda folder: shutil.rmtree(folder / "checkpoints" / "3" / "state"),
  "missing record": lambda folder: files(folder)["record/metadata"].unlink(),
  "empty record": lambda folder: os.truncate(files(folder)["record/metadata"], 0),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(damage, folder, like, messages, state):
  DAMAGE[damage](folder)
  checkpoints = reopen(folder, messages)
  restored, record = checkpoints.restore_latest(like)
  assert record == {"n": 2}
  assert int(restored["step"]) == 2
  (message,) = messages
  assert message.startswith("checkpoint of step 3 is damaged (")
  assert message.endswith("using step 2")
  assert (folder / "damaged" / "3").is_dir(), "nothing is thrown away"
  checkpoints.save(3, state, {"n": "again"})
  checkpoints.wait()
  assert checkpoints.restore_latest(like)[1] == {"n": "again"}


def test_missing_metadata_is_never_fatal(folder, like, messages):
  """Orbax describes a checkpoint in several places; whatever is left, some checkpoint is read."""
  for name in ("_CHECKPOINT_METADATA", "state/_METADATA"):
    files(folder)[name].unlink()
  restored, record = reopen(folder, messages).restore_latest(like)
  assert record == {"n": int(restored["step"])}
  assert (record == {"n": 3}) == (messages == [])


def test_changed_numbers_are_noticed(folder, like, messages, monkeypatch):
  """A file that reads well but holds other numbers than were written."""
  from regionjax.train import checkpoint

  found = []

  def first_differs(tree):
    found.append(tree)
    return checksum(tree) + jnp.uint32(len(found) == 1)

  monkeypatch.setattr(checkpoint, "checksum", first_differs)
  assert reopen(folder, messages).restore_latest(like)[1] == {"n": 2}
  assert "its checksum is" in messages[0]


def test_all_damaged_is_an_error(folder, like, messages):
  for step in ("2", "3"):
    (folder / "checkpoints" / step / "record" / "metadata").unlink()
  said = r"no checkpoint .* can be read \(damaged: steps 2, 3\); .* delete .*damaged to start anew"
  for _ in range(2):  # a second try must not take the emptied folder for a new one
    with pytest.raises(CheckpointError, match=said):
      reopen(folder, messages).restore_latest(like)
    assert len(messages) == 2
  shutil.rmtree(folder / "damaged")
  assert reopen(folder, messages).restore_latest(like) is None


def test_a_damaged_checkpoint_can_be_put_back(folder, like, messages):
  for step in ("2", "3"):
    (folder / "checkpoints" / step / "record" / "metadata").rename(folder / step)
  with pytest.raises(CheckpointError):
    reopen(folder, messages).restore_latest(like)
  (folder / "damaged" / "2").rename(folder / "checkpoints" / "2")
  (folder / "2").rename(folder / "checkpoints" / "2" / "record" / "metadata")
  assert reopen(folder, messages).restore_latest(like)[1] == {"n": 2}


def test_an_unfinished_write_is_not_a_checkpoint(folder, like, messages):
  (folder / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
  assert reopen(folder, messages).restore_latest(like)[1] == {"n": 3}


def test_the_best_is_kept_apart(folder, state, like, messages, bits):
  checkpoints = reopen(folder, messages)
  for step in (10, 20):
    checkpoints.save_best(step, {"w": state["a"] + step}, {"loss": 1.0})
  for step in (30, 40, 50):
    checkpoints.save(step, state, {})
  checkpoints.wait()
  best = checkpoints.restore_best(20, {"w": like["a"]})
  assert bits(best) == bits({"w": state["a"] + 20})
  assert checkpoints.steps() == [40, 50]
  assert checkpoints.restore_best(10, {"w": like["a"]}) is None
  assert messages[-1].startswith("the best checkpoint (step 10) cannot be read")


@pytest.mark.parametrize("anew", [False, True])
def test_a_best_checkpoint_of_steps_that_are_repeated_gives_way(
  anew, folder, state, like, messages, bits
):
  """The run goes on from step 3, or from nothing, in a folder with a best checkpoint of step 5."""
  if anew:
    shutil.rmtree(folder / "checkpoints")
  checkpoints = reopen(folder, messages)
  checkpoints.save_best(5, {"w": state["a"]}, {})
  checkpoints.close()
  checkpoints = reopen(folder, messages)
  restored = checkpoints.restore_latest(like)
  assert restored is None if anew else restored[1] == {"n": 3}
  best = checkpoints.restore_best(5, {"w": like["a"]})
  assert bits(best) == bits({"w": state["a"]}), "an export only reads: nothing is deleted yet"
  for change in (1, 2):  # the same step found again may hold other numbers
    checkpoints.save_best(4, {"w": state["a"] + change}, {})
    best = checkpoints.restore_best(4, {"w": like["a"]})
    assert bits(best) == bits({"w": state["a"] + change})
  assert [p.name for p in (folder / "best").iterdir()] == ["4"]


def test_checksum_sees_every_bit_and_place(state):
  base = int(checksum(state))
  changed = state | {"a": state["a"].at[3, 4].set(jnp.nextafter(state["a"][3, 4], 9.0))}
  assert int(checksum(changed)) != base
  same_bits = {"x": jnp.float32([1, 2]), "y": jnp.float32([3, 4])}
  swapped = {"x": same_bits["y"], "y": same_bits["x"]}
  assert int(checksum(same_bits)) != int(checksum(swapped))
  assert np.uint32(int(checksum({"i": jnp.int32([7, 8])}))) == 15

"""Checkpoints: kept, deleted, damaged in every way, written beside the run and to a full disk."""

import os
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_cases import full_disk

from regionjax.train import store
from regionjax.train.checkpoint import CheckpointError, Checkpoints
from regionjax.train.store import checksum

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


def change(path, old, new):
  data = path.read_bytes().replace(b" ", b"")
  assert old in data
  path.write_bytes(data.replace(old, new))


def empty(folder):
  shutil.rmtree(folder)
  folder.mkdir()


DAMAGE = {
  "truncated array": lambda folder: os.truncate(largest(folder), 1000),
  "garbled array": lambda folder: garble(largest(folder)),
  "missing array": lambda folder: largest(folder).unlink(),
  "missing manifest": lambda folder: files(folder)["state/manifest.ocdbt"].unlink(),
  "missing arrays": lambda folder: shutil.rmtree(folder / "checkpoints" / "3" / "state"),
  "missing record": lambda folder: files(folder)["record/metadata"].unlink(),
  "empty record": lambda folder: os.truncate(files(folder)["record/metadata"], 0),
  "another record": lambda folder: change(files(folder)["record/metadata"], b'"n":3', b'"n":4'),
  "empty folder": lambda folder: empty(folder / "checkpoints" / "3"),
  "half a folder": lambda folder: [p.unlink() for p in list(files(folder).values())[1::2]],
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
  assert (folder / "damaged" / "3").exists(), "nothing is thrown away"
  checkpoints.save(3, state, {"n": "again"})
  checkpoints.wait()
  assert checkpoints.restore_latest(like)[1] == {"n": "again"}


HARM = {
  "removed": lambda path: path.unlink(),
  "emptied": lambda path: os.truncate(path, 0),
  "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
  "garbled": garble,
}


@pytest.mark.parametrize("harm", HARM)
def test_whatever_happens_to_one_file_a_whole_checkpoint_is_read(
  harm, folder, like, state, bits, tmp_path_factory
):
  """Each of the newest one's files in turn. Some of them Orbax can do without."""
  expected = bits(state | {"step": jnp.int32(0)})
  passed_over, copies = set(), tmp_path_factory.mktemp("copies")
  for name in files(folder):
    copy = shutil.copytree(folder, copies / name.replace("/", "_"))
    HARM[harm](files(copy)[name])
    messages = []
    checkpoints = reopen(copy, messages)
    restored, record = checkpoints.restore_latest(like)
    checkpoints.close()
    assert record == {"n": int(restored["step"])}, name
    assert record["n"] == (2 if messages else 3), (name, messages)
    assert bits(restored | {"step": jnp.int32(0)}) == expected, name
    if messages:
      (message,) = messages
      assert message.startswith("checkpoint of step 3 is damaged ("), name
      passed_over.add(name)
  assert "record/metadata" in passed_over
  assert any("/d/" in name for name in passed_over), "files of arrays"


def test_missing_metadata_is_never_fatal(folder, like, messages):
  """Orbax describes a checkpoint in several places; whatever is left, some checkpoint is read."""
  for name in ("_CHECKPOINT_METADATA", "state/_METADATA"):
    files(folder)[name].unlink()
  restored, record = reopen(folder, messages).restore_latest(like)
  assert record == {"n": int(restored["step"])}
  assert (record == {"n": 3}) == (messages == [])


def test_changed_numbers_are_noticed(folder, like, messages, monkeypatch):
  """A file that reads well but holds other numbers than were written."""
  found = []

  def first_differs(tree):
    found.append(tree)
    return checksum(tree) + jnp.uint32(len(found) == 1)

  monkeypatch.setattr(store, "checksum", first_differs)
  assert reopen(folder, messages).restore_latest(like)[1] == {"n": 2}
  assert "its checksum is" in messages[0]


@pytest.mark.parametrize(
  "error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 3 of 2 GB"),
            PermissionError(13, "Permission denied", "state")],
)  # fmt: skip
def test_what_is_no_damage_moves_nothing(error, folder, like, messages, monkeypatch):
  def fails(*_):
    raise error

  monkeypatch.setattr(store.Store, "_read", fails)
  with pytest.raises(CheckpointError, match="step 3 could not be read and is left where it is"):
    reopen(folder, messages).restore_latest(like)
  assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["2", "3"]
  assert messages == []


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


def test_some_steps_are_kept_for_ever(tmp_path, state):
  for begin in (1, 6):  # the second part of the run knows of the first one's
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=4)
    for step in range(begin, begin + 5):
      checkpoints.save(step, state, {})
    checkpoints.close()
  assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [4, 8, 9, 10]


def test_who_only_looks_changes_nothing(folder, like, messages):
  """An export beside a run that is just writing a checkpoint, and deleting an old one."""
  (folder / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
  largest(folder).unlink()
  before = sorted(folder.rglob("*"))
  checkpoints = Checkpoints(folder, keep=1, read_only=True, log=messages.append)
  assert checkpoints.restore_latest(like)[1] == {"n": 2}
  checkpoints.close()
  assert sorted(folder.rglob("*")) == before
  assert messages[0].startswith("checkpoint of step 3 is damaged (") and len(messages) == 1


def test_the_run_goes_on_while_a_checkpoint_is_written(tmp_path, state, monkeypatch):
  """The last thing that a write does is to rename; it is held up until `save` has returned."""
  returned, waited = threading.Event(), []
  rename = os.rename

  def held_up(source, target, *args, **kwargs):
    if str(target).endswith("/checkpoints/1"):
      waited.append(returned.wait(timeout=60))
    rename(source, target, *args, **kwargs)

  monkeypatch.setattr(os, "rename", held_up)
  checkpoints = Checkpoints(tmp_path, keep=2)
  checkpoints.save(1, state, {})
  assert not (tmp_path / "checkpoints" / "1").exists()
  checkpoints.poll()  # doesn't wait either
  assert not (tmp_path / "checkpoints" / "1").exists()
  returned.set()
  checkpoints.wait()
  assert waited == [True]
  assert (tmp_path / "checkpoints" / "1").is_dir()


def test_a_full_disk_costs_a_checkpoint_and_no_more(folder, state, like, messages, bits):
  checkpoints = reopen(folder, messages)
  with full_disk():
    checkpoints.save(4, state, {"n": 4})
    checkpoints.save_best(4, {"w": state["a"]}, {})
    checkpoints.wait()
  said = sorted(message.split(" (")[0] for message in messages)
  assert said == [
    f"the {name} of step 4 could not be written" for name in ("best checkpoint", "checkpoint")
  ]
  assert all("File too large" in m and m.endswith("; going on without it") for m in messages)
  assert checkpoints.steps() == [2, 3]
  left = sorted(str(p.relative_to(folder)) for p in folder.glob("*/*"))
  assert left == ["checkpoints/2", "checkpoints/3"], "half-written files take up no space"
  for step in (5, 6):  # the very next save works
    checkpoints.save(step, state | {"step": jnp.int32(step)}, {"n": step})
  checkpoints.save_best(6, {"w": state["a"]}, {})
  checkpoints.wait()
  assert len(messages) == 2
  assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["5", "6"], "2 and 3 went"
  assert checkpoints.restore_latest(like)[1] == {"n": 6}
  assert bits(checkpoints.restore_best(6, {"w": like["a"]})) == bits({"w": state["a"]})


def test_a_failed_write_is_told_before_the_next_save(folder, state, messages):
  checkpoints = reopen(folder, messages)
  with full_disk():
    checkpoints.save(4, state, {})
    while not messages:
      checkpoints.poll()
  checkpoints.close()
  assert len(messages) == 1


def test_the_last_state_is_tried_twice_then_the_run_fails(folder, state, like, messages):
  checkpoints = reopen(folder, messages)
  said = "state of step 4 could not be saved .* newest checkpoint is of step 3. Free some space"
  with full_disk(), pytest.raises(CheckpointError, match=said):
    checkpoints.save_last(4, state, {"n": 4})
  assert len(messages) == 2
  checkpoints.save_last(4, state, {"n": 4})
  assert (folder / "checkpoints" / "4").is_dir()
  assert checkpoints.restore_latest(like)[1] == {"n": 4}


def test_checksum_sees_every_bit_and_place(state):
  base = int(checksum(state))
  changed = state | {"a": state["a"].at[3, 4].set(jnp.nextafter(state["a"][3, 4], 9.0))}
  assert int(checksum(changed)) != base
  same_bits = {"x": jnp.float32([1, 2]), "y": jnp.float32([3, 4])}
  swapped = {"x": same_bits["y"], "y": same_bits["x"]}
  assert int(checksum(same_bits)) != int(checksum(swapped))
  assert np.uint32(int(checksum({"i": jnp.int32([7, 8])}))) == 15

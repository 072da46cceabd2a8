"""On eight devices, whatever the mesh: the losses, gradients and tokens of one device.

All programs of a kind are compiled in one process, whose start alone takes as long as one of them.
"""

import numpy as np
import pytest
from mesh_cases import SHAPES, run_on_eight

EIGHT, GROUPED = "eight heads", "two key heads"
SPLIT, PARTS, ALL = (1, 1, 8), (1, 8, 1), (2, 2, 2)
FEW = (SPLIT, PARTS, ALL)
QUICK = [
  *(("loss_and_gradients", EIGHT, shape) for shape in (None, *FEW)),
  *(("loss_and_gradients", GROUPED, shape) for shape in (None, SPLIT)),
  *(("generated", EIGHT, shape) for shape in (None, SPLIT)),
  *(("head_collectives", trained, PARTS) for trained in (False, True)),
]
SLOW = [
  *(("loss_and_gradients", EIGHT, shape) for shape in (None, *SHAPES) if shape not in FEW),
  *(("loss_and_gradients", GROUPED, shape) for shape in (None, *SHAPES) if shape != SPLIT),
  *(("generated", GROUPED, shape) for shape in (None, *SHAPES)),
  *(("generated", EIGHT, shape) for shape in (None, *SHAPES) if shape != SPLIT),
]


@pytest.fixture(scope="module")
def quick():
  return run_on_eight("each", QUICK)


@pytest.fixture(scope="module")
def slow():
  return run_on_eight("each", SLOW)


def check_gradients(results, name, shape):
  loss, gradients, _, _ = results["loss_and_gradients", name, shape]
  wanted_loss, wanted, _, _ = results["loss_and_gradients", name, None]
  np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
  assert gradients.keys() == wanted.keys()
  # What is added to all keys of a query cancels in the softmax: that gradient is rounding alone.
  biases = [f"vision/layers/{name}/bias" for name in "kq"]
  assert np.abs(wanted[biases[0]]).max() < 1e-4 * np.abs(wanted[biases[1]]).max()
  distances = {
    path: np.abs(gradients[path] - wanted[path]).max() / np.abs(wanted[path]).max()
    for path in wanted.keys() - {biases[0]}
  }
  assert max(distances.values()) < 1e-5, sorted(distances.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("shape", FEW)
def test_losses_and_gradients_are_those_of_one_device(quick, shape):
  check_gradients(quick, EIGHT, shape)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape not in FEW])
def test_losses_and_gradients_on_the_other_meshes(slow, shape):
  check_gradients(slow, EIGHT, shape)


def test_key_heads_that_do_not_divide_change_nothing(quick):
  check_gradients(quick, GROUPED, SPLIT)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != SPLIT])
def test_grouped_queries_on_every_mesh(slow, shape):
  check_gradients(slow, GROUPED, shape)


def test_parameters_really_lie_apart(quick):
  """Equal numbers on eight whole copies would prove nothing."""
  parts = {shape: quick["loss_and_gradients", EIGHT, shape][2] for shape in FEW}
  down = "decoder/layers/down/kernel"
  assert parts[PARTS][down] == (2, 64, 8)
  assert parts[SPLIT][down] == (2, 8, 64)
  assert parts[ALL][down] == (2, 32, 32)
  assert parts[SPLIT]["regions/round_0/conv/kernel"] == (3, 3, 32, 4)
  assert parts[PARTS]["regions/flatten/kernel"] == (16, 32)


def test_the_pieces_of_the_loss_exchange_nothing(quick):
  assert quick["loss_and_gradients", EIGHT, PARTS][3] == []


@pytest.mark.parametrize("trained", [False, True])
def test_an_output_layer_is_reduced_once(quick, trained):
  in_loops, reductions = quick["head_collectives", trained, PARTS]
  assert in_loops == []
  assert len(reductions) == int(trained), reductions


def check_tokens(results, name, shape):
  tokens, heads = results["generated", name, shape]
  wanted, _ = results["generated", name, None]
  assert tokens == wanted
  tensor, held = shape[2], {EIGHT: 8, GROUPED: 2}[name]
  assert heads == {str(held // tensor if held % tensor == 0 else held)}


def test_tokens_are_those_of_one_device(quick):
  check_tokens(quick, EIGHT, SPLIT)
  assert len({ids for batch in quick["generated", EIGHT, None][0] for ids in batch}) > 3


@pytest.mark.slow
@pytest.mark.parametrize("name", [EIGHT, GROUPED])
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_on_every_mesh(quick, slow, name, shape):
  check_tokens(quick if (name, shape) == (EIGHT, SPLIT) else slow, name, shape)

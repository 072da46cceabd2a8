"""On a mesh every device leaves out its own images without regions; values and gradients stay."""

import numpy as np
import pytest
from mesh_cases import run_on_eight

SHAPES = ((1, 1, 1), (2, 4, 1), (1, 1, 8))  # data, fsdp, tensor


@pytest.fixture(scope="module")
def found():
  return run_on_eight("each", [("pyramid_maps", shape) for shape in SHAPES])


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_a_mesh_changes_no_map_and_no_gradient(found, shape):
  _, plain, plain_gradients, _ = found["pyramid_maps", SHAPES[0]]
  used, maps, gradients, _ = found["pyramid_maps", shape]
  assert 8 < used.sum() < 16 and not used[0].any()
  for level in maps:
    assert np.all(level[~used] == 0) and np.all(level[used].any((1, 2, 3)))
  for a, b in zip((*maps, *gradients), (*plain, *plain_gradients), strict=True):
    assert np.all(np.isfinite(a)) and np.max(np.abs(a - b)) <= 1e-5 * np.max(np.abs(b))


def test_rows_need_nothing_from_each_other(found):
  """Weights come before the loop over images, their gradients are added up behind it."""
  *_, talk = found["pyramid_maps", (2, 4, 1)]
  assert not talk

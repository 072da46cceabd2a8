"""Freed memory stays with the process."""

import subprocess
import sys

import pytest

from regionjax.train.heap import has_accelerator

SCRIPT = """
import resource, sys
import numpy as np
from regionjax.train.heap import keep_freed_memory
if sys.argv[1] == "keep":
  assert keep_freed_memory()
np.ones(8 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
  np.ones(8 << 20)  # 64 MiB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
  not sys.platform.startswith("linux") or has_accelerator(), reason="only for Linux on CPUs"
)
def test_what_was_freed_is_not_mapped_again():
  def faults(how: str) -> int:
    done = subprocess.run(
      [sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True
    )
    return int(done.stdout)

  assert 20 * faults("keep") < faults("leave")

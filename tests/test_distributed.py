"""Processes find each other, by words or by variables, and say clearly when they do not."""

import os
import re
import socket
import subprocess
import sys

import pytest

from regionjax import distributed
from regionjax.config import ConfigError

# Each process says who it is and what it sees; the sum needs both.
PROGRAM = """
import sys
from regionjax.distributed import connect
count = connect(*sys.argv[1:])
import jax
from jax.experimental import multihost_utils
total = multihost_utils.process_allgather(jax.numpy.float32(jax.process_index() + 1)).sum()
print("told", count, jax.process_index(), jax.process_count(), jax.device_count(), int(total))
"""

# A verb of the program; one process of two fails in it.
FAILING = """
import sys, types
from regionjax import cli
verb = types.ModuleType("verb")
def run(args):
  from regionjax.distributed import connect
  connect(args.where)
  import jax
  from jax.experimental import multihost_utils
  multihost_utils.sync_global_devices("both are there")
  if jax.process_index() == 1:
    raise RuntimeError("only here")
  multihost_utils.sync_global_devices("never")
verb.run, verb.add_arguments = run, lambda parser: parser.add_argument("where")
sys.modules["verb"] = verb
cli.VERBS["fail"] = cli.Verb("verb", "")
sys.exit(cli.main(["fail", sys.argv[1]]))
"""


def free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("localhost", 0))
    return listener.getsockname()[1]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
  """No sign of a cluster, wherever the tests run."""
  for name in os.environ:
    if name.startswith(("SLURM_", "OMPI_")) or name in distributed.VARIABLES:
      monkeypatch.delenv(name)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def test_two_processes_meet():
  """The first by words, the second by variables."""
  address = f"localhost:{free_port()}"
  running = []
  for index, words in enumerate(([f"{address},2,0"], [])):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    if not words:
      environment |= dict(zip(distributed.VARIABLES, (address, "2", str(index))))
    command = [sys.executable, "-c", PROGRAM, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running.append(subprocess.Popen(command, env=environment, **pipes))
  try:
    told = [process.communicate(timeout=240) for process in running]
  finally:
    for process in running:
      process.kill()
  for index, (out, _) in enumerate(told):  # Gloo writes to stdout too
    assert f"told 2 {index} 2 4 3" in out
  assert f"process 1 of 2: joining the others at {address}" in told[1][1]


def test_a_process_that_fails_alone_ends_with_a_code_of_its_own():
  """Not with jax's 134 for all, after five minutes of waiting for each other."""
  address = f"localhost:{free_port()}"
  pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
  other, failing = (
    subprocess.Popen([sys.executable, "-c", FAILING, f"{address},2,{index}"], **pipes)
    for index in range(2)
  )
  try:
    _, told = failing.communicate(timeout=240)
    assert failing.returncode == 1
    assert told.count("RuntimeError: only here") == 1
  finally:
    failing.kill()
    other.kill()
    other.communicate()


def test_a_process_is_alone_without_a_sign_of_others(monkeypatch):
  assert distributed.connect() == 1
  monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
  assert distributed.connect("off") == 1


@pytest.mark.parametrize(
  "variables",
  [
    {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "16"},
    {"OMPI_COMM_WORLD_SIZE": "2"},
  ],
)
def test_several_tasks_are_a_sign(variables, monkeypatch):
  asked = []
  monkeypatch.setattr(distributed, "_find", lambda *, timeout: asked.append(timeout) or 16)
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  assert distributed.connect(timeout=7) == 16
  assert asked == [7]


@pytest.mark.parametrize(
  "variables",
  [
    {"SLURM_NTASKS": "16"},  # a batch script: srun starts the tasks
    {"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"},
    {"OMPI_COMM_WORLD_SIZE": "1"},
  ],
)
def test_one_task_is_no_sign(variables, monkeypatch):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  assert distributed.connect() == 1


def test_auto_insists_on_a_cluster():
  """In a process of its own: jax looks for others only before its first use of a device."""
  code = "from regionjax import distributed; distributed.connect('auto')"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert re.search(r"no cluster found.*srun.*JAX_COORDINATOR_ADDRESS", done.stderr)


@pytest.mark.parametrize(
  "where, message",
  [
    ("everywhere", "expected auto, off, or HOST:PORT,PROCESSES,INDEX"),
    ("host0,2,0", "'host0' is no HOST:PORT of process 0"),
    ("host0:8476,2,2", "an index from 0 to one less, not '2' and '2'"),
    ("host0:8476,two,0", "expected a number of processes"),
  ],
)
def test_words_that_name_no_process(where, message):
  with pytest.raises(ConfigError, match=message):
    distributed.connect(where)


def test_variables_come_together(monkeypatch):
  monkeypatch.setenv("JAX_PROCESS_ID", "1")
  with pytest.raises(ConfigError, match="not JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES; set"):
    distributed.connect()
  monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host0")
  with pytest.raises(ConfigError, match="JAX_PROCESS_ID=1: 'host0' is no HOST:PORT"):
    distributed.connect()


def test_process_0_that_does_not_answer_is_named():
  address = f"localhost:{free_port()}"
  with pytest.raises(ConfigError, match=f"process 0 does not answer at {address} after 1 s"):
    distributed.connect(f"{address},2,1", timeout=1)

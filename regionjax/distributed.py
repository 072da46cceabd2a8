"""How the processes of one program find each other, before any of them asks for devices.

Each process sees the devices of its own host (or one GPU of it). After `connect`, `jax.devices()`
are those of all, and every process runs the same program on them.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import NoReturn

from regionjax.config import ConfigError

# The three that name a process outright, in any environment.
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
EXPLICIT = "HOST:PORT,PROCESSES,INDEX as in host0:8476,4,2"
TIMEOUT = 300  # seconds; hosts of a pod come up within a minute or two of each other
LAST = 5  # seconds


def connect(where: str = "", *, timeout: int = TIMEOUT) -> int:
  """Joins the other processes of the program. Call it before anything asks for devices.

  Args:
    where: '' joins if the environment names others: the three variables `JAX_COORDINATOR_ADDRESS`
      (HOST:PORT of process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`; a Slurm step or an MPI run
      of several tasks; a Cloud TPU (TPU VM or GKE). 'auto' insists on finding them, by the same
      signs or another that jax knows. 'off' stays alone. 'HOST:PORT,PROCESSES,INDEX' needs no
      signs.
    timeout: seconds to wait until all have come.

  Returns:
    How many processes there are.

  Raises:
    ConfigError: `where` or the variables don't name a process, 'auto' finds no cluster, or process
      0 cannot be reached. Where process 0 waits in vain, jax ends it with a stack trace.
  """
  if where not in ("", "auto", "off"):
    return _join(*_parse(where), timeout=timeout)
  if where == "off":
    return 1
  named = _from_variables()
  if named is not None:
    return _join(*named, timeout=timeout)
  if where == "" and not _cluster():
    return 1
  return _find(timeout=timeout)


def joined() -> bool:
  """Whether other processes are joined to this one; doesn't import jax."""
  if "jax" not in sys.modules:
    return False
  from jax._src import distributed

  state = distributed.global_state
  return state.client is not None and state.num_processes > 1


def leave(code: int) -> NoReturn:
  """Ends this process after an error, without waiting for the others that are joined to it.

  Left to itself, jax waits five minutes for the others, which know of no error, and then ends all
  of them with 134: no script could tell that from a lost host. Now the others miss this process
  within 100 s. Process 0, which keeps their connection, leaves after those with the same error.
  """
  from jax._src import distributed

  if distributed.global_state.process_id == 0:
    time.sleep(LAST)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _find(*, timeout: int) -> int:
  """Lets jax ask the cluster for the address, the number of processes and this one's index."""
  import jax

  _say(f"looking for the other processes of this {_cluster() or 'cluster'}, up to {timeout} s")
  try:
    jax.distributed.initialize(initialization_timeout=timeout)
  except ValueError as error:  # jax's way to say that it knows no cluster of this kind
    raise ConfigError(
      f"--distributed auto: no cluster found ({error}); start under Slurm's srun, MPI or on a "
      f"Cloud TPU, set {', '.join(VARIABLES)}, or pass {EXPLICIT}"
    ) from None
  return jax.process_count()


def _join(address: str, count: int, index: int, *, timeout: int) -> int:
  import jax

  _say(f"process {index} of {count}: joining the others at {address}, up to {timeout} s")
  if index:
    _reach(address, timeout)
  try:
    # No detection: inside a Slurm job or on a TPU it would override what was said here.
    jax.distributed.initialize(
      address, count, index, cluster_detection_method="deactivate", initialization_timeout=timeout
    )
  except jax.errors.JaxRuntimeError as error:
    reason = " ".join(str(error).split())[:160]
    raise ConfigError(
      f"process {index} of {count} cannot join at {address} ({reason}); start each process with "
      "another index, and process 0 on that host, where no other program may have the port"
    ) from None
  return count


def _reach(address: str, timeout: int) -> None:
  """Waits for process 0 to listen. Left to itself, jax ends the program with a stack trace."""
  host, _, port = address.rpartition(":")
  end = time.monotonic() + timeout
  while True:
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() >= end:
        raise ConfigError(
          f"process 0 does not answer at {address} after {timeout} s ({error}); start it with the "
          "same address and count, on that host, and let the others reach that port"
        ) from None
      time.sleep(min(1.0, timeout / 10))


def _say(text: str) -> None:
  """Before a wait that jax may end with a stack trace: whoever reads the log sees what for."""
  print(text, file=sys.stderr, flush=True)


def _parse(where: str) -> tuple[str, int, int]:
  """'HOST:PORT,PROCESSES,INDEX' -> its parts."""
  parts = where.split(",")
  if len(parts) != 3:
    raise ConfigError(f"--distributed {where!r}: expected auto, off, or {EXPLICIT}")
  return _checked(*parts, origin=f"--distributed {where!r}")


def _from_variables() -> tuple[str, int, int] | None:
  """What the three variables say, or None if the number of processes and the index are unset.

  An address alone is none of ours: jax takes it as the port's owner where it finds the rest itself.
  """
  values = [os.environ.get(name, "") for name in VARIABLES]
  if not any(values[1:]):
    return None
  missing = [name for name, value in zip(VARIABLES, values) if not value]
  if missing:
    given = ", ".join(f"{n}={v}" for n, v in zip(VARIABLES, values) if v)
    raise ConfigError(
      f"{given} is set but not {' and '.join(missing)}; set all three of {', '.join(VARIABLES)}, "
      "or none"
    )
  return _checked(*values, origin=", ".join(f"{n}={v}" for n, v in zip(VARIABLES, values)))


def _checked(address: str, count: str, index: str, *, origin: str) -> tuple[str, int, int]:
  host, _, port = address.rpartition(":")
  if not host or not port.isdigit():
    raise ConfigError(f"{origin}: {address!r} is no HOST:PORT of process 0, e.g. 10.0.0.2:8476")
  if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
    raise ConfigError(
      f"{origin}: expected a number of processes and an index from 0 to one less, not {count!r} "
      f"and {index!r}"
    )
  return address, int(count), int(index)


def _cluster() -> str | None:
  """By what sign the environment shows several processes, or None."""

  def tasks(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else 1

  # A batch script has SLURM_NTASKS too; only what srun starts is a task of a step.
  if "SLURM_STEP_NODELIST" in os.environ and tasks("SLURM_NTASKS") > 1:
    return "Slurm"
  if tasks("OMPI_COMM_WORLD_SIZE") > 1:
    return "Open MPI"
  return "Cloud TPU" if _has_tpu() else None


def _has_tpu() -> bool:
  """Whether this is a host of a Cloud TPU that may be used; opens no device."""
  wanted = os.environ.get("JAX_PLATFORMS", "")
  if wanted and "tpu" not in wanted.split(","):
    return False
  import jax  # noqa: F401  looks for the chips when it is imported
  from jax._src import cloud_tpu_init

  return cloud_tpu_init.running_in_cloud_tpu_vm

"""What runs on the hosts: the detached run of a TPU host, Slurm's batch script, compiler flags."""

import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOST = ROOT / "launch" / "tpu_host.sh"

# In the place of training: tells its words, and ends as asked by SIGTERM or by a file.
PROGRAM = """#!/usr/bin/env bash
trap 'echo saved; exit 42' TERM
echo "$FIRST in ${PWD##*/}:" "$@"
while [ ! -e "$HOME/end" ]; do sleep 0.05; done
exit 3
"""

NOTES = """#!/usr/bin/env bash
{ printf '%q ' "${0##*/}" "$@"; echo; } >>"$RECORD"
"""


def wait_for(what, seconds=60):
  end = time.monotonic() + seconds
  while not what():
    assert time.monotonic() < end
    time.sleep(0.05)


@pytest.fixture
def host(shell):
  """A TPU host with the files of commit c0ffee and a stand-in for its Python."""
  home = shell.folder / "home" / "regionjax"
  (home / "c0ffee").mkdir(parents=True)
  (home / "venv" / "bin").mkdir(parents=True)
  (home / "venv/bin/python").write_text(PROGRAM)
  (home / "venv/bin/python").chmod(0o755)
  return lambda *words: shell("bash", HOST, *words)


def start(host, shell, name="run"):
  done = host("start", name, "c0ffee", "FIRST=a b", "train", "configs/x.py", "--steps=[1, 2]")
  assert done.returncode == 0, done.stderr
  log = shell.folder / "home/regionjax/runs" / name / "log"
  wait_for(lambda: "configs" in log.read_text())
  return log


def state(host, name="run"):
  return host("state", name).stdout.strip()


def test_a_detached_run_is_started_seen_and_its_code_kept(host, shell):
  assert state(host) == "regionjax: absent"
  log = start(host, shell)
  assert "a b in c0ffee: -u -m regionjax train configs/x.py --steps=[1, 2]" in log.read_text()
  assert state(host) == "regionjax: running"
  (shell.folder / "home/end").touch()
  wait_for(lambda: state(host) != "regionjax: running")
  assert state(host) == "regionjax: exit 3"


def test_stop_lets_it_save_and_a_new_start_ends_the_old_run(host, shell):
  log = start(host, shell)
  first = (log.parent / "pid").read_text().split()[0]
  log.write_text("")
  start(host, shell)
  assert "saved" in log.read_text()
  assert state(host) == "regionjax: running"
  assert not Path(f"/proc/{first}").exists()
  assert host("stop", "run").returncode == 0
  assert state(host) == "regionjax: stopped"  # told from a run that a preemption ended
  assert (log.parent / "exit").read_text() == "42\n"
  assert host("stop", "run").returncode == 0


def test_a_pid_from_before_a_reboot_is_no_run(host, shell):
  folder = shell.folder / "home/regionjax/runs/run"
  folder.mkdir(parents=True)
  (folder / "pid").write_text(f"{os.getpid()} another-boot\n")
  assert state(host) == "regionjax: absent"


def test_setup_mounts_and_installs(host, shell):
  shell.fake("sudo", "gcsfuse", "python3", "curl", "lsb_release")
  done = host("setup", "my-bucket", "c0ffee")
  # Nothing made the folder of uv: the stand-in for pip did nothing.
  calls = [" ".join(call) for call in shell.calls()]
  assert "gcsfuse --implicit-dirs my-bucket /mnt/my-bucket" in calls
  assert any("pip install" in call and call.endswith(" uv") for call in calls)
  assert done.returncode == 127 and "uv/bin/uv" in done.stderr
  dry = host("--dry-run", "setup", "my-bucket", "c0ffee")
  assert dry.returncode == 0 and shell.calls() == []
  assert re.search(r"--editable \S+/c0ffee\[tpu\]", dry.stderr)


@pytest.mark.parametrize("words", [(), ("fly", "run"), ("start", "run", "c0ffee"), ("state",)])
def test_a_host_refuses_other_words(words, host):
  done = host(*words)
  assert done.returncode == 2 and done.stderr.startswith("error: ")


@pytest.fixture
def job(shell, checkout):
  """Slurm's batch script, as `slurm.sh` writes it."""
  shell.fake("sbatch")
  done = shell(
    "bash", checkout / "launch/slurm.sh", "train", "configs/tiny.py", "--name", "run", "--workdir",
    "runs/a b", "--nodes", "2", "--gpus-per-node", "4", "--setup", "export FIRST=set", "--grace",
    "120", "--qos", "high", "--cpus-per-task", "12", "--", "--train.steps=5",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  (call,) = shell.calls()
  assert call[0] == "sbatch"
  return Path(call[1])


def test_the_batch_script_asks_for_the_nodes_and_is_sound(job):
  text = job.read_text()
  asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE))
  assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("2", "4", "4")
  assert (asked["signal"], asked["qos"], asked["requeue"]) == ("B:USR1@120", "high", "")
  assert asked["open-mode"] == "append"  # a job that comes back goes on in its log
  assert "partition" not in asked
  assert asked["cpus-per-task"] == "12"
  assert re.search(r"^srun .*--cpus-per-task=12 python", text, re.MULTILINE)  # srun takes none over
  checker = Path(sysconfig.get_path("scripts")) / "shellcheck"
  checked = subprocess.run([checker, "--exclude=SC2034", job], capture_output=True, text=True)
  assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
  "event, code, requeued",
  [
    ("time", 42, True),
    ("time, and it saves at once", 42, True),
    ("preempted", 42, True),
    ("stopped", 42, False),
    ("failed", 3, False),
    ("finished though preempted", 0, False),
  ],
)
def test_a_job_that_slurm_ends_saves_and_goes_back_into_the_queue(
  event, code, requeued, job, shell
):
  """The stand-in for srun ends by the signal that Slurm or scancel sends to the steps of a job."""
  run = PROGRAM.replace("while", 'echo $$ >"$HOME/pid"\nwhile', 1)
  shell.fake("srun", text=run.replace("exit 3", f"exit {code}"))
  at = "2026-01-01T00:00:00" if "preempted" in event else "None"
  told = f"   PreemptEligibleTime=2025-12-31T00:00:00 PreemptTime={at}"
  shell.fake("scontrol", text=f"{NOTES}[ \"$1\" != show ] || echo '{told}'\n")
  # Slurm's own returns at once; the run may have ended before the batch script goes on.
  until = 'while kill -0 "$pid"; do :; done 2>/dev/null' if "at once" in event else ""
  send = f'#!/usr/bin/env bash\npid=$(cat "$HOME/pid")\nkill -TERM "$pid"\n{until}\n'
  shell.fake("scancel", text=send)
  process = subprocess.Popen(
    ["bash", job], env=shell.environment | {"SLURM_JOB_ID": "17"}, stdout=subprocess.PIPE, text=True
  )
  pid = shell.folder / "home/pid"
  wait_for(lambda: pid.exists() and pid.read_text().strip())
  if event.startswith("time"):
    process.send_signal(signal.SIGUSR1)
  elif event in ("failed", "finished though preempted"):
    (shell.folder / "home/end").touch()
  else:
    os.kill(int(pid.read_text()), signal.SIGTERM)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == code
  assert "set in " in out and "regionjax train configs/tiny.py" in out
  again = [call for call in shell.calls() if call[1] != "show"]
  assert again == ([["scontrol", "requeue", "17"]] if requeued else [])


def test_this_jaxlib_knows_the_flags_for_gpus():
  text = (ROOT / "launch/lib.sh").read_text()
  (flags,) = re.findall(r"^GPU_FLAGS='(.*)'$", text, re.MULTILINE)

  def run(flags):
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(words, env=environment, capture_output=True).returncode

  assert run(flags) == 0
  assert run(f"{flags} --xla_gpu_no_such_flag=true") != 0

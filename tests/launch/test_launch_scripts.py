"""The scripts that start runs elsewhere: sound shell, true dry runs, errors that help."""

import re
import shlex
import subprocess
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

from regionjax.config_files import load_config
from regionjax.mesh import from_config

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
COMMANDS = ("gke.sh", "slurm.sh", "tpu_pod.sh")

POD = (
  "tpu_pod.sh train configs/tiny.py:seed=1 --name stage2 --zone us-west4-a --accelerator "
  "v5litepod-64 --bucket my-bucket --poll 0"
)
GKE = (
  "gke.sh train configs/tiny.py --name stage2 --cluster tpus --zone us-east5-a --project mine "
  "--accelerator v5p-128 --storage runs --workdir /mnt/runs/stage2"
)
SLURM = "slurm.sh train configs/tiny.py --name stage2 --nodes 2 --gpus-per-node 8"


def words_of(checkout, line: str, *more: str) -> list[str]:
  script, *rest = line.split()
  return ["bash", str(checkout / "launch" / script), *rest, *more]


def option(call, name: str) -> str:
  """The value of `--name=value` in a call."""
  (value,) = [word.partition("=")[2] for word in call if word.startswith(f"--{name}=")]
  return value


def shellcheck(*words) -> subprocess.CompletedProcess:
  program = Path(sysconfig.get_path("scripts")) / "shellcheck"
  assert program.exists(), "shellcheck is missing; pip install -e '.[test]' brings it"
  return subprocess.run([program, *words], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
  # SC1091: an environment that does not exist yet cannot be followed.
  checked = shellcheck("--external-sources", "--exclude=SC1091", path)
  assert checked.returncode == 0, checked.stdout
  subprocess.run(["bash", "-n", path], check=True)


def test_shellcheck_can_find_something(tmp_path):
  (tmp_path / "bad.sh").write_text("#!/bin/bash\nrm $1\n")
  assert shellcheck(tmp_path / "bad.sh").returncode == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_every_option(name, checkout, shell):
  text = (checkout / "launch" / name).read_text()
  known = re.search(r"parse (['\"].*?['\"]) (['\"].*?['\"]) ", text, re.DOTALL).group(0)
  options = set(re.findall(r"[a-z]+(?:-[a-z]+)*", known.replace("${passed[*]}", ""))) - {"parse"}
  for words in ([name, "--help"], [name, "train", "-h"]):
    done = shell("bash", checkout / "launch" / words[0], *words[1:])
    assert done.returncode == 0
    assert not [word for word in options if f"--{word}" not in done.stdout]
    assert "--dry-run" in done.stdout


@pytest.mark.parametrize(
  "line",
  [
    f"{POD} --spot --delete-when-done",
    f"{POD} --slices 2 --reserved --project mine --network net --runtime-version x",
    "tpu_pod.sh status --name stage2 --zone us-west4-a",
    "tpu_pod.sh logs --name stage2 --zone us-west4-a --slices 2",
    "tpu_pod.sh logs --name stage2 --zone us-west4-a --all-hosts",
    "tpu_pod.sh stop --name stage2 --zone us-west4-a",
    "tpu_pod.sh delete --name stage2 --zone us-west4-a",
    f"{GKE} --slices 2",
    f"{GKE} --image gcr.io/mine/regionjax:1",
    "gke.sh status --name stage2 --cluster tpus --zone us-east5-a --project mine",
    "gke.sh logs --name stage2 --cluster tpus --zone us-east5-a --project mine",
    "gke.sh delete --name stage2 --cluster tpus --zone us-east5-a --project mine",
    f"{SLURM} --workdir runs/stage2 --partition gpu --mem 0",
    "slurm.sh status --name stage2 --workdir runs/stage2",
    "slurm.sh stop --name stage2 --workdir runs/stage2",
    "slurm.sh delete --name stage2 --workdir runs/stage2",
  ],
)
def test_a_dry_run_prints_what_runs(line, checkout, shell):
  """Nothing is called, none of the programs need be there; pasted, it does what the script does."""
  settings = () if " train " not in line else ("--", "--train.steps=9", "--train.trainable=['a b']")
  words = words_of(checkout, line)
  dry = shell(*words, "--dry-run", *settings)
  assert (dry.returncode, dry.stderr) == (0, "")

  shell.fake("gcloud", "xpk", "kubectl", "sbatch", "scancel", "squeue")
  shell(*words, "--dry-run", *settings)
  assert shell.calls() == []

  shell.answer("tpus", "")
  shell.answer("run", "regionjax: absent")
  real = shell(*words, *settings)
  assert real.returncode == 0, real.stderr
  called = shell.calls()
  assert called
  job = shell.folder / "runs/.launch/stage2/job.sh"
  written = job.read_text() if job.exists() else None
  job.unlink(missing_ok=True)

  (shell.folder / "dry.sh").write_text(dry.stdout)
  pasted = shell("bash", "-e", shell.folder / "dry.sh")
  assert pasted.returncode == 0, pasted.stderr
  assert shell.calls() == called
  assert (job.read_text() if job.exists() else None) == written


def test_a_pod_gets_the_commit_the_cache_and_the_flags(checkout, shell):
  shell.fake("gcloud")
  shell.answer("tpus", "")
  shell.answer("run", "regionjax: absent")
  settings = ("--", "--train.steps=9", "--train.trainable=['a b']")
  assert shell(*words_of(checkout, f"{POD} --slices 2 --spot"), *settings).returncode == 0
  calls = shell.calls()

  (create,) = [call for call in calls if "create" in call]
  assert option(create, "accelerator-type") == "v5litepod-64"
  assert option(create, "runtime-version") == "v2-alpha-tpuv5-lite"
  assert (option(create, "node-count"), option(create, "node-prefix")) == ("2", "stage2")
  assert "--spot" in create and "--reserved" not in create

  on_hosts = [call for call in calls if "ssh" in call and option(call, "worker") == "all"]
  assert [option(call, "node") for call in on_hosts] == ["all", "all"]
  setup, start = [option(call, "command") for call in on_hosts]
  (copy,) = [call for call in calls if call[:3] == ["gcloud", "storage", "cp"]]
  assert copy[4] in setup  # what was copied there is what hosts fetch

  words = shlex.split(start)
  variables = dict(word.split("=", 1) for word in words if re.match("[A-Z_]+=", word))
  assert variables["JAX_COMPILATION_CACHE_DIR"] == "/mnt/my-bucket/runs/.xla-cache"
  assert "data_parallel" in variables["LIBTPU_INIT_ARGS"]  # two slices
  assert variables["REGIONJAX_COMMIT"] in copy[4]
  train = words[words.index("train") :]
  assert train[:2] == ["train", "configs/tiny.py:seed=1"]
  assert train[train.index("--workdir") + 1] == "/mnt/my-bucket/runs/stage2"
  assert train[train.index("--distributed") + 1] == "auto"
  assert train[train.index("--stopped-exit-code") + 1] == "42"
  assert {"--train.mesh.slices=2", "--train.steps=9", "--train.trainable=['a b']"} <= set(train)


class Chip(SimpleNamespace):
  __hash__ = object.__hash__


@pytest.mark.parametrize("config", ["tiny.py", "gpt4roi_7b.py:stage2", "chatspot_7b.py:stage2"])
def test_every_config_has_a_mesh_over_two_slices(config, checkout, shell):
  """What is wrong with it would otherwise be told by hosts that are paid for."""
  line = GKE.replace("configs/tiny.py", f"configs/{config}") + " --slices 2"
  done = shell(*words_of(checkout, line, "--dry-run"))
  chips = [
    Chip(
      id=4 * s + i, slice_index=s, coords=(i % 2, i // 2, 0), core_on_chip=0, process_index=s,
      platform="tpu", device_kind="TPU v5 lite",
    )
    for s in range(2) for i in range(4)
  ]  # fmt: skip
  settings = re.findall(r"--train\.mesh\S+?(?= |')", done.stdout)
  mesh = from_config(load_config(f"{ROOT}/configs/{config}", settings).train.mesh, devices=chips)
  assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}


def test_preempted_tpus_are_asked_for_again(checkout, shell):
  """Waiting, running, preempted, given back, asked for anew, stopped by a host, finished."""
  shell.fake("gcloud")
  states = ["", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", "FAIL", "SUSPENDING"]
  shell.answer("tpus", *states, "SUSPENDED", "", "ACTIVE")
  shell.answer("run", *(f"regionjax: {x}" for x in ("absent", "running", "absent", "exit 42")))
  done = shell(*words_of(checkout, POD))
  assert done.returncode == 0, done.stderr
  verbs = [
    "start" if "host.sh start" in call[-1] else call[4]
    for call in shell.calls()
    if "host.sh start" in call[-1] or call[4] in ("create", "delete")
  ]
  assert verbs == ["create", "start", "delete", "create", "start", "start"]


def test_a_run_that_is_there_is_followed(checkout, shell):
  """Also when its host can't be asked for a while."""
  shell.fake("gcloud")
  shell.answer("run", *["regionjax: running"] * 2, "FAIL", "FAIL", "regionjax: exit 0")
  assert shell(*words_of(checkout, POD)).returncode == 0
  assert not [call for call in shell.calls() if "create" in call or "start" in call[-1]]


def test_the_host_whose_error_ended_the_run_is_heard(checkout, shell):
  """jax ends the others with codes by which the run would be begun again, to fail again."""
  shell.fake("gcloud")
  shell.answer("run", "regionjax: absent", "regionjax: exit 134")
  shell.answer("hosts", "regionjax: exit 134", "regionjax: exit 1", "regionjax: running")
  done = shell(*words_of(checkout, POD))
  assert done.returncode == 2
  assert "the run ended with code 1; why, one host's log tells: " in done.stderr
  command = re.search(r"launch/(tpu_pod.sh logs .*?)\. Mend", done.stderr).group(1)
  shell.calls()
  assert shell(*words_of(checkout, command)).returncode == 0
  (call,) = shell.calls()
  assert "--worker=all" in call and "stage2/log" in option(call, "command")


@pytest.mark.parametrize("failures, code, times", [(2, 0, 3), (9, 2, 5)])
def test_fresh_hosts_let_nobody_in_at_first(failures, code, times, checkout, shell):
  shell.fake("gcloud")
  shell.answer("run", "regionjax: absent")
  shell.answer("setup", *["FAIL"] * failures)
  done = shell(*words_of(checkout, POD))
  assert done.returncode == code
  assert sum("host.sh setup" in call[-1] for call in shell.calls()) == times
  assert ("hosts cannot be reached" in done.stderr) == (code == 2)


@pytest.mark.parametrize(
  "answers, code, message",
  [
    (["exit 1"], 2, "the run ended with code 1"),
    (["stopped"], 0, "the same command goes on"),
    (["exit 134", "absent", "exit 137", "absent"], 2, "raise --restarts"),
  ],
)
def test_runs_that_end_otherwise(answers, code, message, checkout, shell):
  shell.fake("gcloud")
  shell.answer("run", "regionjax: absent", *(f"regionjax: {answer}" for answer in answers))
  done = shell(*words_of(checkout, POD, "--restarts", "1"))
  assert done.returncode == code
  assert message in done.stderr


@pytest.mark.parametrize(
  "line, message",
  [
    ("tpu_pod.sh", "expected train, status, logs, stop or delete"),
    ("tpu_pod.sh fly --name a", "not 'fly'"),
    ("tpu_pod.sh train configs/tiny.py", "missing --name: .* e.g. --name stage2"),
    ("tpu_pod.sh status --name Stage", "--name Stage: expected a to z"),
    ("tpu_pod.sh status --name a", "missing --zone: .* e.g. --zone us-west4-a"),
    ("tpu_pod.sh status --name a --zone", "--zone needs a value; write --zone=VALUE"),
    ("tpu_pod.sh status --name a --zone b --dry-run=1", "takes no value"),
    (POD.replace("--bucket my-bucket", ""), "missing --bucket: .* e.g. --bucket my-bucket"),
    (POD.replace("my-bucket", "gs://my-bucket/runs"), "a bucket's name alone"),
    (POD.replace("v5litepod-64", "v5e-64"), "Cloud TPU calls it v5litepod-64"),
    (POD.replace("v5litepod-64", "v5p-100"), "v5p-N with N cores, two a chip"),
    (POD.replace("configs/tiny.py:seed=1", "configs/huge.py"), "config configs/huge.py: no such"),
    (POD.replace("configs/tiny.py:seed=1", ""), "expected one config"),
    (f"{POD} --spot --reserved", "exclude each other"),
    (f"{POD} --slices two", "--slices two: expected a whole number from 1"),
    (f"{POD} --workdir /mnt/runs", "expected a path in the bucket"),
    (f"{POD} --commit nosuch", "--commit nosuch: no such commit"),
    (f"{POD} --train.steps=3", "go after --, e.g. -- --train.steps=1000"),
    (GKE.replace("--storage runs", ""), "missing --storage"),
    (GKE.replace("/mnt/runs/stage2", "runs"), "--workdir runs: expected a folder under a mount"),
    (f"{GKE} --grace soon", "--grace soon: expected a whole number"),
    (SLURM, "missing --workdir: .* shared file system"),
    (f"{SLURM} --workdir w --nodes 0", "--nodes 0: expected a whole number from 1"),
    ("slurm.sh train configs/tiny.py --name a/b --workdir w", "expected letters, digits"),
  ],
)
def test_errors_say_how_to_mend(line, message, checkout, shell):
  done = shell(*words_of(checkout, line, "--dry-run"))
  assert done.returncode == 2
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
  assert re.search(message, done.stderr), done.stderr


@pytest.mark.parametrize(
  "line, program",
  [(POD, "gcloud"), (GKE, "xpk"), (f"{SLURM} --workdir w", "sbatch")],
)
def test_a_missing_program_is_named(line, program, checkout, shell):
  done = shell(*words_of(checkout, line))
  assert done.returncode == 2
  assert f"{program} is not installed" in done.stderr and "--dry-run" in done.stderr


def test_uncommitted_changes_and_flat_buckets_are_refused(checkout, shell):
  shell.fake("gcloud")
  shell.answer("bucket", "")
  done = shell(*words_of(checkout, POD))
  assert done.returncode == 2
  assert "--enable-hierarchical-namespace" in done.stderr
  (checkout / "new.py").touch()
  try:
    done = shell(*words_of(checkout, GKE, "--dry-run"))
    assert done.returncode == 2
    assert "commit them, or name the one that is to run with --commit" in done.stderr
    assert shell(*words_of(checkout, GKE, "--dry-run", "--commit", "HEAD")).returncode == 0
  finally:
    (checkout / "new.py").unlink()


@pytest.mark.parametrize(
  "name, told",
  [
    ("v5litepod-256", "256 chips a slice, v5e:16x16"),
    ("v5p-128", "64 chips a slice, v5p:4x4x4"),  # named by cores
    ("v6e-8", "8 chips a slice, v6e:2x4"),
  ],
)
def test_accelerators_are_told_in_chips(name, told, checkout, shell):
  line = POD.replace("v5litepod-64", name)
  assert told in shell(*words_of(checkout, line, "--dry-run")).stdout


PAGE = (ROOT / "docs" / "laptop-to-pod.md").read_text()
SHOWN = re.findall(r"<!-- dry-run -->\n```bash\n(.*?)```\n\n```console\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("command, output", SHOWN, ids=lambda text: text.split()[0])
def test_the_page_shows_what_the_scripts_print(command, output, checkout, shell):
  line = command.replace("\\\n", "")
  done = shell("bash", "-c", f"cd {checkout} && {line}")
  assert done.returncode == 0, done.stderr
  printed = done.stdout.replace(str(checkout), "ROOT")
  printed = re.sub(r"\b[0-9a-f]{12}\b", "COMMIT", printed)
  printed = re.sub(r"\S*/regionjax-\S+-COMMIT", "/tmp/regionjax-ME-COMMIT", printed)
  shown = output.replace("--output=/tmp/", "/tmp/").replace("--script-dir=/tmp/", "/tmp/")
  assert shlex.split(printed, comments=True) == shlex.split(shown, comments=True)


def test_the_page_has_a_dry_run_of_every_script():
  assert {command.split()[0] for command, _ in SHOWN} == {f"launch/{name}" for name in COMMANDS}

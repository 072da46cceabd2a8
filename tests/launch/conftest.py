"""A checkout of the launch scripts, and stand-ins for the programs that they call."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASICS = (
  "bash", "cat", "cp", "cut", "date", "dirname", "env", "git", "grep", "gzip", "id", "kill",
  "mkdir", "mountpoint", "nohup", "rm", "sed", "setsid", "sh", "sleep", "tail", "tar", "touch",
)  # fmt: skip

# Notes its words, answers from a queue of its own, and otherwise does nothing.
FAKE = """#!/usr/bin/env bash
{ printf '%q ' "${0##*/}" "$@"; echo; } >>"$RECORD"
line="$*"
answer() {
  [ -s "$ANSWERS/$1" ] || { echo "$2"; return; }
  head=$(sed -n 1p "$ANSWERS/$1")
  sed -i 1d "$ANSWERS/$1"
  [ "$head" != FAIL ] || exit 1
  echo "$head"
}
case $line in
  *'buckets describe'*) answer bucket True ;;
  *'queued-resources list'*) answer tpus ACTIVE ;;
  *--worker=all*'host.sh state'*) cat "$ANSWERS/hosts" 2>/dev/null || true ;;
  *'host.sh state'*) echo 'SSH: connecting to worker 0'; answer run 'regionjax: exit 0' ;;
  *'host.sh setup'*) answer setup '' ;;
esac
"""


class Shell:
  """Runs scripts with only the basic programs and the chosen stand-ins on the PATH."""

  def __init__(self, folder: Path):
    self.folder, self.bin = folder, folder / "bin"
    self.record = folder / "record"
    self.answers = folder / "answers"
    for path in (self.bin, self.answers, folder / "tmp", folder / "home"):
      path.mkdir()
    for name in BASICS:
      (self.bin / name).symlink_to(shutil.which(name))

  def fake(self, *names: str, text: str = FAKE) -> None:
    for name in names:
      (self.bin / name).write_text(text)
      (self.bin / name).chmod(0o755)

  def answer(self, queue: str, *lines: str) -> None:
    (self.answers / queue).write_text("".join(f"{line}\n" for line in lines))

  @property
  def environment(self) -> dict[str, str]:
    return {
      "PATH": str(self.bin), "HOME": str(self.folder / "home"), "USER": "tester",
      "TMPDIR": str(self.folder / "tmp"), "RECORD": str(self.record),
      "ANSWERS": str(self.answers), "GIT_CONFIG_GLOBAL": os.devnull,
    }  # fmt: skip

  def __call__(self, *words, **variables):
    return subprocess.run(
      [str(word) for word in words], capture_output=True, text=True, timeout=120,
      env=self.environment | variables, cwd=self.folder,
    )  # fmt: skip

  def calls(self) -> list[list[str]]:
    """What the stand-ins were called with, in order; forgotten afterwards."""
    lines = self.record.read_text().splitlines() if self.record.exists() else []
    self.record.unlink(missing_ok=True)
    return [shlex.split(line) for line in lines]


@pytest.fixture
def shell(tmp_path):
  return Shell(tmp_path)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
  """A repository with one commit: the scripts and the configs."""
  folder = tmp_path_factory.mktemp("checkout")
  shutil.copytree(ROOT / "launch", folder / "launch", ignore=shutil.ignore_patterns("__pycache__"))
  shutil.copytree(
    ROOT / "configs", folder / "configs", ignore=shutil.ignore_patterns("__pycache__")
  )
  identity = ["-c", "user.name=tester", "-c", "user.email=tester@example.org"]
  for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "all"]):
    subprocess.run(["git", *words], cwd=folder, check=True)
  return folder

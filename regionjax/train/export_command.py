"""`regionjax export WORKDIR OUT`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the verb's arguments."""
  parser.description = (
    "Make a release folder, which regionjax.load and every verb open, from a training run's work "
    "folder, finished or not."
  )
  parser.add_argument("workdir", type=Path, help="a --workdir of regionjax train")
  parser.add_argument("out", type=Path, help="the release folder to write")


def run(args: argparse.Namespace) -> int:
  """Exports; returns the exit code."""
  from regionjax.train.finish import export_workdir

  print(f"wrote {export_workdir(args.workdir, args.out)}")
  return 0

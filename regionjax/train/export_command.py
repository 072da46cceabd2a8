"""`regionjax export WORKDIR OUT [--adapter | --merge]`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the verb's arguments."""
  parser.description = (
    "Make a release folder, which regionjax.load and every verb open, from a training run's work "
    "folder, finished or not. By default it holds the whole model."
  )
  parser.add_argument("workdir", type=Path, help="a --workdir of regionjax train")
  parser.add_argument("out", type=Path, help="the release folder to write")
  forms = parser.add_mutually_exclusive_group()
  forms.add_argument(
    "--adapter", action="store_const", dest="form", const="adapter", default="full",
    help="only what was trained; the release in train.init_from is needed beside it",
  )  # fmt: skip
  forms.add_argument(
    "--merge", action="store_const", dest="form", const="merged", default="full",
    help="the whole model, LoRA merged into the maps that it updates",
  )  # fmt: skip


def run(args: argparse.Namespace) -> int:
  """Exports; returns the exit code."""
  from regionjax.train.finish import export_workdir

  print(f"wrote {export_workdir(args.workdir, args.out, form=args.form)}")
  return 0

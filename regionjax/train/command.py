"""`regionjax train CONFIG --workdir DIR [--key=value ...]`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from regionjax.train.heap import keep_freed_memory

HELP = "train a model from a config file, or go on training it"

EPILOG = """\
Any setting of the config can be overridden by its dotted name:
  regionjax train configs/tiny.py:scale=0.5,region=text --train.steps=200 --workdir runs/small
The same command goes on from the newest checkpoint in the work folder. Ctrl-C finishes the step,
saves and stops. --train.stop_after_minutes=60 ends the run, its learning-rate schedule included,
after that time; such a run cannot be repeated bit by bit, since the clock drives it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the verb's arguments; dotted overrides arrive in `args.overrides`."""
  parser.description = HELP[0].upper() + HELP[1:] + "."
  parser.epilog = EPILOG
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("config", help="a config file, e.g. configs/tiny.py or configs/tiny.py:arg")
  parser.add_argument(
    "--workdir", required=True, type=Path, metavar="DIR",
    help="folder of this run: checkpoints, metrics, and in the end release/",
  )  # fmt: skip


def run(args: argparse.Namespace) -> int:
  """Trains; returns the exit code."""
  from regionjax.config_files import load_config

  config = load_config(args.config, args.overrides)
  keep_freed_memory()
  # After the config is known to be sound: importing jax and its friends takes seconds.
  from regionjax.train.loop import DivergedError, train

  words = ["regionjax", "train", args.config, *args.overrides, "--workdir", str(args.workdir)]
  try:
    return train(config, args.workdir, command=shlex.join(words)).exit_code
  except DivergedError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1

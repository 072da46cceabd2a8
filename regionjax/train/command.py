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

SIGTERM saves too, and a killed process loses what came after its newest checkpoint: the same
command does that again, with the same bits. Checkpoints are written while the run goes on, every
--train.save_every steps; the newest --train.keep stay, and with --train.keep_every=5000 those of
each 5000th step for ever. One that cannot be read is named and an older one is used; one that
cannot be written, on a full disk say, is named and the next one tried. goodput.jsonl tells what
the time went into.

All devices share the rows of a batch. --train.mesh.fsdp=8 splits the parameters as well, and
--train.mesh.tensor=4 the work on each row; a run may go on on another mesh. On several hosts start
the same command on each, with a work folder that all of them see; they find each other under
Slurm, MPI and on a Cloud TPU, and by --distributed elsewhere.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the verb's arguments; dotted overrides arrive in `args.overrides`."""
  parser.description = HELP[0].upper() + HELP[1:] + "."
  parser.epilog = EPILOG
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("config", help="a config file, e.g. configs/tiny.py or configs/tiny.py:arg")
  parser.add_argument(
    "--workdir", required=True, type=Path, metavar="DIR",
    help="folder of this run: checkpoints, metrics, and in the end release/; a bucket has to be "
    "mounted as one",
  )  # fmt: skip
  parser.add_argument(
    "--distributed", default="", metavar="WHERE",
    help="how to join the other processes of the run: auto, off, or HOST:PORT,PROCESSES,INDEX with "
    "the address of process 0 (default: as the environment says)",
  )  # fmt: skip
  parser.add_argument(
    "--stopped-exit-code", type=int, metavar="N",
    help="exit code of a run that a signal stopped before its end, for schedulers that start it "
    "again (default: 0 after SIGTERM, 130 after Ctrl-C)",
  )  # fmt: skip
  parser.add_argument(
    "--profile", metavar="FIRST:LAST",
    help="trace these steps (counted from 1, 10:12 are three) into the work folder's profile/",
  )  # fmt: skip
  parser.add_argument(
    "--compile-cache", metavar="DIR",
    help="where compiled programs are kept for the next start, off for nowhere (default: "
    "$JAX_COMPILATION_CACHE_DIR, else regionjax/xla in the user's cache folder). Machines may "
    "share it: an entry serves only the same program, versions and kind of processor. On several "
    "hosts only the first one writes; name a folder that all see, or gs:// (pip install gcsfs)",
  )  # fmt: skip


def run(args: argparse.Namespace) -> int:
  """Trains; returns the exit code."""
  from regionjax.config_files import load_config

  config = load_config(args.config, args.overrides)
  keep_freed_memory()
  # After the config is known to be sound: importing jax and its friends takes seconds.
  import jax

  from regionjax.distributed import connect
  from regionjax.train.loop import DivergedError, train
  from regionjax.train.profile import parse_steps

  profile = parse_steps(args.profile) if args.profile else None
  words = ["regionjax", "train", args.config, *args.overrides, "--workdir", str(args.workdir)]
  if args.compile_cache:
    cache = None if args.compile_cache == "off" else args.compile_cache
    jax.config.update("jax_compilation_cache_dir", cache)
    words += ["--compile-cache", args.compile_cache]
  connect(args.distributed)
  try:
    outcome = train(config, args.workdir, command=shlex.join(words), profile=profile)
  except DivergedError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  if args.stopped_exit_code is not None and not outcome.finished:
    return args.stopped_exit_code
  return outcome.exit_code

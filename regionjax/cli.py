"""`regionjax VERB ...`: each verb lives in a module of its own, imported when it is asked for.

A verb's module has `add_arguments(parser)` and `run(args) -> int`, the exit code. Mistakes of the
person at the keyboard (our ValueErrors, and OSErrors) become one line on stderr and exit code 2;
anything else is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import regionjax
from regionjax.distributed import joined, leave


@dataclasses.dataclass(frozen=True)
class Verb:
  """Where a verb lives and what it is for.

  Attributes:
    module: has `add_arguments` and `run`.
    help: one line.
    overrides: whether `--dotted.key=value` options are collected into `args.overrides`.
  """

  module: str
  help: str
  overrides: bool = False


VERBS = {
  "demo": Verb("regionjax.demo", "ask the shipped model about scenes it has never seen"),
  "chat": Verb("regionjax.infer.command", "ask about regions of an image"),
  "tokens": Verb(
    "regionjax.tokens_command", "show a prompt's ids, slots and loss mask", overrides=True
  ),
  "train": Verb("regionjax.train.command", "train a model from a config file", overrides=True),
  "compile": Verb(
    "regionjax.aot.command", "compile a config for a TPU or GPU pod without one", overrides=True
  ),
  "evaluate": Verb("regionjax.evaluate.command", "measure a model on held-out questions"),
  "export": Verb("regionjax.train.export_command", "make a release folder from a training run"),
  "pack": Verb("regionjax.data.pack_command", "pictures into a few large files, for buckets"),
  "convert": Verb("regionjax.weights.convert_command", "published weights to a release, and back"),
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command line (by default the program's) and returns its exit code.

  Where others are joined to this process, one that failed doesn't return: it would wait for them.
  """
  try:
    code = _run(argv)
  except Exception:
    if joined():
      traceback.print_exc()
      leave(1)
    raise
  if code in (1, 2) and joined():
    leave(code)
  return code


def _run(argv: Sequence[str] | None) -> int:
  words = list(sys.argv[1:] if argv is None else argv)
  # Compiled programs are kept between runs; jax reads this when it is imported.
  caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
  cache = caches / "regionjax" / "xla"
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
  if not words or words[0] not in VERBS:
    return _top_level(words)
  verb = VERBS[words[0]]
  try:
    module = importlib.import_module(verb.module)
    parser = argparse.ArgumentParser(prog=f"regionjax {words[0]}", allow_abbrev=False)
    module.add_arguments(parser)
    overrides, words = _overrides(words[1:]) if verb.overrides else ([], words[1:])
    args = parser.parse_args(words)
    if verb.overrides:
      args.overrides = overrides
    return module.run(args)
  except SystemExit as leaving:  # argparse's way out of --help and of wrong arguments
    return leaving.code if isinstance(leaving.code, int) else 2
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    return 130
  except BrokenPipeError:
    sys.stderr.close()  # whoever read our output has gone; nobody is left to complain to
    return 141
  except (ValueError, OSError) as error:
    if not is_ours(error):
      raise
    print(f"error: {error}", file=sys.stderr)
    return 2


def is_ours(error: Exception) -> bool:
  """Whether an error tells the user something: raised by this package, or about a named file."""
  if type(error).__module__.split(".")[0] == "regionjax":
    return True
  if isinstance(error, OSError) and error.filename is not None:
    return True
  return _innermost(error.__traceback__).startswith("regionjax.")


def _innermost(trace: TracebackType | None) -> str:
  """Name of the module in which an exception was raised."""
  if trace is None:
    return ""
  while trace.tb_next is not None:
    trace = trace.tb_next
  return trace.tb_frame.f_globals.get("__name__", "")


def _overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
  """Takes `--a.b=1` and `--a.b 1` out of a command line -> (['--a.b=1', ...], the other words)."""
  overrides, others = [], []
  left = iter(words)
  for word in left:
    name, equals, _ = word.partition("=")
    if not (name.startswith("--") and ("." in name or name == "--name")):
      others.append(word)
    elif equals:
      overrides.append(word)
    else:
      overrides.append(f"{name}={next(left, '')}")
  return overrides, others


def _top_level(words: list[str]) -> int:
  """Handles everything that doesn't begin with a verb."""
  parser = argparse.ArgumentParser(
    prog="regionjax",
    description="Region-level multimodal chat in JAX.",
    epilog="verbs:\n"
    + "\n".join(f"  {name:<10}{verb.help}" for name, verb in VERBS.items())
    + "\n\nregionjax VERB --help explains a verb.",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--version", action="version", version=f"regionjax {regionjax.__version__}")
  parser.add_argument("verb", choices=VERBS, metavar="VERB", help="what to do, see below")
  try:
    if not words:
      parser.print_help()
      return 2
    parser.parse_args(words)
  except SystemExit as leaving:
    return leaving.code if isinstance(leaving.code, int) else 2
  return 2


if __name__ == "__main__":
  sys.exit(main())

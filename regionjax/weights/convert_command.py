"""`regionjax convert`: published checkpoints to releases, and back."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import TextIO

DTYPES = ("keep", "float32", "bfloat16", "float16")
FROM = ("hf-clip", "hf-llama", "hf-llava", "gpt4roi", "gguf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the verb's arguments."""
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.description = (
    "Make a release, which regionjax.load and every verb open, of published weights:\n\n"
    "  regionjax convert --from hf-llava llava-1.5-7b-hf/ --to runs/llava\n"
    "  regionjax convert --from gpt4roi GPT4RoI-7B-delta-V0/ --base llama-7b/ \\\n"
    "    --clip clip-vit-large-patch14/ --to runs/gpt4roi\n\n"
    "or a folder for transformers of a release:\n\n"
    "  regionjax convert --to-hf runs/tiny/release --part decoder --to decoder/"
  )
  way = parser.add_mutually_exclusive_group(required=True)
  way.add_argument("--from", dest="family", choices=FROM, help="what the source is")
  way.add_argument("--to-hf", action="store_true", help="the source is a release; the way back")
  parser.add_argument("source", type=Path, help="folder or .gguf file; with --to-hf, a release")
  parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write")
  parser.add_argument("--base", type=Path, help="of a GPT4RoI delta: LLaMA-7B, Hugging Face layout")
  parser.add_argument("--clip", type=Path, help="of a GPT4RoI: CLIP ViT-L/14's folder")
  parser.add_argument("--dtype", choices=DTYPES, default="keep", help="of the written floats")
  parser.add_argument(
    "--vocab-multiple", type=int, default=1, metavar="N",
    help="pad the token tables to a multiple of N rows, so that N devices can share them",
  )  # fmt: skip
  parser.add_argument("--template", default="", help="of the prompt; default: the source's own")
  parser.add_argument("--part", default="", help="with --to-hf: vision or decoder alone")
  parser.add_argument(
    "--check", action="store_true",
    help="compare with the source bit by bit, and with transformers (needs torch) in numbers",
  )  # fmt: skip


def run(args: argparse.Namespace) -> int:
  """Converts; returns the exit code: 1 when a check fails."""
  if args.to_hf:
    return _back(args)
  from regionjax.weights import convert

  if args.vocab_multiple < 1:
    raise convert.WeightsError(f"--vocab-multiple {args.vocab_multiple}: expected 1 or more")
  options = convert.Options(args.base, args.clip, args.template, args.vocab_multiple)
  arranged = convert.arrange(args.family, args.source, options)
  _describe(arranged)
  command = shlex.join(["regionjax", "convert", *_words(args)])
  bar = Bar("writing")
  folder = convert.write(arranged, args.to, dtype=args.dtype, command=command, progress=bar.update)
  bar.close()
  print(f"wrote {folder}")
  if not args.check:
    return 0
  from regionjax.weights.check import check

  report = check(
    arranged, folder, source=args.source, clip=args.clip,
    log=lambda text: print(f"{text} ...", file=sys.stderr),
  )  # fmt: skip
  print(report)
  return 0 if report.passed else 1


def _back(args: argparse.Namespace) -> int:
  from regionjax.weights import release, to_hf
  from regionjax.weights.tensors import WeightsError

  for name in ("check", "base", "clip", "template"):
    if getattr(args, name):
      raise WeightsError(f"--{name} goes with --from, not with --to-hf")
  published = to_hf.publish(release.open_release(args.source), args.part)
  for name, one in published.items():
    print(f"{args.to / name}: {one.family}, {len(one.leaves)} tensors")
    if one.filled:
      print(
        f"  {len(one.filled)} tensors that this model never reads, and that the release doesn't "
        "keep, are written as blocks that change nothing"
      )
  bar = Bar("writing")
  folder = to_hf.write(published, args.to, dtype=args.dtype, progress=bar.update)
  bar.close()
  print(f"wrote {folder}")
  return 0


def _describe(arranged) -> None:
  """What will be done, before it is."""
  print(f"{arranged.where}: {arranged.family}, {len(arranged.leaves)} parameters")
  for step in arranged.steps:
    used = len(step.source) - len(step.plan.ignored) - len(step.plan.spare)
    told = [f"{used} tensors used"]
    if step.plan.spare:
      told.append(f"{len(step.plan.spare)} kept for the way back (this model doesn't read them)")
    if step.plan.ignored:
      told.append(f"{len(step.plan.ignored)} ignored (they carry nothing)")
    print(f"  {step.table.family}: {', '.join(told)}")


def _words(args: argparse.Namespace) -> list[str]:
  words = ["--from", args.family, str(args.source), "--to", str(args.to)]
  for name, default in (("base", None), ("clip", None), ("dtype", "keep"), ("template", "")):
    value = getattr(args, name)
    if value != default:
      words += [f"--{name}", str(value)]
  return words + (["--vocab-multiple", str(args.vocab_multiple)] * (args.vocab_multiple > 1))


class Bar:
  """Bytes written, their speed and the tensor at hand; a line that redraws itself on a terminal."""

  def __init__(self, what: str, stream: TextIO | None = None) -> None:
    self._what = what
    self._stream = sys.stderr if stream is None else stream
    self._live = self._stream.isatty()
    self._start = self._shown = time.monotonic()

  def update(self, name: str, done: int, total: int) -> None:
    """Draws the line, ten times a second at most (elsewhere than on a terminal, each 10 s)."""
    now = time.monotonic()
    if now - self._shown < (0.1 if self._live else 10) and done < total:
      return
    self._shown = now
    speed = done / max(now - self._start, 1e-3)
    text = (
      f"{self._what}  {done / max(total, 1):.0%}  {done / 1e9:.2f} of {total / 1e9:.2f} GB  "
      f"{speed / 1e6:.0f} MB/s  {name}"
    )
    self._stream.write(f"\r\033[K{text[:110]}" if self._live else text + "\n")
    self._stream.flush()

  def close(self) -> None:
    """Leaves the last line standing."""
    if self._live:
      self._stream.write("\n")

"""`regionjax compile CONFIG --topology v5e:8x8`: compile for a machine without having it."""

from __future__ import annotations

import argparse
import dataclasses
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regionjax.aot import topology as topologies
from regionjax.aot.errors import AotError
from regionjax.chips import GIB

if TYPE_CHECKING:
  from jax.sharding import Mesh

  from regionjax.aot.programs import Program
  from regionjax.aot.report import Report
  from regionjax.config import Config

DESCRIPTION = """\
Compiles a config's training step (or the decoding of an answer) for a TPU or GPU topology on any
CPU, and reports whether it fits, what it costs, how it communicates and what would bound its speed.

  regionjax compile configs/gpt4roi_7b.py:stage2 --topology v5e:8x8 --rows-per-chip 2 --out aot
  regionjax compile configs/gpt4roi_7b.py:stage2 --topology v5e:8x8 --slices 2
  regionjax compile configs/gpt4roi_7b.py --topology v5e:2x4 --program decode --mesh tensor=8
  regionjax compile configs/gpt4roi_7b.py:stage2 --topology v5p:4x4x4 --search

Neither the config's data nor its tokenizer is opened. Settings are overridden as in `train`, e.g.
--model.remat=dots. The exit code is 0 where the program fits and 1 where it doesn't.

On the machine itself, --run N also runs the program N times on made-up data, and says what it takes
beside what it should:

  regionjax compile configs/gpt4roi_7b.py:stage1 --topology h100:1 --rows-per-chip 2 --run 10
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the verb's arguments; dotted overrides arrive in `args.overrides`."""
  parser.description = DESCRIPTION
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("config", help="a config file, e.g. configs/gpt4roi_7b.py:stage2")
  parser.add_argument(
    "--topology", required=True, metavar="CHIP:SHAPE",
    help="v5e:8x8, v5e:16x16, v5p:4x4x4, v6e:16x16, h100:8, ...",
  )  # fmt: skip
  parser.add_argument(
    "--slices", type=int, default=1, metavar="N",
    help="so many of these, joined by the data centre's network; multiplies the mesh's data axis",
  )  # fmt: skip
  parser.add_argument(
    "--mesh", metavar="AXIS=N,...",
    help="axes of one slice, e.g. fsdp=64 or fsdp=16,tensor=4 (default: the config's train.mesh)",
  )  # fmt: skip
  parser.add_argument(
    "--program", choices=("train", "decode"), default="train", help="(default: train)"
  )
  parser.add_argument(
    "--rows-per-chip", type=float, metavar="N",
    help="packed rows of a chip; sets data.rows (default: the config's data.rows)",
  )  # fmt: skip
  parser.add_argument(
    "--rows", type=int, default=8, metavar="N", help="decode: rows generated at once (default: 8)"
  )
  parser.add_argument(
    "--length", type=int, metavar="N",
    help="decode: tokens of room in the cache (default: the decoder's max_length)",
  )  # fmt: skip
  parser.add_argument(
    "--search", action="store_true",
    help="find the largest batch per chip over remat policies and meshes; takes many compilations",
  )  # fmt: skip
  parser.add_argument(
    "--out", type=Path, metavar="DIR", help="write the report there: JSON, and a picture"
  )
  parser.add_argument(
    "--text", action="store_true", help="write the compiled program's text to --out too"
  )
  parser.add_argument(
    "--run", type=int, default=0, metavar="N",
    help="run it N times, on the machine that --topology names, which must be this one",
  )  # fmt: skip


def run(args: argparse.Namespace) -> int:
  """Compiles; returns the exit code."""
  from regionjax.aot import analysis
  from regionjax.config_files import load_config

  topology = topologies.parse(args.topology, args.slices)
  if args.text and args.out is None:
    raise AotError("--text writes a file: give --out DIR too")
  if args.run < 0 or (args.run and args.search):
    raise AotError(f"--run {args.run}: expected a number of runs, and no --search beside it")
  config = load_config(args.config, args.overrides)
  if args.run:
    devices = topology.here()
  else:
    topologies.use_cpu()
    devices = topology.devices()
  no_compile_cache()
  if args.search:
    return _search(config, topology, devices, args)
  config = _meshed(config, topology, args.mesh)
  if args.rows_per_chip is not None:
    config = with_rows(config, args.rows_per_chip * topology.chips)
  program = _program(config, devices, args)
  kept: list[Any] = []
  report = analysis.measure(program, topology, keep=kept)
  print(report.table(), flush=True)
  text = kept[0].as_text() if args.text and kept else ""
  if args.out is not None:
    _write(report, args.out, text)
  if args.run and kept:
    report = _run(report, program, topology, kept[0], args)
  return 0 if report.fits else 1


def _run(
  report: Report, program: Program, topology: topologies.Topology, compiled: Any,
  args: argparse.Namespace,
) -> Report:  # fmt: skip
  """Adds what was measured to the report, and to its file."""
  import jax

  from regionjax.aot import running

  try:
    taken = running.seconds(program, compiled, args.run)
  except jax.errors.JaxRuntimeError as error:
    raise AotError(f"compiled for this machine, but it doesn't run: {error}") from error
  report = report.with_measured(running.measured(program, topology, taken))
  print("\n" + report.measured_line())
  if args.out is not None:
    report.write(args.out / f"{file_stem(report)}.json")
  return report


def no_compile_cache() -> None:
  """A cached executable has no compile time, and one for abstract devices can't be loaded."""
  import jax

  jax.config.update("jax_enable_compilation_cache", False)


def with_rows(config: Config, rows: float) -> Config:
  """The config with another number of rows in the global batch.

  Raises:
    AotError: no whole number.
  """
  if rows != int(rows) or rows < 1:
    raise AotError(f"--rows-per-chip gives {rows:g} rows in all; expected a whole number")
  return dataclasses.replace(config, data=dataclasses.replace(config.data, rows=int(rows)))


def _meshed(config: Config, topology: topologies.Topology, text: str | None) -> Config:
  """The config with the mesh of the command line, or its own, over the topology's slices."""
  from regionjax.mesh import parse_mesh

  mesh = config.train.mesh
  if text is not None:
    mesh = dataclasses.replace(parse_mesh(text), slices=topology.slices)
    if "data" not in text:
      # The axes that are named fill a slice; without any of them all of it is data's.
      whole = topology.chips // topology.slices
      data = max(1, whole // (mesh.fsdp * mesh.tensor)) if min(mesh.fsdp, mesh.tensor) > 0 else 1
      mesh = dataclasses.replace(mesh, data=data)
  data = mesh.data * topology.slices if mesh.data > 0 else mesh.data
  mesh = dataclasses.replace(mesh, data=data, slices=topology.slices)
  return dataclasses.replace(config, train=dataclasses.replace(config.train, mesh=mesh))


def _program(config: Config, devices: list[Any], args: argparse.Namespace) -> Program:
  """What the command line asks for, on a mesh of these devices."""
  from regionjax.aot import programs
  from regionjax.mesh import from_config

  mesh: Mesh = from_config(config.train.mesh, devices=devices)
  if args.program == "train":
    return programs.train(config, mesh)
  length = args.length or config.model.decoder.max_length
  return programs.decode(config, mesh, rows=args.rows, length=length)


def _search(
  config: Config, topology: topologies.Topology, devices: list[Any], args: argparse.Namespace
) -> int:
  """Compiles many; the exit code says whether any fits."""
  from regionjax.aot import search
  from regionjax.config import ConfigError
  from regionjax.models.leaves import REMAT_POLICIES

  if args.program != "train":
    raise AotError("--search looks for the batch of a training step; leave --program out")
  if args.mesh is not None or args.rows_per_chip is not None:
    raise AotError("--search chooses mesh and rows itself; leave out --mesh and --rows-per-chip")
  candidates = list(
    search.candidates(topology.chips // topology.slices, remats=tuple(REMAT_POLICIES))
  )

  def compile_rows(candidate: search.Candidate, rows: int) -> Report:
    shape = f"data={candidate.data},fsdp={candidate.fsdp},tensor={candidate.tensor}"
    model = dataclasses.replace(config.model, remat=candidate.remat)
    chosen = _meshed(dataclasses.replace(config, model=model), topology, shape)
    parts = candidate.data * candidate.fsdp * topology.slices * config.train.accumulate
    report, known = _compiled_once(with_rows(chosen, rows * parts), topology, devices, args)
    peak = report["memory"]["peak"] / GIB
    verdict = "fits" if report.fits else "too large"
    how = "known" if known else f"{report['compile_seconds']:.0f} s"
    number = candidates.index(candidate) + 1
    print(
      f"[{number}/{len(candidates)}] {candidate}, {rows} rows: {peak:.2f} GiB, {verdict} ({how})",
      file=sys.stderr, flush=True,
    )  # fmt: skip
    return report

  found: list[search.Found] = []
  stopped = False
  for candidate in candidates:
    try:
      found.append(search.largest(candidate, compile_rows))
    except ConfigError as error:  # a mesh that can't split this model
      print(f"{candidate}: left out, {error}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
      stopped = True
      break
  if found:
    print(f"{config.name} on {topology.name}, rows per part of the batch:\n{search.table(found)}")
  if stopped:
    kept = f"what was compiled is in {args.out}: give the same command to go on"
    print(f"interrupted; {kept if args.out else 'nothing is kept without --out'}", file=sys.stderr)
    return 130
  if args.out is not None:
    for one in found:
      _write(one.report, args.out, "")
  return 0 if any(one.rows for one in found) else 1


def _compiled_once(
  config: Config, topology: topologies.Topology, devices: list[Any], args: argparse.Namespace
) -> tuple[Report, bool]:
  """The report of a compilation, and whether `--out` had it already, of the same settings."""
  from regionjax.aot import analysis, programs
  from regionjax.aot.report import read
  from regionjax.mesh import from_config

  program = programs.train(config, from_config(config.train.mesh, devices=devices))
  if args.out is None:
    return _interruptible(lambda: analysis.measure(program, topology)), False
  path = args.out / "search" / f"{analysis.fingerprint(program, topology)}.json"
  if (report := read(path)) is not None:
    return report, True
  report = _interruptible(lambda: analysis.measure(program, topology))
  path.parent.mkdir(parents=True, exist_ok=True)
  report.write(path)
  return report, False


def _interruptible(compute: Callable[[], Report]) -> Report:
  """Computes in a thread that isn't waited for when Ctrl-C comes: a compilation takes minutes.

  Python only tells of a Ctrl-C between its own instructions, and the compiler is none.
  """
  done: queue.SimpleQueue[Report | BaseException] = queue.SimpleQueue()

  def work() -> None:
    try:
      done.put(compute())
    except BaseException as error:  # handed to the thread that waits
      done.put(error)

  threading.Thread(target=work, daemon=True).start()
  result = done.get()
  if isinstance(result, BaseException):
    raise result
  return result


def _write(report: Report, folder: Path, text: str) -> None:
  from regionjax.aot.report import picture

  folder.mkdir(parents=True, exist_ok=True)
  stem = file_stem(report)
  report.write(folder / f"{stem}.json")
  picture(report, folder / f"{stem}.png")
  if text:
    (folder / f"{stem}.hlo.txt").write_text(text)
  print(f"\nwritten: {folder / stem}.json, .png{', .hlo.txt' if text else ''}")


def file_stem(report: Report) -> str:
  """A file name that tells reports apart: config, program, machine, mesh, rows, remat."""
  v = report.values
  slices = v["topology"]["slices"]
  words = [
    v["config"], v["program"], v["topology"]["name"].replace(":", "-"),
    f"{slices}slices" if slices > 1 else "",
    "-".join(f"{name}{size}" for name, size in v["mesh"].items() if size > 1),
    f"{v['rows']}rows", f"remat-{v['remat']}" if v["program"] == "train" else "",
  ]  # fmt: skip
  return "_".join(word for word in words if word)

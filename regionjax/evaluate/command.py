"""`regionjax evaluate`: accuracy of a model on held-out questions.

regionjax evaluate -n 1000
regionjax evaluate --split heldout_pairs --tasks name,attribute --json result.json
regionjax evaluate --source coco --annotations val.json --images val/ --checkpoint my-release
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from regionjax.config import SourceConfig
from regionjax.data.errors import DataError
from regionjax.data.sources import SOURCES, make_source
from regionjax.infer.mesh_option import add_mesh_option, mesh_of

if TYPE_CHECKING:
  from regionjax.evaluate.accuracy import Question


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of `regionjax evaluate`."""
  parser.description = __doc__
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("--checkpoint", default="tiny", help="a release folder (default: shipped)")
  parser.add_argument(
    "--base", metavar="DIR",
    help="the release that an adapter was trained from, where it is not found by itself",
  )  # fmt: skip
  add_mesh_option(parser)
  parser.add_argument("--source", default="scenes", choices=sorted(SOURCES), help="of questions")
  parser.add_argument(
    "--split", default="test", choices=("test", "heldout_pairs", "train"), help="of the scenes"
  )
  parser.add_argument("--tasks", help="scenes: some tasks only, such as name,attribute")
  parser.add_argument(
    "--seed", type=int, default=1, help="scenes: other scenes; 0 are those that training looks at"
  )
  parser.add_argument("-n", type=int, default=500, help="least number of questions (default: 500)")
  parser.add_argument("--annotations", help="coco: the annotation file")
  parser.add_argument("--images", help="coco: the folder of its images")
  parser.add_argument(
    "--strict", action="store_true", help="coco: faulty annotations are errors, not skipped"
  )
  parser.add_argument("--json", type=Path, metavar="FILE", help="figures and all answers")
  parser.add_argument("--chart", type=Path, metavar="FILE.png", help="the table as a bar chart")


def run(args: argparse.Namespace) -> int:
  """Runs `regionjax evaluate`."""
  if args.n < 1:
    raise DataError(f"-n {args.n}: expected at least one question")
  for path in (args.json, args.chart):
    if path is not None and not path.parent.is_dir():
      raise DataError(f"{path}: there is no folder {path.parent}")

  from regionjax.evaluate.protocol import evaluate, progress_line
  from regionjax.evaluate.report import bar_chart
  from regionjax.infer.chat import load

  questions = _questions(args)
  chat = load(args.checkpoint, base=args.base, mesh=mesh_of(args))
  what = args.source if args.source != "scenes" else f"scenes, {args.split} split, seed {args.seed}"
  report = evaluate(chat, questions, title=f"{chat.config.name} on {what}", progress=progress_line)
  print(report.table())
  print(f"{len(questions)} questions in {report.seconds:.1f} s")
  if args.json is not None:
    args.json.write_text(json.dumps(report.to_json(), indent=1, ensure_ascii=False) + "\n")
  if args.chart is not None:
    bar_chart(report, args.chart)
  return 0


def _questions(args: argparse.Namespace) -> list[Question]:
  from regionjax.evaluate.accuracy import collect
  from regionjax.evaluate.scenes import answers_of, scenes_questions
  from regionjax.weights import release

  if args.source == "scenes":
    for name in ("annotations", "images", "strict"):
      if getattr(args, name):
        raise DataError(f"--{name} belongs to --source coco")
    tasks = [t.strip() for t in args.tasks.split(",") if t.strip()] if args.tasks else None
    style = answers_of(release.load_config(release.find(args.checkpoint)))
    return scenes_questions(args.n, split=args.split, seed=args.seed, tasks=tasks, answers=style)
  if not args.annotations or not args.images:
    raise DataError(f"--source {args.source} needs --annotations FILE and --images FOLDER")
  if args.tasks:
    raise DataError("--tasks belongs to --source scenes")
  fields = {"annotations": args.annotations, "images": args.images, "strict": args.strict}
  source = make_source(SourceConfig(args.source, args=fields))
  print(getattr(source, "report", ""))
  return collect(source, args.n)

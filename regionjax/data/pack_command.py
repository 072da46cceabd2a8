"""`regionjax pack FOLDER OUT`: pictures into a few ArrayRecord files."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the verb's arguments."""
  parser.description = (
    "Pack a folder's pictures, with its subfolders, into a few large ArrayRecord files: buckets "
    "and network disks are slow with many small ones. The result takes the folder's place "
    "wherever the COCO source is given one (images=OUT, --images OUT)."
  )
  parser.add_argument("folder", type=Path, help="the pictures")
  parser.add_argument("out", type=Path, help="the folder to make; new or empty")
  parser.add_argument(
    "--files", type=int, default=16, help="over how many files they are spread (default 16)"
  )


def run(args: argparse.Namespace) -> int:
  """Packs; returns the exit code."""
  from regionjax.data.image_records import pack_images

  packed = pack_images(args.folder, args.out, files=args.files)
  print(f"packed {packed.images} pictures into {args.out}")
  if packed.left_out:
    print(f"left out {len(packed.left_out)} files that are no pictures: first {packed.left_out[0]}")
  return 0

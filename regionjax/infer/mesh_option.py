"""`--mesh tensor=8`: the option of the verbs that run a model on several devices."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from regionjax.config import ConfigError

if TYPE_CHECKING:
  from jax.sharding import Mesh


def add_mesh_option(parser: argparse.ArgumentParser) -> None:
  """Declares --mesh."""
  parser.add_argument(
    "--mesh", metavar="AXIS=SIZE,...",
    help="split the model over devices: tensor=8 its heads, channels and vocabulary, fsdp=8 only "
    "where its parameters lie (default: one device)",
  )  # fmt: skip


def mesh_of(args: argparse.Namespace) -> Mesh | None:
  """The mesh that --mesh names, over as many devices as it has places; None without it.

  Raises:
    ConfigError: it isn't a mesh, or there are fewer devices.
  """
  if args.mesh is None:
    return None
  import jax

  from regionjax.mesh import make_mesh, parse_mesh

  config = parse_mesh(args.mesh)
  # One row at a time is the rule here: rows have nothing to share unless it is asked for.
  sizes = (max(config.data, 1), config.fsdp, config.tensor)
  count, devices = sizes[0] * sizes[1] * sizes[2], jax.devices()
  if not 1 <= count <= len(devices):
    raise ConfigError(
      f"--mesh {args.mesh}: it has {count} places, and there are {len(devices)} devices"
    )
  return make_mesh(
    data=sizes[0], fsdp=sizes[1], tensor=sizes[2], slices=config.slices, devices=devices[:count]
  )

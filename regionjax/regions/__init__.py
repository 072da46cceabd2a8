"""Regions of an image: what they are (`Region`) and how they are written as text (`FORMATS`)."""

from regionjax.regions.checks import KINDS, RegionError
from regionjax.regions.coordinates import (
  FORMATS,
  CoordinateFormat,
  Refusal,
  get_format,
  parse_regions,
  scan_regions,
)
from regionjax.regions.masks import Mask
from regionjax.regions.region import Region

__all__ = [
  "FORMATS",
  "KINDS",
  "CoordinateFormat",
  "Mask",
  "Refusal",
  "Region",
  "RegionError",
  "get_format",
  "parse_regions",
  "scan_regions",
]

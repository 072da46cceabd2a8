"""Regions of an image: what they are (`Region`) and how they are written as text (`FORMATS`)."""

from regionjax.regions.checks import RegionError
from regionjax.regions.coordinates import FORMATS, CoordinateFormat, get_format, parse_regions
from regionjax.regions.masks import Mask
from regionjax.regions.region import KINDS, Region

__all__ = [
  "FORMATS",
  "KINDS",
  "CoordinateFormat",
  "Mask",
  "Region",
  "RegionError",
  "get_format",
  "parse_regions",
]

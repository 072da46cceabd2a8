"""RoIAlign: the average of bilinear samples on a grid of bins inside each box."""

from regionjax.ops.roi_align.api import roi_align

__all__ = ["roi_align"]

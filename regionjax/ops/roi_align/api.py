"""The public RoIAlign: argument checks and the choice of implementation.

Axes: B rows, K images of a row, R boxes, H and W cells, P and Q bins, C channels.
"""

from __future__ import annotations

import functools
import importlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from regionjax.ops.roi_align import pallas_schedule
from regionjax.ops.roi_align.placement import local_shape
from regionjax.ops.roi_align.sampling import Boxes

MODULES = {"einsum": "einsum", "gather": "gather", "pallas": "pallas_tpu"}

# Measured on two cores of an AMD EPYC 9004, float32, jax 0.10.2; only their ratios matter.
PRODUCT_FLOPS = 40e9  # floating-point operations a second in the einsum form
GATHER_TAPS = 12e9  # channels of taps read a second by the gather
LOOP_BIN = 1e-6  # seconds that one bin costs the gather's backward loop, whatever its width
LOOP_TAPS = 10e9  # channels of taps added a second by that loop


def roi_align(
  features: jax.Array,
  boxes: jax.Array,
  *,
  output_size: int | tuple[int, int],
  sampling_ratio: int,
  box_image: jax.Array | None = None,
  valid: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Averages bilinear samples of feature maps over a grid of bins inside each box.

  The rule of torchvision's and mmcv's `roi_align(aligned=True)` with a fixed sampling ratio (He et
  al., Mask R-CNN, section 3; the half-pixel shift is Detectron2's): see `sampling.py`. A box may
  reach outside the map, be empty (all bins then read one point) or inverted (it is read mirrored).

  Differentiable in reverse mode with respect to `features`; `boxes` get no gradient, as there.

  Args:
    features: [B, H, W, C], or [B, K, H, W, C] for K images per row; floating point.
    boxes: [B, R, 4] xyxy, normalised: (0, 0, 1, 1) is the whole map.
    output_size: bins per side, or (P, Q) for bins per column and per row.
    sampling_ratio: S; a bin averages S*S samples. torchvision's adaptive 0 has no static shape.
    box_image: [B, R] integers, the image of each box; needed when K > 1. A box of an image that
      does not exist counts as invalid.
    valid: [B, R] bool, default all.
    implementation: one of
      'einsum': two matrix products per box; their result in between goes through memory.
      'gather': reads the neighbours of every sample.
      'pallas': one TPU kernel that reads each map and writes each crop once; float32 and
        bfloat16. Elsewhere it is emulated, for tests.
      None: what is fastest. On a CPU by a cost model with measured constants, apart for forward
        and backward. On a TPU 'pallas' where it takes the maps and saves enough traffic, see
        `pallas_schedule.suits`. Otherwise einsum, whose products suit matrix units and whose
        gradient needs no scatter.

  Returns:
    [B, R, P, Q, C] in the dtype of `features`. Rows of boxes that are invalid or not finite are
    exactly zero and send zero gradient, whatever the features hold. A NaN or an infinity in an
    image reaches its own boxes: with 'gather' the bins that read it, with 'pallas' their whole rows
    of bins, with 'einsum' any of them, and any of the boxes of the other images in its row of the
    batch (their weight of it is zero, and 0 * NaN is NaN).

  On a mesh einsum and gather are split by the compiler. 'pallas' puts itself into a `shard_map`,
  rows over `data` and `fsdp`, channels over `tensor`, see `placement.py`.

  Raises:
    ValueError: shapes that do not fit, an unknown implementation, or features that 'pallas' doesn't
      take.
  """
  features, boxes = jnp.asarray(features), jnp.asarray(boxes)
  box_image = None if box_image is None else jnp.asarray(box_image)
  valid = None if valid is None else jnp.asarray(valid)
  size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
  _check(features, boxes, size, sampling_ratio, box_image, valid, implementation)
  return _run(features, boxes, box_image, valid, size, sampling_ratio, implementation)


# One program also for callers outside of jit: a dozen small ones cost more than RoIAlign itself.
@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _run(features, boxes, box_image, valid, output_size, sampling_ratio, implementation):
  if features.ndim == 4:
    features = features[:, None]
  xyxy_br4 = jax.lax.stop_gradient(boxes.astype(jnp.float32))
  image_br = jnp.zeros(boxes.shape[:2], jnp.int32)
  valid_br = jnp.all(jnp.isfinite(xyxy_br4), axis=-1)
  if box_image is not None:
    image_br = box_image.astype(jnp.int32)
    valid_br &= (image_br >= 0) & (image_br < features.shape[1])
  if valid is not None:
    valid_br &= valid
  prepared = Boxes(
    jnp.where(valid_br[..., None], xyxy_br4, 0.0), jnp.where(valid_br, image_br, 0), valid_br
  )
  choice = _choose(features, boxes.shape[1], output_size, sampling_ratio, implementation)
  return _roi_align(features, prepared, output_size, sampling_ratio, choice)


class Choice(NamedTuple):
  """Names of implementations by platform, and on a CPU by direction."""

  cpu_forward: str
  cpu_backward: str
  tpu: str
  other: str


def _choose(features, boxes: int, output_size, sampling_ratio, implementation) -> Choice:
  if boxes == 0:
    return Choice(*["einsum"] * 4)
  if implementation is not None:
    return Choice(*[implementation] * 4)
  on_cpu = _fastest_on_cpu(features.shape, output_size=output_size, sampling_ratio=sampling_ratio)
  fits = pallas_schedule.suits(
    local_shape(features), features.dtype, boxes=boxes, output_size=output_size
  )
  return Choice(*on_cpu, tpu="pallas" if fits else "einsum", other="einsum")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _roi_align(
  features_bkhwc: jax.Array,
  boxes: Boxes,
  output_size: tuple[int, int],
  sampling_ratio: int,
  choice: Choice,
) -> jax.Array:
  kw = dict(output_size=output_size, sampling_ratio=sampling_ratio)
  return _by_platform(_forward, choice.cpu_forward, choice, kw)(features_bkhwc, boxes)


def _forward_rule(features_bkhwc, boxes, output_size, sampling_ratio, choice):
  out = _roi_align(features_bkhwc, boxes, output_size, sampling_ratio, choice)
  # RoIAlign is linear: its transpose needs the boxes and the features' shape, not their values.
  empty = jnp.zeros((0, *features_bkhwc.shape), features_bkhwc.dtype)
  return out, (boxes, empty)


def _backward_rule(output_size, sampling_ratio, choice, residuals, cotangent_brpqc):
  boxes, empty = residuals
  features = jax.ShapeDtypeStruct(empty.shape[1:], empty.dtype)
  kw = dict(output_size=output_size, sampling_ratio=sampling_ratio, features=features)
  return _by_platform(_backward, choice.cpu_backward, choice, kw)(cotangent_brpqc, boxes), None


_roi_align.defvjp(_forward_rule, _backward_rule)


def _by_platform(direction, on_cpu: str, choice: Choice, kw):
  """The platform is known when the program is lowered, not now: it may be compiled for another."""
  return functools.partial(
    jax.lax.platform_dependent,
    cpu=direction(on_cpu, kw, interpret=True),
    tpu=direction(choice.tpu, kw, interpret=False),
    default=direction(choice.other, kw, interpret=True),
  )


def _forward(name: str, kw, *, interpret: bool):
  module = _module(name)
  if name == "pallas":  # writes the zeros itself: a pass over its result would double the traffic
    return functools.partial(module.forward, **kw, interpret=interpret)
  # Weights of zero are not enough: features may be NaN.
  return lambda x, boxes: _zero_invalid(module.forward(x, boxes, **kw), boxes)


def _backward(name: str, kw, *, interpret: bool):
  module = _module(name)
  if name == "pallas":  # doesn't read them
    return functools.partial(module.backward, **kw, interpret=interpret)
  # Also when what follows sends NaN for a row that it masks, as a norm's gradient at zero does.
  return lambda g, boxes: module.backward(_zero_invalid(g, boxes), boxes, **kw)


def _zero_invalid(x_brpqc: jax.Array, boxes: Boxes) -> jax.Array:
  return jnp.where(boxes.valid_br[:, :, None, None, None], x_brpqc, 0)


def _module(name: str):
  # When it is needed: importing Pallas takes longer than many programs' RoIAlign.
  return importlib.import_module(f"regionjax.ops.roi_align.{MODULES[name]}")


def _fastest_on_cpu(
  shape: tuple[int, ...], *, output_size: tuple[int, int], sampling_ratio: int
) -> tuple[str, str]:
  """Names of the implementations for forward and backward, by estimated seconds per bin."""
  _, k, h, w, c = shape
  q = output_size[1]
  taps = (2 * sampling_ratio) ** 2 * c
  products = 2 * w * c * (k * h + q) / q / PRODUCT_FLOPS
  forward = "gather" if taps / GATHER_TAPS <= products else "einsum"
  backward = "gather" if LOOP_BIN + taps / LOOP_TAPS <= products else "einsum"
  return forward, backward


def _check(features, boxes, size, sampling_ratio, box_image, valid, implementation) -> None:
  if features.ndim not in (4, 5):
    raise ValueError(
      f"roi_align: features have shape {features.shape}, expected [B, H, W, C] or [B, K, H, W, C]"
    )
  if not jnp.issubdtype(features.dtype, jnp.floating):
    raise ValueError(f"roi_align: features are {features.dtype}; convert them to a float type")
  if boxes.ndim != 3 or boxes.shape[-1] != 4 or boxes.shape[0] != features.shape[0]:
    raise ValueError(
      f"roi_align: boxes have shape {boxes.shape}, expected [{features.shape[0]}, R, 4] for "
      f"features of shape {features.shape}; pad rows with fewer boxes and name the padding in valid"
    )
  for name, array in (("box_image", box_image), ("valid", valid)):
    if array is not None and array.shape != boxes.shape[:2]:
      raise ValueError(
        f"roi_align: {name} has shape {array.shape}, expected [B, R] = {boxes.shape[:2]}"
      )
  if box_image is None and features.ndim == 5 and features.shape[1] > 1:
    raise ValueError(
      f"roi_align: {features.shape[1]} images per row; say in box_image [B, R] which each box is in"
    )
  if len(size) != 2 or min(size) < 1 or sampling_ratio < 1:
    raise ValueError(
      f"roi_align: output_size={size} and sampling_ratio={sampling_ratio} must be at least 1"
    )
  if implementation is not None and implementation not in MODULES:
    raise ValueError(
      f"roi_align: implementation={implementation!r}, expected None or one of "
      f"{', '.join(map(repr, MODULES))}"
    )

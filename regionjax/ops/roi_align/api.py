"""The public RoIAlign: argument checks and the choice of implementation.

Axes: B rows, K images of a row, R boxes, H and W cells, P and Q bins, C channels.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from regionjax.ops.roi_align import einsum, gather
from regionjax.ops.roi_align.sampling import Boxes

IMPLEMENTATIONS = {"einsum": einsum, "gather": gather}

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
    implementation: 'einsum', 'gather', or None for what is fastest: on a CPU by a cost model with
      measured constants, apart for forward and backward; elsewhere einsum, whose products suit
      matrix units and whose gradient needs no scatter.

  Returns:
    [B, R, P, Q, C] in the dtype of `features`. Rows of boxes that are invalid or not finite are
    exactly zero and send zero gradient, whatever the features hold. A NaN or an infinity in an
    image reaches its own boxes: with 'gather' the bins that read it, with 'einsum' any of them, and
    any of the boxes of the other images in its row of the batch (their weight of it is zero, and
    0 * NaN is NaN).

  Raises:
    ValueError: shapes that do not fit, or an unknown implementation.
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
  return _roi_align(features, prepared, output_size, sampling_ratio, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _roi_align(
  features_bkhwc: jax.Array,
  boxes: Boxes,
  output_size: tuple[int, int],
  sampling_ratio: int,
  implementation: str | None,
) -> jax.Array:
  kw = dict(output_size=output_size, sampling_ratio=sampling_ratio)
  name = implementation or _fastest_on_cpu(features_bkhwc.shape, **kw)[0]
  out_brpqc = _dispatch("forward", name, implementation, (features_bkhwc, boxes), kw)
  # Weights of zero are not enough: features may be NaN.
  return jnp.where(boxes.valid_br[:, :, None, None, None], out_brpqc, 0)


def _forward_rule(features_bkhwc, boxes, output_size, sampling_ratio, implementation):
  out = _roi_align(features_bkhwc, boxes, output_size, sampling_ratio, implementation)
  # RoIAlign is linear: its transpose needs the boxes and the features' shape, not their values.
  empty = jnp.zeros((0, *features_bkhwc.shape), features_bkhwc.dtype)
  return out, (boxes, empty)


def _backward_rule(output_size, sampling_ratio, implementation, residuals, cotangent_brpqc):
  boxes, empty = residuals
  # Also when what follows sends NaN for a row that it masks, as a norm's gradient at zero does.
  cotangent_brpqc = jnp.where(boxes.valid_br[:, :, None, None, None], cotangent_brpqc, 0)
  features = jax.ShapeDtypeStruct(empty.shape[1:], empty.dtype)
  kw = dict(output_size=output_size, sampling_ratio=sampling_ratio)
  name = implementation or _fastest_on_cpu(features.shape, **kw)[1]
  kw["features"] = features
  return _dispatch("backward", name, implementation, (cotangent_brpqc, boxes), kw), None


_roi_align.defvjp(_forward_rule, _backward_rule)


def _dispatch(direction: str, on_cpu: str, implementation: str | None, args, kw) -> jax.Array:
  """Runs `on_cpu` on a CPU and, unless the caller chose, einsum elsewhere.

  The platform is known when the program is lowered, not now: it may be compiled for another one.
  """
  elsewhere = implementation or "einsum"
  return jax.lax.platform_dependent(
    *args,
    cpu=functools.partial(getattr(IMPLEMENTATIONS[on_cpu], direction), **kw),
    default=functools.partial(getattr(IMPLEMENTATIONS[elsewhere], direction), **kw),
  )


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
  if implementation is not None and implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"roi_align: implementation={implementation!r}, expected None or one of "
      f"{', '.join(map(repr, IMPLEMENTATIONS))}"
    )

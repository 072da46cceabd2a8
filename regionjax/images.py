"""Image files to pixels, safely, and pixels to the model's input by a named rule.

| rule | what it does | whose |
|---|---|---|
| chatspot | squash to the size, bicubic with antialiasing | ChatSpot (square resize, no pad) |
| gpt4roi | shortest edge bicubic, then the long side plain bilinear | GPT4RoI's demo |
| hf | shortest edge bicubic, then the square in the middle | Hugging Face's CLIP processor |
| letterbox | fit inside, bicubic, and pad evenly with the mean colour | |

Every rule also returns the ImageTransform that carries regions along: `Region.transform(t)`.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

# Formats whose decoders are pure decoders: PIL would also run Ghostscript on an EPS file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "JPEG2000", "AVIF")
MAX_PIXELS = 64_000_000  # 192 MB decoded; a 60000 x 60000 header would ask for 10.8 GB
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)


class ImageError(ValueError):
  """An image that cannot be used; the message gives the cause and what to do."""


@dataclasses.dataclass(frozen=True)
class ImageTransform:
  """Where a resize rule put the image: xy_new = xy * scale + offset, both frames normalised.

  Attributes:
    scale: (x, y).
    offset: (x, y).
    size: (width, height) of the result in pixels.
  """

  scale: tuple[float, float]
  offset: tuple[float, float]
  size: tuple[int, int]


Rule = Callable[[np.ndarray, tuple[int, int], Sequence[float]], tuple[np.ndarray, ImageTransform]]


def decode(source: str | Path | bytes | BinaryIO, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
  """Reads an image file: uint8 [height, width, 3] RGB, upright by its EXIF orientation.

  Transparency is laid on white, 16-bit values are scaled by 1/257, CMYK is converted without its
  colour profile, and of an animation the first frame is taken.

  Args:
    source: path, encoded bytes, or a binary file.
    max_pixels: images with more are refused from their header, before anything is decoded.

  Raises:
    ImageError: missing, empty, not an image, truncated, too large, or of an unreadable kind.
  """
  name = f"image {str(source)!r}" if isinstance(source, (str, Path)) else "image"
  return to_rgb(open_picture(source, name, max_pixels=max_pixels), name)


def size_in_header(path: str | Path) -> tuple[int, int] | None:
  """Upright (width, height) by a file's header; None if it has no readable one."""
  try:
    with Image.open(path, formats=FORMATS) as image:
      turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientation: lying on a side
      return (image.height, image.width) if turned else image.size
  except Exception:  # decoders raise anything on odd headers
    return None


def from_pil(image: Image.Image, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
  """A PIL image by the rules of `decode`: the pixels that its file gives, as far as it has one.

  An image that PIL opened from a file is refused as the file would be, by its format too: PIL reads
  the data only now. Of an animation the frame that it stands at is taken.

  Raises:
    ImageError: as `decode`.
  """
  kind = image.format
  if kind is not None and kind not in FORMATS:
    raise ImageError(
      f"image: {kind} files aren't read; expected one of {', '.join(FORMATS)}. Give a copy without "
      "a file (image.convert('RGB')), or save it as PNG or JPEG"
    )
  return to_rgb(_loaded(image, "image", max_pixels), "image")


def open_picture(
  source: str | Path | bytes | BinaryIO, name: str, *, max_pixels: int = MAX_PIXELS
) -> Image.Image:
  """An image file as a PIL image in its own mode, loaded and upright.

  Args:
    source, max_pixels: as for `decode`.
    name: what errors call it.

  Raises:
    ImageError: as `decode`.
  """
  data = _read(source, name)
  if not data:
    raise ImageError(f"{name}: the file is empty (0 bytes); copy or download it again")
  try:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise ImageError(f"{name}: far too many pixels ({error}); make it smaller") from error
  except Exception as error:  # decoders raise SyntaxError, struct.error, ... on odd headers
    raise ImageError(
      f"{name}: {len(data)} bytes that aren't a readable image ({type(error).__name__}); expected "
      f"one of {', '.join(FORMATS)}. Open it in a viewer and save it as PNG or JPEG"
    ) from error
  return _loaded(image, name, max_pixels)


def _loaded(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
  """The image with its data read, upright."""
  kind, (width, height) = image.format or "image", image.size
  if width * height > max_pixels:
    raise ImageError(
      f"{name}: {width} x {height} = {width * height / 1e6:.0f} million pixels. "
      f"At most {max_pixels / 1e6:.0f} million are read; make it smaller, or raise max_pixels"
    )
  if 0 in image.size:
    raise ImageError(f"{name}: expected an image with pixels, got {width} x {height}")
  try:
    image.load()
  except Exception as error:  # likewise, on damaged data
    raise ImageError(
      f"{name}: {width} x {height} {kind} whose data is truncated or damaged "
      f"({error}); copy or download it again"
    ) from error
  return _upright(image)


def _read(source: str | Path | bytes | BinaryIO, name: str) -> bytes:
  if isinstance(source, (bytes, bytearray, memoryview)):
    return bytes(source)
  if not isinstance(source, (str, Path)):
    data = source.read()
    if not isinstance(data, bytes):
      raise ImageError(f"{name}: expected a binary file, got text; open it with mode 'rb'")
    return data
  if str(source).startswith(("http://", "https://")):
    raise ImageError(f"{name}: is a web address; download it and give the file")
  try:
    return Path(source).read_bytes()
  except FileNotFoundError as error:
    raise ImageError(f"{name}: no such file (looked in {Path.cwd()}); check the path") from error
  except (OSError, ValueError) as error:
    raise ImageError(f"{name}: cannot be read ({error}); expected an image file") from error


def _upright(image: Image.Image) -> Image.Image:
  try:
    return ImageOps.exif_transpose(image)
  except Exception:  # the pixels are good; damaged EXIF only means that no orientation is known
    return image


def to_rgb(image: Image.Image, name: str) -> np.ndarray:
  """A loaded PIL image of any mode as uint8 [height, width, 3]; `name` is what errors call it.

  Raises:
    ImageError: values without an agreed scale (floating point, 32-bit integers).
  """
  if image.mode.startswith("I"):  # 16 bits; PIL's own conversion would clip at 255
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
      raise ImageError(
        f"{name}: 32-bit integers beyond 0..65535 have no agreed scale; save it with 8 or 16 bits"
      )
    grey = ((values + 128) // 257).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)
  if image.mode == "F":
    raise ImageError(f"{name}: floating-point pixels have no agreed scale; save it with 8 bits")
  try:
    if image.has_transparency_data:
      image = image.convert("RGBA")
      image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))
  except Exception as error:  # damaged palettes, transparency of modes that have none, ...
    raise ImageError(f"{name}: {image.mode} pixels that can't be made RGB ({error})") from error


def preprocess(
  image_u8: np.ndarray,
  *,
  rule: str,
  size_hw: tuple[int, int],
  mean: Sequence[float],
  std: Sequence[float],
) -> tuple[np.ndarray, ImageTransform]:
  """Resizes by a named rule and normalises.

  Args:
    image_u8: uint8 [height, width, 3] RGB, as `decode` gives.
    rule: a name of RESIZE_RULES.
    size_hw: (height, width) of the result; square for 'gpt4roi' and 'hf'.
    mean, std: per channel, of values in [0, 1].

  Returns:
    float32 [height, width, 3], (value / 255 - mean) / std, and where the image went.

  Raises:
    ImageError: an unknown rule, not an RGB image, or one too long and thin for the rule.
  """
  if rule not in RESIZE_RULES:
    raise ImageError(f"resize rule {rule!r}: expected one of {', '.join(RESIZE_RULES)}")
  if image_u8.ndim != 3 or image_u8.shape[2] != 3 or image_u8.dtype != np.uint8:
    raise ImageError(
      f"expected uint8 pixels [height, width, 3], got {image_u8.dtype} {list(image_u8.shape)}"
    )
  if 0 in image_u8.shape:
    raise ImageError(f"expected an image with pixels, got {list(image_u8.shape)}")
  pixels, transform = RESIZE_RULES[rule](image_u8, size_hw, mean)
  scale = 1 / (255 * np.asarray(std, np.float64))
  shift = np.asarray(mean, np.float64) / np.asarray(std, np.float64)
  return pixels * scale.astype(np.float32) - shift.astype(np.float32), transform


def squash(
  image_u8: np.ndarray, size_hw: tuple[int, int], mean: Sequence[float] = CLIP_MEAN
) -> tuple[np.ndarray, ImageTransform]:
  """'chatspot': PIL bicubic (antialiased) to the size whatever the aspect ratio."""
  h, w = size_hw
  return _bicubic(image_u8, h, w), ImageTransform((1.0, 1.0), (0.0, 0.0), (w, h))


def shortest_edge_squash(
  image_u8: np.ndarray, size_hw: tuple[int, int], mean: Sequence[float] = CLIP_MEAN
) -> tuple[np.ndarray, ImageTransform]:
  """'gpt4roi': what GPT4RoI does to VCR, LLaVA and demo images.

  CLIP's processor with its crop switched off, then torch's bilinear (align_corners=False, no
  antialiasing) of the long side. It resamples the normalised image; normalising is affine and
  bilinear weights sum to 1, so doing it before or after gives the same.
  """
  side = _square(size_hw, "gpt4roi")
  pixels = _shortest_edge(image_u8, side, "gpt4roi")
  pixels = _bilinear(_bilinear(pixels, side, axis=0), side, axis=1)
  return pixels, ImageTransform((1.0, 1.0), (0.0, 0.0), (side, side))


def shortest_edge_crop(
  image_u8: np.ndarray, size_hw: tuple[int, int], mean: Sequence[float] = CLIP_MEAN
) -> tuple[np.ndarray, ImageTransform]:
  """'hf': Hugging Face's CLIPImageProcessor with its defaults."""
  side = _square(size_hw, "hf")
  pixels = _shortest_edge(image_u8, side, "hf")
  top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
  cut = pixels[top : top + side, left : left + side]
  return cut, crop_transform((image_u8.shape[1], image_u8.shape[0]), size_hw)


def crop_transform(size: tuple[int, int], size_hw: tuple[int, int]) -> ImageTransform:
  """Where 'hf' puts an image of `size` (width, height), known without its pixels.

  Raises:
    ImageError: as `preprocess` for an image of that size.
  """
  side = _square(size_hw, "hf")
  height, width = _shortest_edge_hw((size[1], size[0]), side, "hf")
  top, left = (height - side) // 2, (width - side) // 2
  return ImageTransform((width / side, height / side), (-left / side, -top / side), (side, side))


def letterbox(
  image_u8: np.ndarray, size_hw: tuple[int, int], mean: Sequence[float] = CLIP_MEAN
) -> tuple[np.ndarray, ImageTransform]:
  """'letterbox': the whole image, undistorted, centred on the mean colour."""
  h, w = size_hw
  height, width = image_u8.shape[:2]
  ratio = min(h / height, w / width)
  new_h, new_w = max(round(height * ratio), 1), max(round(width * ratio), 1)
  top, left = (h - new_h) // 2, (w - new_w) // 2
  canvas = np.empty((h, w, 3), np.float32)
  canvas[:] = np.asarray(mean, np.float32) * 255
  canvas[top : top + new_h, left : left + new_w] = _bicubic(image_u8, new_h, new_w)
  return canvas, ImageTransform((new_w / w, new_h / h), (left / w, top / h), (w, h))


RESIZE_RULES: dict[str, Rule] = {
  "chatspot": squash,
  "gpt4roi": shortest_edge_squash,
  "hf": shortest_edge_crop,
  "letterbox": letterbox,
}


def _bicubic(image_u8: np.ndarray, height: int, width: int) -> np.ndarray:
  if image_u8.shape[:2] == (height, width):
    return image_u8.astype(np.float32)
  resized = Image.fromarray(image_u8).resize((width, height), Image.Resampling.BICUBIC)
  return np.asarray(resized).astype(np.float32)


def _shortest_edge(image_u8: np.ndarray, side: int, rule: str) -> np.ndarray:
  return _bicubic(image_u8, *_shortest_edge_hw(image_u8.shape[:2], side, rule))


def _shortest_edge_hw(size_hw: tuple[int, ...], side: int, rule: str) -> tuple[int, int]:
  height, width = size_hw
  long = int(side * max(height, width) / min(height, width))  # Hugging Face rounds down
  if long * side > MAX_PIXELS:
    raise ImageError(
      f"resize rule {rule!r}: a {width} x {height} image would become {long} x {side} pixels on "
      "the way; crop it, or use the rule 'chatspot' or 'letterbox'"
    )
  return (long, side) if height > width else (side, long)


def _bilinear(pixels: np.ndarray, n: int, *, axis: int) -> np.ndarray:
  """torch.nn.functional.interpolate(mode='bilinear', align_corners=False) along one axis."""
  length = pixels.shape[axis]
  if length == n:
    return pixels
  at = np.maximum((np.arange(n) + 0.5) * (length / n) - 0.5, 0)
  low = at.astype(np.intp)
  weight = (at - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
  a = np.take(pixels, low, axis=axis)
  b = np.take(pixels, np.minimum(low + 1, length - 1), axis=axis)
  return a + (b - a) * weight


def _square(size_hw: tuple[int, int], rule: str) -> int:
  if size_hw[0] != size_hw[1]:
    raise ImageError(
      f"resize rule {rule!r} makes squares, asked for {size_hw[0]} x {size_hw[1]} (height x "
      "width); use the rule 'chatspot' or 'letterbox' for other shapes"
    )
  return size_hw[0]

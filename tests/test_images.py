"""Decoding hostile and odd files; the resize rules against the processors that define them."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from regionjax import images
from regionjax.images import ImageError, decode, from_pil, preprocess
from regionjax.regions import Region

MEAN, STD = images.CLIP_MEAN, (0.26862954, 0.26130258, 0.27577711)


def photo(height, width, seed=0):
  """Smooth colours with some texture, uint8 [H, W, 3]."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
  smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
  noise = rng.integers(-20, 20, (height, width, 3))
  return np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)


def encode(image, kind="PNG", **options):
  buffer = io.BytesIO()
  (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
    buffer, kind, **options
  )
  return buffer.getvalue()


def png_with_header(width, height):
  """A PNG whose header promises width x height and whose data hold next to nothing."""

  def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
  return b"\x89PNG\r\n\x1a\n" + body


# Bad files.


@pytest.mark.parametrize(
  "data, message",
  [
    (b"", "empty .0 bytes."),
    (b"hello, this is text", "19 bytes that aren't a readable image"),
    (b"\x89PNG\r\n\x1a\n" + b"\0" * 30, "aren't a readable image"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "aren't a readable image"),
    (png_with_header(60000, 60000), "too many pixels"),
    (png_with_header(9000, 9000), "9000 x 9000 = 81 million pixels. At most 64 million"),
    (png_with_header(50, 50), "50 x 50 PNG whose data is truncated or damaged"),
    (encode(photo(300, 400), "JPEG")[:-2000], "400 x 300 JPEG whose data is truncated"),
    (encode(photo(300, 400), "PNG")[:5000], "truncated or damaged"),
    (encode(photo(40, 40), "WEBP")[:200], "image"),
    (encode(photo(40, 40), "GIF")[:300], "image"),
    (encode(np.ones((4, 4), np.float32), "TIFF"), "floating-point"),
    (encode(np.full((4, 4), 70000, np.int32), "TIFF"), "32-bit integers"),
  ],
  ids=[
    "zero-byte", "text", "png-no-header", "eps", "bomb", "large", "short-data", "cut-jpeg",
    "cut-png", "cut-webp", "cut-gif", "float-tiff", "int32-tiff",
  ],
)  # fmt: skip
def test_bad_data(data, message):
  with pytest.raises(ImageError, match=message):
    decode(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
  def load(self):
    raise AssertionError("decoded")

  monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
  for size in ((60000, 60000), (12000, 12000), (9000, 9000)):
    with pytest.raises(ImageError, match="pixels"):
      decode(png_with_header(*size))


def test_bad_paths(tmp_path):
  with pytest.raises(ImageError, match=r"nowhere\.jpg.*no such file.*check the path"):
    decode(tmp_path / "nowhere.jpg")
  with pytest.raises(ImageError, match="cannot be read"):
    decode(tmp_path)
  with pytest.raises(ImageError, match="download it"):
    decode("https://example.com/cat.jpg")
  with pytest.raises(ImageError, match="cannot be read"):
    decode("a\0b.png")
  with pytest.raises(ImageError, match="binary"):
    decode(io.StringIO("text"))
  empty = tmp_path / "empty.png"
  empty.touch()
  with pytest.raises(ImageError, match=r"empty\.png.*0 bytes"):
    decode(empty)


def test_max_pixels_can_be_set():
  data = encode(photo(20, 30))
  assert decode(data, max_pixels=600).shape == (20, 30, 3)
  with pytest.raises(ImageError, match="raise max_pixels"):
    decode(data, max_pixels=599)


# Odd but good files.


def test_every_kind_of_source(tmp_path):
  pixels = photo(20, 30)
  data = encode(pixels)
  path = tmp_path / "photo.png"
  path.write_bytes(data)
  with path.open("rb") as file:
    for source in (path, str(path), data, bytearray(data), io.BytesIO(data), file):
      got = decode(source)
      assert got.dtype == np.uint8 and got.flags.c_contiguous and np.array_equal(got, pixels)


def test_sixteen_bits_are_scaled_not_clipped():
  values = np.array([[0, 257, 128 * 257, 65535], [40000, 300, 65000, 1]], np.uint16)
  for data in (encode(values), encode(values, "TIFF"), encode(values.astype(np.int32), "TIFF")):
    got = decode(data)
    assert np.array_equal(got[:, :, 0], np.round(values / 257))
    assert np.array_equal(got[:, :, 0], got[:, :, 2])


def test_transparency_lies_on_white():
  rgba = np.zeros((2, 2, 4), np.uint8)
  rgba[0, 0] = (200, 10, 30, 255)
  rgba[0, 1] = (200, 10, 30, 0)
  rgba[1, 0] = (0, 0, 0, 128)
  want = np.array([[[200, 10, 30], [255, 255, 255]], [[127, 127, 127], [255, 255, 255]]])
  assert np.array_equal(decode(encode(rgba)), want)
  grey = Image.fromarray(rgba).convert("LA")
  assert np.array_equal(decode(encode(grey))[0, 1], [255, 255, 255])


def test_palette_with_and_without_transparency():
  image = Image.new("P", (3, 1))
  image.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 0])
  for x in range(3):
    image.putpixel((x, 0), x)
  assert decode(encode(image)).tolist() == [[[10, 20, 30], [200, 100, 50], [0, 0, 0]]]
  clear = decode(encode(image, transparency=1))
  assert clear.tolist() == [[[10, 20, 30], [255, 255, 255], [0, 0, 0]]]
  partly = decode(encode(image, transparency=bytes([255, 0, 128])))
  assert partly.tolist() == [[[10, 20, 30], [255, 255, 255], [127, 127, 127]]]


def test_cmyk_grey_and_one_bit():
  cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
  red = decode(encode(cmyk, "JPEG", quality=95))
  assert np.abs(red.astype(int) - [255, 0, 0]).max() <= 6
  grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
  assert np.array_equal(decode(encode(grey))[:, :, 1], grey)
  bits = Image.fromarray(grey > 100)
  assert np.array_equal(decode(encode(bits))[:, :, 2], np.where(grey > 100, 255, 0))


def test_exif_rotation_is_applied():
  pixels = photo(20, 30)
  stored = Image.fromarray(np.rot90(pixels))  # what a camera held sideways writes
  exif = Image.Exif()
  exif[0x0112] = 6  # "rotate 90 degrees clockwise to show it upright"
  assert np.array_equal(decode(encode(stored, exif=exif)), pixels)
  assert decode(encode(stored, "JPEG", exif=exif)).shape == (20, 30, 3)


def test_damaged_exif_and_profile_do_not_matter():
  profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
  pixels = photo(20, 30)
  assert np.array_equal(decode(encode(pixels, icc_profile=profile[:50])), pixels)
  assert np.array_equal(decode(encode(pixels, exif=b"Exif\0\0nonsense")), pixels)


def test_first_frame_of_an_animation():
  frames = [Image.new("RGB", (8, 8), name) for name in ("red", "blue")]
  data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
  assert decode(data)[0, 0].tolist() == [255, 0, 0]


# PIL images.


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "1", "P", "CMYK", "I;16", "I"])
def test_a_pil_image_gives_the_pixels_of_its_file(mode):
  """Opened, loaded or copied: transparency on white, 16 bits scaled, upright by its EXIF."""
  rng = np.random.default_rng(1)
  if mode.startswith("I"):
    image = Image.fromarray(rng.integers(0, 65536, (20, 30), np.uint16)).convert(mode)
  else:
    image = Image.fromarray(rng.integers(0, 256, (20, 30, 4), np.uint8)).convert(mode)
  kind = "TIFF" if mode in ("CMYK", "I") else "PNG"
  exif = Image.Exif()
  exif[0x0112] = 6
  data = encode(image, kind, exif=exif)
  want = decode(data)
  assert want.shape == (30, 20, 3)
  opened = Image.open(io.BytesIO(data))
  for source in (Image.open(io.BytesIO(data)), opened, opened, opened.copy()):
    got = from_pil(source)
    assert got.dtype == np.uint8 and got.flags.c_contiguous and got.flags.writeable
    assert np.array_equal(got, want)
  assert np.array_equal(from_pil(image), np.rot90(want))


def test_bad_pil_images():
  cut = Image.open(io.BytesIO(encode(photo(300, 400), "JPEG")[:-2000]))
  with pytest.raises(ImageError, match="400 x 300 JPEG whose data is truncated"):
    from_pil(cut)
  with pytest.raises(ImageError, match="floating-point"):
    from_pil(Image.fromarray(np.ones((4, 4), np.float32)))
  with pytest.raises(ImageError, match="32-bit integers"):
    from_pil(Image.fromarray(np.full((4, 4), 70000, np.int32)))
  with pytest.raises(ImageError, match="raise max_pixels"):
    from_pil(Image.fromarray(photo(20, 30)), max_pixels=599)
  with pytest.raises(ImageError, match="0 x 5"):
    from_pil(Image.new("RGB", (0, 5)))


def test_pil_does_not_read_a_file_that_runs_programs(monkeypatch):
  """Loading an EPS would start Ghostscript."""
  monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a, **k: pytest.fail("it ran"))
  eps = Image.open(io.BytesIO(encode(photo(8, 8), "EPS")))
  with pytest.raises(ImageError, match="EPS files aren't read"):
    from_pil(eps)


# Resize rules. The processors of transformers are the oracle.

SHAPES = [(224, 224), (333, 500), (500, 333), (100, 101), (1200, 301), (225, 224), (37, 450)]


def clip_processor(**options):
  import torch  # noqa: F401
  import transformers.models.clip.image_processing_pil_clip as clip

  return clip.CLIPImageProcessorPil(**options)


@pytest.mark.parametrize("shape", SHAPES)
def test_gpt4roi_rule_is_pipeline_b(shape):
  """CLIP's processor without its crop, then torch bilinear of the normalised tensor."""
  import torch

  pixels = photo(*shape)
  processor = clip_processor(do_center_crop=False)
  tensor = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
  want = torch.nn.functional.interpolate(
    tensor, size=(224, 224), mode="bilinear", align_corners=False
  )[0].permute(1, 2, 0)
  got, transform = preprocess(pixels, rule="gpt4roi", size_hw=(224, 224), mean=MEAN, std=STD)
  assert got.shape == (224, 224, 3) and got.dtype == np.float32
  assert np.abs((got - want.numpy()) * np.array(STD)).max() < 1e-4  # torch's positions are float32
  assert transform == images.ImageTransform((1.0, 1.0), (0.0, 0.0), (224, 224))


@pytest.mark.parametrize("shape", SHAPES)
def test_hf_rule_is_the_processor(shape):
  pixels = photo(*shape)
  want = clip_processor()(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
  got, _ = preprocess(pixels, rule="hf", size_hw=(224, 224), mean=MEAN, std=STD)
  assert got.shape == (224, 224, 3) and got.dtype == np.float32
  assert np.abs(got - want.transpose(1, 2, 0)).max() < 1e-5


@pytest.mark.parametrize("size_hw", [(224, 224), (224, 336)])
def test_chatspot_rule_is_pils_bicubic(size_hw):
  pixels = photo(301, 450)
  want = Image.fromarray(pixels).resize(size_hw[::-1], Image.Resampling.BICUBIC)
  want = (np.asarray(want) / 255 - MEAN) / STD
  got, transform = preprocess(pixels, rule="chatspot", size_hw=size_hw, mean=MEAN, std=STD)
  assert np.abs(got - want).max() < 1e-5
  assert transform.size == size_hw[::-1]


def test_letterbox_pads_with_the_mean():
  pixels = photo(100, 200)
  got, transform = preprocess(pixels, rule="letterbox", size_hw=(224, 224), mean=MEAN, std=STD)
  assert transform.scale == (1.0, 0.5) and transform.offset == (0.0, 0.25)
  assert np.abs(got[:56]).max() < 1e-5 and np.abs(got[168:]).max() < 1e-5
  inner, _ = preprocess(pixels, rule="chatspot", size_hw=(112, 224), mean=MEAN, std=STD)
  assert np.array_equal(got[56:168], inner)


@pytest.mark.parametrize("rule", images.RESIZE_RULES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (150, 64), (64, 151), (128, 128), (500, 700)])
def test_regions_move_with_the_pixels(rule, shape):
  """Paint a region on the image, resize both: the painted pixels are the region's."""
  region = Region.polygon([(0.3, 0.35), (0.72, 0.3), (0.7, 0.66), (0.45, 0.74)])
  painted = np.repeat(region.rasterize(*shape)[:, :, None] * np.uint8(255), 3, axis=2)
  got, transform = preprocess(painted, rule=rule, size_hw=(96, 96), mean=(0, 0, 0), std=(1, 1, 1))
  assert transform.size == (96, 96) and got.shape == (96, 96, 3)
  seen = got[:, :, 0] > 0.5
  want = region.transform(transform).rasterize(96, 96)
  if min(shape) > 50:
    assert (seen & want).sum() / (seen | want).sum() > 0.9


def test_rule_errors():
  pixels = photo(20, 30)
  options = dict(size_hw=(32, 32), mean=MEAN, std=STD)
  with pytest.raises(ImageError, match="chatspot, gpt4roi, hf, letterbox"):
    preprocess(pixels, rule="squash", **options)
  with pytest.raises(ImageError, match=r"float64 \[20, 30, 3\]"):
    preprocess(pixels / 255, rule="hf", **options)
  with pytest.raises(ImageError, match=r"uint8 \[20, 30\]"):
    preprocess(pixels[:, :, 0], rule="hf", **options)
  with pytest.raises(ImageError, match=r"\[0, 30, 3\]"):
    preprocess(pixels[:0], rule="hf", **options)
  for rule in ("hf", "gpt4roi"):
    with pytest.raises(ImageError, match="makes squares, asked for 32 x 64"):
      preprocess(pixels, rule=rule, size_hw=(32, 64), mean=MEAN, std=STD)
    with pytest.raises(ImageError, match="20000 x 1 image would become"):
      preprocess(photo(1, 20000), rule=rule, size_hw=(224, 224), mean=MEAN, std=STD)

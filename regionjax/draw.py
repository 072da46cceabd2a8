"""Pictures for people: numbered coloured regions on an image, and a dialogue beside it.

Region k has the same colour and number everywhere: on the image, and as a chip where a text
mentions it (`<region1>`, `region1` or `{region:0}`).
"""

from __future__ import annotations

import functools
import importlib.util
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from regionjax.regions import Region

Colour = tuple[int, int, int]

# Neighbours differ in hue and in lightness, so that they stay apart for colour-blind eyes too.
PALETTE: tuple[Colour, ...] = (
  (230, 36, 60), (36, 112, 255), (24, 160, 72), (255, 140, 20), (150, 60, 220), (0, 184, 212),
  (255, 225, 30), (236, 64, 190), (150, 84, 36), (150, 205, 0), (10, 120, 125), (255, 140, 170),
)  # fmt: skip
MENTION = re.compile(r"<region(\d+)>|\bregion ?(\d+)\b|\{region:(\d+)\}")
_SMOOTH = Image.Resampling.BICUBIC
WORDS = re.compile(r"\n|[^\S\n]+|\S+")
_HALF = [0] * 128 + [255] * 128  # threshold for Image.point
INK, MUTED = (28, 30, 36), (112, 118, 130)


def colour(index: int) -> Colour:
  """The colour of region number `index` (0-based); the palette repeats after 12."""
  return PALETTE[index % len(PALETTE)]


def contrast(background: Colour) -> Colour:
  """Black or white, whichever reads better on it (WCAG relative luminance)."""
  linear = [
    v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
    for v in (c / 255 for c in background)
  ]
  luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
  # White against it has ratio 1.05 / (L + 0.05), black (L + 0.05) / 0.05; white is kept down to
  # 3:1, the limit for bold text, because it looks calmer on saturated colours.
  return (255, 255, 255) if 1.05 / (luminance + 0.05) >= 3.0 else (0, 0, 0)


@functools.lru_cache(maxsize=64)
def font(size: int, weight: str = "regular") -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
  """DejaVu Sans as matplotlib ships it (Latin, Greek, Cyrillic, arrows), else PIL's own ASCII."""
  spec = importlib.util.find_spec("matplotlib")
  if spec is not None and spec.origin is not None:
    name = "DejaVuSans-Bold.ttf" if weight == "bold" else "DejaVuSans.ttf"
    path = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / name
    if path.exists():
      return ImageFont.truetype(str(path), size)
  return ImageFont.load_default(size)


def annotate(
  image_u8: np.ndarray,
  regions: Sequence[Region],
  labels: Sequence[str] | None = None,
  *,
  side: int = 640,
) -> Image.Image:
  """The image with its regions drawn and numbered from 1.

  Args:
    image_u8: uint8 [height, width, 3] RGB.
    regions: boxes as frames, points as markers, everything else translucent with an outline.
    labels: a text after each number, or None.
    side: smaller images are enlarged by a whole factor until their longer side has about this
      many pixels, so that lines and numbers are legible on them.

  Returns:
    An RGB image.
  """
  if labels is not None and len(labels) != len(regions):
    raise ValueError(f"{len(labels)} labels for {len(regions)} regions; give one each, or None")
  canvas = Image.fromarray(image_u8)
  factor = max(round(side / max(canvas.size)), 1)
  canvas = canvas.resize((canvas.width * factor, canvas.height * factor), _SMOOTH)
  unit = max(max(canvas.size) / 560, 1.0)  # widths and letters grow with the picture
  over = 2 if canvas.width * canvas.height <= 4_000_000 else 1  # draw finer, then average
  overlay = Image.new("RGBA", (canvas.width * over, canvas.height * over), (0, 0, 0, 0))
  # Shapes first, frames and points on top, so that no fill hides a thin thing.
  order = sorted(range(len(regions)), key=lambda k: -regions[k].kind_id)
  for k in order:
    _draw_region(overlay, regions[k], colour(k), unit * over)
  canvas.paste(small := overlay.resize(canvas.size, Image.Resampling.LANCZOS), mask=small)
  taken: list[tuple[float, float, float, float]] = []
  for k, region in enumerate(regions):
    text = str(k + 1) if labels is None else f"{k + 1} {labels[k]}".strip()
    _badge(canvas, region, text, fill=colour(k), unit=unit, taken=taken)
  return canvas


def _draw_region(overlay: Image.Image, region: Region, ink: Colour, unit: float) -> None:
  line, halo = 3.0 * unit, 1.2 * unit
  if region.kind_id == 3:
    _draw_shape(overlay, region, ink, line=line, halo=halo)
    return
  draw = ImageDraw.Draw(overlay)
  corners = np.multiply(region.box_xyxy, overlay.size * 2)
  x1, y1 = corners[:2]
  if region.kind == "point":
    for radius, fill in ((9 * unit, (0, 0, 0)), (8 * unit, (255, 255, 255)), (6 * unit, ink)):
      draw.ellipse((x1 - radius, y1 - radius, x1 + radius, y1 + radius), fill=(*fill, 255))
    return
  reach = line / 2 + halo  # a frame along the border stays on the picture
  corners[:2] = np.maximum(corners[:2], reach)
  corners[2:] = np.maximum(np.minimum(corners[2:], np.array(overlay.size) - reach), corners[:2])
  for grow, width, fill in (
    (reach, line + 2 * halo, (0, 0, 0, 150)),
    (line / 2, line, (*ink, 255)),
  ):
    frame = (*(corners[:2] - grow), *(corners[2:] + grow))
    draw.rounded_rectangle(frame, radius=2 * unit, outline=fill, width=round(width))


def _draw_shape(
  overlay: Image.Image, region: Region, ink: Colour, *, line: float, halo: float
) -> None:
  """Fill and outline from a raster: the blurred shape is Phi(distance to the edge / sigma), so a
  band of its values is a line of even width along the edge, whatever the shape."""
  shape = _shape(region, overlay.size)
  x1, y1, x2, y2 = shape.getbbox() or (0, 0, *overlay.size)
  reach = math.ceil(2 * line + halo)  # only this part is blurred and painted
  part = (
    max(x1 - reach, 0), max(y1 - reach, 0),
    min(x2 + reach, overlay.width), min(y2 + reach, overlay.height),
  )  # fmt: skip
  shape = shape.crop(part)
  # A sixth: at a third, a red object in the blue region looked purple.
  overlay.paste((*ink, 42), part, mask=shape)
  soft = shape.filter(ImageFilter.GaussianBlur(line / 2))
  edge, shade = (_phi(-2 * d / line) for d in (line / 2, line / 2 + halo))
  for low, fill in ((shade, (0, 0, 0, 150)), (edge, (*ink, 255))):
    band = soft.point([255 * (low * 255 < v < (1 - low) * 255) for v in range(256)])
    overlay.paste(fill, part, mask=band)


def _shape(region: Region, size: tuple[int, int]) -> Image.Image:
  """The region as 0 and 255 at the picture's size; the steps of an enlarged mask are smoothed."""
  width, height = size
  if region.mask is not None:
    steps = max(width / region.mask.width, height / region.mask.height)
    if steps > 1:
      shape = Image.fromarray(region.mask.array).convert("L").resize(size, _SMOOTH)
      # Sigma 0.6 of a mask pixel: more would wipe out lines one pixel wide.
      shape = shape.filter(ImageFilter.GaussianBlur(0.6 * steps)).point(_HALF)
      if shape.getbbox():
        return shape
  return Image.fromarray(region.rasterize(height, width)).convert("L")


def _phi(z: float) -> float:
  """Cumulative normal distribution."""
  return (1 + math.erf(z / math.sqrt(2))) / 2


def _badge(
  canvas: Image.Image,
  region: Region,
  text: str,
  *,
  fill: Colour,
  unit: float,
  taken: list[tuple[float, float, float, float]],
) -> None:
  """A number near the region: inside the image, and off other badges where possible."""
  face = font(max(round(16 * unit), 12), "bold")
  pad_x, pad_y = 5 * unit, 3 * unit
  left, _, right, _ = face.getbbox(text)
  _, cap_top, _, cap_bottom = face.getbbox("H8")
  height = round(cap_bottom - cap_top + 2 * pad_y)
  width = max(round(right - left + 2 * pad_x), height)
  x, y = _place(region, canvas.size, (width, height), unit=unit, taken=taken)
  taken.append((x, y, x + width, y + height))
  _rounded(canvas, (x, y, width, height), fill, outline=(255, 255, 255), radius=4 * unit)
  start = (x + (width - (right - left)) / 2 - left, y + pad_y - cap_top)
  ImageDraw.Draw(canvas).text(start, text, font=face, fill=contrast(fill))


def _rounded(
  canvas: Image.Image,
  xywh: tuple[float, float, float, float],
  fill: Colour,
  *,
  outline: Colour | None = None,
  radius: float,
) -> None:
  """A filled box with smooth corners: drawn four times as large and averaged."""
  x, y, w, h = (round(v) for v in xywh)
  patch = Image.new("RGBA", (4 * w, 4 * h), (*(outline or fill), 0))
  ImageDraw.Draw(patch).rounded_rectangle(
    (0, 0, 4 * w - 1, 4 * h - 1), radius=4 * radius, fill=fill, outline=outline, width=5
  )
  patch = patch.resize((w, h), Image.Resampling.BOX)
  canvas.paste(patch, (x, y), mask=patch)


def _place(
  region: Region,
  canvas: tuple[int, int],
  size: tuple[float, float],
  *,
  unit: float,
  taken: list[tuple[float, float, float, float]],
) -> tuple[float, float]:
  x1, y1, x2, y2 = np.multiply(region.box_xyxy, canvas * 2)
  w, h = size
  gap = 3 * unit
  if region.kind == "point":
    spots = []
    for r in (9 * unit + gap, 9 * unit + 2 * gap + h):
      spots += [(x1 + r, y1 - h / 2), (x1 - r - w, y1 - h / 2)]
      spots += [(x1 - w / 2, y1 - r - h), (x1 - w / 2, y1 + r)]
  elif region.kind_id == 3:
    xy = np.multiply(region.outline(16), canvas)
    (lx, ly), (rx, ry) = xy[xy[:, 0].argmin()], xy[xy[:, 0].argmax()]
    (tx, ty), (bx, by) = xy[xy[:, 1].argmin()], xy[xy[:, 1].argmax()]
    far = gap + 2 * unit + region.brush[1] / 2 * canvas[1]
    spots = [(tx - w / 2, ty - h - far), (lx - w - far, ly - h / 2), (rx + far, ry - h / 2)]
    spots += [(bx - w / 2, by + far), ((x1 + x2 - w) / 2, (y1 + y2 - h) / 2)]
  else:
    outside = [(x1 - gap, y1 - h - gap), (x2 - w + gap, y1 - h - gap), (x1 - gap, y2 + gap)]
    outside += [(x2 - w + gap, y2 + gap), (x1 - w - gap, y1), (x2 + gap, y1)]
    inside = [(x1 + gap, y1 + gap), (x2 - w - gap, y1 + gap), (x1 + gap, y2 - h - gap)]
    spots = outside + inside
  best, best_cost = (0.0, 0.0), float("inf")
  for rank, (x, y) in enumerate(spots):
    at = (min(max(x, 1), canvas[0] - w - 2), min(max(y, 1), canvas[1] - h - 2))
    moved = abs(at[0] - x) + abs(at[1] - y)
    overlap = sum(
      max(min(at[0] + w, b[2]) - max(at[0], b[0]), 0)
      * max(min(at[1] + h, b[3]) - max(at[1], b[1]), 0)
      for b in taken
    )
    cost = 0.2 * rank + moved / h + 20 * overlap / (w * h)
    if cost < best_cost:
      best, best_cost = at, cost
  return best


# The dialogue beside the image.


def dialogue_card(
  image_u8: np.ndarray,
  regions: Sequence[Region],
  turns: Sequence[tuple[str, str]],
  *,
  labels: Sequence[str] | None = None,
  height: int = 560,
) -> Image.Image:
  """The annotated image on the left and the dialogue on the right, regions as coloured chips.

  Args:
    image_u8, regions, labels: as for `annotate`.
    turns: (role, text); roles 'user' and 'assistant' get a bubble of their own colour.
    height: pixels of the image's longer side; the card grows if the dialogue is longer.

  Returns:
    An RGB image.
  """
  picture = Image.fromarray(image_u8)
  ratio = height / max(picture.size)
  shape = (max(round(picture.width * ratio), 1), max(round(picture.height * ratio), 1))
  picture = annotate(np.asarray(picture.resize(shape, _SMOOTH)), regions, labels, side=height)
  margin, text_width = 20, 460
  bubbles = [_Bubble(role, text, text_width, regions=len(regions)) for role, text in turns]
  tall = sum(b.height + 10 for b in bubbles) - 10 if bubbles else 0
  card_height = max(picture.height, tall) + 2 * margin
  card = Image.new("RGB", (picture.width + text_width + 3 * margin, card_height), (247, 248, 250))
  card.paste(picture, (margin, margin))
  y = margin
  for bubble in bubbles:
    bubble.draw(card, picture.width + 2 * margin, y)
    y += bubble.height + 10
  return card


class _Bubble:
  """One turn: wrapped text with chips, in a rounded box."""

  SIZE, LINE, PAD = 17, 26, 12

  def __init__(self, role: str, text: str, width: int, *, regions: int) -> None:
    self.role, self.width, self.regions = role, width, regions
    self.face = font(self.SIZE)
    self.lines = self._wrap(text, width - 2 * self.PAD)
    self.height = len(self.lines) * self.LINE + 2 * self.PAD + 18

  def _pieces(self, text: str) -> Iterator[tuple[str, int | None]]:
    """Words, blanks and newlines as (text, None), mentions as (text, region index)."""
    at = 0
    # Raqm, which shapes the text, refuses control characters.
    text = "".join(c for c in text if c == "\n" or c.isprintable())
    for match in MENTION.finditer(text):
      digits = match[1] or match[2] or match[3]
      number = int(digits[:9]) + (match[3] is not None)
      if not 1 <= number <= self.regions:
        continue
      yield from ((p, None) for p in WORDS.findall(text[at : match.start()]))
      yield f"region {number}", number - 1
      at = match.end()
    yield from ((p, None) for p in WORDS.findall(text[at:]))

  def _measure(self, piece: str, index: int | None) -> float:
    return self.face.getlength(piece) + (14 if index is not None else 0)

  def _wrap(self, text: str, width: int) -> list[list[tuple[str, int | None, float]]]:
    """Lines of (text, region index, x)."""
    lines: list[list[tuple[str, int | None, float]]] = [[]]
    x = 0.0
    for piece, index in self._pieces(text):
      if piece == "\n":
        lines.append([])
        x = 0.0
        continue
      for part in self._split(piece, width) if index is None else [piece]:
        wide = self._measure(part, index)
        if x + wide > width and lines[-1] and not part.isspace():
          lines.append([])
          x = 0.0
        if part.isspace() and not lines[-1]:
          continue
        lines[-1].append((part, index, x))
        x += wide
    return lines

  def _split(self, word: str, width: int) -> list[str]:
    """Cuts a word longer than a line."""
    parts = [""]
    for letter in word:
      if self.face.getlength(parts[-1] + letter) > width:
        parts.append("")
      parts[-1] += letter
    return parts

  def draw(self, card: Image.Image, x: int, y: int) -> None:
    fill = {"user": (255, 255, 255), "assistant": (226, 238, 255)}.get(self.role, (238, 238, 238))
    _rounded(card, (x, y, self.width, self.height), fill, outline=(214, 219, 228), radius=10)
    draw = ImageDraw.Draw(card)
    name = self.role[:1].upper() + self.role[1:]
    draw.text((x + self.PAD, y + 8), name, font=font(12, "bold"), fill=MUTED)
    base = y + self.PAD + 16
    for line in self.lines:
      for piece, index, dx in line:
        at = x + self.PAD + dx
        if index is not None:
          ink = colour(index)
          chip = (at, base - 1, self._measure(piece, index) - 2, self.LINE - 4)
          _rounded(card, chip, ink, radius=6)
          draw.text((at + 6, base), piece, font=self.face, fill=contrast(ink))
        else:
          draw.text((at, base), piece, font=self.face, fill=INK)
      base += self.LINE

"""`regionjax chat` as a person runs it: answers, pictures, and every bad input."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from regionjax import cli
from regionjax.infer.chat import RegionChat
from regionjax.infer.command import show_regions
from regionjax.infer.engine import Generation
from regionjax.infer.regions_input import parse_region, read_mask
from regionjax.regions import Region, RegionError

SIZE = (64, 48)  # width, height


@pytest.fixture
def picture(tmp_path):
  path = tmp_path / "picture.jpg"
  pixels = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)
  Image.fromarray(pixels).save(path)
  return path


def chat_line(release_folder, *words):
  return cli.main(
    ["chat", "--checkpoint", str(release_folder), "--max-new-tokens", "5", *map(str, words)]
  )


def test_questions_are_answered(release_folder, picture, tmp_path, capsys):
  card = tmp_path / "card.png"
  code = chat_line(
    release_folder, picture, "--box", "4,5,40,40", "--point", "50,20", "--ask",
    "What is <region1>?", "--ask", "Is <region1> left of <region2>?", "--save", card,
  )  # fmt: skip
  out = capsys.readouterr().out
  assert code == 0
  assert "> What is <region1>?\n" in out
  assert "> Is <region1> left of <region2>?\n" in out
  assert Image.open(card).size[0] > 600


@pytest.mark.parametrize(
  ("asked", "printed"),
  [
    (["What is this?"], ["What is this? <region1>"]),
    (["What is this?", "And its colour?"], ["What is this? <region1>", "And its colour?"]),
    (["How many objects?", "What is <region1>?"], ["How many objects?", "What is <region1>?"]),
    (["What is <region1>?", "How many?"], ["What is <region1>?", "How many?"]),
  ],
)
def test_a_lone_region_that_no_question_mentions(
  asked, printed, release_folder, picture, capsys, monkeypatch
):
  """The first question gets it, and what is printed is what the model was asked."""
  sessions = []
  start = RegionChat.start
  monkeypatch.setattr(
    RegionChat, "start", lambda *args: sessions.append(start(*args)) or sessions[-1]
  )
  words = [word for text in asked for word in ("--ask", text)]
  assert chat_line(release_folder, picture, "--point", "5,5", *words) == 0
  out = capsys.readouterr().out
  assert [line[2:] for line in out.splitlines() if line.startswith("> ")] == printed
  (session,) = sessions
  assert [text for role, text in session.turns if role == "user"] == printed


def test_a_question_needs_no_region(release_folder, picture):
  assert chat_line(release_folder, picture, "--ask", "How many?") == 0


def test_normalized_and_temperature(release_folder, picture, capsys):
  words = ["--polygon", "0.1,0.1,0.9,0.2,0.5,0.8", "--normalized", "--ask", "What is <region1>?"]
  settings = ["--temperature", "1.5", "--top-p", "0.9", "--seed", "3"]
  assert chat_line(release_folder, picture, *words, *settings) == 0
  first = capsys.readouterr().out
  assert chat_line(release_folder, picture, *words, *settings) == 0
  assert capsys.readouterr().out == first
  assert chat_line(release_folder, picture, *words) == 0
  assert capsys.readouterr().out != first


def test_policies_mend_what_is_refused(release_folder, picture, capsys):
  words = ["--box", "40,40,-5,5", "--ask", "What is <region1>?"]
  assert chat_line(release_folder, picture, *words) == 2
  assert chat_line(release_folder, picture, *words, "--inverted", "swap") == 2
  assert chat_line(release_folder, picture, *words, "--inverted=swap", "--outside=clip") == 0


def test_the_prompt(release_folder, picture, tmp_path, capsys, monkeypatch):
  card = tmp_path / "card.png"
  lines = [
    "help", "What is <region1>?", "box 1,2,30,40", "point 400,1", "What is <region1>?", "regions",
    "point out what is red", f"save {card}", "new", "Is <region1> red?", "quit", "never read",
  ]  # fmt: skip
  monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
  assert chat_line(release_folder, picture) == 0
  out = capsys.readouterr().out
  assert "Image of 64 x 48 pixels" in out
  assert "error: the text mentions <region1>, but no region was given" in out
  assert "<region1> is box 1,2,30,40" in out
  assert "error: point 400,1" in out
  assert f"wrote {card}" in out
  assert card.exists()
  assert "never" not in out


def huge_png() -> bytes:
  """A PNG whose header says 60000 x 60000 and which holds next to nothing."""

  def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

  header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
  data = chunk(b"IDAT", zlib.compress(b"\0" * 100))
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


ASK = ["--ask", "What is <region1>?"]
BAD = {
  "missing image": (["{dir}/none.jpg", *ASK], "no such file"),
  "truncated image": (["{dir}/truncated.jpg", *ASK], "truncated"),
  "bomb": (["{dir}/bomb.png", *ASK], "60000 x 60000|pixels"),
  "not an image": (["{dir}/text.jpg", *ASK], "readable image"),
  "outside": (["{image}", "--box", "10,10,65,40", *ASK], "outside|beyond"),
  "inverted": (["{image}", "--box", "40,10,10,40", *ASK], "x1 <= x2"),
  "nan": (["{image}", "--box", "nan,10,20,40", *ASK], "nan|finite"),
  "infinite": (["{image}", "--point", "inf,10", *ASK], "inf|finite"),
  "empty": (["{image}", "--box", "10,10,10,40", *ASK], "no area"),
  "three numbers": (["{image}", "--box", "10,10,20", *ASK], "expected x1,y1,x2,y2"),
  "words": (["{image}", "--point", "a,b", *ASK], "expected numbers, x,y"),
  "pixels as shares": (["{image}", "--normalized", "--box", "1,2,30,40", *ASK], "--normalized"),
  "too many mentions": (["{image}", "--box", "1,2,30,40", "--ask", "<region1> or <region2>?"],
                        "<region2>, but there are regions 1 to 1"),
  "no region": (["{image}", *ASK], "no region was given"),
  "too few mentions": (["{image}", "--box", "1,2,30,40", "--point", "3,4", *ASK],
                       "never mentions <region2>"),
  "missing mask": (["{image}", "--mask", "{dir}/none.png", *ASK], "no such file"),
  "mask of another size": (["{image}", "--mask", "{dir}/small.png", *ASK], "8x8 pixels, the image"),
  "empty mask": (["{image}", "--mask", "{dir}/black.png", *ASK], "no pixel is inside"),
  "mask bomb": (["{image}", "--mask", "{dir}/bomb.png", *ASK], "pixels"),
  "mask of text": (["{image}", "--mask", "{dir}/text.jpg", *ASK], "aren't a readable image"),
  "mask of an unread format": (["{image}", "--mask", "{dir}/mask.eps", *ASK],
                               "aren't a readable image"),
  "truncated mask": (["{image}", "--mask", "{dir}/cut.png", *ASK], "truncated or damaged"),
  "floating mask": (["{image}", "--mask", "{dir}/float.tiff", *ASK], "floating-point"),
  "endless mention": (["{image}", "--ask", "What is <region{many}>?"], "no region was given"),
  "temperature": (["{image}", "--temperature", "-1", "--ask", "How many?"], "temperature -1.0"),
  "top-p": (["{image}", "--top-p", "0", "--ask", "How many?"], "top_p 0.0"),
  "tokens": (["{image}", "--max-new-tokens", "0", "--ask", "How many?"], "at least 1"),
  "picture's folder": (["{image}", "--ask", "How many?", "--save", "{dir}/none/x.png"],
                       "there is no folder"),
  "picture's type": (["{image}", "--ask", "How many?", "--save", "{dir}/x.doc"], "ends in .png"),
  "no checkpoint": (["{image}", "--ask", "How many?", "--checkpoint", "{dir}/none"],
                    "no release at"),
  "too long": (["{image}", "--ask", "word " * 600], "limit is 512"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_exits_with_2_and_writes_nothing(case, release_folder, picture, tmp_path, capsys):
  (tmp_path / "truncated.jpg").write_bytes(picture.read_bytes()[:300])
  (tmp_path / "bomb.png").write_bytes(huge_png())
  (tmp_path / "text.jpg").write_text("hello")
  Image.new("L", (8, 8), 255).save(tmp_path / "small.png")
  Image.new("L", SIZE, 0).save(tmp_path / "black.png")
  Image.new("L", SIZE, 255).save(tmp_path / "mask.eps")
  Image.new("F", SIZE, 1.0).save(tmp_path / "float.tiff")
  noise = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0]), np.uint8)
  Image.fromarray(noise).save(tmp_path / "cut.png")
  (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:1000])
  before = sorted(tmp_path.rglob("*"))
  words, message = BAD[case]
  words = [w.format(dir=tmp_path, image=picture, many="1" * 5000) for w in words]
  if "--save" not in words:
    words += ["--save", str(tmp_path / "card.png")]
  assert chat_line(release_folder, *words) == 2
  err = capsys.readouterr().err
  assert err.startswith("error: ")
  assert any(part in err for part in message.split("|")), err
  assert sorted(tmp_path.rglob("*")) == before


def test_typed_regions():
  assert parse_region("box", "16, 12 32 24", size=SIZE) == Region.box(0.25, 0.25, 0.5, 0.5)
  assert parse_region("point", "16,12", size=SIZE) == Region.point(0.25, 0.25)
  polygon = parse_region("polygon", "0,0,64,0,0,48", size=SIZE)
  assert polygon == Region.polygon([(0, 0), (1, 0), (0, 1)])
  assert parse_region("scribble", "0,0,64,48", size=SIZE).kind == "scribble"
  with pytest.raises(RegionError, match="4 numbers; expected x1,y1,x2,y2,x3,y3"):
    parse_region("polygon", "0,0,64,0", size=SIZE)


def test_masks_from_pictures(tmp_path):
  """Transparency, grey, 0/1 and palette pictures say the same mask."""
  inside = np.zeros((SIZE[1], SIZE[0]), bool)
  inside[10:30, 20:50] = True
  rgba = np.full((*inside.shape, 4), 90, np.uint8)
  rgba[..., 3] = 255 * inside
  palette = Image.fromarray((3 * inside).astype(np.uint8)).convert("P")
  palette.putdata((3 * inside).ravel().tolist())
  pictures = {
    "alpha": Image.fromarray(rgba),
    "grey": Image.fromarray((200 * inside + 20).astype(np.uint8)),
    "ones": Image.fromarray(inside.astype(np.uint8)),
    "bits": Image.fromarray(inside),
    "sixteen bits": Image.fromarray((40000 * inside + 300).astype(np.uint16)),
    "sixteen bits of ones": Image.fromarray(inside.astype(np.uint16)),
    "palette": palette,
    "colour": Image.fromarray(np.repeat((255 * inside).astype(np.uint8)[..., None], 3, axis=2)),
  }
  for name, picture in pictures.items():
    path = tmp_path / f"{name}.png"
    picture.save(path)
    np.testing.assert_array_equal(read_mask(path, size=SIZE).rasterize(*inside.shape), inside, name)


def test_a_mask_is_upright_like_its_image(tmp_path):
  """A phone's picture and the mask painted on it carry the same orientation."""
  inside = np.zeros((SIZE[1], SIZE[0]), bool)
  inside[10:30, 20:50] = True
  exif = Image.Exif()
  exif[0x0112] = 6  # "rotate 90 degrees clockwise to show it upright"
  path = tmp_path / "mask.png"
  Image.fromarray(np.rot90(255 * inside).astype(np.uint8)).save(path, exif=exif)
  np.testing.assert_array_equal(read_mask(path, size=SIZE).rasterize(*inside.shape), inside)


def test_a_palette_may_be_transparent(tmp_path):
  inside = np.zeros((SIZE[1], SIZE[0]), bool)
  inside[10:30, 20:50] = True
  palette = Image.fromarray(np.where(inside, 2, 1).astype(np.uint8)).convert("P")
  palette.putdata(np.where(inside, 2, 1).ravel().tolist())
  palette.save(tmp_path / "mask.png", transparency=1)
  mask = read_mask(tmp_path / "mask.png", size=SIZE)
  np.testing.assert_array_equal(mask.rasterize(*inside.shape), inside)


def test_faulty_boxes_of_an_answer_are_shown(make_chat, capsys):
  """An inverted box would vanish else."""
  text = "[0.90, 0.20, 0.10, 0.40]"
  chat = make_chat("pool")
  ids = (*chat.tokenizer.encode_text(text), chat.tokenizer.eos_id)
  show_regions(chat.answer(Generation(ids, text, "stop"), SIZE), SIZE)
  out = capsys.readouterr().out
  assert out == f"  = {text} is no region (its corners are the wrong way round)\n"
  text = "[0.25, 0.25, 0.50, 0.50]"
  ids = (*chat.tokenizer.encode_text(text), chat.tokenizer.eos_id)
  show_regions(chat.answer(Generation(ids, text, "stop"), SIZE), SIZE)
  assert capsys.readouterr().out == "  = box 16,12,32,24\n"

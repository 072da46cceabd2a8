"""`regionjax tokens` as a person runs it: ids, slots, mask, colours, and every bad input."""

import io
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from regionjax import cli
from regionjax.conversation import Conversation, Renderer
from regionjax.data.schema import ImageRef
from regionjax.regions import Region
from regionjax.tokens_command import in_colour, open_prompt

SIZE = (64, 48)  # width, height
LINE = re.compile(r"([LIR+ ]) +(\d+)(?:-(\d+))? +(\d+)  (.*)")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch, request):
  monkeypatch.chdir(request.config.rootpath)


@pytest.fixture
def picture(tmp_path):
  path = tmp_path / "picture.jpg"
  pixels = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)
  Image.fromarray(pixels).save(path)
  return path


@pytest.fixture
def tokens(capsys):
  """Runs the verb -> (what it printed, [(mark, id, rest of the line) of every token])."""

  def run(*words):
    assert cli.main(["tokens", *map(str, words)]) == 0
    out = capsys.readouterr().out
    rows = []
    for line in out.splitlines():
      if match := LINE.fullmatch(line):
        mark, start, end, index, rest = match.groups()
        assert int(start) == len(rows)
        rows += [(mark, int(index), rest)] * (int(end or start) - int(start) + 1)
    return out, rows

  return run


ASK = ["--ask", "What is <region1>?"]
BOX = ["--box", "4,5,40,40"]


@pytest.mark.parametrize("region", ["pool", "text", "pyramid+text", "none"])
def test_the_ids_are_those_of_chat(region, tokens):
  spec = f"configs/tiny.py:region={region}"
  config, tokenizer = open_prompt(spec)
  words = ["--size", "64,48", *BOX, "--point", "50,20", "--ask", "Is <region1> left of <region2>?"]
  _, rows = tokens("--checkpoint", spec, *words)
  chat = Conversation(
    Renderer(config.prompt, config.model, tokenizer), images=[ImageRef("memory", "0", SIZE)]
  )
  regions = [Region.box(4, 5, 40, 40, size=SIZE), Region.point(50, 20, size=SIZE)]
  prompt = chat.ask("Is <region1> left of <region2>?", regions)
  assert [index for _, index, _ in rows] == prompt.ids.tolist()
  marks = [mark for mark, _, _ in rows]
  assert marks.count("I") == config.model.image_tokens and "L" not in marks
  assert marks.count("R") == (2 if config.model.region.features else 0)


def test_an_image_is_as_good_as_its_size(picture, tokens):
  assert tokens(picture, *BOX, *ASK) == tokens("--size", "64x48", *BOX, *ASK)


def test_the_loss_mask_of_several_turns(tokens):
  out, rows = tokens(
    "--size", "64,48", *BOX, "--point", "5,5", *ASK, "--answer", "A cat.", "--ask",
    "And <region2>?", "--answer", "A dog at <region2>.",
  )  # fmt: skip
  _, tokenizer = open_prompt("tiny")
  counted = [(index, rest.split(", answer ")[1]) for mark, index, rest in rows if mark == "L"]
  answers = {
    number: tokenizer.decode([index for index, n in counted if n == number]) for number in "12"
  }
  assert answers == {"1": " A cat.</s>", "2": " A dog at [0.08, 0.10].</s>"}
  assert [rest.split()[-2:] for mark, _, rest in rows if mark == "R"] == [
    ["region", "1"], ["region", "2"],
  ]  # fmt: skip
  assert "what training sees" in out
  assert (
    f"{len(rows)} tokens of at most 512\n  64 slots of 1 image\n  2 slots of 2 regions\n" in out
  )
  assert f"{len(counted)} counted by the loss, in 2 answers\nan answer ends with: </s>\n" in out


def test_a_question_at_the_end_is_a_prompt(tokens):
  out, rows = tokens("--ask", "How many?", "--answer", "Two.", "--ask", "Of what?")
  assert "a prompt to answer" in out and "0 counted by the loss, in 0 answers" in out
  assert {mark for mark, _, _ in rows} == {" ", "+"}
  assert "0 slots of 0 images" in out


def test_pieces_are_shown_as_they_are(tokens):
  _, rows = tokens("--ask", "two  <bbox></s>\x1b[31m\n日")
  shown = [rest.strip() for _, _, rest in rows]
  assert "\x1b" not in "".join(shown)
  assert {mark for mark, _, _ in rows} == {" "}  # typed tokens are text
  assert any("\\x1b" in piece for piece in shown) and "'\\n'" in shown


def test_settings_can_be_overridden(tokens):
  words = ["--size", "64,48", *BOX, *ASK, "--answer", "A cat."]
  _, plain = tokens(*words)
  out, vicuna = tokens(*words, "--prompt.template=vicuna_v1", "--system", "Be brief.")
  assert "template vicuna_v1" in out and len(vicuna) > len(plain)
  _, tokenizer = open_prompt("tiny")
  text = tokenizer.decode([index for _, index, _ in vicuna])
  assert "Be brief. USER:" in text and text.endswith("ASSISTANT: A cat.</s>")
  out, rows = tokens(*words, "--model.decoder.max_length=50")
  assert f"{len(rows)} tokens: {len(rows) - 50} more than the decoder's max_length of 50" in out


def test_shares_need_no_size(tokens):
  words = ["--normalized", "--box", "0.1,0.1,0.5,0.5", *ASK]
  _, rows = tokens(*words)
  assert [mark for mark, _, _ in rows].count("R") == 1
  _, sized = tokens(*words, "--size", "64,48")
  assert rows == sized


def test_colours(tokens, capsys):
  words = ["tokens", "--size", "64,48", *BOX, *ASK, "--answer", "A cat."]
  outs = {}
  for when in ("always", "never", "auto"):
    assert cli.main([*words, "--color", when]) == 0
    outs[when] = capsys.readouterr().out
  assert "\x1b[32m' cat'\x1b[0m" in outs["always"]  # counted by the loss
  assert "\x1b[34m<im_patch> x64\x1b[0m" in outs["always"]
  assert "\x1b[35m<bbox>\x1b[0m" in outs["always"]
  assert "\x1b[36m<im_start>\x1b[0m" in outs["always"]
  assert re.sub(r"\x1b\[\d+m", "", outs["always"]) == outs["never"] == outs["auto"]


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.mark.parametrize(
  ("when", "environment", "stream", "coloured"),
  [
    ("auto", {}, Terminal(), True),
    ("auto", {}, io.StringIO(), False),
    ("auto", {"NO_COLOR": "1"}, Terminal(), False),
    ("auto", {"NO_COLOR": ""}, Terminal(), True),
    ("auto", {"TERM": "dumb"}, Terminal(), False),
    ("always", {"NO_COLOR": "1"}, io.StringIO(), True),
    ("never", {}, Terminal(), False),
  ],
)
def test_colours_only_where_they_are_wanted(when, environment, stream, coloured, monkeypatch):
  monkeypatch.delenv("NO_COLOR", raising=False)
  monkeypatch.setenv("TERM", "xterm")
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  assert in_colour(when, stream) == coloured


def test_no_weights_are_read_and_no_accelerator_started():
  code = (
    "import sys, safetensors.numpy; safetensors.numpy.load_file = None; from regionjax import cli;"
    "assert cli.main(['tokens', '--ask', 'How many?']) == 0; assert 'jax' not in sys.modules"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


SIZED = ["--size", "64,48"]
BAD = {
  "nothing": ([], "give at least one --ask"),
  "an answer first": (["--answer", "A."], "--answer 'A.' stands where a dialogue has --ask"),
  "two questions": (["--ask", "A?", "--ask", "B?"], "'B?' stands where a dialogue has --answer"),
  "pixels of nothing": ([*BOX, *ASK], "--box 4,5,40,40: pixels of an image of unknown size"),
  "mask of nothing": (["--mask", "x.png", "--normalized", *ASK], "--mask x.png: pixels of an"),
  "size": (["--size", "64", *ASK], "--size 64: expected WIDTH,HEIGHT"),
  "no pixels": (["--size", "0,48", *ASK], "--size 0,48: expected WIDTH,HEIGHT"),
  "both": (["{image}", *SIZED, *ASK], "give one of them"),
  "missing image": (["{dir}/none.jpg", *ASK], "no such file"),
  "outside": (["{image}", "--box", "10,10,65,40", *ASK], "outside|beyond"),
  "inverted": (["{image}", "--box", "40,10,10,40", *ASK], "x1 <= x2"),
  "numbers": (["{image}", "--box", "10,10", *ASK], "expected x1,y1,x2,y2"),
  "no region": (["{image}", *ASK], "no region was given"),
  "unmentioned": (["{image}", *BOX, "--point", "3,4", *ASK], "never mentions <region2>"),
  "answer's mention": (["--ask", "A?", "--answer", "<region1>"], "no region was given"),
  "no checkpoint": ([*SIZED, *BOX, *ASK, "--checkpoint", "{dir}/none"], "no release at"),
  "no config": ([*SIZED, *BOX, *ASK, "--checkpoint", "configs/tinny.py"], "no config file"),
  "template": (["--ask", "A?", "--prompt.template=vicuna"], "prompt.template='vicuna'"),
  "template's tokens": (["--ask", "A?", "--prompt.template=llama3"], "<|start_header_id|>"),
  "setting": (["--ask", "A?", "--prompt.templat=plain"], "did you mean prompt.template"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, picture, tmp_path, capsys):
  words, message = BAD[case]
  words = [w.format(dir=tmp_path, image=picture) for w in words]
  assert cli.main(["tokens", *words]) == 2
  streams = capsys.readouterr()
  assert streams.out == "" and streams.err.startswith("error: ")
  assert any(re.search(part, streams.err) for part in [message, re.escape(message)]), streams.err

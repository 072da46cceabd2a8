import json
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest
from PIL import Image

import regionjax
from regionjax import cli
from regionjax.config import ConfigError
from regionjax.config_files import load_config, write_config


@pytest.fixture
def verb(monkeypatch):
  """Registers a verb whose `run` is the given function."""

  def register(run, **kwargs):
    module = types.ModuleType("regionjax.fake_verb")

    def add_arguments(parser):
      parser.add_argument("word", nargs="?")
      parser.add_argument("--flag")

    module.add_arguments, module.run = add_arguments, run
    monkeypatch.setitem(sys.modules, "regionjax.fake_verb", module)
    monkeypatch.setitem(cli.VERBS, "fake", cli.Verb("regionjax.fake_verb", "a test", **kwargs))

  return register


def raises(error):
  def run(args):
    raise error

  return run


def test_version(capsys):
  assert cli.main(["--version"]) == 0
  assert capsys.readouterr().out == f"regionjax {regionjax.__version__}\n"


def test_help_names_all_verbs(capsys):
  assert cli.main(["--help"]) == 0
  out = capsys.readouterr().out
  assert all(name in out and verb.help in out for name, verb in cli.VERBS.items())
  assert cli.main([]) == 2


@pytest.mark.parametrize("words", [["fly"], ["--fly"], ["fake", "--fly"], ["fake", "a", "b"]])
def test_wrong_usage_exits_with_2(words, verb, capsys):
  verb(lambda args: 0)
  assert cli.main(words) == 2
  assert "usage: regionjax" in capsys.readouterr().err


@pytest.mark.parametrize("code", [0, 1, 130])
def test_the_exit_code_is_the_verbs(code, verb):
  verb(lambda args: code)
  assert cli.main(["fake"]) == code


def test_our_errors_become_one_line(verb, capsys):
  verb(raises(ConfigError("train.steps=0: expected at least 1")))
  assert cli.main(["fake"]) == 2
  assert capsys.readouterr().err == "error: train.steps=0: expected at least 1\n"


def test_a_missing_file_becomes_one_line(verb, capsys):
  verb(lambda args: Path("/nowhere/at/all").read_text())
  assert cli.main(["fake"]) == 2
  assert "/nowhere/at/all" in capsys.readouterr().err


@pytest.mark.parametrize("error", [TypeError("x"), RuntimeError("x"), ValueError("of a library")])
def test_defects_keep_their_traceback(error, verb):
  verb(raises(error))
  with pytest.raises(type(error)):
    cli.main(["fake"])


def test_ctrl_c(verb, capsys):
  verb(raises(KeyboardInterrupt()))
  assert cli.main(["fake"]) == 130
  assert capsys.readouterr().err == "interrupted\n"


def test_dotted_options_are_collected(verb):
  seen = {}

  def run(args):
    seen.update(vars(args))
    return 0

  verb(run, overrides=True)
  assert cli.main(["fake", "--a.b", "1", "there", "--c.d=x=y", "--flag", "f", "--name=n"]) == 0
  assert seen == {"word": "there", "flag": "f", "overrides": ["--a.b=1", "--c.d=x=y", "--name=n"]}


def test_the_program_starts_without_jax():
  code = (
    "import sys; from regionjax import cli; code = cli.main(['train', '--help']);"
    "assert code == 0; assert 'jax' not in sys.modules, 'imported'"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert "--workdir" in done.stdout


def test_train_refuses_an_unknown_key_and_writes_nothing(tmp_path, capsys, request, monkeypatch):
  monkeypatch.chdir(request.config.rootpath)
  workdir = tmp_path / "run"
  words = ["train", "configs/tiny.py", "--train.stepz=3", "--workdir", str(workdir)]
  assert cli.main(words) == 2
  assert "did you mean train.steps" in capsys.readouterr().err
  assert not workdir.exists()


@pytest.mark.parametrize("name", sorted(cli.VERBS))
def test_every_verb_explains_itself(name, capsys):
  assert cli.main([name, "--help"]) == 0
  assert f"usage: regionjax {name}" in capsys.readouterr().out


def workdir_of_another_config(folder):
  workdir = folder / "run"
  workdir.mkdir()
  write_config(workdir / "config.json", load_config("configs/tiny.py"))
  (workdir / "metrics.jsonl").write_text("{}\n")
  words = ["train", "configs/tiny.py", "--train.learning_rate=0.5", "--workdir", str(workdir)]
  return words, ["belongs to a run with another config", "train.learning_rate", "0.5 here"]


def boxes_without_their_image(folder):
  """A COCO-format file with one image that is there and one that isn't."""
  Image.new("RGB", (60, 40), "grey").save(folder / "a.jpg")
  size = {"width": 60, "height": 40}
  images = [{"id": 1, "file_name": "a.jpg"} | size, {"id": 2, "file_name": "gone.jpg"} | size]
  box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 10]}
  data = {"images": images, "annotations": [box], "categories": [{"id": 1, "name": "cat"}]}
  path = folder / "boxes.json"
  path.write_text(json.dumps(data))
  return path, ["1 defects and strict=True", "missing image", "gone.jpg"]


def missing_image_in_training(folder):
  path, causes = boxes_without_their_image(folder)
  spec = f"configs/coco.py:annotations={path},images={folder},strict=true"
  return ["train", spec, "--workdir", str(folder / "run")], causes


def missing_image_in_evaluation(folder):
  path, causes = boxes_without_their_image(folder)
  words = ["evaluate", "--source", "coco", "--annotations", str(path), "--images", str(folder)]
  return [*words, "--strict", "--json", str(folder / "result.json")], causes


def truncated_image_in_chat(folder):
  path = folder / "photo.jpg"
  Image.effect_noise((60, 40), 50).convert("RGB").save(path)
  path.write_bytes(path.read_bytes()[:-500])
  words = ["chat", str(path), "--box", "5,5,20,20", "--ask", "What is <region1>?"]
  return [*words, "--save", str(folder / "card.png")], ["photo.jpg", "truncated or damaged"]


@pytest.mark.parametrize(
  "accident",
  [
    workdir_of_another_config,
    missing_image_in_training,
    missing_image_in_evaluation,
    truncated_image_in_chat,
  ],
)
def test_bad_input_is_named_before_anything_is_written_or_compiled(
  accident, tmp_path, capsys, request, monkeypatch
):
  monkeypatch.chdir(request.config.rootpath)
  words, causes = accident(tmp_path)
  before = {p: p.read_bytes() if p.is_file() else None for p in tmp_path.rglob("*")}
  compiled = []

  def listen(event, seconds, **_):
    if event.endswith("backend_compile_duration"):
      compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    assert cli.main(words) == 2
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  error = capsys.readouterr().err
  assert error.startswith("error: ") and all(cause in error for cause in causes), error
  assert {p: p.read_bytes() if p.is_file() else None for p in tmp_path.rglob("*")} == before
  assert compiled == []

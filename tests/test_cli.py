import subprocess
import sys
import types
from pathlib import Path

import pytest

import regionjax
from regionjax import cli
from regionjax.config import ConfigError


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

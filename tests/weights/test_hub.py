"""Releases from the hub: out of a cache, from a hub on this machine, and everything that fails."""

import contextlib
import http.server
import json
import os
import threading
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import constants

import regionjax
from regionjax.weights import release
from regionjax.weights.hub import HubError, from_hub
from regionjax.weights.release import ReleaseError

NAME = "someone/roi-tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHIPPED = Path(regionjax.__file__).parent / "assets" / "tiny"


@pytest.fixture
def cache(tmp_path):
  """A cache as huggingface_hub fills it: files by their hash, and links to them."""
  home = tmp_path / "cache" / "models--someone--roi-tiny"
  for folder in ("refs", "blobs", f"snapshots/{COMMIT}"):
    (home / folder).mkdir(parents=True)
  (home / "refs" / "main").write_text(COMMIT)
  for number, path in enumerate(sorted(SHIPPED.iterdir())):
    blob = home / "blobs" / f"{number:040x}"
    blob.write_bytes(path.read_bytes())
    link = home / "snapshots" / COMMIT / path.name
    link.symlink_to(os.path.relpath(blob, link.parent))
  return tmp_path / "cache"


def refused(repo_id=NAME, **options) -> str:
  with pytest.raises(HubError) as caught:
    from_hub(repo_id, **options)
  assert isinstance(caught.value, ReleaseError)  # what the command line reports without a traceback
  assert "\n" not in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_copy_from_before_needs_no_hub(cache, revision):
  folder = from_hub(NAME, revision=revision, cache_dir=cache)
  assert folder == cache / "models--someone--roi-tiny" / "snapshots" / COMMIT


def test_it_is_a_release_that_answers(cache):
  chat = regionjax.load(from_hub(NAME, cache_dir=cache))
  config, params, tokenizer = release.load("tiny")
  assert chat.config == config and chat.tokenizer.fingerprint == tokenizer.fingerprint
  copied = release.load(from_hub(NAME, cache_dir=cache))[1]
  jax.tree.map(np.testing.assert_array_equal, copied, params)
  answer = chat.ask(None, "What is this?", max_new_tokens=2)
  assert len(answer.ids) == 2


def test_the_cache_is_huggingface_hubs_own_unless_named(cache, monkeypatch):
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
  assert from_hub(NAME).name == COMMIT
  assert regionjax.from_hub is from_hub


def test_offline_without_a_copy(tmp_path):
  assert constants.HF_HUB_OFFLINE  # tests/conftest.py sees to it
  told = refused(cache_dir=tmp_path)
  assert told.startswith(f"{NAME!r} cannot be downloaded: ")
  assert "(HF_HUB_OFFLINE is set)" in told and "no copy from before" in told and "HF_HOME" in told


def test_offline_with_a_copy_of_another_revision(cache):
  assert refused(revision="v2", cache_dir=cache).startswith(f"{NAME!r} at 'v2' cannot be")


@pytest.mark.parametrize("name", ["", "a/b/c", "someone/tiny release", "./out/release", "/tmp/r"])
def test_names_that_the_hub_cannot_have(name, tmp_path):
  told = refused(name, cache_dir=tmp_path)
  assert told.startswith(f"{name!r} is no name on the hub") and "'owner/name'" in told
  assert "goes to regionjax.load as it is" in told


# A hub on this machine.


class Hub(http.server.ThreadingHTTPServer):
  """Answers as the hub does: the files of one model, or an error to every question."""

  def __init__(self, error: tuple[int, str] | None = None):
    super().__init__(("127.0.0.1", 0), Answers)
    self.error, self.asked = error, []


class Answers(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    self.server.asked.append(self.path)
    if self.server.error is not None:
      status, code = self.server.error
      return self.answer(b'{"error": "no"}', status=status, headers={"X-Error-Code": code})
    path = self.path.split("?")[0]
    if path.startswith(f"/api/models/{NAME}/tree/"):
      entries = [
        {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": f"{i:040x}"}
        for i, p in enumerate([*sorted(SHIPPED.iterdir()), SHIPPED / "config.json"])
      ]
      entries[-1]["path"] = "pytorch_model.bin"  # which no release needs
      return self.answer(json.dumps(entries).encode())
    if path.startswith(f"/api/models/{NAME}"):
      return self.answer(json.dumps({"id": NAME, "sha": COMMIT, "siblings": []}).encode())
    prefix, _, name = path.rpartition("/")
    assert prefix == f"/{NAME}/resolve/{COMMIT}", path
    data = (SHIPPED / name).read_bytes()
    etag = f"{sorted(p.name for p in SHIPPED.iterdir()).index(name):040x}"
    return self.answer(data, headers={"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

  do_HEAD = do_GET

  def answer(self, data: bytes, *, status: int = 200, headers: dict | None = None):
    self.send_response(status)
    for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
      self.send_header(key, value)
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(data)

  def log_message(self, *_):
    pass


@pytest.fixture
def online(monkeypatch):
  """`with online(error) as hub`: huggingface_hub asks it, over a real connection."""

  @contextlib.contextmanager
  def serve(error=None):
    with Hub(error) as hub:
      thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
      thread.start()
      point_to(monkeypatch, hub.server_address[1])
      yield hub
      hub.shutdown()
      thread.join()

  yield serve
  huggingface_hub.close_session()


def point_to(monkeypatch, port: int) -> None:
  endpoint = f"http://127.0.0.1:{port}"
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
  monkeypatch.setattr(constants, "ENDPOINT", endpoint)
  monkeypatch.setattr(
    constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
  )
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  huggingface_hub.close_session()  # which would still be offline


def test_a_release_is_downloaded_once(online, tmp_path):
  with online() as hub:
    folder = from_hub(NAME, cache_dir=tmp_path)
    assert {p.name for p in folder.iterdir()} == {p.name for p in SHIPPED.iterdir()}
    for path in SHIPPED.iterdir():
      assert (folder / path.name).read_bytes() == path.read_bytes()
    assert not any("pytorch_model.bin" in path for path in hub.asked)
    first = sum("/resolve/" in path for path in hub.asked)
    assert from_hub(NAME, cache_dir=tmp_path) == folder
    assert sum("/resolve/" in path for path in hub.asked) == first > 0
  assert from_hub(NAME, cache_dir=tmp_path) == folder  # the hub is gone


@pytest.mark.parametrize(
  ("error", "options", "match"),
  [
    ((404, "RepoNotFound"), {}, "the hub has no public model 'someone/roi-tiny'"),
    ((401, ""), {}, r"the hub refuses 'someone/roi-tiny' \(Client error '401 .*`hf auth login`"),
    ((404, "RevisionNotFound"), {"revision": "v9"}, "has no revision 'v9' on the hub"),
    ((403, "GatedRepo"), {}, "is given to those who asked its owner: ask at http://127.0.0.1:"),
    ((500, ""), {}, r"the hub is out of reach \(HfHubHTTPError: Server error '500 .*no copy"),
  ],
)
def test_what_the_hub_refuses_is_said(online, tmp_path, error, options, match):
  with online(error), pytest.raises(HubError, match=match):
    from_hub(NAME, cache_dir=tmp_path, **options)


def test_a_hub_out_of_reach(monkeypatch, tmp_path, cache):
  with http.server.HTTPServer(("127.0.0.1", 0), Answers) as closed:
    port = closed.server_address[1]
  point_to(monkeypatch, port)  # where nobody listens any more
  told = refused(cache_dir=tmp_path / "empty")
  assert "out of reach (ConnectError: " in told and "no copy from before" in told
  assert from_hub(NAME, cache_dir=cache).name == COMMIT
  huggingface_hub.close_session()


def test_a_download_that_was_cut_off(online, monkeypatch, tmp_path):
  with online():
    folder = from_hub(NAME, cache_dir=tmp_path)
  (folder / "model.safetensors").unlink()
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  huggingface_hub.close_session()
  told = refused(cache_dir=tmp_path)
  assert told.startswith(f"{NAME!r} was downloaded in part only") and "HF_HUB_OFFLINE" in told


def test_a_cache_that_cannot_be_written(online, tmp_path):
  (tmp_path / "cache").write_text("a file")
  with online():
    told = refused(cache_dir=tmp_path / "cache")
  assert f"cannot be kept in {tmp_path / 'cache'} (" in told and "cache_dir" in told

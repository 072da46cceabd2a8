"""Releases from the Hugging Face hub."""

from __future__ import annotations

import os
import pathlib
import textwrap

from regionjax.weights.release import ReleaseError


class HubError(ReleaseError):
  """A release that the hub could not give; the message says what to do instead."""


def from_hub(
  repo_id: str, *, revision: str | None = None, cache_dir: str | os.PathLike | None = None
) -> pathlib.Path:
  """Downloads a release, once, and returns its folder, which `regionjax.load` opens.

  Args:
    repo_id: 'owner/name'.
    revision: branch, tag or commit; None is the main branch.
    cache_dir: where downloads are kept; None is huggingface_hub's own place (HF_HOME).

  Raises:
    HubError: the name is malformed, the hub doesn't have it or doesn't give it, it can't be reached
      and there is no copy from before, or the copy can't be written.
  """
  import huggingface_hub
  from huggingface_hub import constants, errors

  # What it raises where there is no connection: of whichever library it calls with.
  transport = getattr(errors, "HTTPError", OSError)
  try:
    folder = huggingface_hub.snapshot_download(
      repo_id, revision=revision, cache_dir=cache_dir, ignore_patterns=["*.bin", "*.msgpack"]
    )
  except (errors.HFValidationError, transport, OSError) as error:
    cache = cache_dir or constants.HF_HUB_CACHE
    raise HubError(_explain(error, repo_id, revision, cache=cache)) from None
  return pathlib.Path(folder)


def _explain(
  error: Exception, repo_id: str, revision: str | None, *, cache: str | os.PathLike
) -> str:
  """What went wrong, and what to do."""
  from huggingface_hub import constants, errors

  named = repr(repo_id) if revision is None else f"{repo_id!r} at {revision!r}"
  if isinstance(error, errors.HFValidationError):
    return (
      f"{repo_id!r} is no name on the hub, which are like 'owner/name' ({_short(error)}); a folder "
      "of this machine goes to regionjax.load as it is"
    )
  if isinstance(error, errors.GatedRepoError):
    return (
      f"{repo_id!r} is given to those who asked its owner: ask at {constants.ENDPOINT}/{repo_id}, "
      "then log in with `hf auth login`"
    )
  if isinstance(error, errors.RepositoryNotFoundError):
    return (
      f"the hub has no public model {repo_id!r}; check the name, and for a private one log in with "
      "`hf auth login`"
    )
  if isinstance(error, errors.RevisionNotFoundError):
    return (
      f"{repo_id!r} has no revision {revision!r} on the hub; give a branch, tag or commit that it "
      "has, or none for the main branch"
    )
  if isinstance(error, errors.HfHubHTTPError):
    return (
      f"the hub refuses {named} ({_short(error)}); if that is for want of a login, `hf auth login`"
    )
  if isinstance(error, getattr(errors, "IncompleteSnapshotError", ())):  # older ones lack it
    return (
      f"{named} was downloaded in part only, and the hub is out of reach for the rest "
      f"({_why(error)}); run it again with a connection"
    )
  if isinstance(error, OSError) and not isinstance(
    error, (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
  ):
    return (
      f"{named} cannot be kept in {cache} ({error}); make room there, or name another folder: "
      "cache_dir, or HF_HOME for all downloads"
    )
  return (
    f"{named} cannot be downloaded: the hub is out of reach ({_why(error)}) and there is no copy "
    "from before. Copy the release's folder to this machine and give its path, or set HF_HOME to "
    "a cache that has it"
  )


def _why(error: BaseException) -> str:
  """Why the hub is out of reach."""
  from huggingface_hub import constants

  cause = error.__cause__ or error
  offline = constants.HF_HUB_OFFLINE
  return "HF_HUB_OFFLINE is set" if offline else f"{type(cause).__name__}: {_short(cause)}"


def _short(error: BaseException) -> str:
  """The first line of a message."""
  lines = str(error).strip().splitlines()
  return textwrap.shorten(lines[0], 160, placeholder=" ...") if lines else type(error).__name__

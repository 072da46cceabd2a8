"""Releases from the Hugging Face hub."""

from __future__ import annotations

import os
import pathlib

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
    HubError: the name is malformed, the hub doesn't have it, or it can't be reached and there is no
      copy from before.
  """
  import huggingface_hub
  from huggingface_hub import errors

  try:
    folder = huggingface_hub.snapshot_download(
      repo_id, revision=revision, cache_dir=cache_dir, ignore_patterns=["*.bin", "*.msgpack"]
    )
  except errors.HFValidationError as error:
    raise HubError(
      f"{repo_id!r} is no name on the hub, which are like 'owner/name' ({error})"
    ) from None
  except errors.RepositoryNotFoundError:
    raise HubError(
      f"the hub has no public model {repo_id!r}; check the name, and for a private one log in with "
      "`hf auth login`"
    ) from None
  except errors.RevisionNotFoundError:
    raise HubError(f"{repo_id!r} has no revision {revision!r} on the hub") from None
  except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
    raise HubError(
      f"{repo_id!r} cannot be downloaded: the hub is out of reach ({_first_line(error)}) and there "
      "is no copy from before. Copy the release's folder to this machine and give its path, or set "
      "HF_HOME to a cache that has it"
    ) from None
  return pathlib.Path(folder)


def _first_line(error: BaseException) -> str:
  text = str(error).strip().splitlines()
  return text[0][:120] if text else type(error).__name__

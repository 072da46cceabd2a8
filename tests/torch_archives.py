"""Checkpoints as torch.save writes them, and ones made by hand."""

import zipfile

import torch


def save(path, obj, **options):
  torch.save(obj, path, **options)
  return path


def archive(path, data, members=(), *, compression=zipfile.ZIP_STORED, root="m"):
  """A checkpoint made by hand around a pickle."""
  with zipfile.ZipFile(path, "w", compression) as out:
    out.writestr(f"{root}/data.pkl", data)
    for name, content in members:
      out.writestr(f"{root}/{name}", content)
  return path


class Calls:
  """Pickled as a call of `function` with `args`."""

  def __init__(self, function, *args):
    self.call = (function, args)

  def __reduce__(self):
    return self.call

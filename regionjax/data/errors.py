"""What goes wrong with data, said to the person who gave it."""

from __future__ import annotations


class DataError(ValueError):
  """A data source, an annotation file or one of its records cannot be used.

  The message says what was given, what was expected and how to mend it.
  """

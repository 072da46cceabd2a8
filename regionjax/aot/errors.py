"""What can go wrong before there is a report."""


class AotError(ValueError):
  """A topology or a program that cannot be compiled here; the text says how to mend it."""

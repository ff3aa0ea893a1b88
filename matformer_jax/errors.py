"""The one exception for mistakes a user can fix."""


class UserError(ValueError):
  """A mistake in a config, a flag, a path or a corpus.

  The message names the offending value, where it came from and how to fix it.
  Command-line programs print it on one line and exit with code 1.
  """

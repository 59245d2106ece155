"""The one exception that callers' mistakes raise; the command line prints it as one line."""


class LgpError(Exception):
    """A mistake in parameters, data or environment.

    The message says what was given, what is valid and what to do, in one line.
    """

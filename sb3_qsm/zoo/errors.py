"""Errors that are the user's to mend."""


class UserError(Exception):
    """A mistake in what the user gave: printed as one line, without a traceback."""

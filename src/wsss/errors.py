"""The one exception for mistakes a user can mend."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input or the configuration.

    The message names the file or key, the value found and the remedy; commands print it
    without a traceback and end with exit code 2.
    """

"""Why the operator's tool stops, and its exit codes.

0  done, every check passed
1  Failed         a check failed, or the service is not well
2  (argparse)     the command line is wrong
3  TimedOut       it did not happen in time
4  Unreachable    the API server does not answer
5  Forbidden      the API server answers no
"""

from __future__ import annotations


class ToolError(Exception):
    """Root; the message is the whole story, `code` the exit code."""

    code = 1


class Failed(ToolError):
    """The service or a check is not as it should be."""


class TimedOut(ToolError):
    """It did not happen in time."""

    code = 3


class Unreachable(ToolError):
    """No answer from the API server, or from a pod through it, after several tries."""

    code = 4


class Forbidden(ToolError):
    """The API server knows us and says no."""

    code = 5


class NotFound(ToolError):
    """No such object."""


class Conflict(ToolError):
    """The object is no longer the one that was looked at."""


class Blocked(ToolError):
    """A disruption budget forbids it now."""

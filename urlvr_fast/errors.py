"""The base of errors that are addressed to a user: the command line prints their message and no traceback."""

from __future__ import annotations


class ExplainedError(Exception):
    """Its message says what went wrong and what to do. `exit_status` is 2 for a request that cannot be met, 1 for one that failed."""

    exit_status = 1


class LogError(ExplainedError, RuntimeError):
    """The log cannot be kept as asked. The message says what to do."""

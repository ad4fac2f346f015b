"""Errors that the person at the command line can do something about."""

from __future__ import annotations


class UsageError(Exception):
    """A wrong option or a missing package; its message is one paragraph that says what is allowed and what to do."""


def missing(what: str, package: str, command: str) -> UsageError:
    """The error for ``what`` not working because ``package`` is not installed, which ``command`` would change."""
    return UsageError(f"{what} needs the package {package}, which is not installed: {command}")

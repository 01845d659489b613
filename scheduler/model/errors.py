"""What the user is told in one line: errors with their exit codes."""

from __future__ import annotations


class HeadroomError(Exception):
    """Base of every error the user is meant to read: what was wrong, the value seen, what to do."""

    exit_code = 2


class UsageError(HeadroomError):
    """A wrong argument, configuration or input file (exit code 2)."""


class NothingFits(HeadroomError):
    """No trial of any study fits any worker (exit code 3)."""

    exit_code = 3

"""The trial's own pipes, kept out of reach of a user's function.

Covers the descriptors of the protocol, which are moved where no function closes or writes to them by accident, and
whether one still is what it was. What is said through them is `training.protocol`.
"""

from __future__ import annotations

import fcntl
import os
import resource
import select
import sys

HIGH_DESCRIPTOR = 1000  # above what a library that "closes everything" usually closes, below the usual limit of 1024


def private_stdin() -> int:
    """Return the protocol's own descriptor; an `input()` of the user's finds an empty stdin instead of our commands."""
    private = _private(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return private


def private_stdout() -> int:
    """Return the protocol's own descriptor; from here on `print` goes where stderr goes. Not inherited by children."""
    private = _private(1)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # or a crash loses the last prints
    return private


def _private(descriptor: int) -> int:
    """Return a copy of it under a high number, out of the way of what a user's function closes; not inherited by
    children."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, max(3, min(HIGH_DESCRIPTOR, limit - 20)))


def same_file(descriptor: int) -> tuple[int, int] | None:
    """Which file the number stands for now; None for none."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def reader_gone(descriptor: int) -> bool:
    """Whether this is the writing end of a pipe that nobody can read any more."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))

"""The pipe that a trial process, and whatever it starts, writes its output to: read by the agent into a bounded log.

Covers how much is read when, so that a trial that floods waits for its reader, and not the reader's other work for it;
and what is still in the pipe when the process is dead. Which log, and when to look, is `trial_process`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from typing import IO

from scheduler.files.bounded_log import BoundedLog

# Fifty looks a second, however many lines come: a trial that prints costs the agent next to nothing. A look takes what
# the pipe holds (50 MiB/s); once the log is full, it is a flood, and has half of that.
LOOK_EVERY_S = 0.02
PIPE_BYTES = 2**20  # the most that Linux gives without asking root
_FLOOD_BYTES = PIPE_BYTES // 2
_READ_BYTES = 1 << 16


class LogPipe:
    """The reading end. Used by one thread at a time."""

    def __init__(self, pipe: IO[bytes], log: BoundedLog) -> None:
        """Take over both."""
        self.log, self._pipe = log, pipe
        self._next_look = 0.0
        descriptor = pipe.fileno()
        os.set_blocking(descriptor, False)
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # a user's pipes together may take 64 MiB: then it stays at 64 KiB
                fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    @property
    def ended(self) -> bool:
        """Nobody can write any more, or nobody reads."""
        return self._pipe.closed

    def due(self) -> int | None:
        """Return the descriptor to wait for; None while it is too early, and at the end."""
        return None if self.ended or time.monotonic() < self._next_look else self._pipe.fileno()

    def look(self) -> None:
        """Move into the log what is there, up to what one look takes."""
        self._move(_FLOOD_BYTES if self.log.flooded else PIPE_BYTES)
        self._next_look = time.monotonic() + LOOK_EVERY_S

    def drain(self) -> None:
        """Move into the log what a dead process has left: no more than the pipe held then. A grandchild may write on
        for ever."""
        self._move(PIPE_BYTES)

    def log_to(self, log: BoundedLog) -> None:
        """Write all that follows to this log; what was written until now still goes to the one so far."""
        self.drain()
        self.log.close()
        self.log = log

    def close(self) -> None:
        """Stop reading: whoever still writes gets EPIPE. Again: nothing happens."""
        self._pipe.close()
        self.log.close()

    def _move(self, most_bytes: int) -> None:
        while most_bytes > 0 and not self.ended:
            try:
                data = os.read(self._pipe.fileno(), min(_READ_BYTES, most_bytes))
            except BlockingIOError:
                return
            if not data:
                self._pipe.close()
            self.log.write(data)
            most_bytes -= len(data)

"""One driver per run folder: a lock the kernel frees when its holder dies.

Standard library only. Two machines that share a run folder over NFS are told apart by the study's leases, not here.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from scheduler.model import UsageError


class DriverLock:
    """Held from construction to `release` or the process's end. Raises UsageError naming the pid that has it."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise UsageError(
                f"run {path.parent.name!r} is already being run by the driver with pid {holder}; "
                f"wait for it, stop it (touch {path.parent / 'STOP'}), or give this one another --name"
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        os.close(self._fd)

"""What makes a process the watchdog of its host, and keeps it able to act: election, lifeline, self-protection.

Covers the lock that names the one who acts, the pipe by which it learns that its agent is gone, and its priority and
memory. What the watchdog does is `scheduler.watchdog`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import stat
import time

from scheduler.files.private import FLAGS
from scheduler.host.registry import HostRegistry


class Lifeline:
    """The pipe to the agent that started us: at its end we leave, once no trial needs watching."""

    def __init__(self, fd: int = 0) -> None:
        self._fd: int | None = fd
        self.cut = False
        try:
            mode = os.fstat(fd).st_mode
        except OSError:
            mode = 0
        if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
            self._fd = None  # started by hand: runs until it is told to stop

    def wait(self, seconds: float) -> None:
        """Sleep for so long, less when the pipe ends."""
        if self._fd is None or self.cut:
            time.sleep(seconds)
            return
        ready, _, _ = select.select([self._fd], [], [], seconds)
        if ready and not os.read(self._fd, 4096):
            self.cut = True


class Election:
    """flock on a file of the registry: the kernel frees it when its holder dies, however it dies."""

    def __init__(self, registry: HostRegistry) -> None:
        self._registry = registry
        self._fd = -1

    @property
    def _path(self) -> str:
        return os.path.join(self._registry.root, "watchdog.lock")

    def won(self) -> bool:
        """Try to become the watchdog; True as long as we are."""
        if self._fd >= 0:
            if self._same_file():
                return True
            os.close(self._fd)  # somebody removed the lock (a cleaner of /tmp): another may hold a new one
            self._fd = -1
        try:
            self._registry.ensure()  # or the whole folder
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | FLAGS, 0o600)
        except OSError:  # nobody can be elected: the reading goes stale, which closes admission
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            return False
        self._fd = fd
        if not self._same_file():
            os.close(fd)
            self._fd = -1
            return False
        return True

    def _same_file(self) -> bool:
        try:
            here, there = os.fstat(self._fd), os.stat(self._path)
        except OSError:
            return False
        return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def protect_self() -> None:
    """Stay able to act while the host swaps: before the others in the queue, last for the kernel's own killer."""
    with contextlib.suppress(OSError):
        os.nice(-10)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("-900")
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        # MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT: what was touched stays, untouched library pages do not come in
        ctypes.CDLL(None, use_errno=True).mlockall(1 | 2 | 4)

"""Sending signals to processes that are certainly the ones meant.

Covers identity (pid and start time, held by a pidfd on Linux), whole trees, and what can be learned of a process before
it is killed (Python stacks, kernel wait channel). Decides nothing. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

Identity = tuple[int, float]  # pid, start time

_STACK_BYTES = 16384
_MRELEASE = 448  # process_mrelease(pidfd, flags), Linux 5.15: frees a dying process's memory before it gets to run


def never() -> set[int]:
    """Pids that are no trial's, whatever a registration says: init, this process, its parent, its group's leader."""
    return {0, 1, os.getpid(), os.getppid(), os.getpgrp()}


def send(identity: Identity, number: int, start_time: Callable[[int], float | None]) -> bool:
    """Signal this very process; False when it is gone, was replaced by another, or may not be signalled.

    The pidfd is opened first and the start time read after it: from then on the descriptor means that process, even if
    its number is used again between the check and the signal.
    """
    pid, start = identity
    if pid in never():
        return False
    fd = -1
    try:
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # an old kernel, or a container that forbids it
                fd = os.pidfd_open(pid)
        if start_time(pid) != start:
            return False
        if fd >= 0:
            signal.pidfd_send_signal(fd, number)
        else:  # check and signal are two steps, microseconds apart
            os.kill(pid, number)
        return True
    except OSError:
        return False
    finally:
        if fd >= 0:
            os.close(fd)


def send_all(identities: Iterable[Identity], number: int, start_time: Callable[[int], float | None]) -> int:
    """How many of these were signalled."""
    return sum(send(identity, number, start_time) for identity in identities)


def release_memory(identity: Identity, start_time: Callable[[int], float | None]) -> bool:
    """Free the memory of a process that has SIGKILL pending but does not get to run (Linux 5.15; else False)."""
    if sys.platform != "linux" or start_time(identity[0]) != identity[1]:
        return False
    import ctypes  # not at start: it would cost the idle watchdog memory

    try:
        fd = os.pidfd_open(identity[0])
    except OSError:
        return False
    try:
        return bool(ctypes.CDLL(None, use_errno=True).syscall(_MRELEASE, fd, 0) == 0)
    finally:
        os.close(fd)


def catches(pid: int, number: int) -> bool:
    """Has the process a handler for this signal? Without one, SIGUSR1 would kill it instead of showing its stack."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            for line in file:
                if line.startswith(b"SigCgt:"):
                    return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    except (OSError, ValueError, IndexError):
        return False
    return False


class StackRequest:
    """Asks a trial for its Python stacks (faulthandler on SIGUSR1 writes to its log) and reads the answer later."""

    def __init__(self, identity: Identity, log: Path, start_time: Callable[[int], float | None]) -> None:
        self.identity = identity
        self._log = log
        self._offset = self._size()
        self.asked = catches(identity[0], signal.SIGUSR1) and send(identity, signal.SIGUSR1, start_time)
        self.kernel = kernel_view(identity[0])

    def _size(self) -> int:
        try:
            return os.stat(self._log).st_size
        except OSError:
            return 0

    def answer(self) -> str | None:
        """Read what the trial wrote since it was asked (at most 16 KiB), None when it wrote nothing."""
        if not self.asked:
            return None
        with contextlib.suppress(OSError), open(self._log, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            # A log that is full is cut and shorter than it was: its end is what was written last.
            file.seek(self._offset if self._offset <= end else max(0, end - _STACK_BYTES))
            text = file.read(_STACK_BYTES).decode(errors="replace").strip()
            return text or None
        return None


def kernel_view(pid: int) -> dict[str, str]:
    """Where the process stands in the kernel: wait channel, kernel stack (root only), status. Empty on macOS."""
    found = {}
    for name in ("wchan", "stack", "syscall", "status"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/{name}", errors="replace") as file:
            found[name] = file.read(4096)
    return found


def failpoint(name: str) -> None:
    """For the fault tests: die or wait at a named step of a kill. Does nothing unless HEADROOM_FAILPOINT names it.

    `HEADROOM_FAILPOINT=term` kills this process there with SIGKILL; `recheck@/path` waits there until /path exists
    (and writes /path.reached), at most 30 s.
    """
    wanted = os.environ.get("HEADROOM_FAILPOINT")
    if not wanted:
        return
    step, _, path = wanted.partition("@")
    if step != name:
        return
    if not path:
        os.kill(os.getpid(), signal.SIGKILL)
    with open(path + ".reached", "w") as file:
        file.write(name)
    deadline = time.monotonic() + 30.0
    while not os.path.exists(path) and time.monotonic() < deadline:
        time.sleep(0.01)

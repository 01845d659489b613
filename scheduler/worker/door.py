"""Whether a worker can start trials at all: closed with a reason when one could not be started, open again when a probe
says so.

Covers the reason in words (`words`), what is tried (folders, a process, the import of the objective), and when. What a
closed worker means for admission is the brain's; that a trial pays nothing for it is `core.fault`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from scheduler.files.durable import write
from scheduler.model import HeadroomError

FIRST_LOOK_S = 1.0
LONGEST_WAIT_S = 15.0
LARGEST_SHARE = 0.1
PROBE_BYTES = 64 * 1024
Probe = Callable[[], None]

_WORDS = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk quota reached",
    errno.EROFS: "file system is read-only",
    errno.EACCES: "folder not writable",
    errno.EPERM: "folder not writable",
    errno.ENOENT: "folder gone",
    errno.ENOTDIR: "no folder",
    errno.EMFILE: "too many open files",
    errno.ENFILE: "too many open files on this host",
}
_NO_PROCESS = (errno.EAGAIN, errno.ENOMEM)


class Door:
    """One worker's. `close` may be called from any thread, `look` from one; a probe runs in a thread of its own.

    probes: called in order; each raises OSError, RuntimeError (no thread to be had) or HeadroomError while it cannot.
    """

    def __init__(self, *probes: Probe) -> None:
        self.reason: str | None = None
        self._probes = probes
        self._more: tuple[Probe, ...] = ()
        self._lock = threading.Lock()
        self._looking = False
        self._failures = 0
        self._look_at = self._wait_s = 0.0

    def close(self, reason: str, *more: Probe) -> None:
        """Nothing starts until all probes, and these besides, have succeeded."""
        with self._lock:
            if self.reason is None:
                self._wait_s = FIRST_LOOK_S
                self._look_at = time.monotonic() + self._wait_s
            self.reason, self._more = reason, more or self._more
            self._failures += 1

    def look(self) -> None:
        """Probe, if it is closed and time to; returns at once."""
        with self._lock:
            if self.reason is None or self._looking or time.monotonic() < self._look_at:
                return
            self._looking = True
            failures, probes = self._failures, (*self._probes, *self._more)
        try:
            threading.Thread(target=self._look, args=(failures, probes), name="headroom-probe", daemon=True).start()
        except RuntimeError as error:
            self._found(words(error), failures, 0.0)

    def _look(self, failures: int, probes: Sequence[Probe]) -> None:
        began = time.monotonic()
        reason = None
        try:
            for probe in probes:
                probe()
        except (OSError, RuntimeError, HeadroomError) as error:
            reason = words(error)
        self._found(reason, failures, time.monotonic() - began)

    def _found(self, reason: str | None, failures: int, took_s: float) -> None:
        with self._lock:
            self._looking = False
            if failures == self._failures:
                self.reason, self._more = reason, self._more if reason else ()
            elif reason is not None:  # else something failed while it looked: that has not been seen to work
                self.reason = reason
            # Importing torch takes seconds of a core: at most a tenth of the time goes into looking.
            self._wait_s = max(min(LONGEST_WAIT_S, self._wait_s * 1.5), took_s / LARGEST_SHARE)
            self._look_at = time.monotonic() + self._wait_s


def folders(paths: Sequence[Path]) -> Probe:
    """Return a probe that makes a folder and a file of 64 KiB in each of these, and takes them away again."""

    def probe() -> None:
        for path in paths:
            with naming(path):
                path.mkdir(parents=True, exist_ok=True)
                made = tempfile.mkdtemp(prefix=".probe-", dir=path)
                try:
                    write(os.path.join(made, "file"), "\0" * PROBE_BYTES, durable=True)
                finally:
                    shutil.rmtree(made, ignore_errors=True)

    return probe


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an OSError of the block name this folder, which is what a person can do something about."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def words(error: BaseException) -> str:
    """Why nothing can be started, for a person: what is short, and where."""
    if isinstance(error, RuntimeError):  # what `Thread.start` raises; the kernel's limit is the same one
        return f"no process to be had ({error})"
    if not isinstance(error, OSError) or error.errno is None:
        return " ".join(str(error).split()) or type(error).__name__
    if error.errno in _NO_PROCESS and error.filename is None:
        return f"no process to be had ({os.strerror(error.errno)})"
    where = f": {error.filename}" if error.filename else ""
    if error.errno == errno.ENOSPC and error.filename and _without_inodes(error.filename):
        return f"no inodes left{where}"
    return f"{_WORDS.get(error.errno) or error.strerror or os.strerror(error.errno)}{where}"


def _without_inodes(path: str) -> bool:
    """Whether the file system of the path, or of the nearest folder above it, has no inode left."""
    for folder in (Path(path), *Path(path).parents):
        try:
            found = os.statvfs(folder)
        except FileNotFoundError:
            continue
        except OSError:
            return False
        return found.f_files > 0 and found.f_favail == 0
    return False

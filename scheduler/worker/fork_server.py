"""The fork server as the agent sees it: a process that has imported what trials need and forks one in milliseconds.

Covers starting it, asking it for a process, what that is to whoever asked, and replacing it when it dies. Its own side,
and why it refuses where it does, is `training.fork_server`. Linux only; what is done where none can be is the agent's.

A forked process is this process's own child: the server lets go of it while this process adopts orphans, so that its
end is heard from the kernel as that of any child is, whether the server lives or not. Orphans are adopted for those
milliseconds only: else whatever a trial leaves behind would come here, and stay as a zombie that nobody waits for.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from scheduler.model import HeadroomError

READY_TIMEOUT_S = 120.0  # importing torch took 25 s on a cold, busy disk
ANSWER_TIMEOUT_S = 60.0  # a fork takes milliseconds; this is for a host that swaps
TRIES = 3
STEADY_S = 10.0  # one that dies sooner is replaced when it is asked again, not before: something here kills servers
ANSWER_BYTES = 4096
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
_adopting = threading.Lock()


class NoForkServer(HeadroomError):
    """No process can be forked here; the message says why. They are started one by one then."""


class ForkedProcess:
    """A child of this process that it did not start itself: what `subprocess.Popen` is of one that it did.

    shared_bytes: what it began with, as the server holds it too. Each page becomes its own when it is written to.
    """

    def __init__(self, pid: int, *, stdin: int, stdout: int, stderr: int, shared_bytes: int = 0) -> None:
        self.pid, self.shared_bytes = pid, shared_bytes
        self.returncode: int | None = None
        self.stdin: IO[bytes] | None = os.fdopen(stdin, "wb")
        self.stdout: IO[bytes] | None = os.fdopen(stdout, "rb")
        self.stderr: IO[bytes] | None = os.fdopen(stderr, "rb")
        self._waiting = threading.Lock()

    def poll(self) -> int | None:
        """Exit code, minus the signal's number, or None while it lives."""
        with self._waiting:  # its number is somebody else's as soon as one thread has heard of its end
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid == self.pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        delay = 0.0005
        while (status := self.poll()) is None:
            if timeout is not None and deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired("a forked trial process", timeout)
            time.sleep(delay)
            delay = min(2 * delay, 0.05)
        return status


class ForkServer:
    """Keeps at most one server, from the first process that is asked for. `start` starts one whose stdin is the given
    socket. `fork` is called by one thread at a time, the rest from any."""

    def __init__(self, start: Callable[[socket.socket], subprocess.Popen[bytes]]) -> None:
        self._start = start
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._closed = False
        self.refusal: str | None = None  # why nothing is forked here, for good

    @property
    def pid(self) -> int | None:
        """Of the server that is there, None without one."""
        server = self._server
        return None if server is None or server.process is None or server.is_over else server.process.pid

    def fork(self) -> ForkedProcess:
        """Return a new process that waits for its task. A server that has died is replaced.

        Raises NoForkServer; OSError: no process is to be had.
        """
        for _ in range(TRIES):
            server = self._current()
            why = server.wait_ready(READY_TIMEOUT_S)
            if server.unfit is not None:
                self.refusal = server.unfit
                self.drop()
            if self.refusal is not None or self._closed:
                raise NoForkServer(self.refusal or "it is closed")
            if why is None and (process := server.fork()) is not None:
                return process
            if server.unfit is None:
                server.end()
                if why is not None and not server.was_killed:
                    raise NoForkServer(why)  # another one would do the same
        raise NoForkServer(self.refusal or f"{TRIES} servers were killed")

    def drop(self) -> None:
        """End the server to free its memory; `fork` starts another one. What it has forked goes on."""
        with self._lock:
            server, self._server = self._server, None
        if server is not None:
            server.kill()

    def close(self) -> None:
        """End it for good, and wait until it is gone."""
        self._closed = True
        server = self._server
        self.drop()
        if server is not None:
            server.end()

    def _current(self) -> _Server:
        with self._lock:
            if self._closed or self.refusal is not None:
                raise NoForkServer(self.refusal or "it is closed")
            if self._server is None or self._server.is_over:
                self._server = _Server(self._start, on_end=self._ended)
            return self._server

    def _ended(self, server: _Server) -> None:
        """Replace one that had been of use for a while."""
        if server.served_s >= STEADY_S:
            with self._lock:
                if self._server is server and not self._closed:
                    with contextlib.suppress(OSError):  # no process to be had: with the next that is asked for
                        self._server = _Server(self._start, on_end=self._ended)


class _Server:
    """One server process.

    It is started and waited for by a thread of its own: the signal that ends it with us comes already when the thread
    that started it ends.
    """

    def __init__(
        self, start: Callable[[socket.socket], subprocess.Popen[bytes]], on_end: Callable[[_Server], None]
    ) -> None:
        """Begin to start one. Raises OSError: no thread or socket is to be had."""
        self._start, self._on_end = start, on_end
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process: subprocess.Popen[bytes] | None = None
        self.unfit: str | None = None  # why it will not fork, as it says
        self.error: OSError | None = None  # why it could not be started
        self.is_over = self._to_be_killed = False
        self.was_killed = False  # by somebody else's signal, before it was ready
        self._ready_at: float | None = None
        self._shared_bytes = 0
        self._known = threading.Event()  # that it is ready, or will never be
        self.served_s = 0.0
        self.keeper = threading.Thread(target=self._keep, name="headroom-fork-server", daemon=True)
        try:
            self.keeper.start()
        except RuntimeError as error:
            self._ours.close()
            self._theirs.close()
            raise OSError(errno.EAGAIN, str(error)) from error

    def _keep(self) -> None:
        try:
            try:
                with adopting_orphans():  # what it starts will then ask, on any kernel, whether somebody adopts it
                    self.process = self._start(self._theirs)
            finally:
                self._theirs.close()
            if self._to_be_killed:
                self.process.kill()
            self._hear_first()
            if self._ready_at is not None:
                self._known.set()
            self.was_killed = self.process.wait() < 0 and not self._to_be_killed
        except OSError as error:
            self.error = error
        self.is_over = True
        self._ours.close()
        self._known.set()
        if self._ready_at is not None:
            self.served_s = time.monotonic() - self._ready_at
        self._on_end(self)

    def _hear_first(self) -> None:
        """Wait for its word that it has imported everything; nothing when it ends without."""
        try:
            said = json.loads(self._ours.recv(ANSWER_BYTES))
        except (OSError, ValueError):
            return
        self.unfit, self._shared_bytes = said["unfit"], said["shared_bytes"]
        self._ready_at = time.monotonic()

    def wait_ready(self, timeout_s: float) -> str | None:
        """Return None once it is ready; else why it is not. Raises OSError: it could not be started."""
        in_time = self._known.wait(timeout_s)
        if self.error is not None:
            raise self.error
        if self._ready_at is not None:
            return None
        status = None if self.process is None else self.process.poll()
        return f"it ended with status {status}" if in_time else f"it did not get ready within {timeout_s:.0f} s"

    def kill(self) -> None:
        """SIGKILL; its keeper waits for it."""
        self._to_be_killed = True
        if self.process is not None:
            self.process.kill()

    def end(self) -> None:
        """End it and wait until it is gone."""
        self.kill()
        self.keeper.join()

    def fork(self) -> ForkedProcess | None:
        """Have it fork; None when it cannot (`unfit`), or does not answer. Raises OSError: no process is to be had."""
        with contextlib.ExitStack() as passed:
            ours, theirs = [], []
            for mine in (1, 0, 0):  # we write its stdin
                ends = os.pipe()
                theirs.append(ends[1 - mine])
                ours.append(ends[mine])
                passed.callback(os.close, ends[1 - mine])
            answer = self._ask(theirs)
            if answer is not None and (pid := answer.get("pid")) is not None and self._is_ours(pid):
                stdin, stdout, stderr = ours
                return ForkedProcess(pid, stdin=stdin, stdout=stdout, stderr=stderr, shared_bytes=self._shared_bytes)
            for each in ours:
                os.close(each)
        if answer is not None and (number := answer.get("errno")) is not None:
            raise OSError(number, os.strerror(number))
        if answer is not None and answer.get("unfit") is not None:
            self.unfit = answer["unfit"]
        return None

    def _is_ours(self, pid: int) -> bool:
        """Whether we were given what was forked; where we were not, it leaves by itself at the end of its stdin."""
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            self.unfit = "the kernel does not give this process its orphans"
            return False
        return True

    def _ask(self, descriptors: list[int]) -> dict[str, Any] | None:
        self._ours.settimeout(ANSWER_TIMEOUT_S)
        try:
            with adopting_orphans():
                socket.send_fds(self._ours, [b"fork"], descriptors)
                answer: dict[str, Any] = json.loads(self._ours.recv(ANSWER_BYTES))
        except (OSError, ValueError):  # it died, or says nothing
            return None
        return answer


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """Have the kernel give us the orphans among our descendants meanwhile."""
    prctl = ctypes.CDLL(None).prctl
    with _adopting:  # one server starts while another one forks: neither may end it for the other
        prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            yield
        finally:
            prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

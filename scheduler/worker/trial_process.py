"""A trial process as the agent sees it: `python -m training.trial` and its pipes.

Covers starting one, the lines both ways, where its output goes, and ending its whole tree. Does not decide when to
start or end one; what its end means is `witness`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scheduler.files.bounded_log import BoundedLog
from scheduler.files.durable import tail
from scheduler.model import HeadroomError, Json
from scheduler.model.fields import BadMessage
from scheduler.model.messages import Ready, Task, ToTrial, ready
from scheduler.model.plain import plain
from scheduler.worker import launch
from scheduler.worker.fork_server import ForkedProcess
from scheduler.worker.log_pipe import LOOK_EVERY_S, LogPipe

MAX_LINE_BYTES = 4 * 2**20  # a result at its bounds (`training.plain`) is shorter, all of it escaped
_POLL_S = 0.25  # how soon a death is noticed whose pipe a grandchild keeps open


class TrialStartError(HeadroomError):
    """A trial process did not come up; the message ends with the last line it wrote.

    exit_status: of a process that died by itself (minus the signal's number), None of one that took too long.
    """

    def __init__(self, message: str, exit_status: int | None = None) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class TrialProcess:
    """One process, warm or at work. Its reader is one thread; `send` and `kill` may be called from any."""

    def __init__(self, child: subprocess.Popen[bytes] | ForkedProcess, *, log: Path) -> None:
        """Take charge of it. log: where its output goes until `log_to`."""
        self.log = log
        self._popen = child
        assert self._popen.stderr is not None
        self._output = LogPipe(self._popen.stderr, BoundedLog(log))
        self.ready = Ready()  # its message of that name
        self._write = threading.Lock()
        self._closed = False
        self._buffer, self._too_long = b"", False

    @classmethod
    def start(
        cls,
        *,
        environment: Mapping[str, str | None],
        log: Path,
        module: str = "training.trial",
        preload: Sequence[str] | None = None,
    ) -> TrialProcess:
        """Start one. environment: variables over our own; None takes one away. preload: modules it imports before its
        task is known; None: what the built-in training needs."""
        pipe = subprocess.PIPE
        return cls(launch.start(module, preload, environment, stdin=pipe, stdout=pipe, stderr=pipe), log=log)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def shared_bytes(self) -> int:
        """What it began with of memory that a fork server holds too, 0 without one."""
        return self._popen.shared_bytes if isinstance(self._popen, ForkedProcess) else 0

    @property
    def exit_status(self) -> int | None:
        """Exit code, minus the signal's number, or None while it lives."""
        return self._popen.poll()

    def log_to(self, log: Path) -> None:
        """Its output from here on goes to this file (`files.bounded_log`). For the thread that reads its messages."""
        self.log = log
        self._output.log_to(BoundedLog(log))

    def wait_ready(self, timeout_s: float) -> Ready:
        """Its word that it is ready. Raises TrialStartError: it does not come in time, the process dies first, or it is
        of another version."""
        deadline = time.monotonic() + timeout_s
        for message in self.messages(deadline):
            try:
                found = ready(message)
            except BadMessage as error:
                self.kill()
                raise TrialStartError(f"the trial process cannot be used: {error}") from None
            if found is not None:
                self.ready = found
                return found
        status = self.exit_status
        self.kill()
        self._output.drain()
        why = f"did not get ready within {timeout_s:.0f} s" if status is None else f"ended with status {status}"
        raise TrialStartError(
            f"the trial process {why}; its log {self.log} ends: {tail(self.log, 300).strip()!r}", status
        )

    def begin(self, task: Task) -> bool:
        """Hand over its task; False when nobody reads it any more."""
        return self.send(task.for_trial())

    def tell(self, message: ToTrial) -> bool:
        """Say something to it while it runs; False when nobody reads it any more."""
        return self.send(message.to_json())

    def send(self, message: Mapping[str, Any]) -> bool:
        """Write one line to its stdin; False when nobody reads it any more."""
        line = (json.dumps(message) + "\n").encode()
        try:
            with self._write:
                assert self._popen.stdin is not None
                self._popen.stdin.write(line)
                self._popen.stdin.flush()
        except (OSError, ValueError):
            return False
        return True

    def messages(self, deadline: float | None = None) -> Iterator[Json]:
        """Its messages until the process is dead (not until EOF: a forked grandchild may keep the pipe open).

        Bounded JSON objects (`model.plain`); what is none is dropped. Nothing here is believed: a user's code can write
        to the pipe too. Its output is moved to its log meanwhile, and only then.
        """
        assert self._popen.stdout is not None
        protocol: int | None = self._popen.stdout.fileno()
        while deadline is None or time.monotonic() < deadline:
            dead = self._popen.poll() is not None
            chunk = self._read(protocol, 0 if dead else _POLL_S)
            for written in self._lines(chunk or b""):
                with contextlib.suppress(ValueError, RecursionError):
                    if isinstance(message := json.loads(written), dict):
                        yield plain(message)
            if not chunk and dead:
                self._output.drain()
                return
            if chunk is None and protocol is not None:  # its death, which shows in a moment, or a function closed it
                protocol = None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._popen.wait(LOOK_EVERY_S)

    def _read(self, protocol: int | None, timeout_s: float) -> bytes | None:
        """Wait for either pipe, look after its output, and return what the protocol's holds; None at its end."""
        output = self._output.due()
        wanted = [descriptor for descriptor in (protocol, output) if descriptor is not None]
        if output is None and not self._output.ended:
            timeout_s = min(timeout_s, LOOK_EVERY_S)
        readable, _, _ = select.select(wanted, [], [], timeout_s)
        if output in readable:
            self._output.look()
        if protocol in readable:
            return os.read(protocol, 1 << 16) or None
        return None if protocol is None else b""

    def _lines(self, chunk: bytes) -> list[bytes]:
        """Return the whole lines so far. One that is longer than any message is left out, not kept until it ends."""
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        if lines and self._too_long:
            self._too_long, lines = False, lines[1:]
        if len(self._buffer) > MAX_LINE_BYTES:
            self._too_long, self._buffer = True, b""
        return [line for line in lines if len(line) <= MAX_LINE_BYTES]

    def kill(self) -> None:
        """SIGKILL to it and to all of its session; what left the session is the registry's and the watchdog's.

        Nothing once its death is known: its number may be somebody else's by then. `close` sees to the session.
        """
        if self._popen.returncode is None:
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(OSError):
                    kill(self.pid, signal.SIGKILL)

    def close(self, timeout_s: float = 10.0) -> int | None:
        """Reap it, end what is left of its session, free the pipes. Returns the exit status, None if it lives on.

        Again: nothing happens.
        """
        if self._closed:
            return self._popen.returncode
        with contextlib.suppress(OSError, ValueError):
            if self._popen.stdin is not None:
                self._popen.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout_s)
        self._closed = self._popen.returncode is not None
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        self._output.drain()
        self._output.close()
        with contextlib.suppress(OSError):
            if self._popen.stdout is not None:
                self._popen.stdout.close()
        return self._popen.returncode

"""A trial process as the agent sees it: `python -m training.trial`, its pipes, and what its end means.

Covers starting one, the line protocol (DESIGN section 9), ending its whole tree, and `conclude`, the pure rule that
turns what was seen into an Outcome. Does not decide when to start or end one.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scheduler.model import MEMORY_REASONS, ExitReason, HeadroomError, Json, Outcome

LOG_TAIL_BYTES = 4096
_POLL_S = 0.25  # how soon a death is noticed whose pipe a grandchild keeps open
_PROJECT = Path(__file__).resolve().parent.parent


class TrialStartError(HeadroomError):
    """A trial process did not come up; the message ends with the last line it wrote.

    exit_status: of a process that died by itself (minus the signal's number), None of one that took too long.
    """

    def __init__(self, message: str, exit_status: int | None = None) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class TrialProcess:
    """One process, warm or at work. Its reader is one thread; `send` and `kill` may be called from any."""

    def __init__(
        self,
        *,
        environment: Mapping[str, str | None],
        log: Path,
        module: str = "training.trial",
        preload: Sequence[str] | None = None,
    ) -> None:
        """Start it. environment: variables over our own; None takes one away. log: where its stderr goes until a task
        names a folder. preload: modules it imports before its task is known; None: what the built-in training needs."""
        path = os.pathsep.join(filter(None, [str(_PROJECT), os.environ.get("PYTHONPATH", "")]))
        variables = {**os.environ, "PYTHONPATH": path, **environment}
        self.log = log
        with open(log, "ab") as stderr:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", module, *([] if preload is None else [f"--preload={','.join(preload)}"])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={name: value for name, value in variables.items() if value is not None},
                start_new_session=True,  # the terminal's Ctrl-C is the driver's; and its own session is its own tree
            )
        self.ready: Json = {}  # its message of that name
        self._write = threading.Lock()
        self._closed = False
        self._buffer = b""
        # The kernel, when it must kill for memory, should take a trial before the driver or the watchdog.
        with contextlib.suppress(OSError):
            Path(f"/proc/{self.pid}/oom_score_adj").write_text("500")

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def exit_status(self) -> int | None:
        """Exit code, minus the signal's number, or None while it lives."""
        return self._popen.poll()

    def wait_ready(self, timeout_s: float) -> Json:
        """The `ready` message. Raises TrialStartError when it does not come in time or the process dies first."""
        deadline = time.monotonic() + timeout_s
        for message in self.messages(deadline):
            if message.get("type") == "ready":
                self.ready = message
                return message
        status = self.exit_status
        self.kill()
        why = f"did not get ready within {timeout_s:.0f} s" if status is None else f"ended with status {status}"
        raise TrialStartError(
            f"the trial process {why}; its log {self.log} ends: {tail(self.log, 300).strip()!r}", status
        )

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

        Lines that are no JSON object are dropped: only the process's own code writes here.
        """
        assert self._popen.stdout is not None
        fd = self._popen.stdout.fileno()
        while deadline is None or time.monotonic() < deadline:
            dead = self._popen.poll() is not None
            readable, _, _ = select.select([fd], [], [], 0 if dead else _POLL_S)
            chunk = os.read(fd, 1 << 16) if readable else b""
            *lines, self._buffer = (self._buffer + chunk).split(b"\n")
            for line in lines:
                with contextlib.suppress(ValueError):
                    if isinstance(message := json.loads(line), dict):
                        yield message
            if not chunk and dead:
                return
            if readable and not chunk:  # it closed its end early: nothing to read, wait for the death itself
                self._popen.wait()
                return

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
        with contextlib.suppress(OSError):
            if self._popen.stdout is not None:
                self._popen.stdout.close()
        return self._popen.returncode


@dataclass(slots=True, kw_only=True)
class Witness:
    """All that was seen of one attempt; `conclude` makes the outcome of it.

    last: the `result` or `error` message, None when none came. ended_by: why the agent itself ended it, None if it
    did not. kill: the watchdog's record, empty without one (within_promise: it held no more than was promised to it).
    oom_killed: the kernel killed it and counted that. promised_bytes: what it was promised, None where unknown.
    environment, runtime_bytes: what the process was and held when it was ready.
    """

    last: Json | None = None
    exit_status: int | None = None
    ended_by: str | None = None
    kill: Json = field(default_factory=dict)
    oom_killed: bool = False
    promised_bytes: int | None = None
    epochs: int = 0
    value: float | None = None
    peak_bytes: int | None = None
    device_peak_bytes: int | None = None
    environment: str | None = None
    runtime_bytes: int | None = None
    duration_s: float = 0.0
    checkpoint: str | None = None
    log_tail: str = ""


# Sent from outside (a person, a service manager, a host that shuts down): no word about the trial. What it dies
# of by its own fault (SIGSEGV, SIGABRT, SIGBUS, ...) is its own.
_FROM_OUTSIDE = frozenset({-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP})
_STOPPED = {"pruned": ExitReason.PRUNED, "interrupted": ExitReason.INTERRUPTED}


def conclude(seen: Witness) -> Outcome:
    """What the end of an attempt was. A durable result always wins: a kill that came too late changes nothing."""
    reason, detail, value, traceback = ExitReason.FAILED, "", None, None
    result: Json = {}
    if seen.last is not None and seen.last.get("type") == "result":
        result = dict(seen.last.get("result") or {})
        reason = _STOPPED.get(str(result.get("stop_reason")), ExitReason.COMPLETED)
        value, detail = result.get("value"), str(result.get("stop_reason", ""))
        if reason is ExitReason.COMPLETED and not isinstance(value, int | float):
            reason, detail = ExitReason.FAILED, f"the objective returned the value {value!r}, not a number"
            value = None
    elif seen.kill:
        reason = ExitReason(seen.kill["reason"])
        if reason in MEMORY_REASONS and seen.kill.get("within_promise"):
            reason = ExitReason.PREEMPTED
        detail = f"watchdog: {seen.kill.get('rule', '')}"
    elif seen.last is not None:
        detail, traceback = str(seen.last.get("error", "")), seen.last.get("traceback")
    elif seen.ended_by is not None:
        reason = ExitReason.LOST if seen.ended_by == "orphaned" else ExitReason.INTERRUPTED
        detail = f"ended: {seen.ended_by}"
    elif seen.oom_killed:
        within = seen.peak_bytes and seen.promised_bytes and seen.peak_bytes <= seen.promised_bytes
        reason = ExitReason.PREEMPTED if within else ExitReason.KERNEL_OOM
        detail = f"killed by the kernel: out of memory{', within its promise' if within else ''}"
    else:
        detail = describe_status(seen.exit_status)
        if seen.exit_status in _FROM_OUTSIDE:
            reason = ExitReason.LOST
    peaks = [p for p in (seen.peak_bytes, (seen.last or {}).get("peak_bytes")) if p]
    return Outcome(
        reason=reason,
        value=None if value is None else float(value),
        detail=detail.strip().splitlines()[-1] if detail.strip() else "",
        epochs=int(result.get("epochs") or seen.epochs),
        duration_s=seen.duration_s,
        peak_bytes=max(peaks, default=None),
        device_peak_bytes=(seen.last or {}).get("device_peak_bytes") or seen.device_peak_bytes,
        environment=(seen.last or {}).get("environment") or seen.environment,
        runtime_bytes=(seen.last or {}).get("runtime_bytes") or seen.runtime_bytes,
        exit_status=seen.exit_status,
        traceback=traceback,
        log_tail=seen.log_tail,
        checkpoint=seen.checkpoint,
        kill=seen.kill if reason not in (ExitReason.COMPLETED, ExitReason.PRUNED) else {},
        result=result,
    )


def describe_status(status: int | None) -> str:
    """`exit status 7` or `killed by SIGSEGV` in words."""
    if status is None:
        return "it would not die"
    if status >= 0:
        return f"ended without a result, exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def tail(path: Path, size: int = LOG_TAIL_BYTES) -> str:
    """The last bytes of a file as text; empty when it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - size))
            return file.read().decode(errors="replace")
    except OSError:
        return ""

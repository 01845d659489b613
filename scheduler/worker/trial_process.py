"""A trial process as the agent sees it: `python -m training.trial`, its pipes, and what its end means.

Covers starting one, the lines both ways, where its output goes, ending its whole tree, and `conclude`,
the pure rule that turns what was seen into an Outcome. Does not decide when to start or end one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
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

from scheduler.files.bounded_log import BoundedLog
from scheduler.files.durable import tail
from scheduler.model import ExitReason, HeadroomError, Json, KillRecord, Outcome, UsageError
from scheduler.model.fields import BadMessage, finite
from scheduler.model.messages import Last, Ready, Task, ToTrial, ready
from scheduler.model.plain import line, plain, text
from scheduler.worker import launch
from scheduler.worker.fork_server import ForkedProcess
from scheduler.worker.log_pipe import LOOK_EVERY_S, LogPipe
from scheduler.worker.tree_peak import TreePeak, with_children

CHECK_TIMEOUT_S = 120.0  # importing torch took 25 s on a cold, busy disk
CHECK_TRIES = 3
MAX_LINE_BYTES = 4 * 2**20  # a result at its bounds (`training.plain`) is shorter, all of it escaped
_POLL_S = 0.25  # how soon a death is noticed whose pipe a grandchild keeps open


@dataclass(frozen=True, slots=True, kw_only=True)
class ToImport:
    """A function that trials call, as `check_objective` takes it. flag: what the user calls it; hint: what may help."""

    path: str
    module: str
    flag: str
    hint: str = ""

    def refused(self, why: str, where: str = "") -> UsageError:
        """Return the error for one that cannot be imported."""
        return UsageError(f"{self.flag}: {why}{where}{self.hint}")


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


@dataclass(slots=True, kw_only=True)
class Witness:
    """All that was seen of one attempt; `conclude` makes the outcome of it.

    last: its final message, None when none came. asked: why the agent asked it to leave, None if it did not. ended_by:
    why the agent itself ended it, None if it did not. kill: the watchdog's record, None without one. oom_killed: the
    kernel killed it and counted that.
    allowed_bytes: its promise and what an estimate may err, None where unknown. freed_bytes: what the host had
    available right after the kernel's kill: no less than the victim held; None where that cannot be told. peak_bytes:
    its own, tree: of all its processes. environment, runtime_bytes: what the process was and held when it was ready.
    """

    last: Last | None = None
    asked: str | None = None
    exit_status: int | None = None
    ended_by: str | None = None
    kill: KillRecord | None = None
    oom_killed: bool = False
    allowed_bytes: float | None = None
    freed_bytes: int | None = None
    epochs: int = 0
    value: float | None = None
    peak_bytes: int | None = None
    tree: TreePeak = field(default_factory=TreePeak)
    device_peak_bytes: int | None = None
    environment: str | None = None
    runtime_bytes: int | None = None
    duration_s: float = 0.0
    checkpoint: str | None = None
    log_tail: str = ""


# Sent from outside (a person, a service manager, a host that shuts down): no word about the trial. What it dies
# of by its own fault (SIGSEGV, SIGABRT, SIGBUS, ...) is its own.
_FROM_OUTSIDE = frozenset({-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP})
# Why it was asked, or made, to leave -> what its end then is. Whatever else it is asked for is an interruption.
_ASKED = {"prune": ExitReason.PRUNED, "timeout": ExitReason.TIMED_OUT, "orphaned": ExitReason.LOST}


def conclude(seen: Witness) -> Outcome:
    """Tell what the end of an attempt was. A durable result always wins: a kill that came too late changes nothing."""
    value, traceback, last = None, None, seen.last
    values: tuple[float, ...] = ()
    own_peak_bytes = max(seen.peak_bytes or 0, (last and last.peak_bytes) or 0)
    peak_bytes = with_children(own_peak_bytes, seen.tree, None if last is None else last.children_peak_bytes)
    result: Json = {}
    if last is not None and last.result is not None:
        result = dict(last.result)
        values = _values(result)
        reason, detail, value = _of_result(result, values, seen.asked or last.asked)
    elif seen.kill is not None:
        reason, detail = seen.kill.ended, f"watchdog: {seen.kill.rule}"
    elif last is not None:
        reason, detail, traceback = ExitReason.FAILED, last.error, last.traceback
        if not last.started:
            reason = ExitReason.NOT_STARTED
        elif last.no_room:
            reason = ExitReason.NO_ROOM
    elif seen.ended_by is not None:
        reason, detail = _ASKED.get(seen.ended_by, ExitReason.INTERRUPTED), f"ended: {seen.ended_by}"
    elif seen.oom_killed:
        # The last sample may be a second old, and a trial takes gigabytes in that time: what came back shows it.
        held = max(peak_bytes or 0, seen.freed_bytes or 0)
        within = peak_bytes and seen.allowed_bytes and held <= seen.allowed_bytes
        reason = ExitReason.PREEMPTED if within else ExitReason.KERNEL_OOM
        detail = f"killed by the kernel: out of memory{', within its promise' if within else ''}"
    else:
        reason = ExitReason.LOST if seen.exit_status in _FROM_OUTSIDE else ExitReason.FAILED
        detail = describe_status(seen.exit_status)
    epochs = result.get("epochs")
    return Outcome(
        reason=reason,
        value=value,
        values=values if reason is ExitReason.COMPLETED else (),
        fatal=reason is ExitReason.FAILED and last is not None and last.fatal,
        detail=detail.strip().splitlines()[-1] if detail.strip() else "",
        epochs=epochs if isinstance(epochs, int) and not isinstance(epochs, bool) and epochs > 0 else seen.epochs,
        duration_s=seen.duration_s,
        peak_bytes=peak_bytes or None,
        device_peak_bytes=(last and last.device_peak_bytes) or seen.device_peak_bytes,
        environment=(last and last.environment) or seen.environment,
        runtime_bytes=(last and last.runtime_bytes) or seen.runtime_bytes,
        exit_status=seen.exit_status,
        traceback=traceback,
        log_tail=text(seen.log_tail),
        checkpoint=seen.checkpoint,
        kill=seen.kill if reason not in (ExitReason.COMPLETED, ExitReason.PRUNED) else None,
        result=result,
    )


def _values(result: Json) -> tuple[float, ...]:
    """Return what an objective with a trial of its own returned: numbers as text. Empty when there are none that
    are."""
    found = result.get("values")
    try:
        values = tuple(float(value) for value in found) if isinstance(found, list) else ()
    except (TypeError, ValueError, OverflowError):
        return ()
    return () if any(math.isnan(value) for value in values) else values


def _of_result(result: Json, values: tuple[float, ...], asked: str | None) -> tuple[ExitReason, str, float | None]:
    """(reason, detail, value) of an attempt that returned. That it was interrupted counts only if it was asked to
    leave: a function that says so by itself would else be run again for ever."""
    said, value = line(result.get("stop_reason") or "completed", 80), finite(result.get("value"))
    if values:
        value = values[0]  # may be infinite: the study can hold that
    if said in ("interrupted", "pruned") and asked is not None:
        own_word = said == "pruned" and asked not in _ASKED
        return ExitReason.PRUNED if own_word else _ASKED.get(asked, ExitReason.INTERRUPTED), said, value
    if said == "pruned":
        return ExitReason.PRUNED, said, value
    if value is None:
        why = "it says interrupted, but nobody asked it to leave: " if said == "interrupted" else ""
        shown = line(repr(result.get("value")), 80)
        return ExitReason.FAILED, f"{why}the objective returned the value {shown}, not a number", None
    return ExitReason.COMPLETED, said, value


def check_objective(
    path: str, environment: Mapping[str, str | None] | None = None, module: str = "training.trial"
) -> None:
    """Import the objective `module:function` as a trial would, in a process. Raises TrialStartError saying why not.

    A process that was killed from outside says nothing of the objective and is tried again. module: what runs it.
    """
    # A pickled function is longer than an argument may be, and what it holds is nobody else's to read (ps).
    long = path.startswith("pickled:")
    command = [sys.executable, "-m", module, "--check=-" if long else f"--check={path}"]
    for tries_left in reversed(range(CHECK_TRIES)):
        try:
            done = subprocess.run(
                command,
                input=path.encode() if long else b"",
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=launch.variables(environment or {}),
                start_new_session=True,
                timeout=CHECK_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise TrialStartError(f"objective {path!r} took longer than {CHECK_TIMEOUT_S:.0f} s to import") from None
        if done.returncode == 0:
            return
        if tries_left and done.returncode in _FROM_OUTSIDE:
            continue
        said = done.stderr.decode(errors="replace").strip().splitlines()
        why = said[-1] if said else f"objective {path!r} cannot be imported: {describe_status(done.returncode)}"
        raise TrialStartError(line(why), done.returncode)


async def why_not_imported(path: str, module: str) -> Json:
    """(On a Dask worker, whose loop goes on meanwhile.) `check_objective` there: {"problem": why not, or None}."""
    try:
        await asyncio.to_thread(check_objective, path, module=module)
    except TrialStartError as error:
        return {"problem": str(error)}
    return {"problem": None}


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

"""The trial process: `python -m training.trial` runs one attempt, told and watched through two pipes.

Covers the protocol (JSON lines: one task in, then `stop`; out `ready`, `started`, `progress`, `tick`, `settled`,
`checkpoint`, and one last `result` or `error`), and everything that keeps a user's function from disturbing it: its
prints go where stderr goes, a pipe that the agent reads into a log of bounded size; its exits and exceptions become an
`error`, a segfault leaves a stack in the log, and a child that it forked cannot speak for it. Does not train: the task
names the function that does.

It starts before its task is known (a warm spare), so what every trial needs is imported before `ready`; or it is forked
off a process that has imported it (`training.fork_server`). End of file on stdin means that whoever started it is gone:
it exits at once, whatever it is doing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import fcntl
import importlib
import json
import math
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from training.errors import AskedToLeave, NonFiniteLoss, ObjectiveNotImported, OtherProtocol, TrainingInputError
from training.plain import MAX_TEXT, plain, text
from training.runtime import FORKED, in_force
from training.tensor_file import sync_folder

PROTOCOL = 1
LOG, RESULT = "trial.log", "result.json"  # in the attempt's folder
TICK_INTERVAL_S = 1.0
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
ORPHANED = 3  # exit status after the end of stdin
LAST_STEP = 2**31 - 1  # what a study's database holds
HIGH_DESCRIPTOR = 1000  # above what a library that "closes everything" usually closes, below the usual limit of 1024
TRACE_CHARS = 16_000
_HOSTS_FAULT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENFILE)


def main() -> int:
    """Run one attempt; the exit status is 0 after a result, 1 after an error.

    `--check=module:function` runs none: it imports that function, and says on stderr why it cannot.
    """
    for argument in sys.argv[1:]:
        if argument.startswith("--check="):
            return check(argument.removeprefix("--check="))
    return _serve(lambda: preload(sys.argv[1:]))


def run_forked() -> int:
    """Run one attempt in a process that a fork server has forked (`training.fork_server`): all is imported."""
    return _serve(lambda: None, how=FORKED)


def _serve(imports: Callable[[], None], how: str = "") -> int:
    """Get ready, wait for the task, run it. how: what the environment's name has to say of the way it began."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for the driver, which drains
    faulthandler.enable(file=2, all_threads=True)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)  # the watchdog asks where a stalled trial is
    _adopt_orphans()
    log_pipe, outbox, inbox = _same(2), Outbox(_private_stdout()), Inbox(private_stdin())
    inbox.start()
    imports()
    environment, ready_bytes = in_force() + how, rss_bytes()
    outbox.send(
        {
            "type": "ready",
            "protocol": PROTOCOL,
            "pid": os.getpid(),
            "environment": environment,
            "rss_bytes": ready_bytes,
            "peak_bytes": peak_bytes(),
            "device": device_facts(),
        }
    )
    task = inbox.wait_for_task()
    started = time.monotonic()
    folder = Path(task["folder"])
    outbox.send({"type": "started", "attempt": task["attempt"]})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / LOG, "ab", opener=_owners_only):  # it can be written here
            pass
    except OSError as error:  # no place for a checkpoint or a result: training would be for nothing
        last: dict[str, Any] = {"type": "error", "error": one_line(f"OSError: {error}"), "started": False}
    else:
        last = run(task, TrialProgress(outbox, inbox))
        if last["type"] == "error":
            end_if_alone(log_pipe, outbox)
    last |= {
        "asked": inbox.stop_reason,
        "peak_bytes": peak_bytes(),
        "device_peak_bytes": device_peak_bytes(),
        "children_peak_bytes": children_peak_bytes(),
        "environment": environment,
        "runtime_bytes": ready_bytes,
        "duration_s": round(time.monotonic() - started, 3),
    }
    inbox.finish()
    try:
        write_durably(folder / RESULT, last)
    except OSError as error:  # the scheduler is still there to hear it
        with contextlib.suppress(OSError):
            print(f"{RESULT} not written: {error}", file=sys.stderr)
    outbox.send(last)
    return 0 if last["type"] == "result" else 1


def run(task: Mapping[str, Any], progress: TrialProgress) -> dict[str, Any]:
    """Call the task's objective; whatever it does short of killing the process becomes a result or an error."""
    me = os.getpid()
    try:
        if task.get("protocol") != PROTOCOL:
            spoken = text(plain(task.get("protocol")), 40)
            raise OtherProtocol(f"the task has protocol {spoken}, this process speaks {PROTOCOL}: install one version")
        try:
            found = resolve(task["objective"])(task, progress)
        except AskedToLeave:
            found = {"stop_reason": "interrupted"}
        _end_forked(me)
        return {"type": "result", "result": check_result(found, asked=progress.stop_requested)}
    except BaseException as error:  # also SystemExit and KeyboardInterrupt: a user's sys.exit() is an outcome
        trace = text(traceback.format_exc()[-TRACE_CHARS:], MAX_TEXT)
        with contextlib.suppress(OSError, ValueError):  # the log's disk is full, or the function has closed stderr
            print(trace, file=sys.stderr, flush=True)
        _end_forked(me, error)
        # `error` is formatted by hand: for SystemExit the last line of the traceback would be bare.
        said: dict[str, Any] = {"type": "error", "error": one_line(f"{type(error).__name__}: {text(error)}")}
        return said | {
            "traceback": trace,
            "started": getattr(error, "not_started", False) is not True,
            "fatal": getattr(error, "ends_study", False) is True,
            "no_room": is_no_room(error, trace, task.get("folder")),
        }


def end_if_alone(log_pipe: tuple[int, int] | None, outbox: Outbox) -> None:
    """Never returns once whoever reads our output is gone: a function that fails then may have failed of that (EPIPE
    in a print, SIGPIPE in a child), and the end of stdin may be a moment late.

    log_pipe: what stderr was at the start; a function may have put something of its own in its place.
    """
    if (_same(2) == log_pipe and _reader_gone(2)) or outbox.reader_gone:
        end_children()
        os._exit(ORPHANED)


def _reader_gone(descriptor: int) -> bool:
    """Whether this is the writing end of a pipe that nobody can read any more."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _end_forked(me: int, error: BaseException | None = None) -> None:
    """End a child that the function forked and that came back here, without a word: only its parent may speak."""
    if os.getpid() != me:
        status = 0 if error is None else 1
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        os._exit(status & 0xFF)


def is_no_room(error: BaseException | None, trace: str, folder: str | None = None) -> bool:
    """Whether this error, or one that led to it, is a disk that is full or gone, or a process that was not to be had.

    folder: the attempt's own; any OSError while it cannot be written is one.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and (error.errno in _HOSTS_FAULT or not _writable(folder)):
            return True
        # A read that would block is EAGAIN as well: here it is one only where a process was to be made.
        forking = "fork" in trace or "_posixsubprocess" in trace or "posix_spawn" in trace
        if isinstance(error, OSError) and error.errno == errno.EAGAIN and forking:
            return True
        said = text(error).lower()
        if any(word in said for word in ("no space left on device", "disk is full", "can't start new thread")):
            return True
        error = error.__cause__ or error.__context__
    return False


def _writable(folder: str | None) -> bool:
    return folder is None or os.access(folder, os.W_OK | os.X_OK)


def check(name: str) -> int:
    """Import the function `module:function` names; 0, or 1 with the last line on stderr saying why not."""
    try:
        resolve(name)
    except ObjectiveNotImported as error:
        print(one_line(text(error)), file=sys.stderr)
        return 1
    return 0


def resolve(name: str) -> Callable[[Mapping[str, Any], TrialProgress], Any]:
    """Import the function that `module:function` names. Raises ObjectiveNotImported, whatever its module raises."""
    module_name, _, function_name = name.partition(":")
    try:
        if not function_name:
            raise TrainingInputError("write module:function")
        function: Any = importlib.import_module(module_name)
        for part in function_name.split("."):
            function = getattr(function, part)
        if not callable(function):
            raise TypeError(f"{type(function).__name__} {function_name} is no function")
    except BaseException as error:  # a module may do anything when it is imported, sys.exit() too
        raise ObjectiveNotImported(
            f"objective {name!r} cannot be imported: {type(error).__name__}: {text(error)}"
        ) from error
    return cast("Callable[[Mapping[str, Any], TrialProgress], Any]", function)


def check_result(found: Any, *, asked: str | None = None) -> dict[str, Any]:
    """Make a result mapping of what an objective returned: a mapping with `value`, or the value alone.

    asked: why it was asked to stop, None when it was not. Raises NonFiniteLoss, TypeError. `value` may be None only
    when it was asked, or prunes itself. `values`, numbers as text (JSON has no infinity), stand in its place where the
    function that was called has checked them itself.
    """
    given = dict(found) if isinstance(found, Mapping) else {"value": found}
    if "values" in given:
        return {"stop_reason": "completed", **plain(given)}
    value, stop_reason = given.pop("value", None), text(given.pop("stop_reason", None) or "completed", 64)
    if value is not None or not (stop_reason == "pruned" or (stop_reason == "interrupted" and asked)):
        try:
            value = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several elements
            shown = text(repr(plain(value)), 80)
            raise TypeError(f"the objective returned {shown} as its value: it must be a number") from None
        if not math.isfinite(value):
            raise NonFiniteLoss(f"the objective returned {value}")
    rest = plain(given)
    return {"value": value, "stop_reason": stop_reason, **(rest if isinstance(rest, dict) else {"metrics": rest})}


def one_line(said: str, limit: int = 500) -> str:
    """Return the text on one line, shortened."""
    return text(" ".join(said.split()), limit)


# -- the two pipes --------------------------------------------------------------------------------------------------


class Outbox:
    """Writes messages, one JSON line each, whole and in order also from several threads.

    A function that closes descriptors it did not open may have closed this one, and opened a file of its own under the
    same number: then nothing is sent any more, the durable result says how it ended. A forked child is not heard.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._pipe = descriptor, _same(descriptor)
        self._lock, self._owner = threading.Lock(), os.getpid()

    @property
    def reader_gone(self) -> bool:
        """Nobody can hear it any more."""
        return _same(self._descriptor) == self._pipe and _reader_gone(self._descriptor)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message. A reader that is gone is no error here: the end of stdin says so more reliably."""
        data = json.dumps(message).encode() + b"\n"
        if os.getpid() != self._owner:
            return
        with self._lock, contextlib.suppress(OSError):
            while data and _same(self._descriptor) == self._pipe:
                data = data[os.write(self._descriptor, data) :]


class Inbox:
    """Reads the task and the stop request in a thread of its own, and ends the process at the end of stdin."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._pipe = descriptor, _same(descriptor)
        self._tasks: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.has_task = False
        self.finished = False  # the result is on its way: the end of stdin may come now
        self._ending = threading.Lock()  # held by whoever decides first: a result on its way, or an end without one
        self.stop_reason: str | None = None
        self._answers: dict[int, dict[str, Any]] = {}
        self._heard = threading.Condition()

    def start(self) -> None:
        threading.Thread(target=self._read, name="stdin", daemon=True).start()

    def wait_for_task(self) -> dict[str, Any]:
        return self._tasks.get()

    def wait_for_answer(self, number: int, timeout_s: float) -> dict[str, Any] | None:
        """Wait for the answer to a call; None when there is none yet, or the trial is asked to leave."""
        with self._heard:
            self._heard.wait_for(lambda: number in self._answers or self.stop_reason is not None, timeout_s)
            return self._answers.pop(number, None)

    def _read(self) -> None:
        pending = b""
        try:
            while chunk := os.read(self._descriptor, 65536):
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    if line.strip():
                        self._take(line)
                if _same(self._descriptor) != self._pipe:  # what is read there now is the function's own
                    return
        except OSError:  # closed by the function: it cannot be asked to stop any more, only ended from outside
            return
        with self._ending:
            if not self.finished:
                end_children()
                os._exit(ORPHANED if self.has_task else 0)

    def finish(self) -> None:
        """Say that the result is on its way. Never returns in a process that is already ending for want of a reader:
        what a function makes of its children's death by our hand is no word of its own."""
        with self._ending:
            self.finished = True

    def _take(self, line: bytes) -> None:
        try:
            message = json.loads(line)
            if self.has_task:
                with self._heard:
                    if message["cmd"] == "stop":
                        self.stop_reason = message["reason"]
                    elif message["cmd"] == "answer":
                        self._answers[message["number"]] = message
                    self._heard.notify_all()
            else:
                self.has_task = True
                self._tasks.put(message)
        except (ValueError, KeyError, TypeError) as error:  # a thread that dies silently would orphan the process
            print(f"message not understood: {line[:200]!r}: {error}", file=sys.stderr, flush=True)


class TrialProgress:
    """What the objective reports to; see `training.trainer.Progress`."""

    def __init__(self, outbox: Outbox, inbox: Inbox) -> None:
        self._outbox = outbox
        self._inbox = inbox
        self._ticks = 0
        self._next_tick = 0.0
        self._calls, self._calling = 0, threading.Lock()

    @property
    def stop_requested(self) -> str | None:
        """None, "prune" or "drain": whatever else it is asked to leave for, a checkpoint is wanted first."""
        reason = self._inbox.stop_reason
        return reason if reason in (None, "prune") else "drain"

    def leave_if_asked(self) -> None:
        """Raise AskedToLeave when it is: a function that keeps no checkpoint leaves here, and is begun anew later."""
        if self._inbox.stop_reason is not None:
            raise AskedToLeave(self._inbox.stop_reason)

    def report(self, step: int, value: float) -> None:
        """Send an epoch's value. Raises NonFiniteLoss (a study cannot hold NaN, and training on is pointless), and
        ValueError for a step that it cannot hold."""
        value, step = float(value), int(step)
        if not math.isfinite(value):
            raise NonFiniteLoss(f"value {value} reported for step {text(step, 40)}")
        if not 0 <= step <= LAST_STEP:
            raise ValueError(f"step {text(plain(step), 40)} reported: it must be from 0 to {LAST_STEP}")
        self._send("progress", step=step, value=value)

    def tick(self) -> None:
        self._ticks += 1
        now = time.monotonic()
        if now >= self._next_tick:
            self._next_tick = now + TICK_INTERVAL_S
            self._send("tick", n=self._ticks)

    def settled(self) -> None:
        self._send("settled")

    def checkpoint(self, path: str, step: int = 0) -> None:
        self._outbox.send({"type": "checkpoint", "path": str(path), "step": int(step)})

    def call(self, method: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Ask the study, and wait for the answer: a mapping with `value`, or with `error` and its `kind`.

        Raises AskedToLeave when the trial is to leave before there is one.
        """
        with self._calling:
            self._calls = number = self._calls + 1
        self._outbox.send({"type": "call", "method": method, "number": number, "arguments": dict(arguments)})
        while (answer := self._inbox.wait_for_answer(number, TICK_INTERVAL_S)) is None:
            if self._inbox.stop_reason is not None:
                raise AskedToLeave(self._inbox.stop_reason)
            self.tick()  # its study may be away for long: it is not the trial that stands still
        return answer

    def tell(self, method: str, arguments: Mapping[str, Any]) -> None:
        """Tell the study something, in order with calls and reports, without waiting."""
        self._outbox.send({"type": "call", "method": method, "number": 0, "arguments": dict(arguments)})

    def note(self, said: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # the log's disk is full, which may be what is to be noted
            print(said, file=sys.stderr, flush=True)
        self._outbox.send({"type": "note", "text": one_line(said)})

    def _send(self, kind: str, **fields: Any) -> None:
        memory = {"peak_bytes": peak_bytes(), "device_bytes": device_peak_bytes()}
        self._outbox.send({"type": kind, **fields, **memory})


# -- the process ----------------------------------------------------------------------------------------------------


def _private_stdout() -> int:
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


def _same(descriptor: int) -> tuple[int, int] | None:
    """Which file the number stands for now; None for none."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _adopt_orphans() -> None:
    """Keep what double-forks or changes its session below this process, where whoever ends the trial finds it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def private_stdin() -> int:
    """Return the protocol's own descriptor; an `input()` of the user's finds an empty stdin instead of our commands."""
    private = _private(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return private


def preload(arguments: Sequence[str]) -> None:
    """Import what a trial needs (2 s, of which torch is nearly all), so that a launch costs milliseconds.

    arguments: `--preload=module,module` names what a user's own objective needs instead (maybe nothing).
    """
    for argument in arguments:
        if argument.startswith("--preload="):
            for name in filter(None, argument.removeprefix("--preload=").split(",")):
                importlib.import_module(name)
            return
    from training import data, hpo, patchtst, trainer  # noqa: F401

    with contextlib.suppress(ImportError):  # only our own data needs it
        data.indicator_library()


def write_durably(path: Path, message: Mapping[str, Any]) -> None:
    """Write a JSON file that is there after a crash, or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8", opener=_owners_only) as file:
        json.dump(message, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def _owners_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def end_children() -> None:
    """Kill the processes a user's function started (Linux); data loaders elsewhere notice a dead parent themselves."""
    pending = [os.getpid()]
    while pending:
        with contextlib.suppress(OSError):  # it is gone meanwhile: the function reaps its children too
            for listing in Path(f"/proc/{pending.pop()}/task").glob("*/children"):
                children = [int(child) for child in _read(listing).split()]
                pending += children
                for child in children:
                    with contextlib.suppress(OSError):
                        os.kill(child, signal.SIGSTOP)  # so that it starts no more while we look at its own
                        os.kill(child, signal.SIGKILL)


def _read(path: Path) -> str:
    """Return the file's text; empty when it is gone: a thread that has just ended says nothing of the others'
    children."""
    try:
        return path.read_text()
    except OSError:
        return ""


# -- memory ---------------------------------------------------------------------------------------------------------


def peak_bytes() -> int:
    """Return this process's own largest resident size so far.

    VmHWM, not ru_maxrss: the latter is inherited through exec and would be the parent's.
    """
    found = _status("VmHWM")
    if found is not None:
        return found
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def children_peak_bytes() -> int:
    """Return the largest resident size of any process that this one has started and waited for, and of those they did.

    A child inherits its parent's peak through fork and exec: up to our own it says nothing.
    """
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def rss_bytes() -> int:
    """Return this process's resident size now (elsewhere than on Linux: the largest so far)."""
    found = _status("VmRSS")
    return peak_bytes() if found is None else found


def anonymous_bytes() -> int:
    """Return what this process holds that is no file's: all that one forked off it begins with."""
    return _status("RssAnon") or 0


def _status(key: str) -> int | None:
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))
    except (OSError, StopIteration):
        return None


def device_facts() -> dict[str, Any] | None:
    """Return the accelerator torch sees: kind and bytes (for Metal what it can safely hold), None where there is
    none."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    if torch.cuda.is_available():
        return {"kind": "cuda", "total_bytes": _cuda_total_bytes()}
    if torch.backends.mps.is_available():
        return {"kind": "mps", "total_bytes": torch.mps.recommended_max_memory()}
    return None


def _cuda_total_bytes() -> int:
    """Asked of the driver's tool: torch would open a CUDA context, which takes some 500 MiB in every idle spare."""
    which = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    ask = ["nvidia-smi", f"--id={which}", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True)
    return int(answer.stdout.split()[0]) * 2**20


def device_peak_bytes() -> int:
    """Return the most this process has reserved on its device so far (MPS: holds now, there is no peak counter); 0 on
    CPU."""
    torch = sys.modules.get("torch")
    if torch is None:
        return 0
    if torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_reserved())
    if torch.backends.mps.is_available():
        return int(torch.mps.driver_allocated_memory())
    return 0


def leave_with(run: Callable[[], int]) -> NoReturn:
    """Run it and end this process with the status it returns, 1 where it raises."""
    status = 1
    try:
        status = run()
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    end_children()
    os._exit(status)  # a user's thread or atexit function must not keep a finished trial


if __name__ == "__main__":
    leave_with(main)

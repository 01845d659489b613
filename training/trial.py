"""The trial process: `python -m training.trial` runs one attempt, told and watched through two pipes.

Covers the protocol (JSON lines: one task in, then `stop`; out `ready`, `started`, `progress`, `tick`, `settled`,
`checkpoint`, and one last `result` or `error`), and everything that keeps a user's function from disturbing it: its
prints go to a log of bounded size, its exits and exceptions become an `error`, a segfault leaves a stack in the log.
Does not train: the task names the function that does.

It starts before its task is known (a warm spare), so what every trial needs is imported before `ready`. End of file on
stdin means that whoever started it is gone: it exits at once, whatever it is doing.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import json
import math
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.checkpoint import sync_folder
from training.errors import NonFiniteLoss, TrainingInputError
from training.runtime import in_force

PROTOCOL = 1
TICK_INTERVAL_S = 1.0
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
ORPHANED = 3  # exit status after the end of stdin
# A log that a user's loop floods: its beginning says what it is, its end why it died; the middle can go.
LOG_LIMIT_BYTES = 64 * 2**20
LOG_KEEP_BYTES = 2**20
LOG_CHECK_S = 0.5
_CUTTING = threading.Lock()


def main() -> int:
    """Run one attempt; the exit status is 0 after a result, 1 after an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for the driver, which drains
    faulthandler.enable(file=2, all_threads=True)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)  # the watchdog asks where a stalled trial is
    _adopt_orphans()
    outbox, inbox = Outbox(_private_stdout()), Inbox(_private_stdin())
    inbox.start()
    _preload(sys.argv[1:])
    environment, ready_bytes = in_force(), rss_bytes()
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
        _log_to(folder / "trial.log")
    except OSError as error:  # no place for a checkpoint or a result: training would be for nothing
        last: dict[str, Any] = {"type": "error", "error": one_line(f"OSError: {error}"), "traceback": ""}
    else:
        last = run(task, TrialProgress(outbox, inbox))
        with contextlib.suppress(OSError):  # a flood just before the end, which the regular look has not seen
            bound_log(folder / "trial.log", LOG_LIMIT_BYTES, LOG_KEEP_BYTES)
    last |= {
        "peak_bytes": peak_bytes(),
        "device_peak_bytes": device_peak_bytes(),
        "environment": environment,
        "runtime_bytes": ready_bytes,
        "duration_s": round(time.monotonic() - started, 3),
    }
    inbox.finished = True
    try:
        write_durably(folder / "result.json", last)
    except OSError as error:  # the scheduler is still there to hear it
        with contextlib.suppress(OSError):
            print(f"result.json not written: {error}", file=sys.stderr)
    outbox.send(last)
    return 0 if last["type"] == "result" else 1


def run(task: Mapping[str, Any], progress: TrialProgress) -> dict[str, Any]:
    """Call the task's objective; whatever it does short of killing the process becomes a result or an error."""
    try:
        if task.get("protocol") != PROTOCOL:
            raise TrainingInputError(f"task has protocol {task.get('protocol')}, this process speaks {PROTOCOL}")
        found = resolve(task["objective"])(task, progress)
        return {"type": "result", "result": check_result(found)}
    except BaseException as error:  # also SystemExit and KeyboardInterrupt: a user's sys.exit() is an outcome
        trace = traceback.format_exc()
        with contextlib.suppress(OSError):  # the log's disk is full, which may be why we are here
            print(trace, file=sys.stderr, flush=True)
        # `error` is formatted by hand: for SystemExit the last line of the traceback would be bare.
        return {"type": "error", "error": one_line(f"{type(error).__name__}: {error}"), "traceback": trace[-16_000:]}


def resolve(name: str) -> Callable[[Mapping[str, Any], TrialProgress], Any]:
    """The function `module:function` names. Raises TrainingInputError."""
    module_name, _, function_name = name.partition(":")
    if not function_name:
        raise TrainingInputError(f"objective {name!r}: write module:function")
    function = getattr(importlib.import_module(module_name), function_name, None)
    if not callable(function):
        raise TrainingInputError(f"objective {name!r}: module {module_name} has no function {function_name}")
    return function


def check_result(found: Any) -> dict[str, Any]:
    """A result mapping from what an objective returned: a mapping with `value`, or the value alone.

    Raises NonFiniteLoss, TypeError. `value` may be None only when the trial was stopped.
    """
    result = dict(found) if isinstance(found, Mapping) else {"value": found}
    result.setdefault("stop_reason", "completed")
    value = result.get("value")
    if value is None and result["stop_reason"] in {"pruned", "interrupted"}:
        return plain(result)
    try:
        result["value"] = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"the objective returned {value!r} as its value: it must be a number") from None
    if not math.isfinite(result["value"]):
        raise NonFiniteLoss(f"the objective returned {value}")
    return plain(result)


def plain(value: Any) -> Any:
    """The value as JSON has it: numbers of other libraries become Python's, NaN becomes None, the rest text."""
    match value:
        case Mapping():
            return {str(key): plain(entry) for key, entry in value.items()}
        case list() | tuple() | set():
            return [plain(entry) for entry in value]
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case _ if hasattr(value, "tolist"):  # numpy and torch
            return plain(value.tolist())
    return str(value)


def one_line(text: str, limit: int = 500) -> str:
    """The text on one line, shortened."""
    return " ".join(text.split())[:limit]


# -- the two pipes --------------------------------------------------------------------------------------------------


class Outbox:
    """Writes messages, one JSON line each, whole and in order also from several threads."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message. A reader that is gone is no error here: the end of stdin says so more reliably."""
        data = json.dumps(message).encode() + b"\n"
        with self._lock, contextlib.suppress(BrokenPipeError):
            while data:
                data = data[os.write(self._descriptor, data) :]


class Inbox:
    """Reads the task and the stop request in a thread of its own, and ends the process at the end of stdin."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._tasks: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.has_task = False
        self.finished = False  # the result is on its way: the end of stdin may come now
        self.stop_reason: str | None = None

    def start(self) -> None:
        threading.Thread(target=self._read, name="stdin", daemon=True).start()

    def wait_for_task(self) -> dict[str, Any]:
        return self._tasks.get()

    def _read(self) -> None:
        pending = b""
        while chunk := os.read(self._descriptor, 65536):
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                if line.strip():
                    self._take(line)
        if not self.finished:
            end_children()
            os._exit(ORPHANED if self.has_task else 0)

    def _take(self, line: bytes) -> None:
        try:
            message = json.loads(line)
            if self.has_task:
                self.stop_reason = message["reason"] if message["cmd"] == "stop" else self.stop_reason
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

    @property
    def stop_requested(self) -> str | None:
        return self._inbox.stop_reason

    def report(self, step: int, value: float) -> None:
        """Send an epoch's value. Raises NonFiniteLoss: a study cannot hold NaN, and training on is pointless."""
        value = float(value)
        if not math.isfinite(value):
            raise NonFiniteLoss(f"value {value} reported for step {step}")
        self._send("progress", step=int(step), value=value)

    def tick(self) -> None:
        self._ticks += 1
        now = time.monotonic()
        if now >= self._next_tick:
            self._next_tick = now + TICK_INTERVAL_S
            self._send("tick", n=self._ticks)

    def settled(self) -> None:
        self._send("settled")

    def checkpoint(self, path: str, step: int = 0) -> None:
        self._outbox.send({"type": "checkpoint", "path": str(path), "step": step})

    def note(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the log's disk is full, which may be what is to be noted
            print(text, file=sys.stderr, flush=True)
        self._outbox.send({"type": "note", "text": one_line(text)})

    def _send(self, kind: str, **fields: Any) -> None:
        memory = {"peak_bytes": peak_bytes(), "device_bytes": device_peak_bytes()}
        self._outbox.send({"type": kind, **fields, **memory})


# -- the process ----------------------------------------------------------------------------------------------------


def _private_stdout() -> int:
    """The protocol's own descriptor; from here on `print` goes where stderr goes. Not inherited by children."""
    private = os.dup(1)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # or a crash loses the last prints
    return private


def _adopt_orphans() -> None:
    """Keep what double-forks or changes its session below this process, where whoever ends the trial finds it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _private_stdin() -> int:
    """The protocol's own descriptor; an `input()` of the user's finds an empty stdin instead of our commands."""
    private = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return private


def _preload(arguments: Sequence[str]) -> None:
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


def _log_to(path: Path) -> None:
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    threading.Thread(target=_bound_log, args=(path,), name="log", daemon=True).start()


def _bound_log(path: Path) -> None:
    """Cut the middle out of the log whenever it is over its limit. Writers append, so they go on behind the cut."""
    forever = threading.Event()
    while not forever.wait(LOG_CHECK_S):
        with contextlib.suppress(OSError):
            bound_log(path, LOG_LIMIT_BYTES, LOG_KEEP_BYTES)


def bound_log(path: Path, limit_bytes: int, keep_bytes: int) -> None:
    """Keep the first and the last `keep_bytes` of a log that is over its limit, in the same file."""
    with _CUTTING:
        size = path.stat().st_size
        if size <= limit_bytes:
            return
        with path.open("rb") as log:
            log.seek(-keep_bytes, os.SEEK_END)
            tail = log.read(keep_bytes)
        os.truncate(path, keep_bytes)
        with path.open("ab") as log:
            log.write(f"\n... {size - 2 * keep_bytes} bytes of log cut ...\n".encode() + tail)


def write_durably(path: Path, message: Mapping[str, Any]) -> None:
    """Write a JSON file that is there after a crash, or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(message, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def end_children() -> None:
    """Kill the processes a user's function started (Linux); data loaders elsewhere notice a dead parent themselves."""
    pending = [os.getpid()]
    while pending:
        for listing in Path(f"/proc/{pending.pop()}/task").glob("*/children"):
            with contextlib.suppress(OSError, ProcessLookupError):
                children = [int(child) for child in listing.read_text().split()]
                pending += children
                for child in children:
                    with contextlib.suppress(OSError):
                        os.kill(child, signal.SIGSTOP)  # so that it starts no more while we look at its own
                        os.kill(child, signal.SIGKILL)


# -- memory ---------------------------------------------------------------------------------------------------------


def peak_bytes() -> int:
    """This process's own largest resident size so far.

    VmHWM, not ru_maxrss: the latter is inherited through exec and would be the parent's.
    """
    found = _status("VmHWM")
    if found is not None:
        return found
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def rss_bytes() -> int:
    """This process's resident size now (elsewhere than on Linux: the largest so far)."""
    found = _status("VmRSS")
    return peak_bytes() if found is None else found


def _status(key: str) -> int | None:
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))
    except (OSError, StopIteration):
        return None


def device_facts() -> dict[str, Any] | None:
    """The accelerator torch sees: kind and bytes (for Metal what it can safely hold), None where there is none."""
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
    """The most this process has reserved on its device so far (MPS: holds now, there is no peak counter); 0 on CPU."""
    torch = sys.modules.get("torch")
    if torch is None:
        return 0
    if torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_reserved())
    if torch.backends.mps.is_available():
        return int(torch.mps.driver_allocated_memory())
    return 0


if __name__ == "__main__":
    status = 1
    try:
        status = main()
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    end_children()
    os._exit(status)  # a user's thread or atexit function must not keep a finished trial

"""The trial process: `python -m training.trial` runs one attempt, told and watched through two pipes.

Covers its life from a warm spare to its end, and what keeps a user's function from disturbing it: its prints go where
stderr goes, a pipe that the agent reads into a log of bounded size; a segfault leaves a stack in the log. What is said
is `training.protocol`, what becomes of the function `training.objective`. Does not train: the task names the function
that does.

It starts before its task is known (a warm spare), so what every trial needs is imported before `ready`; or it is forked
off a process that has imported it (`training.fork_server`). End of file on stdin means that whoever started it is gone:
it exits at once, whatever it is doing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.errors import ObjectiveNotImported
from training.memory import children_peak_bytes, device_facts, device_peak_bytes, peak_bytes, rss_bytes
from training.objective import resolve, run
from training.pipes import private_stdin, private_stdout, reader_gone, same_file
from training.plain import one_line, text
from training.processes import ORPHANED, adopt_orphans, end_children, leave_with
from training.protocol import PROTOCOL, Inbox, Outbox, TrialProgress
from training.runtime import FORKED, in_force
from training.tensor_file import sync_folder

LOG, RESULT = "trial.log", "result.json"  # in the attempt's folder


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
    adopt_orphans()
    log_pipe, outbox, inbox = same_file(2), Outbox(private_stdout()), Inbox(private_stdin())
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


def end_if_alone(log_pipe: tuple[int, int] | None, outbox: Outbox) -> None:
    """Never returns once whoever reads our output is gone: a function that fails then may have failed of that (EPIPE
    in a print, SIGPIPE in a child), and the end of stdin may be a moment late.

    log_pipe: what stderr was at the start; a function may have put something of its own in its place.
    """
    if (same_file(2) == log_pipe and reader_gone(2)) or outbox.reader_gone:
        end_children()
        os._exit(ORPHANED)


def check(name: str) -> int:
    """Import the function `module:function` names; 0, or 1 with the last line on stderr saying why not."""
    try:
        resolve(name)
    except ObjectiveNotImported as error:
        print(one_line(text(error)), file=sys.stderr)
        return 1
    return 0


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


if __name__ == "__main__":
    leave_with(main)

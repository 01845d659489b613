"""The processes of a trial: what its function has started ends with it, and so does the trial itself, whatever is left.

Covers who is below it and how they are ended. Ending a trial from outside is the agent's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
ORPHANED = 3  # exit status of a trial whose agent is gone: after the end of stdin


def adopt_orphans() -> None:
    """Keep what double-forks or changes its session below this process, where whoever ends the trial finds it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


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

"""Training functions that need a watchdog, for the tests of the whole scheduler: what BAD names happens to trial 0.

Everything else is `tests.faults.tiny`: the other trials of the study train as usual.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from tests.faults import tiny

candidates, sample, estimate = tiny.candidates, tiny.sample, tiny.estimate


def objective(task: Mapping[str, Any], progress: Any) -> dict[str, Any]:
    """Trial 0 goes wrong in the way that BAD says; the others train."""
    if task["attempt"].split("/")[1] == "0":
        progress.report(1, 0.9)
        {"deadlock": deadlock, "grow": grow, "leap": leap}[os.environ["BAD"]]()
    return tiny.objective(task, progress)


def deadlock() -> None:
    """Wait for a lock that nobody will release."""
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def grow() -> None:
    """Hold far more than was promised, and keep it."""
    held = [bytearray(os.urandom(2**20)) * 64 for _ in range(12)]
    time.sleep(3600)
    del held


def leap() -> None:
    """Take memory as fast as it can be had."""
    held = []
    while True:
        held.append(b"\xff" * 2**26)

"""A trial that writes without end: its log stays within its limit at every moment, and nothing else suffers."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from pathlib import Path

import pytest

from scheduler.files.bounded_log import LIMIT_BYTES
from tests.faults.sandbox import TINY, Sandbox
from tests.faults.test_resume import ends, nothing_left, tail
from tests.faults.tiny import FLOOD_BYTES

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]
if sys.platform != "linux":
    pytestmark.append(pytest.mark.skip(reason="reads /proc"))

SLACK_BYTES = 4 * 2**20  # spec, result, database, journal


class LargestSize:
    """Looks at a folder's size all the time, in a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._done = folder, threading.Event()
        self.looks, self.bytes = 0, 0
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> LargestSize:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.01):
            found = 0
            for folder, _, files in os.walk(self._folder):  # what goes away meanwhile is left out
                for name in files:
                    with contextlib.suppress(OSError):
                        found += os.stat(os.path.join(folder, name)).st_size
            self.looks, self.bytes = self.looks + 1, max(self.bytes, found)


def test_a_flood_of_500_mib_never_takes_more_than_the_limit(tmp_path: Path) -> None:
    """Prints, a child's output and raw writes: the run folder is never larger than one log may be; the trial counts,
    and its log has its first and its last line."""
    settings = {"budgets": ["2M"], "horizons": [1], "trials": 1, "training": {"objective": f"{TINY}:floods"}}
    with Sandbox(tmp_path / "run", **settings) as box, LargestSize(box.root / "runs") as largest:
        assert ends(box.start(), box, 300) == 0, tail(box)
        assert largest.looks > 100
        assert LIMIT_BYTES * 0.9 < largest.bytes <= LIMIT_BYTES + SLACK_BYTES
        (trial,) = box.trials()
        assert (trial["state"], trial["attrs"].get("retries", 0)) == ("COMPLETE", 0)
        log = (box.folder / "attempts" / "crash_2M_h1.t0000.a1" / "trial.log").read_bytes()
        assert log.startswith(b"the first line\n") and log.endswith(b"\nthe last line\n")
        assert FLOOD_BYTES - LIMIT_BYTES < int(log.split(b"\n... ")[1].split()[0]) < FLOOD_BYTES - LIMIT_BYTES // 2
        nothing_left(box)

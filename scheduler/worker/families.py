"""Looks at the process trees of trials that have children, so that what these take counts.

Covers how often (each look walks page tables: milliseconds per GiB) and from which threads. What a look means is
`tree_peak`, how it is read `host.vitals`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from scheduler.host import vitals

if TYPE_CHECKING:
    from scheduler.worker.agent import AttemptRun

LOOK_SHARE = 0.02  # of a core, for all of them


class Families:
    """All trials of one agent. `look` may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 0.0

    def beat(self, runs: Sequence[AttemptRun]) -> None:
        """Look at those that have children, unless looking has cost so much that it has to wait: what a child takes
        for half a second counts, too."""
        if time.monotonic() >= self._next and (parents := [r for r in runs if vitals.has_children(r.process.pid)]):
            self.look(parents)

    def look(self, runs: Sequence[AttemptRun]) -> None:
        """Read what each process of these trees holds now."""
        with self._lock:
            began = time.monotonic()
            wanted = {run.attempt: (run.process.pid, run.registration.start_time, tuple(run.family)) for run in runs}
            found = vitals.processes(wanted)
            for run in runs:
                run.family.update(each.identity for each in found[run.attempt])
                run.seen.tree.saw(run.process.pid, found[run.attempt])
            now = time.monotonic()
            self._next = now + (now - began) / LOOK_SHARE

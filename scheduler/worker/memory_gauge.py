"""Reads what an agent's trials, the agent itself and its host hold of memory.

Covers how often trees with children are looked at (each look walks page tables: milliseconds per GiB), from which
threads, and what a kill by the kernel has freed. What a look means is `trial_tree`, how it is read `host.vitals`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scheduler.host import vitals
from scheduler.host.promises import Promises
from scheduler.model.samples import HostMemory
from scheduler.worker.trial_tree import TrialTree

LOOK_SHARE = 0.02  # of a core, for all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What trials hold now, and have held at most, by attempt; tree_bytes: what the agent holds with all of them."""

    used_bytes: Mapping[str, int]
    peak_bytes: Mapping[str, int]
    tree_bytes: int


class MemoryGauge:
    """One agent's. `look` may be called from any thread, the others from the agent's own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 0.0
        self._oom_kills: int | None = vitals.oom_kills()  # counted when it was last looked, a second ago

    # -- the trials' trees --------------------------------------------------------------------------------------------

    def beat(self, trees: Sequence[TrialTree]) -> None:
        """Look at those that have children, unless looking has cost so much that it has to wait: what a child takes
        for half a second counts, too."""
        if time.monotonic() >= self._next and (parents := [t for t in trees if vitals.has_children(t.pid)]):
            self.look(parents)

    def look(self, trees: Sequence[TrialTree]) -> None:
        """Read what each process of these trees holds now."""
        with self._lock:
            began = time.monotonic()
            found = vitals.processes({t.attempt: (t.pid, t.start_time, tuple(t.members)) for t in trees})
            for tree in trees:
                tree.looked_at(found[tree.attempt])
            now = time.monotonic()
            self._next = now + (now - began) / LOOK_SHARE

    def measure(self, trees: Sequence[TrialTree], *, shared_bytes: int) -> Measured:
        """Sample every tree, and the agent's own. shared_bytes: what its trials and its spare share with the fork
        server, which would count once for each of them."""
        us = os.getpid()
        wanted: dict[str, Any] = {"": (us, vitals.start_time(us), False, ())}
        wanted.update({tree.attempt: (tree.pid, tree.start_time, False, tuple(tree.members)) for tree in trees})
        samples = vitals.sample_trees(wanted)
        self.look([tree for tree in trees if (found := samples[tree.attempt]) is not None and found.processes > 1])
        used, peaks = {}, {}
        for tree in trees:
            if (sample := samples[tree.attempt]) is None:
                continue
            if (footprint := tree.sampled(sample, vitals.peak_bytes(tree.pid))) is not None:
                used[tree.attempt] = footprint
            if (peak := tree.peak_bytes) is not None:
                peaks[tree.attempt] = peak
        own = samples[""]
        held = 0 if own is None else max(0, (own.footprint_bytes or 0) - shared_bytes)
        return Measured(used_bytes=used, peak_bytes=peaks, tree_bytes=held)

    # -- the host -----------------------------------------------------------------------------------------------------

    def host_memory(self) -> HostMemory:
        """Read the host's memory now."""
        memory = vitals.host_memory()
        self._oom_kills = memory.oom_kills
        return memory

    def freed_bytes(self) -> int | None:
        """No less than the one victim of the kernel held, asked right after that kill; None where there were others.

        The kernel kills when nothing is left: what is available now, the victim held (with others killed beside it
        that would say too much).
        """
        if (vitals.oom_kills() or 0) - (self._oom_kills or 0) != 1:
            return None
        return vitals.host_memory().available_bytes


def overhead_bytes(worker: tuple[int, float], promises: Promises) -> int:
    """Measure what a Dask worker, this agent, its watchdog and what is warm hold, while no trial of ours runs yet.

    worker: (pid, start time). promises: by which other runs' trials below the same worker are told apart.
    """
    own = os.getpid()
    # Exactly: what the fork server shares with the process it has forked counts once.
    roots = {"agent": (own, vitals.start_time(own) or 0.0, True, ()), "worker": (*worker, True, ())}
    found = vitals.sample_trees(roots)
    agent, around = found["agent"], found["worker"]
    trees = [around] if around and agent and set(agent.members) <= set(around.members) else [agent, around]
    held = sum(tree.footprint_bytes or 0 for tree in trees if tree is not None)
    others = promises.others_among(m for tree in trees if tree is not None for m in tree.members)
    return max(0, held - others)

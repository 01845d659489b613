"""What people look at, as values: the state of a batch at one moment, ready to be drawn.

Filled by the brain, drawn by `console` and `dashboard`. Bytes are `int`, durations `float` seconds. Standard
library only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyLine:
    """One study. waiting: why its next trial waits ("memory: needs 31.2 GiB, 12.0 GiB free"), None when none does."""

    name: str
    done: int
    quota: int
    running: int = 0
    waiting: str | None = None
    best: float | None = None
    closed: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLine:
    """One worker: what it may promise, has promised, and what is really taken. used_bytes: None when not measured.

    domain: the memory it shares with other workers of its host, "" where it shares none; domain_capacity_bytes,
    domain_headroom_bytes: of that memory as a whole.
    """

    address: str
    host: str
    capacity_bytes: int
    reserved_bytes: int
    used_bytes: int | None
    slots: int
    free_slots: int
    pressure: str = "normal"
    closed_reason: str | None = None
    domain: str = ""
    domain_capacity_bytes: int | None = None
    domain_headroom_bytes: int | None = None

    @property
    def headroom_bytes(self) -> int:
        own = self.capacity_bytes - self.reserved_bytes
        return own if self.domain_headroom_bytes is None else min(own, self.domain_headroom_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialLine:
    """One running attempt. epochs: at most this many, None when unknown."""

    attempt: str
    worker: str
    reserved_bytes: int
    used_bytes: int
    running_s: float
    epoch: int = 0
    epochs: int | None = None
    value: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The whole batch. draining: a first `q` came, nothing new starts; drain_s: at most so long, None while nothing
    drains."""

    run: str
    studies: tuple[StudyLine, ...] = ()
    workers: tuple[WorkerLine, ...] = ()
    trials: tuple[TrialLine, ...] = ()
    elapsed_s: float = 0.0
    draining: bool = False
    drain_s: float | None = None
    dashboard: str | None = None

    @property
    def capacity_bytes(self) -> int:
        """Of all workers together; memory that several share counts once."""
        return self._total("capacity_bytes", "domain_capacity_bytes")

    @property
    def headroom_bytes(self) -> int:
        """The same of what is not reserved."""
        return self._total("headroom_bytes", "domain_headroom_bytes")

    def _total(self, own: str, shared: str) -> int:
        total, bounds = dict[str, int](), dict[str, int]()
        for worker in self.workers:
            domain = worker.domain or worker.address
            total[domain] = total.get(domain, 0) + getattr(worker, own)
            if (bound := getattr(worker, shared)) is not None:
                bounds[domain] = bound
        return sum(min(size, bounds.get(domain, size)) for domain, size in total.items())

"""What people look at, as values: the state of a batch at one moment, ready to be drawn.

Filled by the brain, drawn by `picture` and `dashboard`. Bytes are `int`, durations `float` seconds. Standard
library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Eta:
    """Seconds from now: between low_s and high_s four times in five, and as often more as less than middle_s."""

    low_s: float
    middle_s: float
    high_s: float

    def later(self, age_s: float) -> Eta:
        """Return the same, foreseen `age_s` ago."""
        return Eta(
            low_s=max(0.0, self.low_s - age_s),
            middle_s=max(0.0, self.middle_s - age_s),
            high_s=max(0.0, self.high_s - age_s),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyLine:
    """One study. waiting: why its next trial waits ("memory: needs 31.2 GiB, 12.0 GiB free"), None when none does.

    refused: why it was not begun at all.
    """

    name: str
    done: int
    quota: int
    running: int = 0
    waiting: str | None = None
    best: float | None = None
    closed: str | None = None
    refused: str | None = None
    eta: Eta | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLine:
    """One worker: what it may promise, has promised, and what is really taken. used_bytes: None when not measured.

    available_bytes: what its host has free now, None when that cannot be measured.
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
    available_bytes: int | None = None
    swap_bytes: int | None = None
    domain: str = ""
    domain_capacity_bytes: int | None = None
    domain_headroom_bytes: int | None = None

    @property
    def headroom_bytes(self) -> int:
        own = self.capacity_bytes - self.reserved_bytes
        return own if self.domain_headroom_bytes is None else min(own, self.domain_headroom_bytes)

    @property
    def state(self) -> str:
        """Why nothing starts there, or how pressed its memory is."""
        return self.closed_reason or self.pressure


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialLine:
    """One running attempt. epochs: at most this many, None when unknown. within: the part of the present epoch that is
    done, None when unknown; ticks: its steps so far. params: those that matter, in words. state: "" while it runs."""

    attempt: str
    worker: str
    reserved_bytes: int
    used_bytes: int
    running_s: float
    epoch: int = 0
    epochs: int | None = None
    value: float | None = None
    within: float | None = None
    ticks: int = 0
    params: str = ""
    state: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingLine:
    """A trial that waits. what: for what, with the numbers; behind: the trial that goes first, "" where none does.

    waited_s: so far; still: probably from now on, None while nothing is foreseen.
    """

    trial: str
    what: str
    waited_s: float
    behind: str = ""
    still: Eta | None = None
    params: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """Something to know, as a sentence. tone: "bad", "warn", "good" or "". attempt: whose end it is, "" if nobody's."""

    unix: float
    text: str
    tone: str = ""
    attempt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The whole batch. draining: a first `q` came, nothing new starts; drain_s: at most so long, None while nothing
    drains. eta: until its end; unforeseen: why there is none. happenings: the latest, oldest first.

    waits: how many trials wait, by reason; ends: how many attempts ended, by reason.
    """

    run: str
    studies: tuple[StudyLine, ...] = ()
    workers: tuple[WorkerLine, ...] = ()
    trials: tuple[TrialLine, ...] = ()
    waiting: tuple[WaitingLine, ...] = ()
    happenings: tuple[Happening, ...] = ()
    waits: Mapping[str, int] = field(default_factory=dict)
    ends: Mapping[str, int] = field(default_factory=dict)
    elapsed_s: float = 0.0
    eta: Eta | None = None
    unforeseen: str = ""
    draining: bool = False
    drain_s: float | None = None
    dashboard: str | None = None

    @property
    def done(self) -> int:
        """Trials that count, of all studies together."""
        return sum(study.done for study in self.studies)

    @property
    def quota(self) -> int:
        """How many there are to be, those of refused studies not among them."""
        return sum(study.quota for study in self.studies if study.refused is None)

    @property
    def reserved_bytes(self) -> int:
        return sum(worker.reserved_bytes for worker in self.workers)

    @property
    def used_bytes(self) -> int:
        return sum(worker.used_bytes or 0 for worker in self.workers)

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

"""Placement's view: a trial that waits, an attempt that runs, and what was decided about them."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scheduler.model.ids import AttemptId, TrialId
from scheduler.model.memory import Footprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """The parameters of a trial and what it is predicted to need with them.

    Of one trial there may be several, which train to the same end and differ in the memory that they take.
    """

    params: Mapping[str, Any]
    footprint: Footprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A trial that has been sampled and waits to be placed.

    share: its study's part of the fair share already used (finished and running trials over quota); smaller first.
    expected_s: predicted duration, None when nothing is known yet.
    smaller: what it can do with instead, largest first: the same trial, trained with less memory.
    prefer_host: the host that has its checkpoint; until the instant prefer_until it waits for room there.
    """

    trial: TrialId
    footprint: Footprint
    slots: int
    since: float
    share: float
    expected_s: float | None = None
    smaller: tuple[Footprint, ...] = ()
    prefer_host: str | None = None
    prefer_until: float = 0.0

    @property
    def least_bytes(self) -> int:
        """What it could do with; 1 when nobody knows what it needs."""
        smallest = self.smaller[-1] if self.smaller else self.footprint
        return smallest.host_bytes if smallest.is_known else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A running attempt as placement sees it. expected_end: instant it will probably end, None when unknown."""

    attempt: AttemptId
    worker: str
    reserved_bytes: int
    device_reserved_bytes: int
    slots: int
    expected_end: float | None = None


@dataclass(frozen=True, slots=True)
class Admit:
    """Yes: reserve this much on this worker."""

    worker: str
    host_bytes: int
    device_bytes: int = 0


class DeferReason(enum.StrEnum):
    """Why a trial is not placed now: a constant word for the journal, and what it waits for in words for people."""

    words: str

    def __new__(cls, name: str, words: str) -> DeferReason:
        member = str.__new__(cls, name)
        member._value_, member.words = name, words
        return member

    MEMORY = "memory", "memory"
    LIVE_MEMORY = "live_memory", "memory that other programs hold"
    DEVICE_MEMORY = "device_memory", "memory of the device"
    SLOTS = "slots", "a free slot"
    PRESSURE = "pressure", "the host's memory pressure to ease"
    CLOSED = "closed", "the host to be opened again"
    PROBE_FAILED = "probe_failed", "a working memory probe"
    RETRY_DELAY = "retry_delay", "its next attempt"
    NO_WORKER = "no_worker", "a worker"
    NO_WORKER_FITS = "no_worker_fits", "a worker that is large enough"
    NOT_EMPTY = "not_empty", "an empty worker (its size is unknown)"
    HELD_FOR_HEAD = "held_for_head", "the worker that is held for a larger trial"
    CHECKPOINT_ELSEWHERE = "checkpoint_elsewhere", "the host that has its checkpoint"


@dataclass(frozen=True, slots=True)
class Defer:
    """Not now. `numbers`: what led there."""

    reason: DeferReason
    numbers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reject:
    """Never, on any worker there is."""

    reason: str
    numbers: Mapping[str, int] = field(default_factory=dict)


Decision = Admit | Defer | Reject

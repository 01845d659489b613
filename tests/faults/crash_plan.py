"""What the crash campaign does to a run: its kinds of events, when each comes, and what each may cost at most.

Pure: the list follows from a seed. Their moments also follow from the machine, as in life. How an event is carried out
is `crash_round`; that nothing else was lost is `crash_promises`.
"""

from __future__ import annotations

import collections
import enum
import random
from collections.abc import Mapping
from dataclasses import dataclass

EPOCHS, TRIALS, SLOTS, STUDIES = 10, 10, 2, 12
AWAY_TIMEOUT_S = 20.0  # the run's `away_timeout_s`: agents hold their attempts for so long without their driver
LEASE_S = 3.0  # the run's `lease_s`: after so long without a sign of its driver another may take its trials over
# What a dying program is in the middle of: the moments at which something could be lost or done twice.
MOMENTS = (
    "batch.started",
    "worker.joined",
    "study.opened",
    "trial.asked",
    "attempt.launched",
    "attempt.started",
    "attempt.ended",
    "trial.ended",
    "trial.requeued",
    "trial.told",
    "study.closed",
)


class Kind(enum.StrEnum):
    """The first nine are SIGKILLs. Which of them there are: see `weights`."""

    DRIVER = "driver killed"
    AGENT = "agent killed"
    TRIAL = "trial process killed"
    SPARE = "warm spare killed"
    FORK_SERVER = "fork server killed"
    WATCHDOG = "watchdog killed"
    WORKER = "worker killed"
    WORKER_TWICE = "worker killed, and the next one too"
    NANNY = "nanny killed"
    SCHEDULER = "scheduler killed, and started again"
    DISK = "disk full"
    DISK_DRIVER = "disk full, driver killed meanwhile"
    INODES = "no inodes"
    STOPPED = "driver stopped for longer than it is waited for"
    PAUSED = "driver stopped for a moment"
    TAKEN = "driver stopped past its lease, its trials taken over by another"
    QUIT = "asked to stop"
    QUIT_DRIVER = "asked to stop, driver killed meanwhile"
    NETWORK = "network cut"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one event may cost at most: attempts that end so, and are run again. Everything else is to cost nothing.

    lost: killed in the middle of an epoch. left: asked to leave with their checkpoint. no_room: they found the disk
    full, or were not started because of it; a disk that is filled again by what was being written when it got room
    has another go at each slot.
    """

    lost: int = 0
    left: int = 0
    no_room: int = 0


COSTS: Mapping[Kind, Cost] = {
    Kind.DRIVER: Cost(lost=SLOTS),
    Kind.AGENT: Cost(lost=SLOTS),
    Kind.TRIAL: Cost(lost=1),
    Kind.SPARE: Cost(lost=1),  # it may just have been given its trial
    Kind.FORK_SERVER: Cost(),
    Kind.WATCHDOG: Cost(),
    Kind.WORKER: Cost(),
    Kind.WORKER_TWICE: Cost(),
    Kind.NANNY: Cost(),
    Kind.SCHEDULER: Cost(),
    Kind.DISK: Cost(no_room=4 * SLOTS),
    Kind.DISK_DRIVER: Cost(lost=SLOTS, no_room=4 * SLOTS),
    Kind.INODES: Cost(no_room=4 * SLOTS),
    Kind.STOPPED: Cost(left=SLOTS),
    Kind.PAUSED: Cost(),
    Kind.TAKEN: Cost(left=2 * SLOTS),  # of both drivers
    Kind.QUIT: Cost(left=SLOTS),
    Kind.QUIT_DRIVER: Cost(lost=SLOTS, left=SLOTS),
    Kind.NETWORK: Cost(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What all events of a round may have cost together."""

    lost: int
    left: int
    no_room: int

    @classmethod
    def of(cls, done: collections.Counter[Kind], slow: int = 0) -> Allowance:
        """slow: of the events, those that kept driver and agents apart for longer than agents hold their attempts."""
        costs = [(COSTS[kind], n) for kind, n in done.items()]
        return cls(
            lost=sum(cost.lost * n for cost, n in costs),
            left=sum(cost.left * n for cost, n in costs) + SLOTS * slow,
            no_room=sum(cost.no_room * n for cost, n in costs),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One event: `delay_s` after the next journal line of name `after` (None: after the event before).

    pick: which of several victims or ways, in [0, 1). length_s: how long what lasts lasts.
    """

    kind: Kind
    after: str | None
    delay_s: float
    pick: float
    length_s: float

    def __str__(self) -> str:
        return f"{self.kind} {self.delay_s:.3f} s after {self.after or 'the last one'}"


def weights(*, cluster: bool, disk: bool, network: bool) -> dict[Kind, int]:
    """How often each kind comes. disk: the run folder has a file system of its own; network: the worker has."""
    found = {Kind.DRIVER: 8, Kind.AGENT: 5, Kind.TRIAL: 6, Kind.SPARE: 3, Kind.WATCHDOG: 4, Kind.WORKER: 5}
    found |= {
        Kind.FORK_SERVER: 3,
        Kind.WORKER_TWICE: 4,
        Kind.STOPPED: 1,
        Kind.PAUSED: 2,
        Kind.TAKEN: 2,
        Kind.QUIT: 3,
        Kind.QUIT_DRIVER: 1,
    }
    if cluster:
        found |= {Kind.NANNY: 4, Kind.SCHEDULER: 5}
    if network:
        found |= {Kind.NETWORK: 3}
    if disk:
        found |= {Kind.DISK: 2, Kind.DISK_DRIVER: 1, Kind.INODES: 2}
    return found


def plan(seed: int, count: int, *, cluster: bool, disk: bool = False, network: bool = False) -> list[Event]:
    """A seeded list of events, spread over all that runs."""
    rng = random.Random(f"{seed}/{cluster}")
    kinds = weights(cluster=cluster, disk=disk, network=network)
    found = []
    for _ in range(count):
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        if rng.random() < 0.5:
            after, delay_s = rng.choice(MOMENTS), rng.choice((0.0, 0.0, rng.uniform(0, 0.02), rng.uniform(0, 0.3)))
        else:
            after, delay_s = None, rng.uniform(0.0, 5.0 if kind is Kind.DRIVER else 2.0)
        pick, length_s = rng.random(), rng.uniform(*_LENGTHS.get(kind, (1.0, 4.0)))
        found.append(Event(kind=kind, after=after, delay_s=delay_s, pick=pick, length_s=length_s))
    return found


_LENGTHS: Mapping[Kind, tuple[float, float]] = {
    Kind.STOPPED: (AWAY_TIMEOUT_S + 1.0, AWAY_TIMEOUT_S + 3.0),
    Kind.SCHEDULER: (0.0, 2.0),
    Kind.QUIT_DRIVER: (0.0, 1.0),
    Kind.NETWORK: (1.0, 6.0),
}

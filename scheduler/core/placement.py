"""Which waiting trials start now, and where: one pure function of (waiting, running, workers, now).

Covers the order (fair share, size, duration, age), the choice of a worker (the host that has its checkpoint, then the
tightest fit) and backfill round the head: the first trial in order that waits for something of ours, for which one
worker is held, and with it the memory that the worker shares with others of its host. Does not decide whether one
trial fits one worker (`admission`) nor what may pass the head (`backfill`).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from scheduler.core import admission, backfill
from scheduler.model import Admit, AttemptId, Defer, DeferReason, Reject, Running, TrialId, Waiting, WorkerView

# Studies whose fair shares differ by less than this are equals, among which the largest goes first: large before small
# is worth some 10 % of the makespan, and a strict share would leave every order to the trial that started last.
SHARE_STEP = 0.05
# A wait this long is worth a whole share: whatever keeps arriving with a smaller share, each trial gets its turn.
AGEING_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Start this trial there and reserve these bytes."""

    trial: TrialId
    worker: str
    host_bytes: int
    device_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Each waiting trial is in exactly one of `starts` and `deferred`.

    held: worker -> the trial it is held for; at most one, and only when something else could have started there.
    """

    starts: tuple[Start, ...] = ()
    deferred: Mapping[TrialId, Defer] = field(default_factory=dict)
    held: Mapping[str, TrialId] = field(default_factory=dict)


def place(
    waiting: Iterable[Waiting], running: Iterable[Running], workers: Iterable[WorkerView], now: float
) -> Placement:
    """Start what may start now. The result does not depend on the order of its inputs.

    `running` is read only when something waits while something else could start: hand in a generator.
    """
    board = _Board(workers, running, now)
    starts: list[Start] = []
    deferred: dict[TrialId, Defer] = {}
    blocked: list[Waiting] = []  # in order, while no worker is held: the first with something to wait for is the head
    hold: backfill.Hold | None = None
    held: dict[str, TrialId] = {}
    for trial in _ordered(waiting, now):
        view = board.tightest(trial, hold)
        if view is not None and hold is None and blocked:
            hold = next(filter(None, map(board.hold, blocked)), None)
            blocked.clear()
            view = board.tightest(trial, hold)
        if view is not None and trial.prefer_host not in (None, view.host):
            view = board.tightest(trial, hold, trial.prefer_host) or view
            if view.host != trial.prefer_host and now < trial.prefer_until:
                deferred[trial.trial] = Defer(
                    DeferReason.CHECKPOINT_ELSEWHERE, {"wait_s": math.ceil(trial.prefer_until - now)}
                )
                continue
        if view is None and hold is not None and (beside := board.beside(trial, hold)) is not None:
            held[hold.worker] = hold.head.trial
            if not hold.lets(trial, beside.address, now):
                deferred[trial.trial] = hold.defer(trial, now)
                continue
            hold.take(trial, beside.address, now)
            view = beside
        if view is None:
            deferred[trial.trial] = board.why_not(trial)
            if hold is None:
                blocked.append(trial)
        else:
            starts.append(board.start(trial, view))
    return Placement(starts=tuple(starts), deferred=deferred, held=held)


def _ordered(waiting: Iterable[Waiting], now: float) -> list[Waiting]:
    """Fair share in steps, then memory, then duration, then age. An unknown duration counts as the mean of the known.

    Memory before duration, so that among equals no stream of smaller trials, however long they take, stays ahead of a
    larger one.
    """
    trials = list(waiting)
    known = [trial.expected_s for trial in trials if trial.expected_s is not None]
    typical = sum(known) / len(known) if known else 0.0

    def key(trial: Waiting) -> tuple[int, float, float, float, float, TrialId]:
        level = math.floor(trial.share / SHARE_STEP) - math.floor((now - trial.since) / (AGEING_S * SHARE_STEP))
        size = trial.footprint.host_bytes if trial.footprint.is_known else math.inf
        duration = typical if trial.expected_s is None else trial.expected_s
        return level, -size, -duration, trial.share, trial.since, trial.trial

    return sorted(trials, key=key)


class _Board:
    """The workers while one call hands out starts; the open ones sorted by the room they have."""

    def __init__(self, workers: Iterable[WorkerView], running: Iterable[Running], now: float) -> None:
        self.views = {view.address: view for view in workers}
        self._now = now
        self._unread = running
        self._running: defaultdict[str, list[Running]] = defaultdict(list)
        self._together: defaultdict[str, list[str]] = defaultdict(list)  # by the memory they share
        for view in self.views.values():
            self._together[view.domain or view.address].append(view.address)
        usable = (view for view in self.views.values() if view.free_slots > 0 and admission.closed(view) is None)
        self._rooms = sorted((admission.room(view), view.address) for view in usable)
        self._best: WorkerView | None = None

    def admits(self, trial: Waiting, address: str) -> bool:
        return isinstance(admission.admit(trial, self.views[address]), Admit)

    def together(self, address: str) -> list[str]:
        """Return the workers that share its memory, itself among them."""
        return self._together[self.views[address].domain or address]

    def beside(self, trial: Waiting, hold: backfill.Hold) -> WorkerView | None:
        """Where it could start in the memory that is held: on the held worker, or on one that shares it."""
        others = (address for address in sorted(self.together(hold.worker)) if address != hold.worker)
        return next((self.views[a] for a in (hold.worker, *others) if self.admits(trial, a)), None)

    def tightest(self, trial: Waiting, hold: backfill.Hold | None, host: str | None = None) -> WorkerView | None:
        """Return the worker (of that host) with the least room that admits it, what is held aside.

        Large rooms stay whole for the large.
        """
        held = () if hold is None else self.together(hold.worker)
        need = trial.footprint.host_bytes if trial.footprint.is_known else 1
        for index in range(bisect_left(self._rooms, (need, "")), len(self._rooms)):
            address = self._rooms[index][1]
            if host is not None and self.views[address].host != host:
                continue
            if address not in held and self.admits(trial, address):
                return self.views[address]
        return None

    def start(self, trial: Waiting, view: WorkerView) -> Start:
        """Charge the start, so that the next trial sees what is left. Nothing of it is used yet: all is unclaimed."""
        admitted = admission.admit(trial, view)
        assert isinstance(admitted, Admit), (trial, admitted)
        host_bytes, device_bytes = admitted.host_bytes, admitted.device_bytes
        for address in self.together(view.address):
            self._charge(self.views[address], host_bytes, device_bytes, trial.slots, here=address == view.address)
        self._best = None
        self._running[view.address].append(
            Running(
                attempt=AttemptId(trial.trial, 0),
                worker=view.address,
                reserved_bytes=host_bytes,
                device_reserved_bytes=device_bytes,
                slots=trial.slots,
                expected_end=None if trial.expected_s is None else self._now + trial.expected_s,
            )
        )
        return Start(trial=trial.trial, worker=view.address, host_bytes=host_bytes, device_bytes=device_bytes)

    def _charge(self, view: WorkerView, host_bytes: int, device_bytes: int, slots: int, *, here: bool) -> None:
        """One of the workers whose memory a start takes; here: the one that it takes the slots of, too."""
        place = bisect_left(self._rooms, (admission.room(view), view.address))
        listed = place < len(self._rooms) and self._rooms[place][1] == view.address
        left = view.domain_headroom_bytes
        after = replace(
            view,
            reserved_bytes=view.reserved_bytes + host_bytes * here,
            unclaimed_bytes=view.unclaimed_bytes + host_bytes,
            device_reserved_bytes=view.device_reserved_bytes + device_bytes * (here or view.device_is_shared),
            free_slots=view.free_slots - slots * here,
            domain_headroom_bytes=None if left is None else left - host_bytes,
            domain_idle=False,
        )
        self.views[view.address] = after
        if listed:
            self._rooms.pop(place)
            if after.free_slots > 0:
                insort(self._rooms, (admission.room(after), after.address))

    def hold(self, head: Waiting) -> backfill.Hold | None:
        for run in self._unread:
            self._running[run.worker].append(run)
        self._unread = ()
        options = (
            (view, [run for address in self.together(view.address) for run in self._running.get(address, ())])
            for view in self.views.values()
        )
        return backfill.earliest(head, options, self._now)

    def why_not(self, trial: Waiting) -> Defer:
        """Return the reason on the worker that comes nearest: the roomiest open one, unless it can never take the
        trial."""
        if not self.views:
            return Defer(DeferReason.NO_WORKER)
        if self._best is None:
            full = ((admission.closed(view) is None, address) for address, view in self.views.items())
            self._best = self.views[self._rooms[-1][1] if self._rooms else max(full)[1]]
        decision = admission.admit(trial, self._best)
        if isinstance(decision, Defer):
            return decision
        others = (admission.admit(trial, self.views[address]) for address in sorted(self.views))
        numbers = decision.numbers if isinstance(decision, Reject) else {}
        return next((other for other in others if isinstance(other, Defer)), Defer(DeferReason.NO_WORKER_FITS, numbers))

"""Which waiting trials start now, and where: one pure function of (waiting, running, workers, now).

Covers the order (fair share, size, duration, age), the choice of a worker (the host that has its checkpoint, then the
tightest fit), the smaller form of a trial that would wait for memory, and backfill round the head: the first trial in
order that waits for something of ours, for which one worker is held, and with it the memory that the worker shares
with others of its host. Does not decide whether one trial fits one worker (`admission`) nor what may pass the head
(`backfill`).
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from scheduler.core import admission, backfill
from scheduler.core.rooms import Place, Rooms
from scheduler.model import Admit, AttemptId, Defer, DeferReason, Reject, Running, TrialId, Waiting, WorkerView

# Studies whose fair shares differ by less than this are equals, among which the largest goes first: large before small
# is worth some 10 % of the makespan, and a strict share would leave every order to the trial that started last.
SHARE_STEP = 0.05
# A wait this long is worth a whole share: whatever keeps arriving with a smaller share, each trial gets its turn.
AGEING_S = 86_400.0
# A hold is looked for on so many workers, those with most room: on a thousand alike the head does not wait long.
HOLD_CHOICE = 64

RunningOn = Callable[[str], Sequence[Running]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Start this trial there and reserve these bytes.

    form: 0 as it was asked, else the smaller form of that number (from 1).
    """

    trial: TrialId
    worker: str
    host_bytes: int
    device_bytes: int
    form: int = 0


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

    `running` is read only when something waits while something else could start.
    """

    def running_on(address: str) -> Sequence[Running]:
        if not grouped:
            for run in running:
                grouped[run.worker].append(run)
        return grouped[address]

    grouped: defaultdict[str, list[Running]] = defaultdict(list)
    return place_in(waiting, running_on, Rooms(workers), now)


def place_in(waiting: Iterable[Waiting], running_on: RunningOn, rooms: Rooms, now: float) -> Placement:
    """As `place`, for whoever has the workers in an index and what runs by worker. Changes neither."""
    board = _Board(rooms, running_on, now)
    starts: list[Start] = []
    deferred: dict[TrialId, Defer] = {}
    blocked: list[Waiting] = []  # in order, while no worker is held: the first with something to wait for is the head
    hold: backfill.Hold | None = None
    held: dict[str, TrialId] = {}
    for trial in _ordered(waiting, now):
        found = board.tightest(trial, hold)
        if found is not None and hold is None and blocked:
            hold = next(filter(None, map(board.hold, blocked)), None)
            blocked.clear()
            found = board.tightest(trial, hold)
        if found is not None and trial.prefer_host not in (None, found.view.host):
            found = board.tightest(trial, hold, trial.prefer_host) or found
            if found.view.host != trial.prefer_host and now < trial.prefer_until:
                deferred[trial.trial] = Defer(
                    DeferReason.CHECKPOINT_ELSEWHERE, {"wait_s": math.ceil(trial.prefer_until - now)}
                )
                continue
        if found is None and hold is not None and (beside := board.beside(trial, hold)) is not None:
            held[hold.worker] = hold.head.trial
            found = next((option for option in beside if hold.lets(option.trial, option.view.address, now)), None)
            if found is None:
                deferred[trial.trial] = hold.defer(beside[-1].trial, now)
                continue
            hold.take(found.trial, found.view.address, now)
        if found is None:
            deferred[trial.trial] = board.why_not(trial)
            if hold is None:
                blocked.append(trial)
        else:
            starts.append(board.start(found))
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


@dataclass(frozen=True, slots=True)
class _Option:
    """A trial, in one of its forms, where it could start."""

    trial: Waiting
    form: int
    view: WorkerView


def _forms(trial: Waiting) -> Iterator[tuple[int, Waiting]]:
    """Yield the trial as it was asked, then each smaller form of it."""
    yield 0, trial
    for number, footprint in enumerate(trial.smaller, 1):
        yield number, replace(trial, footprint=footprint, smaller=())


class _Board:
    """The workers while one call hands out starts: the index as it was, and beside it those that are charged by now."""

    def __init__(self, rooms: Rooms, running_on: RunningOn, now: float) -> None:
        self._rooms, self._charged = rooms, Rooms()
        self._now = now
        self._running_on = running_on
        self._started: defaultdict[str, list[Running]] = defaultdict(list)
        self._nearest: WorkerView | None = None  # until the next start

    def _view(self, address: str) -> WorkerView:
        return self._charged.views.get(address) or self._rooms.views[address]

    def _all(self, before: Iterator[WorkerView], charged: Iterator[WorkerView], **order: bool) -> Iterator[WorkerView]:
        """Both, in their common order, each worker as it is now."""
        if not self._charged.views:
            return before
        unchanged = (view for view in before if view.address not in self._charged.views)
        return heapq.merge(unchanged, charged, key=_place, **order)

    def tightest(self, trial: Waiting, hold: backfill.Hold | None, host: str | None = None) -> _Option | None:
        """Return the worker (of that host) with the least room that admits it, what is held aside, in the largest of
        its forms that any admits.

        Large rooms stay whole for the large.
        """
        held: set[str] = set() if hold is None else self._rooms.together(hold.worker)
        for number, form in _forms(trial):
            need = form.footprint.host_bytes if form.footprint.is_known else 1
            views = self._all(
                self._rooms.from_tightest(need, form.slots), self._charged.from_tightest(need, form.slots)
            )
            for view in views:
                if view.address not in held and (host is None or view.host == host) and _admits(form, view):
                    return _Option(form, number, view)
        return None

    def beside(self, trial: Waiting, hold: backfill.Hold) -> list[_Option] | None:
        """In which forms, the largest first, it could start in the memory that is held, and where: on the held worker,
        or on one that shares its memory; None: in none."""
        others = sorted(address for address in self._rooms.together(hold.worker) if address != hold.worker)
        found = []
        for number, form in _forms(trial):
            views = (self._view(address) for address in (hold.worker, *others))
            if (view := next((view for view in views if _admits(form, view)), None)) is not None:
                found.append(_Option(form, number, view))
        return found or None

    def start(self, option: _Option) -> Start:
        """Charge the start, so that the next trial sees what is left. Nothing of it is used yet: all is unclaimed."""
        trial, view = option.trial, option.view
        admitted = admission.admit(trial, view)
        assert isinstance(admitted, Admit), (trial, admitted)
        host_bytes, device_bytes = admitted.host_bytes, admitted.device_bytes
        self._nearest = None
        for address in self._rooms.together(view.address):
            self._charge(self._view(address), host_bytes, device_bytes, trial.slots, here=address == view.address)
        self._started[view.address].append(
            Running(
                attempt=AttemptId(trial.trial, 0),
                worker=view.address,
                reserved_bytes=host_bytes,
                device_reserved_bytes=device_bytes,
                slots=trial.slots,
                expected_end=None if trial.expected_s is None else self._now + trial.expected_s,
            )
        )
        return Start(
            trial=trial.trial,
            worker=view.address,
            host_bytes=host_bytes,
            device_bytes=device_bytes,
            form=option.form,
        )

    def _charge(self, view: WorkerView, host_bytes: int, device_bytes: int, slots: int, *, here: bool) -> None:
        """One of the workers whose memory a start takes; here: the one that it takes the slots of, too."""
        left = view.domain_headroom_bytes
        self._charged.put(
            replace(
                view,
                reserved_bytes=view.reserved_bytes + host_bytes * here,
                unclaimed_bytes=view.unclaimed_bytes + host_bytes,
                device_reserved_bytes=view.device_reserved_bytes + device_bytes * (here or view.device_is_shared),
                free_slots=view.free_slots - slots * here,
                domain_headroom_bytes=None if left is None else left - host_bytes,
                domain_idle=False,
            )
        )

    def hold(self, trial: Waiting) -> backfill.Hold | None:
        """Keep a worker for it: the one where its smallest form can start first."""
        *_, (_, head) = _forms(trial)
        views = self._all(self._rooms.from_roomiest(), self._charged.from_roomiest(), reverse=True)
        able = (view for view in views if admission.never(head.footprint, head.slots, view) is None)
        options = (
            (view, [run for other in self._rooms.together(view.address) for run in self._running(other)])
            for view in islice(able, HOLD_CHOICE)
        )
        return backfill.earliest(head, options, self._now)

    def _running(self, address: str) -> Sequence[Running]:
        return [*self._running_on(address), *self._started.get(address, ())]

    def why_not(self, trial: Waiting) -> Defer:
        """Return the reason on the worker that comes nearest: the roomiest open one, unless it can never take the
        trial."""
        if self._nearest is None:
            near = (self._rooms.nearest(without=self._charged.views), self._charged.nearest())
            views = [self._view(view.address) for view in near if view is not None]
            if not views:
                return Defer(DeferReason.NO_WORKER)
            order = lambda view: (admission.closed(view) is None, view.free_slots > 0, *_place(view))  # noqa: E731
            self._nearest = max(views, key=order)
        *_, (_, trial) = _forms(trial)
        decision = admission.admit(trial, self._nearest)
        if isinstance(decision, Defer):
            return decision
        others = (admission.admit(trial, self._view(address)) for address in sorted(self._rooms.views))
        numbers = decision.numbers if isinstance(decision, Reject) else {}
        return next((other for other in others if isinstance(other, Defer)), Defer(DeferReason.NO_WORKER_FITS, numbers))


def _admits(trial: Waiting, view: WorkerView) -> bool:
    return isinstance(admission.admit(trial, view), Admit)


def _place(view: WorkerView) -> Place:
    return admission.room(view), view.address

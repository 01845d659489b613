"""The workers that are here, by what they have free: what placement looks through without looking at all of them.

Covers the order by room and by free slots, the largest worker, and who shares memory with whom, kept as single workers
change. Decides nothing: whether a trial may start is `admission`'s.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from scheduler.core import admission
from scheduler.model import WorkerView

Place = tuple[int, str]  # bytes, address


@dataclass(frozen=True, slots=True)
class _Entry:
    """By what a worker stands where in the index."""

    room: Place
    limit: Place
    free_slots: int
    is_open: bool
    domain: str

    @classmethod
    def of(cls, view: WorkerView) -> _Entry:
        limit = view.capacity_bytes if view.limit_bytes is None else view.limit_bytes
        is_open = admission.closed(view) is None
        domain = view.domain or view.address
        return cls((admission.room(view), view.address), (limit, view.address), view.free_slots, is_open, domain)

    def is_same_worker(self, other: _Entry) -> bool:
        return self.limit == other.limit and self.domain == other.domain


class Rooms:
    """An index of views. A change costs two searches in sorted lists, whatever the number of workers."""

    def __init__(self, views: Iterable[WorkerView] = ()) -> None:
        self._views: dict[str, WorkerView] = {}
        self._entries: dict[str, _Entry] = {}  # where each stands in what follows
        self._open: dict[int, list[Place]] = {}  # free slots -> (room, address), of the workers that are open
        self._shut: dict[int, set[str]] = {}  # the same of those that are not
        self._limits: list[Place] = []
        self._together: defaultdict[str, set[str]] = defaultdict(set)  # by the memory they share
        for view in views:
            self.put(view)

    @property
    def views(self) -> Mapping[str, WorkerView]:
        """All that are here, by address."""
        return self._views

    def put(self, view: WorkerView) -> None:
        """Take in a worker, or what has become of it."""
        before, entry = self._entries.get(view.address), _Entry.of(view)
        self._views[view.address] = view
        if before == entry:
            return
        if before is not None and before.is_same_worker(entry):  # as a rule: only its room has changed
            self._leave_order(before)
        elif before is not None:
            self.drop(view.address)
            self._views[view.address] = view
            before = None
        self._entries[view.address] = entry
        if entry.is_open:
            insort(self._open.setdefault(entry.free_slots, []), entry.room)
        else:
            self._shut.setdefault(entry.free_slots, set()).add(view.address)
        if before is None:
            insort(self._limits, entry.limit)
            self._together[entry.domain].add(view.address)

    def drop(self, address: str) -> None:
        """Forget a worker; one that is not there is no error."""
        entry = self._entries.pop(address, None)
        if entry is None:
            return
        del self._views[address]
        self._leave_order(entry)
        del self._limits[bisect_left(self._limits, entry.limit)]
        _discard(self._together, entry.domain, address)

    def _leave_order(self, entry: _Entry) -> None:
        if not entry.is_open:
            _discard(self._shut, entry.free_slots, entry.room[1])
            return
        places = self._open[entry.free_slots]
        del places[bisect_left(places, entry.room)]
        if not places:
            del self._open[entry.free_slots]

    def together(self, address: str) -> set[str]:
        """Return the workers that share its memory, itself among them."""
        return self._together[self._views[address].domain or address]

    @property
    def largest(self) -> WorkerView | None:
        """Of all workers the one that has most for one trial when nothing runs."""
        return self._views[self._limits[-1][1]] if self._limits else None

    def by_limit(self) -> Iterator[WorkerView]:
        """Yield all workers, the largest first."""
        return (self._views[address] for _, address in reversed(self._limits))

    def from_tightest(self, need_bytes: int, slots: int) -> Iterator[WorkerView]:
        """Yield the open ones with so much room and so many free slots, those with the least room first."""
        lists = [_from(places, need_bytes) for free, places in self._open.items() if free >= slots]
        return (self._views[address] for _, address in (lists[0] if len(lists) == 1 else heapq.merge(*lists)))

    def from_roomiest(self) -> Iterator[WorkerView]:
        """Yield the open ones, those with the most room first, full or not."""
        merged = heapq.merge(*(reversed(places) for places in self._open.values()), reverse=True)
        return (self._views[address] for _, address in merged)

    def nearest(self, without: Container[str] = ()) -> WorkerView | None:
        """Return what a trial nobody has room for waits for: the roomiest with a free slot, else the roomiest."""
        best = max(
            (
                (free > 0, *place)
                for free, places in self._open.items()
                if (place := next((each for each in reversed(places) if each[1] not in without), None)) is not None
            ),
            default=None,
        )
        if best is not None:
            return self._views[best[2]]
        return self._views[max(self._views)] if self._views else None

    def has_open_slot(self, slots: int = 1) -> bool:
        """Whether an open worker has so many slots free."""
        return any(free >= slots for free in self._open)

    def has_slots(self, slots: int) -> bool:
        """Whether some worker, open or not, has so many slots free, or all that it has."""
        most = max((*self._open, *self._shut), default=0)
        return most >= slots or (most > 0 and any(v.free_slots == v.slots for v in self._views.values()))


def _from(places: list[Place], need_bytes: int) -> Iterator[Place]:
    return (places[index] for index in range(bisect_left(places, (need_bytes, "")), len(places)))


def _discard(sets: dict[Any, set[str]], key: Any, address: str) -> None:
    sets[key].remove(address)
    if not sets[key]:
        del sets[key]

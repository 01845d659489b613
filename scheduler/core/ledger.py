"""The ledger: who holds how many bytes on which worker, and of which memory.

One row per worker (its slots, its own bound), one domain per memory that workers share (a host, or the cgroup that
bounds them there), one reservation per attempt: it is charged to the row and to the domain. Covers reserving, resizing
and releasing, what each attempt was last seen to use, and the views that admission and placement decide on, in an index
that follows what changes. Decides nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from scheduler.core import admission
from scheduler.core.rooms import Rooms
from scheduler.model import AttemptId, Environment, Pressure, WorkerFacts, WorkerView


class LedgerError(RuntimeError):
    """An invariant of the ledger would break; the message tells the attempt and the numbers."""


@dataclass(slots=True, kw_only=True)
class Reservation:
    """Bytes held for one attempt, from launch until its memory is back."""

    attempt: AttemptId
    host_bytes: int
    device_bytes: int
    slots: int
    used_bytes: int = 0
    peak_bytes: int = 0  # at least what is used

    def saw(self, used_bytes: int | None, peak_bytes: int | None) -> None:
        """Note what the attempt was seen to use."""
        if used_bytes is not None:
            self.used_bytes = used_bytes
        self.peak_bytes = max(self.peak_bytes, used_bytes or 0, peak_bytes or 0)


@dataclass(slots=True, kw_only=True, eq=False)
class Domain:
    """Memory that all workers of a host, or of a cgroup on it, draw from."""

    name: str
    capacity_bytes: int
    rows: dict[str, Row] = field(default_factory=dict)

    @property
    def overhead_bytes(self) -> int:
        """What the workers' own processes hold."""
        return sum(row.facts.overhead_bytes for row in self.rows.values())

    @property
    def reserved_bytes(self) -> int:
        """What attempts and the workers' own processes hold."""
        return sum(row.reserved_bytes for row in self.rows.values())

    @property
    def unclaimed_bytes(self) -> int:
        """Promised to attempts here and not yet taken by them."""
        held = (r for row in self.rows.values() for r in row.reservations.values())
        return sum(max(0, r.host_bytes - r.used_bytes) for r in held)

    @property
    def is_idle(self) -> bool:
        return not any(row.reservations for row in self.rows.values())


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """One worker. `gone`: it left; its row stays until the last reservation on it is released.

    own_capacity_bytes: what it may promise whatever its domain has; None: no less than the domain.
    """

    facts: WorkerFacts
    own_capacity_bytes: int | None
    device_capacity_bytes: int | None
    reserve_bytes: int
    available_bytes: int | None
    swap_used_bytes: int | None = None  # shown to people; swap that others made keeps nothing from starting here
    pressure: Pressure = Pressure.NORMAL
    closed_reason: str | None = None
    others_unclaimed_bytes: int = 0
    gone: bool = False
    vitals_at: float | None = None
    reservations: dict[AttemptId, Reservation] = field(default_factory=dict)
    domain: Domain = field(default_factory=lambda: Domain(name="", capacity_bytes=0))
    changed: set[str] = field(default_factory=set)  # the ledger's: whose view is to be built anew

    def touch(self) -> None:
        """Something changed: the view of each worker that shares the memory is built anew before it is next read.

        With a thousand workers building dominates otherwise.
        """
        self.changed.update(self.domain.rows)

    @property
    def capacity_bytes(self) -> int:
        """Bytes it may promise in all, its own overhead included."""
        capacity, own = self.domain.capacity_bytes, self.own_capacity_bytes
        return capacity if own is None else min(own, capacity)

    @property
    def limit_bytes(self) -> int:
        """The most that one trial can be given here while no other runs on the host."""
        domain = self.domain
        return min(self.capacity_bytes - self.facts.overhead_bytes, domain.capacity_bytes - domain.overhead_bytes)

    @property
    def reserved_bytes(self) -> int:
        """What attempts and the worker's own processes hold."""
        return self.facts.overhead_bytes + sum(r.host_bytes for r in self.reservations.values())

    def view(self) -> WorkerView:
        """Return the row as admission and placement see it."""
        domain, facts = self.domain, self.facts
        shared = len(domain.rows) > 1
        unified = shared and facts.device is not None and facts.device.unified
        reserved, unclaimed, device, slots = facts.overhead_bytes, 0, 0, 0
        for held in self.reservations.values():
            reserved += held.host_bytes
            unclaimed += max(0, held.host_bytes - held.used_bytes)
            device += held.device_bytes
            slots += held.slots
        if unified:
            device = sum(r.device_bytes for row in domain.rows.values() for r in row.reservations.values())
        return WorkerView(
            address=facts.address,
            capacity_bytes=self.capacity_bytes,
            reserved_bytes=reserved,
            available_bytes=self.available_bytes,
            unclaimed_bytes=(domain.unclaimed_bytes if shared else unclaimed) + self.others_unclaimed_bytes,
            reserve_bytes=self.reserve_bytes,
            free_slots=facts.slots - slots,
            slots=facts.slots,
            pressure=self.pressure,
            closed_reason=self.closed_reason,
            device_capacity_bytes=self.device_capacity_bytes,
            device_reserved_bytes=device,
            device_is_shared=unified,
            domain=domain.name if shared else "",
            domain_headroom_bytes=domain.capacity_bytes - domain.reserved_bytes if shared else None,
            domain_idle=domain.is_idle if shared else not self.reservations,
            limit_bytes=self.limit_bytes,
            host=facts.host,
        )

    def has(self, need_bytes: int) -> bool:
        """Whether a slot and so much memory are free there now: what a view would say, for less."""
        held, domain = self.reservations.values(), self.domain
        return (
            self.closed_reason is None
            and self.available_bytes is not None
            and self.pressure < Pressure.ELEVATED
            and sum(r.slots for r in held) < self.facts.slots
            and need_bytes
            <= min(
                self.capacity_bytes - self.reserved_bytes,
                domain.capacity_bytes - domain.reserved_bytes,
                self.available_bytes - domain.unclaimed_bytes - self.others_unclaimed_bytes - self.reserve_bytes,
            )
        )


class Ledger:
    """All rows. Every reservation is made once and released once; anything else raises LedgerError."""

    def __init__(self) -> None:
        self._rows: dict[str, Row] = {}
        self._domains: dict[str, Domain] = {}
        self._where: dict[AttemptId, str] = {}
        self._rooms = Rooms()
        self._changed: set[str] = set()
        self._environments: dict[str, Environment | None] | None = {}  # None: to be looked up again

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    @property
    def domains(self) -> Iterator[Domain]:
        """Each memory once, however many workers share it."""
        return iter(self._domains.values())

    def overhead_beside(self, facts: WorkerFacts) -> int:
        """Bytes that other workers of ours hold of this worker's memory for themselves."""
        domain = self._domains.get(facts.domain or facts.address)
        rows = {} if domain is None else domain.rows
        return sum(row.facts.overhead_bytes for address, row in rows.items() if address != facts.address)

    def join(self, row: Row, domain_capacity_bytes: int) -> None:
        """Add a worker.

        One that comes back under the same address before its row is empty is a new life of it: the old reservations
        stay charged until their attempts are reported ended.

        domain_capacity_bytes: what its domain may promise, as this worker sees it. It counts while nothing runs there:
        later it would take our own trials for somebody else's memory.
        """
        address = row.facts.address
        if (old := self._rows.get(address)) is not None:
            row.reservations.update(old.reservations)
            self._leave_domain(old)
            self._environments = None
        name = row.facts.domain or address
        domain = self._domains.setdefault(name, Domain(name=name, capacity_bytes=domain_capacity_bytes))
        if domain.is_idle:
            domain.capacity_bytes = domain_capacity_bytes
        row.domain, domain.rows[address] = domain, row
        row.changed = self._changed
        self._rows[address] = row
        if self._environments is not None:
            _meet(self._environments, row.facts.environment)
        row.touch()

    def _leave_domain(self, row: Row) -> None:
        domain = row.domain
        del domain.rows[row.facts.address]
        if not domain.rows:
            del self._domains[domain.name]
        for other in domain.rows.values():
            other.touch()

    def leave(self, address: str) -> None:
        if (row := self._rows.get(address)) is not None:
            row.gone = True
            self._environments = None
            row.touch()
            self._drop_if_empty(row)

    def row(self, address: str) -> Row | None:
        return self._rows.get(address)

    def worker_of(self, attempt: AttemptId) -> str | None:
        return self._where.get(attempt)

    def reservation(self, attempt: AttemptId) -> Reservation | None:
        address = self._where.get(attempt)
        return None if address is None else self._rows[address].reservations[attempt]

    def saw(self, attempt: AttemptId, *, used_bytes: int | None = None, peak_bytes: int | None = None) -> None:
        """Note what an attempt was seen to use; unknown attempts (already ended) are ignored."""
        held = self.reservation(attempt)
        if held is not None:
            held.saw(used_bytes, peak_bytes)
            self._rows[self._where[attempt]].touch()

    def reserve(self, address: str, reservation: Reservation) -> None:
        """Hold the bytes. Raises LedgerError when they do not fit: admission must have asked before."""
        row = self._rows[address]
        attempt = reservation.attempt
        if attempt in self._where:
            raise LedgerError(f"{attempt} already holds a reservation on {self._where[attempt]}")
        for where, of in ((address, row), (row.domain.name, row.domain)):
            after = of.reserved_bytes + reservation.host_bytes
            if after > of.capacity_bytes:
                raise LedgerError(f"{attempt}: {after} bytes reserved on {where} would exceed {of.capacity_bytes}")
        row.reservations[attempt] = reservation
        row.touch()
        self._where[attempt] = address

    def resize(self, attempt: AttemptId, host_bytes: int, device_bytes: int | None = None) -> bool:
        """Change what is held; growing beyond capacity is allowed, because the bytes are already taken (admission
        then sees a negative headroom and stays closed). Returns whether anything changed."""
        held = self.reservation(attempt)
        if held is None:
            raise LedgerError(f"{attempt} holds no reservation to resize")
        device = held.device_bytes if device_bytes is None else device_bytes
        changed = (host_bytes, device) != (held.host_bytes, held.device_bytes)
        held.host_bytes, held.device_bytes = host_bytes, device
        self._rows[self._where[attempt]].touch()
        return changed

    def release(self, attempt: AttemptId) -> Reservation:
        """Give the bytes back, once. Raises LedgerError the second time."""
        address = self._where.pop(attempt, None)
        if address is None:
            raise LedgerError(f"{attempt} holds no reservation to release")
        row = self._rows[address]
        reservation = row.reservations.pop(attempt)
        row.touch()
        self._drop_if_empty(row)
        return reservation

    @property
    def rooms(self) -> Rooms:
        """The workers that are here, for admission and placement. Not to be kept: it follows what changes."""
        for address in self._changed:
            if (row := self._rows.get(address)) is None or row.gone:
                self._rooms.drop(address)
            else:
                self._rooms.put(row.view())
        self._changed.clear()
        return self._rooms

    def opens(self, row: Row, need_bytes: int) -> bool:
        """Whether somebody who needs so much could start there by what is known of it now, and when the index was last
        read could not."""
        if not row.has(need_bytes):
            return False
        before = self._rooms.views.get(row.facts.address)
        return (
            before is None
            or admission.closed(before) is not None
            or before.free_slots <= 0
            or admission.room(before) < need_bytes
        )

    def views(self) -> list[WorkerView]:
        """Return the rows of workers that are here."""
        return list(self.rooms.views.values())

    @property
    def environments(self) -> list[Environment | None]:
        """Those of the workers that are here, one of each name; None where one has not said.

        Of the workers of one environment the one whose processes hold most stands for all: by some MiB.
        """
        if self._environments is None:
            self._environments = {}
            for row in self._rows.values():
                if not row.gone:
                    _meet(self._environments, row.facts.environment)
        known = self._environments
        return [*filter(None, known.values()), *([None] if "" in known else [])]

    def running_on(self, address: str) -> Iterable[Reservation]:
        """Return what is held there, whoever it runs for."""
        row = self._rows.get(address)
        return () if row is None else row.reservations.values()

    def check(self) -> None:
        """Re-check the invariants (tests call this after each event). Raises LedgerError."""
        for address, row in self._rows.items():
            for attempt in row.reservations:
                if self._where.get(attempt) != address:
                    raise LedgerError(f"{attempt} stands in the row of {address} but not in the index")
        if sum(len(row.reservations) for row in self._rows.values()) != len(self._where):
            raise LedgerError("the index names reservations that no row holds")
        charged = [row for domain in self._domains.values() for row in domain.rows.values()]
        if sorted(map(id, charged)) != sorted(map(id, self._rows.values())):
            raise LedgerError("a worker draws from no domain, or from more than one")
        for name, domain in self._domains.items():
            if name != domain.name or any(row.domain is not domain for row in domain.rows.values()):
                raise LedgerError(f"the workers of {name} think otherwise of whose memory they share")
            if any(row.view() != self.rooms.views.get(address) for address, row in domain.rows.items() if not row.gone):
                raise LedgerError(f"a worker of {name} is not what the index has of it")
            rooms = {row.view().domain_headroom_bytes for row in domain.rows.values()}
            if len(domain.rows) > 1 and rooms != {domain.capacity_bytes - domain.reserved_bytes}:
                raise LedgerError(f"the workers of {name} see different room in the memory they share: {rooms}")

    def _drop_if_empty(self, row: Row) -> None:
        if row.gone and not row.reservations:
            del self._rows[row.facts.address]
            self._leave_domain(row)


def _meet(known: dict[str, Environment | None], found: Environment | None) -> None:
    """Note one more worker's."""
    name = "" if found is None else found.name
    same = known.get(name)
    if found is None or same is None or found.runtime_bytes > same.runtime_bytes:
        known[name] = found

"""The ledger: who holds how many bytes on which worker.

One row per worker (one memory domain), one reservation per attempt. Covers reserving, resizing and releasing, what
each attempt was last seen to use, and the view that admission and placement decide on. Decides nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from scheduler.model import AttemptId, Pressure, WorkerFacts, WorkerView


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
    peak_bytes: int = 0


@dataclass(slots=True, kw_only=True)
class Row:
    """One worker. `gone`: it left; its row stays until the last reservation on it is released."""

    facts: WorkerFacts
    capacity_bytes: int
    device_capacity_bytes: int | None
    reserve_bytes: int
    available_bytes: int | None
    pressure: Pressure = Pressure.NORMAL
    closed_reason: str | None = None
    gone: bool = False
    vitals_at: float | None = None
    reservations: dict[AttemptId, Reservation] = field(default_factory=dict)
    _view: WorkerView | None = None

    def touch(self) -> None:
        """Something changed: the next `view` is built anew (with a thousand workers building dominates otherwise)."""
        self._view = None

    @property
    def reserved_bytes(self) -> int:
        """What attempts and the worker's own processes hold."""
        return self.facts.overhead_bytes + sum(r.host_bytes for r in self.reservations.values())

    def view(self) -> WorkerView:
        if self._view is not None:
            return self._view
        held = self.reservations.values()
        self._view = WorkerView(
            address=self.facts.address,
            capacity_bytes=self.capacity_bytes,
            reserved_bytes=self.reserved_bytes,
            available_bytes=self.available_bytes,
            unclaimed_bytes=sum(max(0, r.host_bytes - r.used_bytes) for r in held),
            reserve_bytes=self.reserve_bytes,
            free_slots=self.facts.slots - sum(r.slots for r in held),
            slots=self.facts.slots,
            pressure=self.pressure,
            closed_reason=self.closed_reason,
            device_capacity_bytes=self.device_capacity_bytes,
            device_reserved_bytes=sum(r.device_bytes for r in held),
            host=self.facts.host,
        )
        return self._view


class Ledger:
    """All rows. Every reservation is made once and released once; anything else raises LedgerError."""

    def __init__(self) -> None:
        self._rows: dict[str, Row] = {}
        self._where: dict[AttemptId, str] = {}

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def join(self, row: Row) -> None:
        """A worker arrives. One that comes back under the same address before its row is empty is a new life of it:
        the old reservations stay charged until their attempts are reported ended."""
        address = row.facts.address
        if (old := self._rows.get(address)) is not None:
            row.reservations.update(old.reservations)
        self._rows[address] = row

    def leave(self, address: str) -> None:
        if (row := self._rows.get(address)) is not None:
            row.gone = True
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
        if held is None:
            return
        if used_bytes is not None:
            held.used_bytes = used_bytes
        held.peak_bytes = max(held.peak_bytes, used_bytes or 0, peak_bytes or 0)
        self._rows[self._where[attempt]].touch()

    def reserve(self, address: str, reservation: Reservation) -> None:
        """Hold the bytes. Raises LedgerError when they do not fit: admission must have asked before."""
        row = self._rows[address]
        attempt = reservation.attempt
        if attempt in self._where:
            raise LedgerError(f"{attempt} already holds a reservation on {self._where[attempt]}")
        after = row.reserved_bytes + reservation.host_bytes
        if after > row.capacity_bytes:
            raise LedgerError(f"{attempt}: {after} bytes reserved on {address} would exceed {row.capacity_bytes}")
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

    def views(self) -> list[WorkerView]:
        """The rows of workers that are here, for admission and placement."""
        return [row.view() for row in self._rows.values() if not row.gone]

    def check(self) -> None:
        """Re-check the invariants (tests call this after each event). Raises LedgerError."""
        for address, row in self._rows.items():
            for attempt in row.reservations:
                if self._where.get(attempt) != address:
                    raise LedgerError(f"{attempt} stands in the row of {address} but not in the index")
        if sum(len(row.reservations) for row in self._rows.values()) != len(self._where):
            raise LedgerError("the index names reservations that no row holds")

    def _drop_if_empty(self, row: Row) -> None:
        if row.gone and not row.reservations:
            del self._rows[row.facts.address]

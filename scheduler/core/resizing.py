"""Reservations that follow what is seen of their attempts: grown when too small, tightened when memory is flat.

Pure. By how much is `reservation`, what is reserved at first `sizing`.
"""

from __future__ import annotations

from collections.abc import Iterator

from scheduler.core.ledger import Ledger, Reservation
from scheduler.core.reservation import grown, tightened
from scheduler.model import AttemptId, Command, ResizeReservation


class Resizing:
    """One per batch. Every method yields the command that says it, where anything changes."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def grow(self, held: Reservation | None) -> Iterator[Command]:
        """Hold what it has taken, and some room above, if that is more than was reserved."""
        if held is not None and held.peak_bytes > held.host_bytes:
            yield from self.resize(held.attempt, grown(held.peak_bytes), "over_reservation")

    def tighten(self, attempt: AttemptId, reason: str, device_bytes: int | None = None) -> Iterator[Command]:
        """Hold what was seen of an attempt that runs, and some room above: it takes no more from here on.

        device_bytes: what it is known to hold on its device, None to leave that.
        """
        held = self._ledger.reservation(attempt)
        assert held is not None  # a current attempt that runs holds one: `BatchState.check` proves it
        # Never upwards: a prior that was right to the MiB leaves less room than the margin above what was seen.
        host_bytes = max(held.peak_bytes, min(held.host_bytes, tightened(held.peak_bytes)))
        yield from self.resize(attempt, host_bytes, reason, tightened(device_bytes) if device_bytes else None)

    def resize(
        self, attempt: AttemptId, host_bytes: int, reason: str, device_bytes: int | None = None
    ) -> Iterator[Command]:
        """Hold another amount for it."""
        worker = self._ledger.worker_of(attempt)
        if worker is not None and self._ledger.resize(attempt, host_bytes, device_bytes):
            yield ResizeReservation(attempt=attempt, worker=worker, reserved_bytes=host_bytes, reason=reason)

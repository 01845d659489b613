"""What the workers say of themselves, as it comes into the ledger: who is there, what is free, who is closed.

Pure. What a trial may take on one is `admission`; that an attempt there grows is `resizing`.
"""

from __future__ import annotations

from collections.abc import Iterator

from scheduler.core import admission
from scheduler.core.ledger import Ledger, Row
from scheduler.core.trial import Rules
from scheduler.model import Command, NoteHost, WorkerFacts, WorkerVitals

VITALS_STALE_S = 15.0  # they come every second; a worker that is busy for some seconds is not silent


class Hosts:
    """One per batch. Methods that say something yield the commands that say it."""

    def __init__(self, rules: Rules, ledger: Ledger) -> None:
        self._rules, self._ledger = rules, ledger

    def joined(self, facts: WorkerFacts) -> None:
        """Take in a worker."""
        budget, beside = self._rules.memory_budget.on(facts), self._ledger.overhead_beside(facts)
        self._ledger.join(
            Row(
                facts=facts,
                own_capacity_bytes=admission.own_capacity(budget, facts),
                device_capacity_bytes=admission.device_capacity(facts.device) if facts.device else None,
                reserve_bytes=self._rules.reserve_bytes,
                available_bytes=facts.available_bytes,
                others_unclaimed_bytes=facts.others_unclaimed_bytes,
            ),
            admission.capacity(budget, facts, beside),
        )

    def heard(self, row: Row, news: WorkerVitals, now: float) -> Iterator[Command]:
        """Take in what is free there now."""
        row.vitals_at = now
        row.available_bytes, row.pressure = news.available_bytes, news.pressure
        row.swap_used_bytes = news.swap_used_bytes
        row.others_unclaimed_bytes = news.others_unclaimed_bytes
        yield from self._shut(row, news.closed_reason)
        row.touch()

    def forget_silent(self, now: float) -> None:
        """Forget what a host had free when no news of it comes: nothing is admitted there until it speaks again."""
        for row in self._ledger:
            if row.vitals_at is not None and now - row.vitals_at > VITALS_STALE_S:
                row.available_bytes, row.vitals_at = None, None
                row.touch()

    def close(self, worker: str, reason: str) -> Iterator[Command]:
        """Nothing more starts there until its agent has looked and says otherwise: with its next vitals."""
        if (row := self._ledger.row(worker)) is not None:
            yield from self._shut(row, reason)

    @staticmethod
    def _shut(row: Row, reason: str | None) -> Iterator[Command]:
        if row.closed_reason != reason:
            row.closed_reason = reason
            row.touch()
            yield NoteHost(worker=row.facts.address, reason=reason)

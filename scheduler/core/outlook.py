"""What placement is told of trials: what those that wait will need and for how long, and when those that run will end.

Pure; reads the brain's books and changes nothing in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scheduler.core.expectation import Expectation
from scheduler.core.ledger import Ledger, Row
from scheduler.core.resume import patience_s
from scheduler.core.sizing import Sizing
from scheduler.core.trial import Study, Trial
from scheduler.model import Environment, Footprint, Running, TrialId, Waiting


class Outlook:
    """One per batch."""

    def __init__(
        self, ledger: Ledger, sizing: Sizing, expectation: Expectation, trials: Mapping[TrialId, Trial]
    ) -> None:
        self._ledger, self._sizing, self._expectation, self._trials = ledger, sizing, expectation, trials

    def sized(self, trial: Trial, row: Row | None = None) -> Footprint:
        """Return what to reserve for it there, or wherever it will run."""
        return self._sized(trial, trial.prior, self._ledger.environments if row is None else [row.facts.environment])

    def _sized(self, trial: Trial, prior: Footprint, environments: Sequence[Environment | None]) -> Footprint:
        if trial.alone:
            return Footprint.unknown()
        asked = None if trial.space is None else (trial.params, trial.space)
        largest = self._ledger.rooms.largest
        room = 0 if largest is None else largest.limit_bytes or 0
        return self._sizing.size(trial.id.study, prior, trial.family, environments, asked, room)

    def _needs(self, trial: Trial) -> Sequence[Footprint]:
        """Return what each form of it needs; worked out anew only when something was learnt: it may wait for a thousand
        placements."""
        environments, forms = self._ledger.environments, trial.forms
        basis = self._sizing.of_formula(trial.prior, trial.family, environments)
        if trial.alone or basis is None or trial.needs is None or trial.needs[0] is not basis:
            found = [self._sized(trial, prior, environments) for prior in (trial.prior, *(f.footprint for f in forms))]
            trial.needs = None if basis is None or trial.alone else (basis, found)
            return found
        return trial.needs[1][: 1 + len(forms)]

    def waiting(self, study: Study, trial: Trial) -> Waiting:
        """Return the trial as it waits now."""
        footprint, *smaller = self._needs(trial)
        return Waiting(
            trial=trial.id,
            footprint=footprint,
            slots=study.spec.slots,
            since=trial.since,
            share=study.share,
            expected_s=self._expectation.expected_s(study, trial),
            smaller=tuple(smaller),
            prefer_host=trial.saved[0].host if trial.saved else None,
            prefer_until=max(trial.since, trial.not_before) + patience_s(trial.ran_s),
        )

    def running_on(self, address: str) -> list[Running]:
        """Return what runs there, and when each will probably end."""
        return [
            Running(
                attempt=held.attempt,
                worker=address,
                reserved_bytes=held.host_bytes,
                device_reserved_bytes=held.device_bytes,
                slots=held.slots,
                expected_end=None if trial is None or trial.attempt != held.attempt.attempt else trial.expected_end(),
            )
            for held in self._ledger.running_on(address)
            for trial in (self._trials.get(held.attempt.trial),)
        ]

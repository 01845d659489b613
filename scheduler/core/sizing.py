"""What a batch has learnt of footprints: from a formula's answer to what is reserved.

Holds the corrections, and for trials that nobody can size the peaks of their own study. Pure like the brain it is a
part of; the statistics are `policy.footprint`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scheduler.core.correction import Corrections, correct, observed
from scheduler.core.trial import Trial
from scheduler.model import (
    MEMORY_REASONS,
    Correction,
    Environment,
    ExitReason,
    Footprint,
    FootprintSource,
    Observation,
    Outcome,
)

# A trial that nobody can size is charged the largest peak its study has shown, and this much above it: the next one
# may be larger, and its reservation shrinks to what it needs after its first step anyway.
UNSIZED_MARGIN = 1.5

Environments = Iterable[Environment | None]


class Sizing:
    """One per batch. Studies of one family (model, device) learn from each other, each environment for itself.

    Where a trial may run in one of several environments, the one that would have it need most counts.
    """

    def __init__(self) -> None:
        self._corrections = Corrections()
        self._family: dict[str, str] = {}
        self._peaks: dict[str, list[int]] = {}

    def open(self, study: str, observations: Sequence[Observation]) -> None:
        """A study brings what its finished trials have shown."""
        self._peaks[study] = [observation.observed_bytes for observation in observations]
        for observation in observations:
            self._corrections.observe(observation)
            self._family[study] = observation.family

    def correction(self, study: str, environments: Environments) -> Correction:
        """What a prediction for this study's next trial is corrected with, wherever of these it will run."""
        family = self._family.get(study, "")
        return Correction.largest(self._corrections.of(family, environment) for environment in environments)

    def size(self, study: str, prior: Footprint, family: str, environments: Environments) -> Footprint:
        """The footprint to reserve for, from the formula's answer."""
        self._family[study] = family
        if prior.is_known:
            return correct(prior, self.correction(study, environments))
        if not (peaks := self._peaks[study]):
            return prior
        return Footprint(
            host_bytes=int(max(peaks) * UNSIZED_MARGIN), source=FootprintSource.CORRECTED, samples=len(peaks)
        )

    def learn(self, study: str, trial: Trial, outcome: Outcome) -> bool:
        """Take in an attempt's end; False when its peak says nothing.

        It does once memory was flat, after a whole run (an objective need not say that its memory is flat), or as "at
        least" after a kill for memory: the peak of half a run teaches too little.
        """
        killed = outcome.reason in MEMORY_REASONS
        whole = trial.settled or outcome.reason is ExitReason.COMPLETED
        if not outcome.peak_bytes or not (whole or killed):
            return False
        self._peaks[study].append(outcome.peak_bytes)
        self._corrections.observe(
            observed(
                trial.family,
                trial.prior.prior_bytes,
                trial.prior.runtime_bytes,
                outcome.peak_bytes,
                environment=outcome.environment,
                ready_bytes=outcome.runtime_bytes,
                at_least=killed and not trial.settled,
            )
        )
        return True

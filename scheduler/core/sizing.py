"""What a batch has learnt of footprints: from a formula's answer to what is reserved.

Holds the corrections of formulas, and for trials that nobody has a formula for what their study's parameters have
taught (`parameter_sizing`). Pure like the brain it is a part of.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from scheduler.core.correction import Corrections, correct, observed
from scheduler.core.growth import GrowthHistory
from scheduler.core.parameter_sizing import ParameterSizing, PeakSource
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
from scheduler.model.parameters import Parameters, PeakObservation, Space

Asked = tuple[Parameters, Space]
"""What a trial has asked for, as far as it is known."""
Environments = Sequence[Environment | None]


class Sizing:
    """One per batch. Studies of one family (model, device) learn from each other, each environment for itself.

    Where a trial may run in one of several environments, the one that would have it need most counts.
    """

    def __init__(self) -> None:
        self._corrections = Corrections()
        self._family: dict[str, str] = {}
        self._learnt: dict[str, ParameterSizing] = {}
        self._growth: dict[str, GrowthHistory] = {}

    def open(self, study: str, observations: Sequence[Observation], peaks: Sequence[PeakObservation] = ()) -> None:
        """Learn what a study's finished trials have shown, of a formula and of their parameters."""
        self._learnt[study] = ParameterSizing()
        self._growth[study] = GrowthHistory()
        for peak in peaks:
            self._learnt[study].observe(peak)
            if peak.flat_after is not None:
                self._growth[study].learn(peak.flat_after)
        for observation in observations:
            self._corrections.observe(observation)
            self._family[study] = observation.family

    def correction(self, study: str, environments: Environments) -> Correction:
        """Return what a prediction for this study's next trial is corrected with, wherever of these it will run."""
        return self._correction(self._family.get(study, ""), environments)

    def of_formula(self, prior: Footprint, family: str, environments: Environments) -> Correction | None:
        """Return what a formula's answer is corrected with, the same object while nothing was learnt; None where there
        is no formula."""
        if not prior.is_known or prior.source is FootprintSource.GIVEN:
            return None
        return self._correction(family, environments)

    def _correction(self, family: str, environments: Environments) -> Correction:
        found = tuple(self._corrections.of(family, environment) for environment in environments)
        return found[0] if len(found) == 1 else _largest(found)

    def size(
        self,
        study: str,
        prior: Footprint,
        family: str,
        environments: Environments,
        asked: Asked | None = None,
        room_bytes: int = 0,
    ) -> Footprint:
        """Return the footprint to reserve for: from the formula's answer, or from the parameters where there is none.

        asked: the trial's parameters, None when they are not known. room_bytes: the most any worker has for one trial.
        """
        self._family[study] = family
        if prior.is_known and prior.source is not FootprintSource.GIVEN:
            return correct(prior, self._correction(family, environments))
        given = prior.host_bytes if prior.source is FootprintSource.GIVEN else None
        params, space = asked or ({}, {})
        found = self._learnt[study].predict(
            params,
            space,
            base_bytes=_base_bytes(environments),
            room_bytes=room_bytes,
            given_bytes=given,
        )
        if found.source is PeakSource.UNKNOWN:
            return prior
        source = FootprintSource.GIVEN if found.source is PeakSource.GIVEN else FootprintSource.LEARNT
        return Footprint(host_bytes=found.peak_bytes, source=source, samples=found.samples)

    def is_flat(self, trial: Trial) -> bool:
        """Whether the reservation may follow what the trial holds: its size is a guess, and its study's trials have had
        all their growth behind them by now. A size that the user gave stands: the trial is judged by it."""
        return trial.footprint.is_guess and self._growth[trial.id.study].is_over(trial.growth.reports)

    def learn(self, study: str, trial: Trial, outcome: Outcome) -> bool:
        """Take in an attempt's end; False when its peak says nothing.

        It does once memory was flat, after a whole run (an objective need not say that its memory is flat), or as "at
        least" after a kill for memory: the peak of half a run teaches a formula too little. By its parameters it does
        after half a run, too: as "at least".
        """
        killed = outcome.reason in MEMORY_REASONS
        whole = trial.settled or outcome.reason is ExitReason.COMPLETED
        half = trial.by_parameters and outcome.reason is ExitReason.PRUNED
        if not outcome.peak_bytes or not (whole or killed or half):
            return False
        if trial.by_parameters:
            flat_after = trial.flat_after(outcome)
            if flat_after is not None:
                self._growth[study].learn(flat_after)
            self._learnt[study].observe(
                PeakObservation(
                    parameters=dict(trial.params) if trial.space is not None else {},
                    space=trial.space or {},
                    base_bytes=outcome.runtime_bytes or 0,
                    peak_bytes=outcome.peak_bytes,
                    at_least=not whole,
                    flat_after=flat_after,
                )
            )
            return not half
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


@functools.lru_cache(maxsize=64)
def _largest(corrections: tuple[Correction, ...]) -> Correction:
    return Correction.largest(corrections)


def _base_bytes(environments: Environments) -> int:
    """Return what a process holds before its objective, wherever it will run."""
    return max((each.runtime_bytes for each in environments if each is not None), default=0)

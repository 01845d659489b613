"""The studies of a run on their way from the database to the brain.

Covers connecting and opening, beside whatever else a start does, and what a study that is open says to the brain. What
a dead driver left in one is `recovery`'s, and comes later: its agents must have let go of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial

from scheduler import model as m
from scheduler.core.fault import RetryPolicy
from scheduler.driver import recovery
from scheduler.driver.event_log import Log
from scheduler.masking import masked
from scheduler.model.journal_events import JournalEvent
from scheduler.study.store import OpenedStudy, StudyStore, StudyUnavailable
from scheduler.workload.plan import Plan, StudyPlan

STORAGE_START_TIMEOUT_S = 60.0  # at the start only; once it runs, a run waits for its database without end

Decided = Mapping[m.TrialId, m.TellTrial | m.EnqueueRetry]


class Opening:
    """Call `begin`, then `settle`.

    decided: what this run's journal holds of decisions that may not have reached the study.
    """

    def __init__(self, plan: Plan, store: StudyStore, decided: Decided, log: Log) -> None:
        self._plan, self._store, self._decided, self._log = plan, store, decided, log
        self._found: Future[dict[str, OpenedStudy]] = Future()

    def begin(self) -> None:
        """Open all studies in a thread of their own."""
        threading.Thread(target=self._open, name="headroom-opening", daemon=True).start()

    def _open(self) -> None:
        try:
            self._found.set_result(
                {
                    study.spec.name: self._patiently(partial(self._store.open, study.spec, study.architectures))
                    for study in self._plan.studies
                    if study.refusal is None
                }
            )
        except BaseException as error:  # whoever asks for the result gets it
            self._found.set_exception(error)

    def finished(self) -> list[m.StudyOpened] | None:
        """Return what to tell the brain when every study has all its trials and nothing is left to settle, else None.

        Waits until they are open. Raises as `settle` does.
        """
        found = self._found.result()
        if self._decided or not all(self._is_over(study, found) for study in self._plan.studies):
            return None
        return [self._opened(study, found[study.spec.name]) for study in self._plan.studies if study.refusal is None]

    @staticmethod
    def _is_over(study: StudyPlan, found: Mapping[str, OpenedStudy]) -> bool:
        if study.refusal is not None:
            return True
        opened = found[study.spec.name]
        return not opened.left and opened.counted >= study.spec.quota

    def settle(self, evidence: recovery.Evidence, policy: RetryPolicy) -> list[m.StudyOpened]:
        """Settle what a dead driver of this run left, and return what to tell the brain.

        Raises UsageError: the database does not answer for a minute; HeadroomError: a study cannot be opened.
        """
        found, told = self._found.result(), []
        for study in self._plan.studies:
            if study.refusal is not None:
                self._log(JournalEvent.STUDY_REFUSED, durable=True, study=study.spec.name, reason=study.refusal)
                continue
            opened = found[study.spec.name]
            if opened.left:
                opened = self._patiently(partial(self._resume, study, evidence, policy))
            told.append(self._opened(study, opened))
        return told

    def _resume(self, study: StudyPlan, evidence: recovery.Evidence, policy: RetryPolicy) -> OpenedStudy:
        return recovery.resume(
            self._store,
            study.spec,
            study.architectures,
            evidence=evidence,
            policy=policy,
            decided=self._decided,
            journal=self._log,
        )

    def _opened(self, study: StudyPlan, found: OpenedStudy) -> m.StudyOpened:
        for note in found.notes:
            self._log(JournalEvent.STUDY_NOTE, study=study.spec.name, note=note)
        self._log(JournalEvent.STUDY_OPENED, study=study.spec.name, counted=found.counted, quota=study.spec.quota)
        return m.StudyOpened(
            study=study.spec,
            counted=found.counted,
            completed=found.completed,
            observations=tuple(found.observations),
            peaks=tuple(found.peaks),
            best=found.best,
        )

    def _patiently(self, operation: Callable[[], OpenedStudy]) -> OpenedStudy:
        """Give a database that is locked or restarting when a run starts a minute."""
        deadline = time.monotonic() + STORAGE_START_TIMEOUT_S
        while True:
            try:
                return operation()
            except StudyUnavailable as error:
                if time.monotonic() > deadline:
                    raise m.UsageError(
                        f"storage {masked(self._store.url)}: {error}; check it, then start again"
                    ) from error
                self._log(JournalEvent.STUDY_UNAVAILABLE, error=str(error))
                time.sleep(1.0)

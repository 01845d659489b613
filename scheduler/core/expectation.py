"""How long a trial that waits will take, as placement is told: one number.

Pure. Seconds for each epoch that was planned, learnt from trials that completed (also early), and before a study has
any from the pace of one that runs; times the epochs that are planned for the trial. Where a study knows nothing yet,
from trials of the same kind at other studies: the same formula, and about the same memory. What a forecast of the whole
is made of is in `durations`.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from statistics import median

from scheduler.core.trial import Study, Trial

Kind = tuple[str, int]
KEPT = 64


class Expectation:
    """One per batch. Where no epochs are planned a trial is one."""

    def __init__(self) -> None:
        self._took: defaultdict[Kind | str, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._durations_s: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))  # of whole trials
        self._pace_s: dict[Kind | str, float] = {}

    def finished(self, study: Study, trial: Trial, duration_s: float) -> None:
        """Note one that completed."""
        whole = self._durations_s[study.spec.name]
        whole.append(duration_s)
        study.expected_s = median(whole)
        for whose in (study.spec.name, _kind(trial)):
            self._took[whose].append(duration_s / (trial.max_epochs or 1))
            self._pace_s[whose] = median(self._took[whose])

    def progressed(self, study: Study, trial: Trial) -> None:
        """Note the pace of one that runs, while its study has nothing better."""
        name = study.spec.name
        if name in self._took or trial.started_at is None or (end := trial.expected_end()) is None:
            return
        self._pace_s[name] = (end - trial.started_at) / (trial.max_epochs or 1)

    def expected_s(self, study: Study, trial: Trial) -> float | None:
        """Return how long the trial will take; None where nobody knows."""
        pace_s = self._pace_s.get(study.spec.name, self._pace_s.get(_kind(trial)))
        return None if pace_s is None else pace_s * (trial.max_epochs or 1)


def _kind(trial: Trial) -> Kind:
    return trial.family, round(math.log2(max(1, trial.prior.host_bytes)))

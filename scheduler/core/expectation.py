"""How long trials take: what placement knows of the end of one that has not begun.

Pure. Learnt from trials that completed, and before a study has any from the pace of those that run; where a study knows
nothing yet, from trials of the same kind at other studies: the same formula, and about the same memory.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from statistics import median

from scheduler.core.trial import Study, Trial

Kind = tuple[str, int]
KEPT = 64


class Expectation:
    """One per batch."""

    def __init__(self) -> None:
        self._of_kind: defaultdict[Kind, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._expected: dict[Kind, float] = {}

    def finished(self, study: Study, trial: Trial, duration_s: float) -> None:
        """Note one that completed."""
        study.durations_s.append(duration_s)
        study.expected_s = median(study.durations_s)
        kind = _kind(trial)
        self._of_kind[kind].append(duration_s)
        self._expected[kind] = median(self._of_kind[kind])

    def progressed(self, study: Study, trial: Trial) -> None:
        """Note what the pace of a running one foretells, while the study has nothing better."""
        if study.durations_s or trial.started_at is None or (end := trial.expected_end()) is None:
            return
        study.expected_s = end - trial.started_at

    def expected_s(self, study: Study, trial: Trial) -> float | None:
        """How long the trial will take; None where nobody knows."""
        return self._expected.get(_kind(trial)) if study.expected_s is None else study.expected_s


def _kind(trial: Trial) -> Kind:
    return trial.family, round(math.log2(max(1, trial.prior.host_bytes)))

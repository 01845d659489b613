"""Identifiers: a trial of a study, and one execution of it."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class TrialId:
    """One Optuna trial: the study's name and the trial's number in it."""

    study: str
    number: int

    def __str__(self) -> str:
        return f"{self.study}/{self.number}"


@dataclass(frozen=True, slots=True, order=True)
class AttemptId:
    """One execution of a trial, numbered from 1."""

    trial: TrialId
    attempt: int

    def __str__(self) -> str:
        return f"{self.trial}/{self.attempt}"

    @property
    def slug(self) -> str:
        """A file name for it, unique within a run: `phase6a_2M_h1.t0007.a1`."""
        return f"{self.trial.study}.t{self.trial.number:04d}.a{self.attempt}"

    @classmethod
    def parse(cls, text: str) -> AttemptId:
        """Parse what `str` made. Raises ValueError on anything else."""
        match = re.fullmatch(r"(.+)/(\d+)/(\d+)", text)
        if match is None:
            raise ValueError(f"not an attempt id: {text!r} (expected STUDY/TRIAL/ATTEMPT)")
        return cls(TrialId(match[1], int(match[2])), int(match[3]))

"""From which checkpoint a trial goes on: which there are, which is the newest, and how long its host is waited for.

Pure. Checkpoints are files, and hosts need share no disk: the newest may be out of reach where the trial is placed, an
older one not. The agent looks (`agent`); placement prefers the host that has the newest (`placement`).
"""

from __future__ import annotations

from dataclasses import dataclass

KEPT = 8  # checkpoints of earlier attempts that are remembered
PREFER_S = 60.0  # at most so long a trial waits for the host that has its checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint of a trial. host: whose disk it is on, None where that is not known. step: epochs that are in it."""

    path: str
    host: str | None = None
    step: int = 0


def remember(known: tuple[Saved, ...], found: Saved) -> tuple[Saved, ...]:
    """All checkpoints of a trial, newest first: the one with most epochs, of equals the one that was written last.

    An attempt that had to start over writes older ones than the one it could not read.
    """
    others = tuple(each for each in known if each.path != found.path)
    return tuple(sorted((found, *others), key=lambda each: -each.step))[:KEPT]


def patience_s(ran_s: float) -> float:
    """How long the trial waits for the host that has its checkpoint: a minute, and no longer than it would lose."""
    return min(PREFER_S, ran_s)

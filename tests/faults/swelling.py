"""An objective of somebody's, nothing but Optuna: it takes as much memory as its one parameter says, for a while."""

from __future__ import annotations

import os
import time

import optuna

PIECE_MIB = 10
MIB_PER_S = float(os.environ.get("SWELL_MIB_PER_S", "100"))
UNTIL = os.environ.get("SWELL_UNTIL")  # a file: it holds what it has until that is there


def objective(trial: optuna.Trial) -> float:
    """Swell to the size, piece by piece, and then report for a while."""
    size = trial.suggest_int("mib", 10, 4096)
    held = []
    for _ in range(0, size, PIECE_MIB):
        held.append(b"\xff" * (PIECE_MIB << 20))
        time.sleep(PIECE_MIB / MIB_PER_S)
    while UNTIL and not os.path.exists(UNTIL):
        time.sleep(0.1)
    for step in range(5):
        trial.report(len(held), step)
        time.sleep(0.6)
    return float(len(held))

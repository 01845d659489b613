"""How long an objective waits for an answer of its study, on this machine; prints a table. Run by hand.

    python -m tests.benchmarks.suggest [--trials 5]

A trial asks for a hundred parameters that nobody could foresee, one after the other: through agent, Dask worker and
driver to Optuna's SQLite database and back. Beside it, in the same trial, a word that is handed by pipes to six
processes and back, each of which works on it for a millisecond: by the ratio a loaded machine is told from a slow
answer. What earlier trials have asked for is sent ahead and takes no call; that is not measured here.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median

from tests import test_objective


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=5)
    trials = parser.parse_args().trials
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--slots", "1", "--trials", str(trials), "--sampler", "random"]
        done = test_objective.schedule(Path(folder), "asks_often", *flags)
        if done.code:
            raise SystemExit(done.stderr)
        told = [trial.user_attrs for trial in done.study.trials]
    print(f"{'trial':>5} {'a suggest, ms: median':>22} {'95 %':>8} {'handed round, ms: median':>25} {'ratio':>6}")
    for number, attrs in enumerate(told):
        asked, rounds = attrs["answers_ms"], median(attrs["rounds_ms"])
        print(f"{number:5} {median(asked):22.2f} {asked[95]:8.2f} {rounds:25.2f} {median(asked) / rounds:6.2f}")
    whole = [each for attrs in told for each in attrs["answers_ms"]]
    print(f"all {len(whole)} suggests: median {median(whole):.2f} ms")


if __name__ == "__main__":
    main()

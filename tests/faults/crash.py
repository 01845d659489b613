"""The crash campaign: runs of 12 small studies to which everything happens, at random moments, until they are done.

`python -m tests.faults.crash --events 500 [--seed N] [--minutes M]` makes as many runs as it takes, every second one on
a Dask cluster started by hand. What happens to them is in `crash_plan`, what they promise all the same in
`crash_promises`. The list of events follows from the seed; their moments also from the machine, as in life.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.faults.crash_plan import TRIALS, Kind, plan
from tests.faults.crash_promises import quota_problems, replay_problems, result_problems
from tests.faults.crash_round import Report, Round
from tests.faults.sandbox import Disk, Network

PLACES = ("this machine", "cluster")
EVENTS_PER_ROUND = 40  # more than a run lives to see


def one_round(root: Path, seed: int, *, cluster: bool, events: int = EVENTS_PER_ROUND, trials: int = TRIALS) -> Report:
    """A run of its own with at most so many events, on a file system and in a network of its own where possible."""
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(Disk(root / "runs"))
        network = stack.enter_context(Network()) if cluster else None
        skipped = {"disk events": disk.refused} if disk.refused else {}
        if network is not None and network.refused:
            skipped["network cuts"] = network.refused
        usable = network if network is not None and not network.refused else None
        events_ = plan(seed, events, cluster=cluster, disk=not disk.refused, network=usable is not None)
        report = Round(root, events_, cluster=cluster, disk=disk, network=usable, trials=trials).run()
        if report.problems:  # what lies on a file system of its own goes with it
            shutil.copytree(root / "runs", root / "kept", ignore=shutil.ignore_patterns("filler"))
    report.skipped = skipped
    return report


def campaign(
    root: Path, count: int, seed: int, *, places: Sequence[str] = PLACES, deadline: float, say: Callable[[str], None]
) -> dict[str, Report]:
    """Rounds until `count` events were carried out, or the deadline (monotonic seconds) has passed."""
    totals = {place: Report() for place in places}
    number = 0
    while sum(total.events for total in totals.values()) < count and time.monotonic() < deadline:
        number += 1
        where = places[(number - 1) % len(places)]
        report = one_round(root / f"round{number}", seed * 1000 + number, cluster=where == PLACES[1])
        totals[where].add(report)
        say(f"run {number} ({where}, seed {seed * 1000 + number}): {report}")
        for problem in report.problems:
            say(f"  PROBLEM: {problem}")
    return totals


def table(totals: dict[str, Report]) -> str:
    """Events by kind and place, and what came of them."""
    lines = [f"| event | {' | '.join(totals)} |", f"|---|{'---|' * len(totals)}"]
    for kind in Kind:
        counts = [total.done[kind] for total in totals.values()]
        if any(counts):
            lines.append(f"| {kind} | {' | '.join(map(str, counts))} |")
    lines.append(f"| all | {' | '.join(str(total.events) for total in totals.values())} |")
    lines.append(f"| problems | {' | '.join(str(len(total.problems)) for total in totals.values())} |")
    return "\n".join(lines)


def main() -> int:
    """The command line; 0 when every promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further run after so long")
    parser.add_argument("--only", choices=PLACES, help="make no runs elsewhere")
    parser.add_argument("--root", type=Path, help="keep what the runs leave here")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.minutes * 60
    with tempfile.TemporaryDirectory(prefix="headroom-crash-", ignore_cleanup_errors=True) as scratch:
        root = arguments.root or Path(scratch)
        totals = campaign(
            root,
            arguments.events,
            arguments.seed,
            places=[arguments.only] if arguments.only else PLACES,
            deadline=deadline,
            say=lambda text: print(text, flush=True),
        )
    print(table(totals))
    skipped = collections.ChainMap(*(total.skipped for total in totals.values()))
    for what, why in skipped.items():
        print(f"without {what}: {why}")
    for where, total in totals.items():
        print(f"{where}: {total}")
    return 1 if any(total.problems for total in totals.values()) else 0


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["Report", "Round", "campaign", "one_round", "quota_problems", "replay_problems", "result_problems"]

"""The crash campaign of every `bin/test --faults`: a short one, on this machine and on a cluster."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.faults.crash import one_round
from tests.faults.crash_plan import Kind

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.mark.parametrize(("count", "cluster"), [(10, False), (8, True)], ids=["here", "on a cluster"])
def test_nothing_is_lost_charged_run_twice_or_left_running(tmp_path: Path, count: int, cluster: bool) -> None:
    """Twelve studies reach exactly their quotas, with the values they would have had, whatever happens to the run.

    A batch may be through before all its events came, or any of a last few: then another one is run, until `count`
    were carried out.
    """
    done: Counter[Kind] = Counter()
    for seed in range(20260, 20280):
        left = count - done.total()
        if left <= 0:
            break
        report = one_round(tmp_path / f"crash-{seed}", seed, cluster=cluster, events=left, trials=4)
        print(report)
        assert not report.problems, "\n".join(report.problems)
        done += report.done
    assert done.total() >= count
    assert len(done) >= 4, done

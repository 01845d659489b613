"""The crash campaign of every `bin/test --faults`: at least 40 kills, on this machine and on a cluster."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.faults.crash import Round, kills

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.mark.parametrize(("count", "cluster"), [(30, False), (10, True)])
def test_nothing_is_lost_run_twice_or_left_running(tmp_path, count, cluster):
    """Twelve studies reach exactly their quotas, whatever of the run is killed and however often.

    A fast machine is through with a batch before all its kill points came: then another one is run, until `count`
    kills have hit.
    """
    done: Counter[str] = Counter()
    for seed in range(20260, 20280):
        left = count - sum(done.values())
        if left <= 0:
            break
        points = kills(seed, max(left, 8), cluster=cluster)
        report = Round(tmp_path / f"crash-{seed}", points, cluster=cluster).run()
        print(report)
        assert not report.problems, "\n".join(report.problems)
        assert report.kills > 0, "not one kill point was reached"
        done += report.done
    assert sum(done.values()) >= count
    assert len(done) >= 4, done

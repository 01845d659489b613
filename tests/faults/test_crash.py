"""The crash campaign of every `bin/test --faults`: at least 40 kills, on this machine and on a cluster."""

from __future__ import annotations

import pytest

from tests.faults.crash import Round, kills

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.mark.parametrize(("count", "cluster"), [(32, False), (12, True)])
def test_nothing_is_lost_run_twice_or_left_running(tmp_path, count, cluster):
    """Twelve studies reach exactly their quotas, whatever of the run is killed and however often."""
    report = Round(tmp_path / "crash", kills(20260, count, cluster=cluster), cluster=cluster).run()
    print(report)
    assert not report.problems, "\n".join(report.problems)
    assert report.kills >= count * 3 // 4, f"the run was over after {report.kills} kills: give it more trials"
    assert len(report.done) >= 4, report.done

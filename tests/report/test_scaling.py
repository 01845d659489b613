"""The power law: that it finds the one that is there, with an interval that holds as often as it says."""

from __future__ import annotations

import math
import random

import pytest

from scheduler.report import scaling
from scheduler.report.page import facts
from scheduler.report.records import load_run
from tests.report.made import Made, frozen

SIZES = [2e6 * 10 ** (i / 3) for i in range(10)]


def test_an_exact_law_is_found_exactly() -> None:
    """Ten points on 3 x N^-0.08: the exponent, R² of 1, an interval of no width."""
    found = scaling.fit([(n, 3 * n**-0.08) for n in SIZES])
    assert found is not None
    assert found.b == pytest.approx(-0.08)
    assert found.a == pytest.approx(3)
    assert found.r2 == pytest.approx(1)
    assert found.high - found.low < 1e-9
    assert found.at(1e9) == pytest.approx(3 * 1e9**-0.08)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """In 400 draws with noise the 95 % interval has the true exponent in 92 to 98 % of them."""
    draw = random.Random(0)
    held = 0
    for _ in range(400):
        found = scaling.fit([(n, 3 * n**-0.08 * math.exp(draw.gauss(0, 0.02))) for n in SIZES])
        assert found is not None
        held += found.low <= -0.08 <= found.high
    assert 0.92 <= held / 400 <= 0.98


def test_too_little_says_nothing() -> None:
    """Three points, one size, values below zero: no law, rather than a wrong one."""
    assert scaling.fit([(1, 1), (2, 2), (3, 3)]) is None
    assert scaling.fit([(5, 1.0), (5, 1.1), (5, 1.2), (5, 1.3)]) is None
    assert scaling.fit([(1, -1), (2, -1), (3, -1), (4, -1)]) is None


@pytest.mark.parametrize(
    ("degrees", "exact"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042)]
)
def test_students_quantile_is_the_tables(degrees: int, exact: float) -> None:
    """Against the printed table, within 1 %."""
    assert scaling.student(degrees) == pytest.approx(exact, rel=0.01)


def test_horizons_are_set_beside_each_other(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The built-in workload: a law per horizon over all its budgets, and none for a workload without sizes."""
    root = tmp_path_factory.mktemp("runs")
    made = Made(root, objective=None, budgets="2M,20M,200M,2B", horizons="1,3")
    for horizon, exponent in ((1, -0.05), (3, -0.02)):
        for budget, size in (("2M", 2e6), ("20M", 2e7), ("200M", 2e8), ("2B", 2e9)):
            study = made.study(f"made_{budget}_h{horizon}")
            for share in (0.9, 1.0, 1.1):
                n = int(size * share)
                study.add_trial(frozen(0.9 * n**exponent, param_count=n))
    found = facts(load_run(made.folder))["scaling"]
    laws = {group["name"]: group["law_of_all"]["exponent"] for group in found["groups"]}
    assert laws == {"horizon 1": pytest.approx(-0.05), "horizon 3": pytest.approx(-0.02)}
    assert all(group["law_of_best"]["count"] == 4 and group["is_wide"] for group in found["groups"])
    other = Made(root, name="other")
    other.study("other").add_trial(frozen(0.5, param_count=3))
    assert facts(load_run(other.folder))["scaling"] is None

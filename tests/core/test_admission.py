"""Memory budgets, capacity, and whether one trial may start on one worker."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.core.admission import admit, capacity, device_capacity, feasible, parse_memory_budget
from scheduler.model import Admit, Defer, DevicePool, Pressure, Reject, UsageError
from scheduler.units import GIB, MIB, gib, parse_size
from tests.builders import WORKER, facts, footprint, waiting, worker


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("100GiB", 100 * GIB),
        ("12GB", 12 * 10**9),
        ("512MiB", 512 * MIB),
        ("1.5 gib", 3 * GIB // 2),
        ("4194304", 4 * MIB),
    ],
)
def test_sizes(text: str, size: int) -> None:
    """Binary and decimal units, fractions, any case, blanks, plain bytes."""
    assert parse_size(text) == size
    assert parse_memory_budget(text).absolute_bytes == size


@pytest.mark.parametrize(
    "text", ["", "lots", "-1GiB", "12XB", "100G", "0", "0%", "101%", "-5%", "1e3GiB", "GiB", "9 0%", "100", "4096"]
)
def test_bad_budgets_are_one_clear_line(text: str) -> None:
    """A budget that cannot be read names itself and the fix, on one line."""
    with pytest.raises(UsageError) as caught:
        parse_memory_budget(text)
    assert "memory_budget" in str(caught.value)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ambiguous_unit_names_both_readings() -> None:
    """100G could be two sizes; the message offers both."""
    with pytest.raises(UsageError, match=r"100GiB.*100GB"):
        parse_size("100G")


def test_gib_reads_well() -> None:
    """Sizes come out with the unit a person would choose."""
    assert [gib(size) for size in (0, 512 * MIB, GIB * 53 + GIB // 2, 115 * GIB, -GIB)] == [
        "0 B",
        "512 MiB",
        "53.5 GiB",
        "115 GiB",
        "-1.00 GiB",
    ]


def test_percentage_is_of_the_limit_less_what_others_hold() -> None:
    """90 % of 20 GiB usable, of which others hold 4 and the worker itself 1, leaves 14 GiB."""
    seen = facts(limit_bytes=20 * GIB, total_bytes=64 * GIB, available_bytes=15 * GIB, overhead_bytes=GIB)
    assert capacity(parse_memory_budget("90%"), seen) == 14 * GIB


def test_capacity_is_never_negative() -> None:
    """On a host that others have filled nothing is promised."""
    assert capacity(parse_memory_budget("10%"), facts(available_bytes=0)) == 0


def test_what_other_runs_attempts_hold_is_not_lost_to_capacity() -> None:
    """It comes back when they end, so a trial waits for it; what any other program holds is taken off for good."""
    budget = parse_memory_budget("90%")
    quiet = facts(limit_bytes=20 * GIB, available_bytes=19 * GIB, overhead_bytes=0)
    beside = dataclasses.replace(quiet, available_bytes=9 * GIB, others_held_bytes=10 * GIB)
    assert capacity(budget, beside) == capacity(budget, quiet) == 17 * GIB
    assert capacity(budget, dataclasses.replace(beside, others_held_bytes=0)) == 7 * GIB


def test_absolute_budget_is_taken_as_written() -> None:
    """A size is the capacity, whatever others hold at start: the live check sees them."""
    assert capacity(parse_memory_budget("20GiB"), facts(available_bytes=GIB)) == 20 * GIB


def test_budget_above_the_limit_is_refused_with_both_numbers() -> None:
    """More than there is: both numbers, and what to write instead."""
    with pytest.raises(UsageError, match=r"100GiB.*100 GiB asked, 24\.0 GiB usable.*90%"):
        capacity(parse_memory_budget("100GiB"), facts(limit_bytes=24 * GIB))


def test_device_capacity() -> None:
    """Metal's recommended maximum is used as it is, a CUDA card to 95 %, no device is None."""
    assert device_capacity(DevicePool(kind="mps", total_bytes=96 * GIB, unified=True)) == 96 * GIB
    assert device_capacity(DevicePool(kind="cuda", total_bytes=100 * GIB, unified=False)) == 95 * GIB
    assert device_capacity(None) is None


def test_admits_what_fits_exactly() -> None:
    """The last byte of the ledger and of the host may be promised."""
    view = worker(capacity_bytes=8 * GIB, reserved_bytes=5 * GIB, available_bytes=4 * GIB, reserve_bytes=GIB)
    assert admit(waiting(0, 3 * GIB), view) == Admit(WORKER, 3 * GIB)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("memory", {"reserved_bytes": 22 * GIB, "available_bytes": 24 * GIB, "free_slots": 3}),
        ("live_memory", {"available_bytes": 3 * GIB}),
        ("live_memory", {"available_bytes": 23 * GIB, "unclaimed_bytes": 20 * GIB}),
        ("live_memory", {"available_bytes": 5 * GIB, "reserve_bytes": 2 * GIB}),
        ("slots", {"free_slots": 0}),
        ("pressure", {"pressure": Pressure.ELEVATED}),
        ("pressure", {"pressure": Pressure.HARD}),
        ("closed", {"closed_reason": "victim 17 does not die"}),
        ("probe_failed", {"available_bytes": None}),
    ],
)
def test_defers_with_reason_and_numbers(reason: str, changes: dict[str, Any]) -> None:
    """Each way not to be admitted now has its own word and carries the numbers that led there."""
    decision = admit(waiting(0, 4 * GIB), worker(**changes))
    assert isinstance(decision, Defer)
    assert decision.reason == reason
    assert decision.numbers


@pytest.mark.parametrize(
    ("reason", "trial", "changes"),
    [
        ("exceeds_capacity", {"host_bytes": 25 * GIB}, {}),
        ("exceeds_capacity", {"host_bytes": 24 * GIB}, {"reserved_bytes": GIB}),
        ("exceeds_slots", {"slots": 5}, {}),
        ("no_device", {"device_bytes": 1}, {}),
        ("exceeds_device", {"device_bytes": 9 * GIB}, {"device_capacity_bytes": 8 * GIB}),
    ],
)
def test_rejects_what_never_fits(reason: str, trial: dict[str, Any], changes: dict[str, Any]) -> None:
    """Too large for the worker even when it is empty: with the need and the limit, also through `feasible`."""
    candidate, view = waiting(0, **trial), worker(**changes)
    decision = admit(candidate, view)
    assert isinstance(decision, Reject)
    assert decision.reason == reason
    assert feasible(candidate.footprint, [view], candidate.slots) == decision


def test_feasible_reports_the_largest_worker() -> None:
    """One worker that could take it is enough; else the numbers are the largest one's."""
    workers = [worker("a", capacity_bytes=4 * GIB), worker("b", capacity_bytes=8 * GIB)]
    assert feasible(footprint(8 * GIB), workers) is None
    rejected = feasible(footprint(9 * GIB), workers)
    assert rejected == Reject("exceeds_capacity", {"needed_bytes": 9 * GIB, "limit_bytes": 8 * GIB})
    assert feasible(footprint(9 * GIB), []) is None


def test_busy_or_closed_is_not_infeasible() -> None:
    """What cannot start now may start later: only capacity counts as never."""
    view = worker(reserved_bytes=20 * GIB, free_slots=0, pressure=Pressure.HARD, available_bytes=None)
    assert feasible(footprint(24 * GIB), [view]) is None


def test_unknown_footprint_runs_alone() -> None:
    """Nobody can size it: it waits for an empty worker and reserves all that is left there."""
    view = worker(reserved_bytes=GIB, device_capacity_bytes=8 * GIB)
    assert admit(waiting(0, None), view) == Admit(WORKER, 23 * GIB, 8 * GIB)
    deferred = admit(waiting(0, None), worker(reserved_bytes=2 * GIB, free_slots=3))
    assert isinstance(deferred, Defer)
    assert deferred.reason == "not_empty"
    assert isinstance(admit(waiting(0, None), worker(available_bytes=0)), Defer)


def test_device_pool_is_checked_beside_the_host() -> None:
    """Enough host memory does not help where the device is full."""
    view = worker(device_capacity_bytes=8 * GIB, device_reserved_bytes=6 * GIB, reserved_bytes=GIB, free_slots=3)
    assert admit(waiting(0, GIB, device_bytes=2 * GIB), view) == Admit(WORKER, GIB, 2 * GIB)
    decision = admit(waiting(0, GIB, device_bytes=3 * GIB), view)
    assert isinstance(decision, Defer)
    assert decision.reason == "device_memory"


@given(
    need=st.integers(0, 40),
    reserved=st.integers(0, 30),
    available=st.none() | st.integers(0, 40),
    unclaimed=st.integers(0, 20),
    reserve=st.integers(0, 5),
    free_slots=st.integers(0, 4),
    pressure=st.sampled_from(Pressure),
)
def test_admitted_means_both_checks_hold(
    need: int, reserved: int, available: int | None, unclaimed: int, reserve: int, free_slots: int, pressure: Pressure
) -> None:
    """Whatever the row looks like, an Admit never breaks the ledger, the live check, the slots or a closure."""
    view = worker(
        capacity_bytes=30,
        reserved_bytes=reserved,
        available_bytes=available,
        unclaimed_bytes=unclaimed,
        reserve_bytes=reserve,
        free_slots=free_slots,
        pressure=pressure,
    )
    decision = admit(waiting(0, need), view)
    if isinstance(decision, Admit):
        assert available is not None
        assert reserved + decision.host_bytes <= 30
        assert available - unclaimed - reserve >= decision.host_bytes
        assert free_slots >= 1
        assert pressure is Pressure.NORMAL
    else:
        assert decision.reason

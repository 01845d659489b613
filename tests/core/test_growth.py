"""When a reservation may follow what a trial holds, where only its study's history can say so."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler import model as m
from scheduler.core.growth import KEPT, LEARN_FROM, Growth, GrowthHistory
from scheduler.core.reservation import tightened
from scheduler.model.parameters import PeakObservation
from tests import builders as b
from tests.core.test_batch import Batch, kinds, only

GIB, MIB = 2**30, 2**20


@given(st.lists(st.integers(1, 64 * 1024), min_size=0, max_size=40), st.integers(0, 64 * 1024))
def test_growth_is_over_where_a_tightened_reservation_would_have_held_the_rest(sizes: list[int], more: int) -> None:
    """From the report that is told on, what tightening leaves is enough for the peak; a report before may be, within
    the noting's 1 %, never one after."""
    growth, peak, peaks = Growth(), 0, list[int]()
    for size in sizes:
        peak = max(peak, size * MIB)
        peaks.append(peak)
        growth.reported(peak)
    final = peak + more * MIB
    over_after = growth.over_after(final)
    enough = [number for number, seen in enumerate(peaks, start=1) if tightened(seen) >= final]
    assert over_after >= min(enough, default=len(sizes) + 1)
    assert all(number in enough for number in range(over_after, len(sizes) + 1))


def test_nothing_is_over_before_enough_trials_have_shown_it_and_one_late_one_forbids_it() -> None:
    """The latest of them counts; it is forgotten once so many have come after it."""
    history = GrowthHistory()
    for _ in range(LEARN_FROM - 1):
        history.learn(2)
    assert not history.is_over(99)
    history.learn(2)
    assert history.is_over(2) and not history.is_over(1)
    history.learn(30)
    assert not history.is_over(29) and history.is_over(30)
    for _ in range(KEPT):
        history.learn(2)
    assert history.is_over(2)


def begin(batch: Batch, number: int, footprint: m.Footprint | None = None) -> m.LaunchAttempt:
    """Start a trial that nobody has a formula for."""
    asked = b.asked(number, params={"rows": 5}, footprint=footprint or m.Footprint.unknown(), space={})
    launch = only(batch.tell(asked), m.LaunchAttempt)
    batch.tell(m.AttemptStarted(attempt=launch.attempt, worker=launch.worker, pid=1))
    return launch


def report(batch: Batch, launch: m.LaunchAttempt, step: int, peak_bytes: int) -> list[m.ResizeReservation]:
    """One report of a trial that has held so much; what became of its reservation."""
    said = m.AttemptProgress(attempt=launch.attempt, step=step, value=1.0, peak_bytes=peak_bytes)
    return kinds(batch.tell(said), m.ResizeReservation)


def run(batch: Batch, number: int, peaks: list[int]) -> m.TellTrial:
    """Run a trial with these peaks at its reports to its end; what the study is told."""
    launch = begin(batch, number)
    for step, peak in enumerate(peaks):
        report(batch, launch, step, peak)
    return only(batch.end(launch.attempt, peak_bytes=peaks[-1]), m.TellTrial)


EARLY = [200 * MIB, 400 * MIB, 404 * MIB, 405 * MIB]  # all there after the second report
LATE = [200 * MIB, 210 * MIB, 220 * MIB, 405 * MIB]  # at the last


@pytest.mark.parametrize(("peaks", "flat_after"), [(EARLY, 2), (LATE, 4)])
def test_a_reservation_shrinks_where_the_studys_trials_grew_no_more(peaks: list[int], flat_after: int) -> None:
    """Not before the report at which all of them had their growth; the study remembers it, also for the next driver."""
    batch = Batch(b.study(quota=99))
    batch.join()
    for number in range(LEARN_FROM):
        told = run(batch, number, [(1 + number % 4) * peak for peak in peaks])
        assert told.attrs["footprint.flat_after_reports"] == flat_after
    assert all(each.reason != "flat" for each in kinds(batch.log, m.ResizeReservation))
    seen = [
        PeakObservation(parameters={}, space={}, base_bytes=0, peak_bytes=size * MIB, flat_after=flat_after)
        for size in (405, 1620)
    ]
    again = Batch(b.study("another"))
    again.tell(m.StudyOpened(study=b.study(quota=99), peaks=seen * LEARN_FROM))
    again.join()
    for each in (batch, again):
        launch = begin(each, LEARN_FROM)
        changed = [report(each, launch, step, peak) for step, peak in enumerate(peaks)]
        assert [len(found) for found in changed] == [int(step == flat_after) for step in range(1, len(peaks) + 1)]
        (shrunk,) = changed[flat_after - 1]
        assert shrunk.reason == "flat"
        assert shrunk.reserved_bytes == tightened(peaks[flat_after - 1]) < launch.reserved_bytes
        # It grew all the same: charged more, and run to its end.
        (grown,) = report(each, launch, 9, 3 * GIB)
        assert grown.reason == "over_reservation" and grown.reserved_bytes > 3 * GIB
        assert only(each.end(launch.attempt, peak_bytes=3 * GIB), m.TellTrial).state is m.FinalState.COMPLETE


def test_what_the_user_gave_is_left_as_it_is() -> None:
    """A trial is judged by a given size: nothing that is only likely makes it less."""
    batch = Batch(b.study(quota=99))
    batch.join()
    for number in range(LEARN_FROM):
        run(batch, number, EARLY)
    given_size = m.Footprint(host_bytes=3 * GIB, source=m.FootprintSource.GIVEN)
    launch = begin(batch, LEARN_FROM, given_size)
    assert launch.reserved_bytes == 3 * GIB
    assert not any(report(batch, launch, step, peak) for step, peak in enumerate(EARLY))


def test_half_a_trial_says_nothing_of_when_growth_is_over() -> None:
    """Pruned before its end, or begun from a checkpoint: neither is kept."""
    batch = Batch(b.study(quota=99))
    batch.join()
    launch = begin(batch, 0)
    report(batch, launch, 0, GIB)
    told = only(batch.end(launch.attempt, m.ExitReason.PRUNED, peak_bytes=GIB), m.TellTrial)
    assert "footprint.flat_after_reports" not in told.attrs
    launch = begin(batch, 1)
    batch.end(launch.attempt, m.ExitReason.LOST, peak_bytes=GIB, checkpoint="/c")
    again = only(kinds(batch.log, m.LaunchAttempt)[-1:], m.LaunchAttempt)
    assert again.attempt.attempt == 2
    report(batch, again, 0, GIB)
    assert "footprint.flat_after_reports" not in only(batch.end(again.attempt, peak_bytes=GIB), m.TellTrial).attrs

"""The forecast of the end: the queue played forward by the real placement, and how sure one may be of it."""

from __future__ import annotations

import random
from statistics import fmean

import pytest

from scheduler import model as m
from scheduler.core.admission import parse_memory_budget
from scheduler.core.durations import Beliefs, Evidence, Took, Under
from scheduler.core.fault import RetryPolicy
from scheduler.core.forecast import Forecast, forecast, span
from scheduler.core.remaining import work
from scheduler.core.state import BatchState
from scheduler.core.trial import Rules
from scheduler.units import GIB
from tests.builders import asked, facts, outcome, study

WORKER = facts("w", slots=2)


def batch(quotas: dict[str, int], slots: int = 2, limit_bytes: int = 24 * GIB) -> BatchState:
    """A brain with open studies and one worker, nothing asked yet."""
    retry = RetryPolicy(max_retries=3, max_consecutive_failures=100)
    rules = Rules(memory_budget=parse_memory_budget("100%"), reserve_bytes=0, retry=retry)
    brain = BatchState(rules, studies=len(quotas))
    brain.handle(m.WorkerJoined(facts=facts("w", slots=slots, limit_bytes=limit_bytes)), 0.0)
    for name, quota in quotas.items():
        brain.handle(m.StudyOpened(study=study(name, quota=quota)), 0.0)
    return brain


def run_trial(brain: BatchState, number: int, begin: float, seconds: float, *, name: str, size: int = GIB) -> None:
    """One trial of ten epochs from its ask to its end, alone."""
    brain.handle(asked(number, size, study=name, max_epochs=10), begin)
    attempt = m.AttemptId(m.TrialId(name, number), 1)
    brain.handle(m.AttemptStarted(attempt=attempt, worker="w", pid=1), begin)
    for step in range(1, 11):
        at = begin + seconds * step / 10
        brain.handle(m.AttemptProgress(attempt=attempt, step=step, value=1.0, peak_bytes=size), at)
    ended = outcome(m.ExitReason.COMPLETED, epochs=10, peak_bytes=size, duration_s=seconds)
    brain.handle(m.AttemptEnded(attempt=attempt, outcome=ended), begin + seconds)


def foreseen(brain: BatchState, now: float, seed: int = 0) -> Forecast:
    """The forecast at that instant."""
    found = forecast(work(brain, now), random.Random(seed).random)
    assert found is not None
    return found


def test_nothing_is_foreseen_before_the_first_trial_ends() -> None:
    """Without any evidence there is no number, not a wrong one."""
    brain = batch({"s": 10})
    brain.handle(asked(0, study="s", max_epochs=10), 0.0)
    assert not work(brain, 1.0).is_known
    assert forecast(work(brain, 1.0), random.Random(0).random) is None


def test_equal_trials_one_after_another_take_as_long_as_they_did() -> None:
    """Ten trials of 100 s on one slot, five done: some 500 s are left, and the range holds that."""
    brain = batch({"s": 10}, slots=1)
    for number in range(5):
        run_trial(brain, number, 100.0 * number, 100.0, name="s")
    found = foreseen(brain, 500.0)
    assert found.whole.low_s <= 500 <= found.whole.high_s
    assert found.whole.middle_s == pytest.approx(500, rel=0.25)
    assert found.serial is not None
    assert found.serial.middle_s == pytest.approx(found.whole.middle_s, rel=1e-6), "on one slot nothing is gained"


def test_memory_bounds_how_many_run_at_once() -> None:
    """The same trials on four slots: with 24 GiB trials of 10 GiB run in pairs, those of 1 GiB by four."""
    ends = {}
    for size in (1, 10):
        brain = batch({"s": 20}, slots=4)
        for number in range(8):
            run_trial(brain, number, 100.0 * number, 100.0, name="s", size=size * GIB)
        found = foreseen(brain, 800.0)
        ends[size] = found.whole.middle_s
        assert max(count for _, count in found.busy) == (4 if size == 1 else 2)
    assert ends[10] == pytest.approx(2 * ends[1], rel=0.25)


def test_what_runs_is_counted_from_where_it_is() -> None:
    """A trial that has done nine of ten epochs is nearly over; a forecast made later is nearer by as much."""
    brain = batch({"s": 4}, slots=1)
    for number in range(3):
        run_trial(brain, number, 100.0 * number, 100.0, name="s")
    brain.handle(asked(3, study="s", max_epochs=10), 300.0)
    attempt = m.AttemptId(m.TrialId("s", 3), 1)
    brain.handle(m.AttemptStarted(attempt=attempt, worker="w", pid=1), 300.0)
    for step in range(1, 10):
        brain.handle(m.AttemptProgress(attempt=attempt, step=step, value=1.0), 300.0 + 10 * step)
    assert foreseen(brain, 390.0).whole.middle_s == pytest.approx(10, abs=2)
    assert foreseen(brain, 395.0).whole.middle_s == pytest.approx(5, abs=2)


def test_a_waiting_trial_learns_when_its_turn_comes() -> None:
    """The next trial waits for the slot of the one that runs, and is told for how long, about."""
    brain = batch({"a": 5, "b": 5}, slots=1)
    for number in range(3):
        run_trial(brain, number, 100.0 * number, 100.0, name="a")
    brain.handle(asked(3, study="a", max_epochs=10), 300.0)
    brain.handle(asked(0, study="b", max_epochs=10), 300.0)
    (waiting,) = [trial for trial in brain.trials.values() if trial.state is m.TrialState.PENDING]
    found = foreseen(brain, 310.0)
    assert set(found.starts) == {waiting.id}
    assert 60 <= found.starts[waiting.id].middle_s <= 140


def test_what_other_programs_hold_is_not_given_out() -> None:
    """Where nothing that waits will ever fit beside other programs, nothing is foreseen."""
    brain = batch({"s": 5}, slots=1)
    run_trial(brain, 0, 0.0, 100.0, name="s", size=10 * GIB)
    brain.handle(m.WorkerVitals(worker="w", available_bytes=2 * GIB), 100.0)
    assert forecast(work(brain, 100.0), random.Random(0).random) is None


def test_earlier_runs_are_evidence() -> None:
    """With trials of before this driver there is a forecast from the first moment on."""
    brain = batch({"s": 10}, slots=1)
    past = {"s": [Took(epochs=10, seconds=60.0, size_bytes=GIB)] * 20}
    left = work(brain, 0.0, past)
    assert left.is_known
    found = forecast(left, random.Random(0).random)
    assert found is not None
    assert found.whole.middle_s == pytest.approx(600, rel=0.25)


def test_a_forecast_changes_nothing() -> None:
    """The brain is read, not used: its ledger and its trials are as before."""
    brain = batch({"s": 10}, slots=2)
    run_trial(brain, 0, 0.0, 100.0, name="s")
    brain.handle(asked(1, study="s", max_epochs=10), 100.0)
    before = [(row.reserved_bytes, row.view()) for row in brain.ledger], sorted(brain.trials)
    foreseen(brain, 100.0)
    assert ([(row.reserved_bytes, row.view()) for row in brain.ledger], sorted(brain.trials)) == before
    brain.check()


def test_thousands_of_trials_are_foreseen_by_their_throughput() -> None:
    """Of ten thousand trials two thousand are played, and the rest goes on at that pace: about 10,000 x 100 s / 4."""
    brain = batch({"s": 10_000}, slots=4)
    for number in range(20):
        run_trial(brain, number, 100.0 * number, 100.0, name="s")
    found = forecast(work(brain, 2000.0), random.Random(0).random, samples=3)
    assert found is not None
    assert found.whole.middle_s == pytest.approx(9980 * 100 / 4, rel=0.2)


def test_trials_that_stopped_early_make_the_rest_shorter() -> None:
    """Trials of at most 100 epochs that stop after ten are expected to go on doing so; one past that, to go on."""
    evidence = Evidence(ended=[Took(epochs=10, seconds=100.0)] * 30, max_epochs=100, size_bytes=GIB)
    chance = random.Random(1).random
    beliefs = Beliefs({"s": evidence})
    truths = [beliefs.truths(chance)["s"] for _ in range(200)]
    assert fmean(truth.trial(chance)[0] for truth in truths) == pytest.approx(100, rel=0.3)
    under = Under(epochs=30, ran_s=300.0, pace_s=10.0)
    rests = [truth.rest(under, chance)[0] for truth in truths]
    assert min(rests) > 0
    assert max(rests) <= 700


def test_trials_that_still_run_count_as_at_least_so_long() -> None:
    """The first to end are the short ones: five that run on make the expected length larger, not smaller."""
    ended = [Took(epochs=2, seconds=20.0)] * 2
    running = [Under(epochs=20, ran_s=200.0, pace_s=10.0)] * 5
    chance = random.Random(1).random

    def mean(evidence: Evidence) -> float:
        beliefs = Beliefs({"s": evidence})
        return fmean(beliefs.truths(chance)["s"].trial(chance)[0] for _ in range(300))

    bare = mean(Evidence(ended=ended, max_epochs=50, size_bytes=GIB))
    assert mean(Evidence(ended=ended, running=running, max_epochs=50, size_bytes=GIB)) > 2 * bare


def test_failures_before_the_first_epoch_are_a_kind_of_their_own() -> None:
    """Half of the trials fail at once: the mean is half of what the others take, not the pace of the failures."""
    ended = [Took(epochs=10, seconds=100.0), Took(epochs=0, seconds=1.0)] * 30
    chance = random.Random(2).random
    beliefs = Beliefs({"s": Evidence(ended=ended, max_epochs=10, size_bytes=GIB)})
    mean = fmean(beliefs.truths(chance)["s"].trial(chance)[0] for _ in range(500))
    assert mean == pytest.approx(50, rel=0.25)


def test_the_range_is_the_second_and_the_eighteenth_of_nineteen() -> None:
    """Between them lie 80 % of what the same draws give again."""
    found = span([float(n) for n in range(19)])
    assert (found.low_s, found.middle_s, found.high_s) == (1.0, 9.0, 17.0)


def test_little_evidence_makes_a_wide_range() -> None:
    """One ended trial leaves more doubt than thirty of the same length."""
    widths = []
    for count in (1, 30):
        brain = batch({"s": 60}, slots=2)
        past = {"s": [Took(epochs=10, seconds=100.0 + number % 3, size_bytes=GIB) for number in range(count)]}
        found = forecast(work(brain, 0.0, past), random.Random(3).random)
        assert found is not None
        widths.append((found.whole.high_s - found.whole.low_s) / found.whole.middle_s)
    assert widths[0] > 2 * widths[1]

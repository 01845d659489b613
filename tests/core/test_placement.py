"""Order, choice of worker, and backfill round a head that waits."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core.backfill import PATIENCE_S, PUT_OFF
from scheduler.core.placement import AGEING_S, Placement, Start, place, place_in
from scheduler.core.rooms import Rooms
from scheduler.model import Pressure, Running, TrialId, Waiting, WorkerView
from scheduler.units import GIB
from tests.builders import WORKER, busy, footprint, running, trial_id, waiting, worker


def started(placement: Placement) -> dict[TrialId, str]:
    """Trial -> worker."""
    return {start.trial: start.worker for start in placement.starts}


# -- order ----------------------------------------------------------------------------------------------------------


def test_smaller_share_goes_first() -> None:
    """The study that has had least of its quota gets the only slot, also against an older and larger trial."""
    queue = [waiting(0, 8 * GIB, study="ahead", share=0.5), waiting(0, study="behind", share=0.1, since=9.0)]
    plan = place(queue, [], [worker(slots=1)], 10.0)
    assert list(started(plan)) == [trial_id(0, "behind")]
    assert plan.deferred[trial_id(0, "ahead")].reason == "slots"


def test_among_equals_the_largest_then_the_oldest() -> None:
    """Shares within one step are equal: memory decides, then the share itself, then age."""
    queue = [
        waiting(0, GIB, since=5.0),
        waiting(1, GIB, since=4.0),
        waiting(2, 2 * GIB, share=0.02, since=9.0),
        waiting(3, GIB, share=0.01),
    ]
    plan = place(queue, [], [worker()], 10.0)
    assert [start.trial.number for start in plan.starts] == [2, 1, 0, 3]


def test_unknown_duration_counts_as_the_mean() -> None:
    """A trial whose duration nobody knows is neither favoured nor put off."""
    queue = [waiting(0, expected_s=10.0), waiting(1), waiting(2, expected_s=30.0)]
    assert [start.trial.number for start in place(queue, [], [worker()], 0.0).starts] == [2, 1, 0]


def test_waiting_long_beats_share() -> None:
    """After a day a trial goes first, however small the shares of those that keep arriving."""
    queue = [waiting(0, study="old", share=1.0), waiting(0, study="new", share=0.0, since=AGEING_S * 1.1)]
    assert list(started(place(queue, [], [worker(slots=1)], AGEING_S * 1.1))) == [trial_id(0, "old")]


# -- where ----------------------------------------------------------------------------------------------------------


def test_tightest_worker_is_taken() -> None:
    """A small trial goes where it leaves the least, so that the large room stays whole."""
    workers = [worker("large", capacity_bytes=24 * GIB), worker("small", capacity_bytes=4 * GIB)]
    assert started(place([waiting(0)], [], workers, 0.0)) == {trial_id(0): "small"}


def test_closed_workers_are_passed_over() -> None:
    """Pressure, a failed probe and a closed host each send the trial elsewhere."""
    workers = [
        worker("a", capacity_bytes=2 * GIB, pressure=Pressure.ELEVATED),
        worker("b", capacity_bytes=2 * GIB, available_bytes=None),
        worker("c", capacity_bytes=2 * GIB, closed_reason="victim does not die"),
        worker("d"),
    ]
    assert started(place([waiting(0)], [], workers, 0.0)) == {trial_id(0): "d"}


def test_no_worker_at_all() -> None:
    """Without workers each trial is deferred with that reason."""
    assert place([waiting(0)], [], [], 0.0).deferred[trial_id(0)].reason == "no_worker"


def test_too_large_for_all_is_deferred_and_holds_nothing() -> None:
    """A trial that fits nowhere is deferred, not lost, and keeps nobody else from starting."""
    plan = place([waiting(0, 99 * GIB), waiting(1)], [], [worker()], 0.0)
    assert plan.deferred[trial_id(0)].reason == "no_worker_fits"
    assert started(plan) == {trial_id(1): WORKER}


def test_unknown_footprint_gets_a_worker_of_its_own() -> None:
    """It takes all of one empty worker; the others share the next."""
    plan = place([waiting(0, None), waiting(1)], [], [worker("a"), worker("b")], 0.0)
    assert plan.starts[0] == Start(trial=trial_id(0), worker="a", host_bytes=24 * GIB, device_bytes=0)
    assert started(plan)[trial_id(1)] == "b"


# -- backfill -------------------------------------------------------------------------------------------------------


def test_backfill_that_ends_before_the_head_can_start() -> None:
    """While 20 GiB wait for an end at 100 s, what ends by then may start; what ends much later may not."""
    run = running(9, 10 * GIB, expected_end=100.0)
    head = waiting(0, 20 * GIB, expected_s=500.0)
    queue = [head, waiting(1, 8 * GIB, expected_s=150.0), waiting(2, 8 * GIB, expected_s=99.0)]
    plan = place(queue, [run], [busy(run)], 0.0)
    assert started(plan) == {trial_id(2): WORKER}
    assert plan.deferred[trial_id(0)].reason == "memory"
    assert plan.deferred[trial_id(1)].reason == "held_for_head"
    assert plan.deferred[trial_id(1)].numbers["head_wait_s"] == 100
    assert plan.held == {WORKER: trial_id(0)}


def test_backfill_beside_the_head() -> None:
    """What the head leaves over at its start is free for trials of any length, but only once."""
    run = running(9, 10 * GIB, expected_end=100.0)
    queue = [waiting(0, 20 * GIB), waiting(1, 3 * GIB), waiting(2, 2 * GIB)]
    plan = place(queue, [run], [busy(run)], 0.0)
    assert started(plan) == {trial_id(1): WORKER}
    assert plan.deferred[trial_id(2)].numbers["spare_bytes"] == GIB


def test_unknown_ends_hold_only_what_the_head_needs() -> None:
    """With nothing known of durations a trial may still start beside the head, and nothing more."""
    run = running(9, 10 * GIB)
    queue = [waiting(0, 20 * GIB), waiting(1, 5 * GIB, expected_s=1.0), waiting(2, 4 * GIB)]
    plan = place(queue, [run], [busy(run)], 0.0)
    assert started(plan) == {trial_id(2): WORKER}
    assert plan.held == {WORKER: trial_id(0)}


def test_others_use_the_workers_that_are_not_held() -> None:
    """Only one worker is held: on the other, small trials start freely."""
    runs = [running(8, 10 * GIB, worker="a", expected_end=50.0), running(9, 10 * GIB, worker="b", expected_end=90.0)]
    queue = [waiting(0, 20 * GIB), *(waiting(n, 6 * GIB) for n in (1, 2, 3))]
    plan = place(queue, runs, [busy(runs[0]), busy(runs[1])], 0.0)
    assert started(plan) == {trial_id(1): "b", trial_id(2): "b"}
    assert plan.held == {"a": trial_id(0)}


def test_head_that_waits_for_slots_is_held_for_too() -> None:
    """Four threads cannot be had while single ones keep coming: slots are held like memory."""
    run = running(9, expected_end=10.0)
    plan = place([waiting(0, 2 * GIB, slots=4), waiting(1)], [run], [busy(run)], 0.0)
    assert started(plan) == {}
    assert plan.deferred[trial_id(1)].reason == "held_for_head"


def test_an_overrun_buys_no_time() -> None:
    """A trial past its predicted end counts as ending now: nothing may slip in before the head."""
    run = running(9, 10 * GIB, expected_end=50.0)
    plan = place([waiting(0, 20 * GIB, expected_s=50.0), waiting(1, 8 * GIB, expected_s=1.0)], [run], [busy(run)], 60.0)
    assert started(plan) == {}


def test_patience_ends() -> None:
    """A head that has waited a day is no longer passed on the strength of a prediction."""
    run = running(9, 10 * GIB, expected_end=PATIENCE_S * 2)
    queue = [waiting(0, 20 * GIB, expected_s=9.0), waiting(1, 8 * GIB, expected_s=1.0)]
    assert started(place(queue, [run], [busy(run)], 10.0)) == {trial_id(1): WORKER}
    assert started(place(queue, [run], [busy(run)], PATIENCE_S + 1)) == {}


def test_foreign_memory_does_not_idle_the_host() -> None:
    """Another program holds 10 GiB: a 20 GiB head has nothing of ours to wait for, so the small ones go on."""
    plan = place([waiting(0, 20 * GIB), waiting(1, 8 * GIB)], [], [worker(available_bytes=14 * GIB)], 0.0)
    assert plan.deferred[trial_id(0)].reason == "live_memory"
    assert started(plan) == {trial_id(1): WORKER}
    assert plan.held == {}


def test_the_next_in_order_becomes_the_head() -> None:
    """Where foreign memory shuts out the first, the second large one still gets its hold."""
    run = running(9, 6 * GIB, expected_end=100.0)
    row = busy(run, available_bytes=8 * GIB)  # 10 GiB are a stranger's
    queue = [waiting(0, 20 * GIB), waiting(1, 12 * GIB), waiting(2, 4 * GIB)]
    plan = place(queue, [run], [row], 0.0)
    assert started(plan) == {}
    assert plan.held == {WORKER: trial_id(1)}
    assert plan.deferred[trial_id(2)].reason == "held_for_head"


def test_device_pool_is_held() -> None:
    """A head that waits for the device keeps its bytes there, while host-only trials pass."""
    run = running(9, GIB, device_reserved_bytes=6 * GIB, expected_end=100.0)
    row = busy(run, device_capacity_bytes=8 * GIB)
    queue = [waiting(0, GIB, device_bytes=7 * GIB), waiting(1, GIB // 2, device_bytes=2 * GIB), waiting(2, GIB // 4)]
    plan = place(queue, [run], [row], 0.0)
    assert started(plan) == {trial_id(2): WORKER}
    assert plan.deferred[trial_id(1)].reason == "held_for_head"


def test_running_is_not_read_without_need() -> None:
    """With nothing blocked the list of running trials is never walked: it is long on a large cluster."""

    class Unread:
        def __iter__(self) -> Iterator[Running]:
            raise AssertionError("read")

    assert place([waiting(0)], Unread(), [worker()], 0.0).starts


# -- properties -----------------------------------------------------------------------------------------------------

sizes = st.none() | st.integers(1, 30)
durations = st.none() | st.floats(0.1, 100)


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[Waiting], list[Running], list[WorkerView]]:
    """A consistent cluster at instant 50: workers with running trials, other programs, closures, and a queue."""
    rows: list[WorkerView] = []
    runs: list[Running] = []
    for index in range(draw(st.integers(0, 3))):
        mine: list[Running] = []
        free, slots = 30, 6
        for _ in range(draw(st.integers(0, 4))):
            size, taken = draw(st.integers(1, 12)), draw(st.integers(1, 2))
            if size <= free and taken <= slots:
                free, slots = free - size, slots - taken
                end = draw(st.none() | st.floats(0, 200))
                mine.append(
                    running(100 + len(runs) + len(mine), size, worker=f"w{index}", slots=taken, expected_end=end)
                )
        available = draw(st.none() | st.integers(0, 30))
        rows.append(
            worker(
                f"w{index}",
                capacity_bytes=30,
                reserved_bytes=30 - free,
                available_bytes=available,
                unclaimed_bytes=draw(st.integers(0, 30 - free)),
                free_slots=slots,
                slots=6,
                pressure=draw(st.sampled_from([Pressure.NORMAL, Pressure.NORMAL, Pressure.SOFT])),
                device_capacity_bytes=draw(st.none() | st.just(10)),
            )
        )
        runs += mine
    queue = [
        waiting(
            number,
            draw(sizes),
            slots=draw(st.integers(1, 3)),
            share=draw(st.floats(0, 1)),
            since=draw(st.floats(0, 50)),
            expected_s=draw(durations),
            device_bytes=draw(st.integers(0, 6)),
        )
        for number in range(draw(st.integers(0, 7)))
    ]
    return queue, runs, rows


@given(situations(), st.randoms(use_true_random=False))
def test_properties(case: tuple[list[Waiting], list[Running], list[WorkerView]], shuffler: random.Random) -> None:
    """Each trial is started or deferred with a reason, no worker is overfilled, and input order does not matter."""
    queue, runs, rows = case
    plan = place(queue, runs, rows, 50.0)
    assert sorted([*started(plan), *plan.deferred]) == sorted(trial.trial for trial in queue)
    assert all(defer.reason for defer in plan.deferred.values())
    assert len(plan.held) <= 1
    by_trial = {trial.trial: trial for trial in queue}
    for row in rows:
        here = [start for start in plan.starts if start.worker == row.address]
        if not here:
            continue
        assert row.available_bytes is not None
        assert row.pressure is Pressure.NORMAL
        total = sum(start.host_bytes for start in here)
        assert row.reserved_bytes + total <= row.capacity_bytes
        assert all(not by_trial[start.trial].footprint.is_known for start in here) or (
            total <= row.available_bytes - row.unclaimed_bytes
        )
        assert sum(by_trial[start.trial].slots for start in here) <= row.free_slots
        device = sum(start.device_bytes for start in here)
        assert row.device_reserved_bytes + device <= (row.device_capacity_bytes or 0)
    for items in (queue, runs, rows):
        shuffler.shuffle(items)
    assert place(queue, runs, rows, 50.0) == plan


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 14), st.floats(0.5, 3)), min_size=1, max_size=40),
    st.booleans(),
    st.integers(15, 30),
    st.integers(1, 2),
)
def test_a_large_head_never_starves(stream: list[tuple[int, float]], known: bool, large: int, hosts: int) -> None:
    """Small trials that keep coming cannot keep a large one out for longer than those running when it came.

    Each time something ends, three new small ones arrive with the same share; the large one must have started when the
    longest of the trials that ran once it could no longer be put off has ended (durations known), or after a bounded
    number of ends.
    """
    feed = itertools.cycle(stream)
    now, number = 0.0, 1
    live: dict[TrialId, tuple[Running, float]] = {}
    queue: dict[TrialId, Waiting] = {}

    def arrive(count: int) -> None:
        nonlocal number
        for size, duration in (next(feed) for _ in range(count)):
            queue[trial_id(number)] = waiting(number, size, since=now, expected_s=duration if known else None)
            length[trial_id(number)] = duration
            number += 1

    def launch() -> dict[TrialId, str]:
        runs = [run for run, _ in live.values()]
        rows = []
        for host in range(hosts):
            mine = [run for run in runs if run.worker == f"w{host}"]
            rows.append(worker(f"w{host}", **view_of(mine)))
        plan = place(queue.values(), runs, rows, now)
        for start in plan.starts:
            trial = queue.pop(start.trial)
            end = now + length[start.trial]
            run = running(
                start.trial.number, start.host_bytes, worker=start.worker, expected_end=end if known else None
            )
            live[trial.trial] = (run, end)
        return started(plan)

    length: dict[TrialId, float] = {trial_id(0): 1.0}
    arrive(10)
    launch()
    queue[trial_id(0)] = waiting(0, large, since=now, expected_s=1.0 if known else None)
    deadline = now + PUT_OFF * 1.0 + 3.0
    for _ in range(150):
        arrive(3)
        if trial_id(0) in launch():
            assert not known or now <= deadline + 1e-9
            return
        first = min(live, key=lambda trial: live[trial][1])
        now = live.pop(first)[1]
    pytest.fail("the large trial never started")


def view_of(runs: list[Running]) -> dict[str, int]:
    """The changes to a 30-byte worker's row that these runs make."""
    reserved = sum(run.reserved_bytes for run in runs)
    return {
        "capacity_bytes": 30,
        "reserved_bytes": reserved,
        "available_bytes": 30 - reserved,
        "slots": 20,
        "free_slots": 20 - len(runs),
    }


# -- the host of a checkpoint ---------------------------------------------------------------------------------------


def test_the_host_that_has_the_checkpoint_goes_before_the_tightest_fit() -> None:
    """Its worker is taken although another has less room; without room there the trial waits its time, then goes on."""
    workers = [
        worker("tight", capacity_bytes=2 * GIB, host="a"),
        worker("roomy", capacity_bytes=24 * GIB, host="b"),
    ]
    plain, prefers = waiting(0), waiting(0, prefer_host="b", prefer_until=60.0)
    assert started(place([plain], [], workers, 0.0)) == {trial_id(0): "tight"}
    assert started(place([prefers], [], workers, 0.0)) == {trial_id(0): "roomy"}
    full = [workers[0], worker("roomy", capacity_bytes=24 * GIB, host="b", free_slots=0)]
    plan = place([prefers], [], full, 0.0)
    assert not plan.starts and plan.deferred[trial_id(0)].reason == "checkpoint_elsewhere"
    assert plan.deferred[trial_id(0)].numbers == {"wait_s": 60}
    assert started(place([prefers], [], full, 60.0)) == {trial_id(0): "tight"}


def test_one_that_waits_for_its_host_holds_up_nobody() -> None:
    """What comes behind it starts where it would not."""
    workers = [worker("here", slots=1, host="a")]
    queue = [waiting(0, 8 * GIB, prefer_host="b", prefer_until=60.0), waiting(1)]
    plan = place(queue, [], workers, 0.0)
    assert started(plan) == {trial_id(1): "here"}
    assert plan.deferred[trial_id(0)].reason == "checkpoint_elsewhere"


# -- smaller forms ---------------------------------------------------------------------------------------------------


def test_a_trial_that_would_wait_for_memory_starts_in_the_largest_form_that_fits() -> None:
    """8 GiB are free: of 20, 10, 6 and 4 it is the one of 6; with room for 20 it stays as it was asked."""
    forms = tuple(footprint(size * GIB) for size in (10, 6, 4))
    run = running(100, 16 * GIB)
    (start,) = place([waiting(0, 20 * GIB, smaller=forms)], [run], [busy(run)], 0.0).starts
    assert (start.form, start.host_bytes) == (2, 6 * GIB)
    (start,) = place([waiting(0, 20 * GIB, smaller=forms)], [], [worker()], 0.0).starts
    assert (start.form, start.host_bytes) == (0, 20 * GIB)


def test_a_smaller_form_may_pass_the_head_where_the_whole_may_not() -> None:
    """The head of 20 GiB leaves 4 over when it starts: a trial of 8 would delay it, its half does not."""
    run = running(100, 12 * GIB, expected_end=100.0)
    queue = [waiting(0, 20 * GIB), waiting(1, 8 * GIB, smaller=(footprint(4 * GIB),))]
    plan = place(queue, [run], [busy(run)], 0.0)
    assert [(start.trial, start.form) for start in plan.starts] == [(trial_id(1), 1)]
    assert plan.held == {WORKER: trial_id(0)}


def test_the_hold_waits_for_the_smallest_form_of_the_head() -> None:
    """In a form of 12 GiB the head starts when the first of two runs ends: what ends later gets what it leaves."""
    runs = [running(100, 10 * GIB, expected_end=50.0), running(101, 10 * GIB, expected_end=100.0)]
    head = waiting(0, 20 * GIB, smaller=(footprint(12 * GIB),))
    queue = [head, waiting(1, 3 * GIB, expected_s=60.0), waiting(2, 2 * GIB, expected_s=60.0)]
    plan = place(queue, runs, [busy(*runs)], 0.0)
    assert started(plan) == {trial_id(2): WORKER}


def test_a_thousand_workers_are_not_looked_at_for_one_hold() -> None:
    """What runs is read for the roomiest few; a head that only the fullest worker is large enough for is held there."""
    read: set[str] = set()

    def running_on(address: str) -> list[Running]:
        read.add(address)
        return [run] if address == "large" else []

    run = running(1, 30 * GIB, worker="large", expected_end=9.0)
    rows = [worker(f"w{n:04d}") for n in range(1000)]
    large = busy(run, capacity_bytes=32 * GIB)
    plan = place_in([waiting(0, 31 * GIB, since=-1.0), waiting(1)], running_on, Rooms([*rows, large]), 0.0)
    assert list(started(plan)) == [trial_id(1)]
    assert read == {"large"}


def test_a_hold_that_idles_more_than_it_saves_is_passed_for_a_while() -> None:
    """The head needs all in 100 s: 8 GiB for 110 s put it off by 10. Worth it, until it has waited for four of its own
    durations; 8 GiB for 150 s are not."""
    run = running(100, 12 * GIB, expected_end=100.0)

    def starts(lasts_s: float, now: float) -> bool:
        late = running(100, 12 * GIB, expected_end=now + 100.0)
        queue = [waiting(0, 20 * GIB, expected_s=50.0), waiting(1, 8 * GIB, expected_s=lasts_s)]
        return trial_id(1) in started(place(queue, [late], [busy(run)], now))

    assert starts(110.0, now=0.0) and starts(110.0, now=200.0)
    assert not starts(110.0, now=201.0)
    assert not starts(150.0, now=0.0)

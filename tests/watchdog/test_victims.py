"""Who is ended when memory runs out, on a simulated clock: the one that is to blame, in time, and never a bystander."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.model import ExitReason, Pressure
from scheduler.model.samples import HostMemory, HostSample, TrialSample
from scheduler.watchdog.policy.eviction import Decision, Evaluator
from scheduler.watchdog.policy.pressure import HostWatch, pace_s
from scheduler.watchdog.policy.thresholds import Thresholds
from scheduler.watchdog.policy.trend import Trend
from tests.watchdog.test_eviction import GIB, MIB, trial

Held = Callable[[float], int]


def host(at: float, available: int, limit: int, **more: Any) -> HostMemory:
    """A host without swap that has so much of `limit` available."""
    swap = {"swap_total_bytes": 0, "swap_free_bytes": 0, "paging_bytes": 0, **more}
    return HostMemory(at=at, total_bytes=limit, limit_bytes=limit, available_bytes=available, **swap)


def one(number: int, held: int, promised: int, *, at: float, launched: float = 0.0, **more: Any) -> TrialSample:
    """A trial that works and ticks."""
    return trial(number, held=held, promised_bytes=promised, cpu_s=at, ticked_at=at, launched=launched, **more)


def play(
    limit: int, ours: dict[int, tuple[Held, int]], stranger: Held, until: float = 120.0, **thresholds: Any
) -> tuple[list[Decision], float | None]:
    """Sample as the watchdog does until an order to kill or the end of memory; decisions, and when memory was gone.

    ours: number -> (what it holds at an instant, its promise). Launched a minute apart, the last one youngest.
    """
    t = Thresholds(**thresholds)
    evaluator, at, trees_at, pace = Evaluator(t), 0.0, -1e9, t.host_sample_s
    decisions: list[Decision] = []
    while at < until:
        available = limit - stranger(at) - sum(held(at) for held, _ in ours.values())
        if available <= 0:
            return decisions, at
        due = t.sample_s if evaluator.host.level is Pressure.NORMAL else pace
        trials = None
        if at - trees_at >= due - 0.01:
            trees_at = at
            trials = tuple(one(n, held(at), p, at=at, launched=60.0 * n - 3600) for n, (held, p) in ours.items())
        memory = host(at, available, limit)
        decisions.append(evaluator.observe(HostSample(at=at, interval_s=pace, host=memory, trials=trials)))
        if decisions[-1].kill is not None:
            break
        pace = pace_s(memory, evaluator.host, t)
        at += pace
    return decisions, None


def constant(size: int) -> Held:
    """It holds that much, always."""
    return lambda at: size


def growing(rate: float, start: int = 300 * MIB, since: float = 10.0) -> Held:
    """It holds `start` and from `since` on takes `rate` bytes a second."""
    return lambda at: start + int(rate * max(0.0, at - since))


# -- in time --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "rate", "promised"),
    [
        (2 * GIB, 50 * MIB, 350 * MIB),
        (2 * GIB, 500 * MIB, 350 * MIB),
        (16 * GIB, GIB, 2 * GIB),
        (16 * GIB, 20 * MIB, 2 * GIB),
        (128 * GIB, 4 * GIB, 20 * GIB),
    ],
)
def test_the_one_that_grows_is_ended_before_memory_is_gone(limit: int, rate: int, promised: int) -> None:
    """Whatever the pace, the order comes with more time left than a kill needs, names the grower, and no neighbour."""
    calm = constant(int(0.9 * promised))
    ours = {0: (growing(rate, promised // 2), promised), 1: (calm, promised), 2: (calm, promised)}
    decisions, gone = play(limit, ours, constant(0), until=3000.0)
    assert gone is None
    kill = decisions[-1].kill
    assert kill is not None and kill.victim.attempt == "s/0/1"
    assert kill.reason in (ExitReason.EVICTED, ExitReason.OVERSHOOT) and kill.evidence["within_promise"] is False
    available = limit - sum(held(decisions[-1].at) for held, _ in ours.values())
    assert available / rate >= 1.0 or kill.grace_s == 0.0
    assert available / rate >= 0.7


def test_far_over_does_not_wait_for_any_window() -> None:
    """Twenty seconds before the end the one far over its promise goes, with no more grace than there is time."""
    decisions, gone = play(64 * GIB, {0: (growing(GIB, GIB), 4 * GIB), 1: (constant(GIB), 2 * GIB)}, constant(0))
    kill = decisions[-1].kill
    assert gone is None and kill is not None
    assert (kill.rule, kill.reason, kill.victim.attempt) == ("overshoot", ExitReason.OVERSHOOT, "s/0/1")
    assert kill.grace_s <= kill.evidence["left_s"] - 1.0


def test_without_the_forecast_memory_is_gone_first() -> None:
    """With the window of 15 s alone 50 MiB/s in 2 GiB reach the end: the forecast is what saves the host."""
    ours = {0: (growing(50 * MIB), 350 * MIB), 1: (constant(300 * MIB), 350 * MIB)}
    _, gone = play(2 * GIB, ours, constant(0), run_out_s=0.0, run_out_soon_s=0.0, hard_for_s=1e9)
    assert gone is not None


def test_a_burst_that_ends_is_no_trend() -> None:
    """Two programs that load 20 GiB within seconds and stop, above a third of the memory, cost nobody anything."""
    limit = 64 * GIB
    burst = lambda at: int(min(20 * GIB, 10 * GIB * max(0.0, at - 20.0)))  # noqa: E731
    ours = {0: (constant(int(2.3 * GIB)), 2 * GIB), 1: (growing(5 * GIB, GIB, 20.0), 200 * GIB)}
    ours[1] = (lambda at: min(18 * GIB, growing(5 * GIB, GIB, 20.0)(at)), 18 * GIB)
    decisions, gone = play(limit, ours, burst, until=300.0)
    assert gone is None and all(d.kill is None for d in decisions)


def test_forecast_leaves_nothing_behind() -> None:
    """A large trial that loads its promise within seconds closes admission while it does, and not a minute longer."""
    loads = lambda at: int(min(20 * GIB, GIB + 3 * GIB * max(0.0, at - 10.0)))  # noqa: E731
    decisions, _ = play(40 * GIB, {0: (loads, 21 * GIB), 1: (constant(9 * GIB), 10 * GIB)}, constant(GIB), until=60.0)
    levels = {round(d.at): d.level for d in decisions}
    assert max(levels.values()) >= Pressure.ELEVATED
    assert all(level is Pressure.NORMAL for at, level in levels.items() if at >= 20)
    assert all(d.kill is None for d in decisions)


def test_one_that_is_over_but_does_not_grow_is_not_to_blame_for_the_pace() -> None:
    """Memory goes at a stranger's pace: a trial that has long been a little over is spared until the end is near."""
    ours = {0: (constant(int(2.4 * GIB)), 2 * GIB), 1: (constant(2 * GIB), 2 * GIB)}
    decisions, _ = play(16 * GIB, ours, growing(GIB, 3 * GIB), run_out_s=5.0)
    kill = decisions[-1].kill
    assert kill is not None and kill.victim.attempt == "s/0/1" and kill.evidence["left_s"] <= 5.0


# -- bystanders -----------------------------------------------------------------------------------------------------


def test_stranger_that_stays_ends_nobody() -> None:
    """1.2 of 2 GiB held by another program, a healthy trial within its promise: admission closes, nobody is ended."""
    stranger = lambda at: int(min(1.2 * GIB, max(0.0, at - 10) * 100 * MIB))  # noqa: E731
    decisions, gone = play(2 * GIB, {0: (constant(700 * MIB), 750 * MIB)}, stranger, until=600.0)
    assert gone is None and all(d.kill is None for d in decisions)
    assert decisions[-1].level >= Pressure.SOFT and decisions[-1].held_back == "within_promise"
    assert decisions[-1].closed_reason == f"within_promise: ours hold {700 * MIB} bytes of {750 * MIB} promised"


def test_stranger_that_goes_on_preempts_the_one_with_least_to_lose() -> None:
    """With almost nothing left that still falls the kernel is next: the youngest within its promise is preempted."""
    ours = {n: (constant(2 * GIB), 2 * GIB) for n in range(3)}
    decisions, gone = play(16 * GIB, ours, growing(300 * MIB, 2 * GIB))
    kill = decisions[-1].kill
    assert gone is None and kill is not None
    assert (kill.reason, kill.victim.attempt, kill.grace_s) == (ExitReason.PREEMPTED, "s/2/1", 0.0)
    assert kill.evidence["within_promise"] is True and kill.evidence["left_s"] <= 5.0
    assert kill.evidence["ours_held_bytes"] <= kill.evidence["ours_promised_bytes"]
    whys = {c["attempt"]: c["why"] for c in kill.candidates}
    assert "within its promise" in whys["s/2/1"] and whys["s/0/1"].startswith("rank")


def test_stranger_that_holds_nearly_all_preempts_nobody() -> None:
    """Ours hold a few per cent: the kernel takes the stranger, so nobody of ours is ended, up to the very end."""
    ours = {n: (constant(GIB // 2), GIB) for n in range(3)}
    decisions, gone = play(16 * GIB, ours, growing(300 * MIB, 2 * GIB))
    assert gone is not None and all(d.kill is None for d in decisions)
    assert decisions[-1].held_back == "not_ours"


def test_over_its_promise_goes_before_every_bystander() -> None:
    """Under SOFT pressure the one that is over is evicted, however much work it has; the others are within."""
    ours = {0: (constant(6 * GIB), 4 * GIB), 1: (constant(4 * GIB), 4 * GIB), 2: (constant(4 * GIB), 4 * GIB)}
    decisions, _ = play(16 * GIB, ours, constant(GIB))
    kill = decisions[-1].kill
    assert kill is not None and (kill.victim.attempt, kill.reason) == ("s/0/1", ExitReason.EVICTED)
    whys = {c["attempt"]: c["why"] for c in kill.candidates}
    assert whys["s/1/1"].startswith("within its promise") and whys["s/2/1"].startswith("within its promise")


def test_estimates_error_is_not_blamed() -> None:
    """A few per cent over its promise is the estimate's error: nobody is ended under SOFT for it."""
    ours = {0: (constant(int(4.2 * GIB)), 4 * GIB), 1: (constant(int(10.3 * GIB)), 10 * GIB)}
    decisions, _ = play(16 * GIB, ours, constant(GIB // 2), until=200.0)
    assert decisions[-1].level >= Pressure.SOFT and all(d.kill is None for d in decisions)


def test_paged_out_within_its_promise_is_preempted_not_blamed() -> None:
    """A trial that thrashes because others took the memory is ended, since it gets nowhere, and runs again."""
    evaluator, kill, at = Evaluator(), None, 0.0
    while kill is None and at < 1000:
        at += 5.0
        memory = host(at, 20 * GIB, 100 * GIB, swap_total_bytes=50 * GIB, swap_free_bytes=30 * GIB,
                      paging_bytes=int(20 * MIB * at))  # fmt: skip
        paged = trial(held=10 * GIB, promised_bytes=11 * GIB, cpu_s=0.9 * at, tree_swap_bytes=5 * GIB)
        kill = evaluator.observe(HostSample(at=at, interval_s=5.0, host=memory, trials=(paged,))).kill
    assert kill is not None and (kill.rule, kill.reason) == ("thrashing", ExitReason.PREEMPTED)


def test_second_grower_does_not_profit_from_the_cool_down() -> None:
    """The 15 s after a kill do not hold while memory runs out: the next one that grows is ended too."""
    evaluator, at = Evaluator(), 0.0
    orders: list[tuple[float, str]] = []
    while at < 40.0 and len(orders) < 2:
        at += 0.25
        gone = {a for _, a in orders}
        grows = growing(400 * MIB, GIB)(at)
        trials = tuple(one(n, grows, 2 * GIB, at=at) for n in (0, 1) if f"s/{n}/1" not in gone)
        memory = host(at, 16 * GIB - sum(t.tree.footprint_bytes or 0 for t in trials if t.tree), 16 * GIB)
        kill = evaluator.observe(HostSample(at=at, interval_s=0.25, host=memory, trials=trials)).kill
        if kill is not None:
            orders.append((at, kill.victim.attempt))
            evaluator.kill_started(at)
            evaluator.kill_ended(at + 0.3)
    assert [a for _, a in orders] == ["s/0/1", "s/1/1"] or [a for _, a in orders] == ["s/1/1", "s/0/1"]


@given(st.integers(0, 2**32))
def test_nobody_within_its_promise_is_ended_while_another_is_over(seed: int) -> None:
    """Over random hosts, trials and strangers: a bystander is ended only when no one over its promise could be."""
    dice = random.Random(seed)
    limit = dice.choice([2, 16, 128]) * GIB
    ours: dict[int, tuple[Held, int]] = {}
    for n in range(dice.randint(1, 5)):
        promised = int(limit * dice.uniform(0.05, 0.25))
        start = int(promised * dice.uniform(0.3, 1.3))
        ours[n] = (growing(dice.choice([0, 0, limit // 300]), start, dice.uniform(0, 30)), promised)
    stranger = growing(dice.choice([0, limit // 200, limit // 30]), int(limit * dice.uniform(0, 0.2)), 5.0)
    decisions, _ = play(limit, ours, stranger, until=200.0)
    kill = decisions[-1].kill if decisions else None
    if kill is None or kill.reason is not ExitReason.PREEMPTED:
        return
    verdicts = {v.sample.attempt: v for v in decisions[-1].verdicts}
    least = max(256 * MIB, int(0.05 * kill.evidence["deficit_bytes"]))
    assert kill.evidence["left_s"] <= Thresholds().run_out_s
    assert not [v for v in verdicts.values() if v.within_promise is False and (v.footprint_bytes or 0) >= least]


# -- the forecast ---------------------------------------------------------------------------------------------------


def trend(*values: float, step: float = 1.0) -> Trend:
    """Readings at even steps, in MiB."""
    made = Trend(window_s=3.0)
    for i, value in enumerate(values):
        made.add(i * step, int(value * MIB))
    return made


def test_trend_needs_four_readings_and_says_how_long_it_lasts() -> None:
    """Three readings are no trend; a steady fall is extrapolated to zero."""
    assert trend(900, 800, 700).left_s() is None
    assert trend(900, 800, 700, 600).left_s() == pytest.approx(6.0)
    assert trend(600, 700, 800, 900).left_s() is None


def test_what_quick_looks_saw_within_half_a_second_is_no_forecast() -> None:
    """Ten looks a second, right after a kill: a neighbour that loads 7 GiB in 0.7 s and stops foretells nothing; one
    that still takes memory after two seconds does."""
    for rate, seconds, expected in ((10 * GIB, 0.7, Pressure.NORMAL), (5 * GIB, 2.0, Pressure.HARD)):
        t, watch = Thresholds(), HostWatch()
        watch.drop_trend()
        looks = [n / 10 for n in range(25)]
        levels = {at: watch.observe(host(at, int(20 * GIB - rate * min(at, seconds)), 64 * GIB), 0, t) for at in looks}
        assert max(levels.values()) is expected, levels


def test_trend_is_not_moved_by_one_odd_reading() -> None:
    """A dip and a spike in a level line are no fall."""
    assert (trend(900, 900, 300, 900, 900).slope or 0.0) == pytest.approx(0.0)
    assert (trend(900, 900, 900, 300).slope or 0.0) > -400 * MIB


def test_trend_forgets_a_fall_that_has_ended() -> None:
    """What fell and then stood still for half a second does not fall."""
    fallen = trend(900, 700, 500, 300, 300, 300, step=0.25)
    assert fallen.left_s() is None


def test_pace_gets_shorter_with_the_time_that_is_left() -> None:
    """Once a second on a large calm host, four times on a small one, ten times before the end."""
    t, watch = Thresholds(), HostWatch()
    assert pace_s(host(0.0, 50 * GIB, 64 * GIB), watch, t) == 1.0
    assert pace_s(host(0.0, GIB, 2 * GIB), watch, t) == 0.25
    watch.left_s = 1.0
    assert pace_s(host(0.0, GIB, 2 * GIB), watch, t) == pytest.approx(0.1)

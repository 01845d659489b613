"""The brain in a simulated cluster: quotas are reached, promises kept, through every kind of trouble."""

from __future__ import annotations

from typing import Any

import pytest

from scheduler.core.trial import Trial
from scheduler.model import FinalState, QuitRequested, WorkerFacts
from tests.builders import facts, footprint, trial_id
from tests.simulator import Simulation, World, bytes_of, phase6a, seconds_of


def hosts(count: int) -> list[WorkerFacts]:
    """That many hosts of 24 GiB."""
    return [facts(f"w{n}", host=f"host{n}", overhead_bytes=2**28) for n in range(count)]


def crowded(count: int) -> list[WorkerFacts]:
    """That many hosts of 24 GiB with three workers each, of which one has a limit of its own."""
    return [
        facts(
            f"w{n}.{k}",
            host=f"host{n}",
            overhead_bytes=2**28,
            domain=f"host{n}",
            worker_limit_bytes=8 * 2**30 if k == 2 else None,
        )
        for n in range(count)
        for k in range(3)
    ]


def world(**changes: Any) -> World:
    """Trials of phase 6a."""
    return World(bytes_of=bytes_of, seconds_of=seconds_of, **changes)


@pytest.mark.parametrize("count", [1, 3])
def test_calm_batch_reaches_every_quota(count: int) -> None:
    """Twelve studies end with exactly their quota of COMPLETE trials, the 2B ones among them."""
    done = Simulation(world(), phase6a(4), hosts(count), seed=1).run()
    assert done.ended is not None
    assert done.ended.exit_code == 0
    assert done.counted == {spec.name: 4 for spec in phase6a(4)}
    assert set(done.finals.values()) == {FinalState.COMPLETE}


@pytest.mark.parametrize("seed", range(6))
def test_troubled_batch_reaches_every_quota(seed: int) -> None:
    """Failures, kills, lost workers, strangers' memory, failed probes: each study still gets its quota, once."""
    troubled = world(trouble=0.2, lost_every_s=300.0, vitals_s=5.0, strangers=0.3)
    done = Simulation(troubled, phase6a(3), hosts(2), seed=seed).run(limit_s=200_000)
    assert done.ended is not None
    assert done.counted == {spec.name: 3 for spec in phase6a(3)}


@pytest.mark.parametrize("seed", range(6))
def test_workers_of_one_host_never_promise_its_memory_twice(seed: int) -> None:
    """Three workers on each host, through every kind of trouble: its memory is promised once, and the 2B trials run."""
    troubled = world(trouble=0.2, lost_every_s=300.0, vitals_s=5.0, strangers=0.2)
    done = Simulation(troubled, phase6a(3), crowded(2), seed=seed).run(limit_s=200_000)
    assert done.counted == {spec.name: 3 for spec in phase6a(3)}


@pytest.mark.parametrize("seed", range(4))
def test_quit_leaves_nothing_behind(seed: int) -> None:
    """A drain in the middle: each trial is finished or back in the queue, none runs, the exit code says stopped."""
    batch = Simulation(world(trouble=0.1), phase6a(4), hosts(2), seed=seed)
    batch.at(100.0 + 37 * seed, QuitRequested(source="q"))
    batch.run()
    assert batch.ended is not None
    assert batch.ended.exit_code == 130
    assert not batch.brain.trials
    assert not set(batch.finals) & batch.requeued


def test_predicted_end_does_not_run_away() -> None:
    """Three epochs of 10 s, the second one late: the end is predicted at 30 s and stays there until news comes."""
    trial = Trial(
        id=trial_id(),
        params={},
        prior=footprint(),
        footprint=footprint(),
        family="",
        attempt=1,
        max_epochs=3,
        since=0.0,
        started_at=0.0,
    )
    assert trial.expected_end() is None
    trial.progressed(10.0, 1, 0.5)
    assert trial.expected_end() == 30.0
    trial.progressed(24.0, 2, 0.4)
    assert trial.expected_end() == 36.0


def test_same_seed_same_run() -> None:
    """The brain is deterministic: two runs of one world agree in every final state and instant."""
    first, second = (Simulation(world(trouble=0.2, vitals_s=7.0), phase6a(2), hosts(2), seed=3).run() for _ in range(2))
    assert (first.now, first.events, first.finals) == (second.now, second.events, second.finals)

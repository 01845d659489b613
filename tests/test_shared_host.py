"""One host's memory, however many workers and drivers draw from it: the ledger, placement, bounds and promises."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.core import admission, placement
from scheduler.core.admission import parse_memory_budget
from scheduler.core.fault import RetryPolicy
from scheduler.core.ledger import LedgerError, Reservation
from scheduler.core.state import BatchState
from scheduler.core.trial import Rules
from scheduler.host import bounds, promises, vitals
from scheduler.host.promises import NoRoom, Promises
from scheduler.host.registry import HostRegistry, Registration
from scheduler.model import DevicePool, Footprint, LaunchAttempt, StudyOpened, WorkerJoined, WorkerLost, WorkerVitals
from scheduler.units import GIB, MIB
from tests.builders import asked, attempt_id, facts, running, study, waiting, worker


def batch(budget: str = "100%", studies: int = 2) -> BatchState:
    """A brain with that many open studies of three trials."""
    rules = Rules(memory_budget=parse_memory_budget(budget), reserve_bytes=0, retry=RetryPolicy())
    brain = BatchState(rules, studies=studies)
    for n in range(studies):
        brain.handle(StudyOpened(study=study(f"s{n}")), 0.0)
    return brain


def joins(brain: BatchState, *names: str, **changes: Any) -> None:
    """Workers of one host of 8 GiB join."""
    for name in names:
        joined = facts(name, **{"limit_bytes": 8 * GIB, "domain": "host", **changes})
        brain.handle(WorkerJoined(facts=joined), 0.0)
        brain.check()


def launches(brain: BatchState, *sizes: int, now: float = 1.0) -> list[LaunchAttempt]:
    """A trial of each size is asked, one per study; what is launched."""
    found = []
    for n, size in enumerate(sizes):
        commands = brain.handle(asked(0, size, study=f"s{n}"), now)
        found += [c for c in commands if isinstance(c, LaunchAttempt)]
        brain.check()
    return found


# -- the ledger -----------------------------------------------------------------------------------------------------


def test_two_workers_of_one_host_promise_its_memory_once() -> None:
    """Two trials of 5.37 GiB do not both start on 8 GiB because two workers offer them: the second one waits."""
    brain = batch()
    joins(brain, "a", "b")
    assert len(launches(brain, int(5.37 * GIB), int(5.37 * GIB))) == 1
    waits = [trial.deferred for trial in brain.trials.values() if trial.deferred is not None]
    assert waits == ["memory"]


def test_workers_of_two_hosts_do_not_share() -> None:
    """The same two trials start at once where the memory is not the same."""
    brain = batch()
    joins(brain, "a")
    joins(brain, "b", domain="other")
    assert len(launches(brain, int(5.37 * GIB), int(5.37 * GIB))) == 2


def test_overhead_of_all_workers_is_charged_and_is_nobody_elses_memory() -> None:
    """What the second worker holds for itself is ours: it is charged once, and not subtracted as a stranger's too."""
    brain = batch("50%")
    taken = 2 * 512 * MIB
    joins(brain, "a", "b", overhead_bytes=512 * MIB, available_bytes=8 * GIB - taken)
    (domain,) = brain.ledger.domains
    assert domain.capacity_bytes == 4 * GIB
    assert {view.headroom_bytes for view in brain.ledger.views()} == {4 * GIB - taken}
    assert {view.limit_bytes for view in brain.ledger.views()} == {4 * GIB - taken}


def test_worker_that_joins_while_trials_run_does_not_take_them_for_strangers() -> None:
    """The capacity was found while the host was empty; a later look would count our own trials as others' memory."""
    brain = batch("90%")
    joins(brain, "a")
    assert len(launches(brain, 5 * GIB)) == 1
    joins(brain, "b", available_bytes=3 * GIB)
    (domain,) = brain.ledger.domains
    assert domain.capacity_bytes == int(8 * GIB * 0.9)


def test_worker_that_leaves_stays_charged_until_its_attempts_have_ended() -> None:
    """The memory of a lost worker's trial is not given to the other worker of its host before it is known free."""
    brain = batch()
    joins(brain, "a", "b")
    (launched,) = launches(brain, 5 * GIB)
    other = "b" if launched.worker == "a" else "a"
    brain.handle(WorkerLost(worker=launched.worker), 2.0)
    brain.check()
    (view,) = brain.ledger.views()
    assert view.address == other and view.headroom_bytes == 3 * GIB


def test_reservation_beyond_the_domain_is_an_error() -> None:
    """The ledger itself refuses what admission should never ask: bytes that the host does not have."""
    brain = batch()
    joins(brain, "a", "b")
    ledger = brain.ledger
    ledger.reserve("a", Reservation(attempt=attempt_id(0), host_bytes=5 * GIB, device_bytes=0, slots=1))
    with pytest.raises(LedgerError, match="reserved on host would exceed"):
        ledger.reserve("b", Reservation(attempt=attempt_id(1), host_bytes=5 * GIB, device_bytes=0, slots=1))
    assert ledger.release(attempt_id(0)).host_bytes == 5 * GIB
    ledger.check()


def test_workers_own_limit_bounds_it_below_its_host() -> None:
    """A worker started with --memory-limit 2GiB takes no trial of 3, and the host's other worker does."""
    brain = batch()
    joins(brain, "small", worker_limit_bytes=2 * GIB, limit_source="dask")
    joins(brain, "large")
    assert [launched.worker for launched in launches(brain, 3 * GIB)] == ["large"]
    capacities = {view.address: view.capacity_bytes for view in brain.ledger.views()}
    assert capacities == {"small": 2 * GIB, "large": 8 * GIB}


def test_unified_device_is_one_pool_for_all_workers_of_its_host() -> None:
    """Two workers on one Mac share what Metal can hold."""
    pool = DevicePool(kind="mps", total_bytes=6 * GIB, unified=True)
    brain = batch()
    joins(brain, "a", "b", device=pool)
    brain.ledger.reserve("a", Reservation(attempt=attempt_id(0), host_bytes=GIB, device_bytes=4 * GIB, slots=1))
    assert {admission.device_room(view) for view in brain.ledger.views()} == {2 * GIB}


def test_other_runs_promises_count_as_taken() -> None:
    """What another driver's trial was promised and has not taken yet is not admitted to ours."""
    brain = batch(studies=1)
    joins(brain, "a")
    brain.handle(WorkerVitals(worker="a", available_bytes=8 * GIB, others_unclaimed_bytes=5 * GIB), 0.5)
    assert launches(brain, 4 * GIB) == []
    assert [trial.deferred for trial in brain.trials.values()] == ["live_memory"]
    commands = brain.handle(WorkerVitals(worker="a", available_bytes=8 * GIB), 2.0)
    assert [c.worker for c in commands if isinstance(c, LaunchAttempt)] == ["a"]


def test_trial_of_unknown_size_waits_while_others_hold_most_of_the_host_and_starts_with_half_of_it() -> None:
    """It is to have all there is: with less than half of it free nothing is launched that another run's promises would
    refuse; with more it starts, although the last byte of others is not gone."""
    brain = batch(studies=1)
    joins(brain, "a", others_unclaimed_bytes=5 * GIB)
    unsized = asked(0, study="s0", footprint=Footprint.unknown())
    assert not any(isinstance(command, LaunchAttempt) for command in brain.handle(unsized, 1.0))
    (trial,) = brain.trials.values()
    assert trial.wait is not None and trial.wait.reason == "live_memory"
    assert trial.wait.numbers["needed_bytes"] == 4 * GIB
    later = WorkerVitals(worker="a", available_bytes=6 * GIB, others_unclaimed_bytes=3 * GIB)
    assert [c for c in brain.handle(later, 3.0) if isinstance(c, LaunchAttempt)] == []
    (launched,) = [
        c for c in brain.handle(WorkerVitals(worker="a", available_bytes=5 * GIB), 9.0) if isinstance(c, LaunchAttempt)
    ]
    assert launched.reserved_bytes == 8 * GIB and not launched.footprint.is_known


# -- placement ------------------------------------------------------------------------------------------------------


def shared(address: str, **changes: Any) -> Any:
    """One of several workers of a host of 24 GiB."""
    return worker(address, **{"domain": "host", "domain_headroom_bytes": 24 * GIB, **changes})


def test_one_call_does_not_start_twice_on_the_same_memory() -> None:
    """Within one placement a start on one worker takes the room of the other."""
    plan = placement.place([waiting(n, 14 * GIB) for n in range(2)], [], [shared("a"), shared("b")], 0.0)
    assert len(plan.starts) == 1
    both = placement.place([waiting(n, 10 * GIB) for n in range(2)], [], [shared("a"), shared("b")], 0.0)
    assert len(both.starts) == 2


def test_head_waits_for_what_runs_on_another_worker_of_its_host() -> None:
    """A large trial is held a worker for, and nothing slips past it through the host's other worker."""
    busy = running(0, 10 * GIB, worker="a", expected_end=100.0)
    views = [
        shared("a", reserved_bytes=10 * GIB, free_slots=3, available_bytes=14 * GIB, domain_headroom_bytes=14 * GIB),
        shared("b", available_bytes=14 * GIB, domain_headroom_bytes=14 * GIB),
    ]
    large = waiting(1, 20 * GIB, since=0.0)
    small = [waiting(n, 6 * GIB, study="small", expected_s=1000.0, share=0.5) for n in range(2, 5)]
    plan = placement.place([large, *small], [busy], views, 0.0)
    # 24 GiB less the head's 20 leave 4 beside it: a trial of 6 that outlasts the wait would delay the head.
    assert plan.starts == () and set(plan.held.values()) == {large.trial}
    brief = [waiting(n, 6 * GIB, study="small", expected_s=50.0, share=0.5) for n in range(2, 5)]
    assert len(placement.place([large, *brief], [busy], views, 0.0).starts) == 2


def test_trial_of_unknown_size_waits_for_an_empty_host() -> None:
    """It is measured alone: not beside what runs on the host's other worker."""
    views = [shared("a", free_slots=3, domain_idle=False), shared("b", domain_idle=False)]
    plan = placement.place([waiting(0, None)], [running(1, GIB, worker="a")], views, 0.0)
    assert plan.starts == () and [d.reason for d in plan.deferred.values()] == ["not_empty"]


# -- what bounds a worker -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "size"),
    [
        ({}, None),
        ({"SLURM_MEM_PER_NODE": "2048"}, 2 * GIB),
        ({"SLURM_MEM_PER_NODE": "0"}, None),
        ({"SLURM_MEM_PER_CPU": "1024", "SLURM_CPUS_ON_NODE": "3"}, 3 * GIB),
        ({"SLURM_MEM_PER_CPU": "1024"}, None),
        ({"SLURM_MEM_PER_NODE": "2G"}, None),
    ],
)
def test_slurm_says_what_it_gave(environment: dict[str, str], size: int | None) -> None:
    """--mem and --mem-per-cpu in MiB; 0 is all of the node, and what cannot be read is no limit."""
    assert bounds.slurm_bytes(environment) == size


def test_smallest_bound_rules_and_is_named() -> None:
    """RAM or the cgroup, then the batch system, then the Dask worker's own: the smallest is the limit."""
    plain = bounds.measure({})
    assert plain.limit_source in ("ram", "cgroup") and plain.worker_limit_bytes is None
    job = bounds.measure({"SLURM_MEM_PER_NODE": "1024", "SLURM_JOB_ID": "7"})
    assert (job.limit_source, job.limit_bytes) == ("slurm", GIB)
    assert job.domain != plain.domain and job.domain.endswith("slurm-7")
    own = bounds.measure({"SLURM_MEM_PER_NODE": "1024", "SLURM_JOB_ID": "7"}, 512 * MIB)
    assert (own.limit_source, own.limit_bytes, own.worker_limit_bytes) == ("dask", GIB, 512 * MIB)
    assert own.domain == job.domain, "a worker's own limit does not make another memory of it"
    assert bounds.measure({}, 2**60).worker_limit_bytes is None


def test_cgroup_names_the_memory() -> None:
    """Two processes in one cgroup with a limit name the same memory, one outside names another."""
    root = Path("/sys/fs/cgroup/memory")
    if os.geteuid() != 0 or not (root / "cgroup.procs").exists():
        pytest.skip("needs root and the v1 memory controller")
    group = root / f"headroom-test-{os.getpid()}-domain"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(GIB))
        code = (
            "from scheduler.host import bounds; b = bounds.measure({}); print(b.domain, b.limit_source, b.limit_bytes)"
        )
        inside = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", sys.executable, "-c", code]
        said = [subprocess.run(inside, capture_output=True, text=True, check=True).stdout.split() for _ in range(2)]
    finally:
        group.rmdir()
    assert said[0] == said[1] and said[0][1:] == ["cgroup", str(GIB)]
    assert said[0][0] != bounds.measure({}).domain


# -- other runs on the host -----------------------------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path: Path) -> HostRegistry:
    """An empty registry."""
    return HostRegistry(tmp_path / "host")


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two small processes that stand for trials."""
    made = [subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"]) for _ in range(2)]
    yield made
    for process in made:
        process.kill()
        process.wait()


def attempt(process: subprocess.Popen[bytes], topic: str, reservation_bytes: int) -> Registration:
    """A registration of that process by the agent of that driver."""
    return Registration(
        attempt=f"{topic}/0/1",
        slug=f"{topic}.t0000.a1",
        pid=process.pid,
        start_time=vitals.start_time(process.pid) or 0.0,
        reservation_bytes=reservation_bytes,
        folder="/nowhere",
        run=topic,
        topic=topic,
        launched=time.monotonic(),
    )


def test_promise_of_another_run_is_seen_until_it_is_taken(registry: HostRegistry, processes: list[Any]) -> None:
    """Its reservation less what it holds; a registration whose process is gone promises nothing; ours is ours."""
    registry.register(attempt(processes[0], "one", GIB))
    assert Promises(registry, "one").others_unclaimed_bytes() == 0
    unclaimed = Promises(registry, "two").others_unclaimed_bytes()
    assert GIB - 64 * MIB < unclaimed < GIB
    processes[0].kill()
    processes[0].wait()
    assert Promises(registry, "two").others_unclaimed_bytes() == 0


def test_two_drivers_that_admit_at_once_do_not_both_start(
    registry: HostRegistry, processes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both saw 8 GiB free and launch 5.37 GiB: one is registered, the other is told that there is no room."""
    memory = vitals.HostMemory(at=0.0, total_bytes=8 * GIB, limit_bytes=8 * GIB, available_bytes=8 * GIB)
    monkeypatch.setattr(vitals, "host_memory", lambda: memory)
    ready, ended = threading.Barrier(2), []

    def launch(process: Any, topic: str) -> None:
        ready.wait()
        try:
            Promises(registry, topic).register(attempt(process, topic, int(5.37 * GIB)))
            ended.append("registered")
        except NoRoom as error:
            ended.append(str(error))

    threads = [threading.Thread(target=launch, args=pair) for pair in zip(processes, ("one", "two"), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused, registered = sorted(ended)
    assert registered == "registered" and refused.startswith("no room: 5.37 GiB needed")
    assert len(list(registry.registrations())) == 1


def test_attempt_of_unknown_size_is_registered_for_what_others_have_left(
    registry: HostRegistry, processes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its driver gives it 8 GiB, another run was promised one: it gets 7, is judged by the 8 that it was given, and
    the other run is promised none of them. With less than it can do with it is refused."""
    memory = vitals.HostMemory(at=0.0, total_bytes=8 * GIB, limit_bytes=8 * GIB, available_bytes=8 * GIB)
    monkeypatch.setattr(vitals, "host_memory", lambda: memory)
    registry.register(attempt(processes[0], "one", GIB))
    whole = attempt(processes[1], "two", 8 * GIB)
    with pytest.raises(NoRoom, match=r"no room: 7\.50 GiB needed"):
        Promises(registry, "two").register(whole, int(7.5 * GIB))
    got = Promises(registry, "two").register(whole, 4 * GIB)
    assert 7 * GIB < got.reservation_bytes < 7 * GIB + 64 * MIB and got.promised == 8 * GIB
    assert got in list(registry.registrations())
    assert Promises(registry, "one").others_unclaimed_bytes() > 7 * GIB - 64 * MIB


def test_own_attempts_are_registered_as_the_ledger_says(registry: HostRegistry, processes: list[Any]) -> None:
    """Where no other run is on the host nothing is asked twice: the driver's own ledger has admitted it."""
    for process in processes:
        Promises(registry, "one").register(attempt(process, "one", 2**50))
    assert len(list(registry.registrations())) == 2


def test_lock_of_a_stopped_holder_does_not_stop_all_others(
    registry: HostRegistry, processes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A holder that is stopped in the middle is waited for, but not for ever."""
    monkeypatch.setattr(promises, "LOCK_TIMEOUT_S", 0.2)
    one, two = Promises(registry, "one"), Promises(registry, "two")
    with one._exclusive():
        two.register(attempt(processes[0], "two", MIB))
    assert len(list(registry.registrations())) == 1

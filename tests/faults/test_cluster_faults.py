"""Faults of clusters, end to end through the real command: who is away, for how long, and what it costs.

Workers, schedulers, drivers and networks here come and go; the trials are those of `tiny`. A worker without Headroom is
a real `dask worker` whose interpreter cannot find it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from tests.faults.relay import Relay
from tests.faults.sandbox import TINY, Process, Sandbox
from tests.faults.test_resume import SMALL, START_S, ends, goes_on, keeps_its_promises, nothing_left, tail, training
from tests.waiting import free_port, until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

TWO: dict[str, Any] = {**SMALL, "trials": 1}  # one for each slot

# Finds neither `scheduler` nor `training`, wherever they are installed: an environment of somebody else's.
WITHOUT_HEADROOM = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("scheduler", "training"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Without())
sys.argv[0] = "dask"
from distributed.cli.dask_{what} import main
main()
"""


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Sandbox]:
    """A sandbox with two trials."""
    with Sandbox(tmp_path / "run", **TWO) as sandbox:
        yield sandbox


def bare(box: Sandbox, what: str, *arguments: str) -> subprocess.Popen[Any]:
    """`dask scheduler` or `dask worker` in an environment without Headroom."""
    with open(box.root / f"bare-{what}.log", "ab") as log:
        return box.spawn([sys.executable, "-c", WITHOUT_HEADROOM.replace("{what}", what), *arguments], log)


def bare_worker(box: Sandbox, address: str) -> subprocess.Popen[Any]:
    """A worker that cannot use Headroom."""
    arguments = ["--no-nanny", "--nthreads", "2", "--no-dashboard", "--local-directory", str(box.root / "bare")]
    return bare(box, "worker", address, *arguments)


def reasons(box: Sandbox) -> set[str]:
    """How attempts ended."""
    return {record["reason"] for record in box.events("attempt.ended")}


def workers_of(address: str) -> set[str]:
    """The Dask workers that a scheduler knows."""
    with Client(address, set_as_default=False) as client:
        return set(client.scheduler_info(n_workers=-1)["workers"])


# -- environments without Headroom -------------------------------------------------------------------------------------


def test_a_cluster_that_is_shared_is_used_where_it_can_be_and_left_alone_elsewhere(box: Sandbox) -> None:
    """The scheduler and one worker have no Headroom, another such worker joins later: they live on, are named once, and
    no trial is sent to them."""
    scheduler_port = free_port()
    address = f"tcp://127.0.0.1:{scheduler_port}"
    scheduler = bare(box, "scheduler", "--host", "127.0.0.1", "--port", str(scheduler_port), "--no-dashboard")
    first = bare_worker(box, address)
    box.start_worker(address)
    until(lambda: len(workers_of(address)) == 2, START_S, "both workers are there")
    driver = box.start("--cluster", address)
    training(box)
    second = bare_worker(box, address)
    until(lambda: len(box.events("worker.unusable")) == 2, 30, lambda: f"both are named: {tail(box)}")
    assert ends(driver, box, 120) == 0, tail(box)
    assert reasons(box) == {"completed"}
    keeps_its_promises(box)
    assert all("has no Headroom" in record["why"] for record in box.events("worker.unusable"))
    assert len(box.events("worker.unusable")) == 2
    assert [process.poll() for process in (scheduler, first, second)] == [None] * 3
    assert len(workers_of(address)) == 3


def test_a_cluster_of_nothing_but_strangers_is_refused_in_a_line(box: Sandbox) -> None:
    """No worker has Headroom: exit code 2 with the reason, and nothing is written."""
    address, _, _ = box.start_cluster(0)
    bare_worker(box, address)
    until(lambda: workers_of(address), START_S, "the worker is there")
    driver = box.start("--cluster", address)
    assert ends(driver, box, 60) == 2, tail(box)
    assert "has no Headroom; start `dask worker` in an environment that has it" in tail(box)
    assert "Traceback" not in tail(box) and not box.folder.exists()


def listened_to(name: str, dask_scheduler: Any) -> bool:
    """Run on a scheduler: whether the driver of this run has subscribed to what its agents say."""
    topics = dask_scheduler._broker._topics
    return any(topic.startswith(f"{name}-") and topics[topic].subscribers for topic in list(topics))


# -- who is away -------------------------------------------------------------------------------------------------------


def stopped(process: Process | subprocess.Popen[Any], seconds: float) -> None:
    """SIGSTOP for so long."""
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(seconds)  # what is tested is this very time
    os.kill(process.pid, signal.SIGCONT)


def test_a_driver_that_is_stopped_for_a_while_has_lost_nothing(box: Sandbox) -> None:
    """Its trials go on meanwhile, end, and are heard of afterwards; here and on a cluster."""
    driver = box.start(environment={"CRASH_EPOCH_S": "0.1"})
    training(box)
    before = box.done()
    stopped(driver, 12.0)
    assert box.done() > before + 30  # two trials, ten epochs a second each, for some seconds at least
    assert ends(driver, box, 120) == 0, tail(box)
    assert reasons(box) == {"completed"}
    keeps_its_promises(box)


def test_trials_of_a_driver_that_is_away_for_too_long_checkpoint_and_leave(tmp_path: Path) -> None:
    """Past `away_timeout_s` nobody trains for nobody; what became of them is kept, and they go on when it is back."""
    with Sandbox(tmp_path / "run", **TWO, away_timeout_s=5) as box:
        box.environment["CRASH_EPOCH_S"] = "0.3"
        address, _, _ = box.start_cluster()
        driver = box.start("--cluster", address)
        training(box)
        os.kill(driver.pid, signal.SIGSTOP)
        until(lambda: not box.of_role("trial"), 30, "its trials have left")
        assert any(line["what"] == "left" for line in box.epochs())
        os.kill(driver.pid, signal.SIGCONT)
        assert ends(driver, box, 120) == 0, tail(box)
        assert reasons(box) == {"completed", "interrupted"}
        again = [record for record in box.events("attempt.launched") if record["attempt"].endswith("/2")]
        assert again and all(record["resume_from"] for record in again)
        keeps_its_promises(box)


def test_a_scheduler_that_is_away_for_a_while_costs_nothing(box: Sandbox) -> None:
    """Longer than a Dask client waits: its workers end with it, the trials do not; whoever supervises the workers
    brings one back, and the driver goes on."""
    box.environment["CRASH_EPOCH_S"] = "0.2"
    address, scheduler, _ = box.start_cluster()
    driver = box.start("--cluster", address)
    training(box)
    scheduler.kill()
    scheduler.wait()
    until(lambda: not box.of_role("worker"), 60, "Dask's workers end with their scheduler")
    before = box.done()
    until(lambda: box.done() > before + 40, 60, "the trials go on")
    box.start_scheduler(int(address.rpartition(":")[2]))
    box.start_worker(address)
    assert ends(driver, box, 120) == 0, tail(box)
    assert reasons(box) == {"completed"}
    assert len(box.events("cluster.back")) == 1
    keeps_its_promises(box)


def test_a_scheduler_that_is_replaced_in_a_moment_costs_nothing(box: Sandbox) -> None:
    """Another one answers at its address before the driver has missed the first (a supervisor, a service that fails
    over): it is told anew what the driver listens to, and the trials go on under the worker there."""
    box.environment["CRASH_EPOCH_S"] = "0.2"
    first, scheduler, _ = box.start_cluster()
    second, _, _ = box.start_cluster()
    until(lambda: workers_of(first) and workers_of(second), START_S, "both have a worker")
    with Relay(first) as relay:
        driver = box.start("--cluster", relay.address)
        training(box)
        relay.turn_to(second)
        scheduler.kill()
        assert ends(driver, box, 120) == 0, tail(box)
    assert reasons(box) == {"completed"}
    assert len(box.events("cluster.disconnected")) == len(box.events("cluster.back")) == 1
    keeps_its_promises(box)


def have_joined(box: Sandbox, count: int) -> bool:
    """Whether so many workers have joined since the start."""
    return len(box.events("worker.joined")) >= count


def test_a_scheduler_that_comes_back_while_the_driver_starts_is_found_again(box: Sandbox) -> None:
    """Killed when the driver is connected and has no agent yet: the new one is told what the driver listens to, and the
    worker that comes with it is put to use."""
    address, scheduler, (nanny,) = box.start_cluster()
    until(lambda: workers_of(address), START_S, "a worker")
    driver = box.start("--cluster", address)
    until(lambda: box.events("batch.started"), START_S, lambda: f"the start: {tail(box)}")
    (worker,) = box.of_role("worker")
    worker.kill(signal.SIGSTOP)  # it cannot be put to use
    with Client(address, set_as_default=False) as client:
        until(lambda: client.run_on_scheduler(listened_to, box.settings["name"]), 30, "the driver listens")
    scheduler.kill()
    scheduler.wait()
    nanny.kill()
    worker.kill()
    box.start_scheduler(int(address.rpartition(":")[2]))
    box.start_worker(address)
    assert ends(driver, box, 100) == 0, tail(box)
    assert reasons(box) == {"completed"}
    keeps_its_promises(box)


def test_own_worker_killed_again_and_again_costs_nothing(box: Sandbox) -> None:
    """Three kills within seconds: Dask's own patience with a worker is no limit of ours."""
    driver = box.start(environment={"CRASH_EPOCH_S": "0.15"})
    training(box)
    for number in range(3):
        (worker,) = until(lambda: box.of_role("worker"), 30, "a worker")
        assert worker.kill()
        joined = functools.partial(have_joined, box, number + 2)
        until(joined, 60, lambda: f"another worker: {tail(box)}")
    assert ends(driver, box, 120) == 0, tail(box)
    assert reasons(box) == {"completed"}
    keeps_its_promises(box)
    nothing_left(box)


def test_worker_and_nanny_gone_for_good_are_replaced_by_whoever_starts_one(box: Sandbox) -> None:
    """Both are killed at once, and another `dask worker` comes on that host: it carries for what still runs there."""
    box.environment["CRASH_EPOCH_S"] = "0.15"
    address, _, (nanny,) = box.start_cluster()
    driver = box.start("--cluster", address)
    training(box)
    for process in box.processes():
        if process.role in ("worker", "nanny"):
            process.kill()
    nanny.wait()
    until(lambda: box.events("worker.left"), 30, "it is out of reach")
    box.start_worker(address)
    assert ends(driver, box, 120) == 0, tail(box)
    assert reasons(box) == {"completed"}
    keeps_its_promises(box)


def test_retired_workers_give_their_trials_back(box: Sandbox) -> None:
    """Retired, as an adaptive cluster or a walltime does: its trials checkpoint, leave, and go on elsewhere; nothing of
    ours stays on that host."""
    box.environment["CRASH_EPOCH_S"] = "1"  # they last until another worker is there, on a loaded machine too
    address, _, _ = box.start_cluster()
    driver = box.start("--cluster", address)
    training(box)
    box.environment["CRASH_EPOCH_S"] = "0.02"
    (agent,) = box.of_role("agent")
    (worker,) = [record["via"] for record in box.events("worker.joined")]
    box.start_worker(address)
    until(lambda: len(box.events("worker.joined")) == 2, START_S, "another worker")
    with Client(address, set_as_default=False) as client:
        client.retire_workers([worker], close_workers=True)
    until(lambda: not agent.lives, 30, "its agent has left")
    assert ends(driver, box, 120) == 0, tail(box)
    assert "failed" not in reasons(box) and "interrupted" in reasons(box)
    keeps_its_promises(box)


# -- hosts -------------------------------------------------------------------------------------------------------------


def other_host(box: Sandbox, address: str) -> subprocess.Popen[Any]:
    """A worker that sees another disk under the run folder, and another registry: as on another host."""
    attempts = box.folder / "attempts"
    registry = box.root / "other-host"
    registry.mkdir(mode=0o700)
    worker = [sys.executable, "-m", "dask", "worker", address, "--nworkers", "1", "--nthreads", "2"]
    worker += ["--memory-limit", "0", "--no-dashboard", "--local-directory", str(box.root / "other-dask")]
    script = f'mkdir -p {attempts} && mount -t tmpfs tmpfs {attempts} && exec "$@"'
    with open(box.root / "other.log", "ab") as log:
        return box.spawn(
            ["unshare", "--mount", "sh", "-c", script, "sh", *worker], log, {"HEADROOM_HOST_DIR": str(registry)}
        )


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a disk of one's own needs root")


@needs_root
def test_a_lost_host_costs_its_trials_what_only_it_had(box: Sandbox) -> None:
    """Everything on a host dies, its disk with it: the trials start over on the other one, said so, and none fails."""
    box.environment["CRASH_EPOCH_S"] = "1"  # they last until another worker is there, on a loaded machine too
    address, _, _ = box.start_cluster()
    driver = box.start("--cluster", address)
    training(box)
    box.environment["CRASH_EPOCH_S"] = "0.02"
    other_host(box, address)
    until(lambda: len(box.events("worker.joined")) == 2, START_S, lambda: f"the other host: {tail(box)}")
    elsewhere = str(box.root / "other-host").encode()
    for process in box.processes():
        with contextlib.suppress(OSError):
            here = elsewhere not in Path(f"/proc/{process.pid}/environ").read_bytes()
            if here and process.role in ("worker", "nanny", "agent", "trial", "spare", "fork server", "watchdog"):
                process.kill()
    assert ends(driver, box, 180) == 0, tail(box)
    over = box.events("attempt.restarted")
    assert over and all(record["checkpoint"] is None and "No such file" in record["detail"] for record in over)
    trials = box.trials()
    assert {trial["state"] for trial in trials} == {"COMPLETE"}
    assert sum("started_over" in trial["attrs"] for trial in trials) == len(over)


def test_a_host_that_is_missing_when_the_user_stops_loses_no_trial(tmp_path: Path) -> None:
    """All of it hangs: the drain ends without it, its trials are requeued with their checkpoints, and the next start
    goes on."""
    with Sandbox(tmp_path / "run", **TWO, drain_timeout_s=2) as box:
        address, _, _ = box.start_cluster()
        driver = box.start("--cluster", address)
        training(box)
        hung = [p for p in box.processes() if p.role in ("worker", "nanny", "agent", "trial", "watchdog")]
        for process in hung:
            os.kill(process.pid, signal.SIGSTOP)
        driver.send_signal(signal.SIGTERM)
        assert ends(driver, box, 60) == 130, tail(box)
        trials = box.trials()
        assert {trial["state"] for trial in trials} <= {"COMPLETE", "WAITING", "FAIL"}
        assert [t for t in trials if t["state"] == "WAITING" and "resume_from" in t["attrs"]]
        assert all("retried" in trial["attrs"] for trial in trials if trial["state"] == "FAIL")
        for process in hung:
            process.kill()
        box.start_worker(address)
        goes_on(box, "--cluster", address, kills=2)


# -- how long a drain waits --------------------------------------------------------------------------------------------


def test_a_drain_waits_for_a_slow_step(tmp_path: Path) -> None:
    """Steps of 4 s and a limit of 1 s: `q` waits as long as steps have taken, says so, and loses none of them."""
    training_side = {"objective": f"{TINY}:slow"}
    with Sandbox(tmp_path / "run", **TWO, drain_timeout_s=1, training=training_side) as box:
        driver = box.start(environment={"CRASH_EPOCH_S": "4"})
        until(lambda: box.done() >= 4, 60, "two epochs of each of two trials")
        driver.send_signal(signal.SIGTERM)
        assert ends(driver, box, 40) == 130, tail(box)
        assert reasons(box) == {"interrupted"}
        (said,) = box.events("batch.draining")
        assert said["wait_s"] >= 7 and "q again stops at once" in tail(box)
        notes = [line["what"] for line in box.epochs()]
        assert notes.count("done") == notes.count("begun") - notes.count("left") == 6  # no step was in vain


# -- a new driver ------------------------------------------------------------------------------------------------------


def test_a_new_driver_ends_what_an_earlier_one_of_its_run_left(box: Sandbox) -> None:
    """The earlier driver is dead, which its agents have not noticed: they hold its trials until the next driver of the
    run folder comes, which ends them before it runs any of them again."""
    box.environment["CRASH_EPOCH_S"] = "0.3"
    address, _, _ = box.start_cluster()
    driver = box.start("--cluster", address)
    training(box)
    config = json.loads((next((box.root / "host" / "agents").glob("*/agent.json"))).read_text())
    assert config["run_id"] == (box.folder / "run_id").read_text().strip()
    (agent,) = box.of_role("agent")
    os.kill(agent.pid, signal.SIGSTOP)  # it does not notice the death, as on another host
    driver.kill()
    driver.wait()
    held = box.of_role("trial")
    assert held
    os.kill(agent.pid, signal.SIGCONT)
    goes_on(box, "--cluster", address, kills=2)
    assert not any(process.lives for process in [agent, *held])


if sys.platform != "linux":
    pytestmark.append(pytest.mark.skip(reason="reads /proc"))

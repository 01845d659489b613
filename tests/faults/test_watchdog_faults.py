"""Faults a host can have, and what the watchdog does: real processes, real signals, limits scaled to a hundredth.

Faults of the whole scheduler (a locked study database, PRUNED exactly once in the study) are tested with the agent and
the recorder. After each fault `Host.check` holds: the victims are as many as they should be, bystanders and foreign
processes live, each trial has one end and one start, registrations are those of living trials, a new trial completes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.host import vitals
from scheduler.host.attempt_folder import AttemptFolder
from scheduler.model import ExitReason, Pressure
from tests.faults.watchdog_harness import BUSY, HEALTHY, MIB, SILENT, WAIT_S, Host, alive, host
from tests.waiting import until

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="these faults are made with Linux's /proc"),
]

ALWAYS_HARD = {"hard_free_share_no_swap": 2.0, "hard_free_share": 2.0, "hard_swap_free_share": 2.0}
NEVER_HARD = {"hard_free_share_no_swap": 0.0, "hard_free_share": 0.0, "hard_swap_free_share": 0.1}


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Host]:
    """A host with scaled limits and no watchdog yet."""
    with host(tmp_path) as made:
        yield made


def lives_for(trial: Any, seconds: float) -> None:
    """The trial must not end within this time."""
    assert not trial.done.wait(seconds), (trial.states, trial.story)


# -- stall ----------------------------------------------------------------------------------------------------------


def test_silent_deadlock_is_killed_with_its_stack_and_story(here: Host) -> None:
    """A trial at 0 % CPU without a tick dies; its folder says by which rule, where it hung, and why not the other."""
    here.running()
    here.foreign()
    healthy, silent = here.trial("healthy", HEALTHY), here.trial("silent", SILENT)
    assert silent.done.wait(WAIT_S)
    assert silent.state == "PRUNED"
    assert silent.story is not None and silent.story.reason is ExitReason.STALLED and silent.story.finished
    assert silent.story.seconds is not None and silent.story.seconds >= 1.5
    story = json.loads((silent.folder / "kill.json").read_text())
    assert "trial.py" in story["stack"]
    assert story["thresholds"]["stall_after_s"] == 1.5
    assert len(story["samples"]) > 5
    assert any(c["why"].startswith("healthy") for c in story["candidates"])
    here.check(victims=1, bystanders=(healthy,))


def test_silent_before_its_first_tick_gets_the_longer_limit(here: Host) -> None:
    """A trial that never ticked is killed as well, only later."""
    here.running()
    silent = here.trial("silent", "time.sleep(600)", wait=False)
    assert silent.done.wait(WAIT_S)
    assert silent.story is not None and silent.story.seconds is not None and silent.story.seconds >= 2.5
    here.check(victims=1)


def test_ticking_at_zero_cpu_is_not_killed(here: Host) -> None:
    """A trial that waits for a GPU uses no CPU; its ticks are what counts."""
    here.running()
    gpu = here.trial("gpu", "while True:\n    tick(); time.sleep(1.2)", uses_device=True)
    lives_for(gpu, 5.0)
    here.check(victims=0, bystanders=(gpu,))


def test_all_cpu_in_a_grandchild_is_not_killed(here: Host) -> None:
    """Work in a grandchild is invisible in the root's CPU time and is work all the same."""
    here.running()
    script = """
    tick()
    burner = "import time\\nwhile True: sum(range(20000)); time.sleep(0.01)"
    code = f"import subprocess, sys; subprocess.call([sys.executable, '-S', '-c', {burner!r}])"
    subprocess.call([sys.executable, "-S", "-c", code])
    """
    trial = here.trial("tree", script)
    lives_for(trial, 4.0)
    here.check(victims=0, bystanders=(trial,))


def test_stopped_trial_is_left_alone_until_the_host_is_in_need(here: Host) -> None:
    """SIGSTOP is a pause, not a stall; under HARD pressure a paused trial can be the victim, and it does die."""
    here.running()
    trial = here.trial("paused", HEALTHY)
    os.kill(trial.process.pid, signal.SIGSTOP)
    lives_for(trial, 4.0)
    here.change(**ALWAYS_HARD)
    assert trial.done.wait(WAIT_S)
    here.change(**NEVER_HARD)
    assert trial.state == "PRUNED"
    here.check(victims=1)


def test_observe_mode_only_writes_what_it_would_have_done(here: Host) -> None:
    """In observe mode nobody dies; the log and the folder hold the same story."""
    here.running()
    silent = here.trial("silent", SILENT, mode="observe")
    until(lambda: here.saw("kill.would_kill"), WAIT_S, "it says what it would have killed")
    lives_for(silent, 2.0)
    assert json.loads((silent.folder / "would_kill.json").read_text())["rule"] == "stalled"
    assert len(here.saw("kill.would_kill")) == 1
    here.check(victims=0, bystanders=(silent,))


def test_orphan_is_ended(here: Host) -> None:
    """A trial whose agent is dead and that did not notice is ended, with a reason of its own."""
    here.running()
    trial = here.trial("orphan", HEALTHY)
    import dataclasses

    gone = dataclasses.replace(trial.registration, owner_pid=trial.registration.pid, owner_start=1.0)
    here.registry.register(gone)
    assert trial.done.wait(WAIT_S)
    assert trial.story is not None and trial.story.reason is ExitReason.LOST
    here.check(victims=1)


# -- dying ----------------------------------------------------------------------------------------------------------


def test_sigterm_ignored_is_killed_by_time(here: Host) -> None:
    """Escalation does not wait for a threshold: after the grace time comes SIGKILL, once."""
    here.running()
    trial = here.trial("ignores_sigterm", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SILENT)
    assert trial.done.wait(WAIT_S)
    assert trial.story is not None
    steps = dict(trial.story.steps)
    assert steps["kill"] - steps["term"] >= 0.55
    here.check(victims=1)


ESCAPES = {
    "setsid": "subprocess.Popen(['sleep', '987'], start_new_session=True)",
    "double_fork": "subprocess.call(['sh', '-c', 'setsid sleep 987 & exit'])",
    "clean_environment": "subprocess.call(['env', '-i', '/bin/sh', '-c', '/usr/bin/setsid /bin/sleep 987 & exit'])",
}


@pytest.mark.parametrize("how", ESCAPES)
def test_escaped_children_die_too(here: Host, how: str) -> None:
    """A child in a session of its own, even with init as parent and a clean environment, is still of the tree."""
    here.running()
    bystander = subprocess.Popen(["sleep", "987"], start_new_session=True)
    here.others.append(bystander)
    # A subreaper keeps orphans of the tree below the trial; `ctypes` because the standard library has no prctl.
    reaper = "import ctypes; ctypes.CDLL(None).prctl(36, 1)\n"
    trial = here.trial("escape", reaper + f"{ESCAPES[how]}\ntick()\n" + BUSY)
    key = trial.registration
    escaped = until(
        lambda: [
            (p.pid, p.start)
            for p in vitals.system.members(key.pid, key.start_time, vitals.system.process_table())
            if p.pid != key.pid
        ],
        5.0,
        "the child is there",
    )
    here.change(stall_cpu_share=1e6, stall_after_s=0.6)  # busy counts as idle now, so it stalls
    assert trial.done.wait(WAIT_S)
    here.change(stall_cpu_share=0.01, stall_after_s=1.5)
    assert not any(alive(identity) for identity in escaped)
    here.check(victims=1)


def test_child_that_lost_its_parent_is_remembered(here: Host) -> None:
    """Without a subreaper a child seen in the tree before it was orphaned is still found by its identity."""
    here.running()
    trial = here.trial(
        "leaver",
        "p = subprocess.Popen(['sh', '-c', 'setsid sleep 986 & sleep 0.7; exit'])\ntick()\np.wait()\n" + SILENT,
    )
    children: set[tuple[int, float]] = set()

    def seen() -> bool:
        key = trial.registration
        children.update(vitals.living(key.pid, key.start_time) - {trial.identity})
        return trial.done.is_set()

    until(seen, WAIT_S, "the trial is killed")
    assert any(s.has("term") for s in here.stories())
    assert children and not any(alive(identity) for identity in children)
    here.check(victims=1)


def test_exit_during_the_grace_time_keeps_its_result(here: Host) -> None:
    """A trial that finishes between SIGTERM and SIGKILL is COMPLETE; no SIGKILL is sent."""
    here.running()
    script = """
    def leave(*_):
        time.sleep(0.2); result(); os._exit(0)
    signal.signal(signal.SIGTERM, leave)
    tick()
    time.sleep(600)
    """
    trial = here.trial("late", script)
    assert trial.done.wait(WAIT_S)
    assert trial.state == "COMPLETE"
    assert trial.story is not None and trial.story.finished and not trial.story.has("kill")
    here.check(victims=1)


def test_result_written_just_before_the_kill_counts(here: Host, tmp_path: Path) -> None:
    """A result that is durable before the signal makes the trial COMPLETE although its process is killed."""
    gate, go = tmp_path / "gate", tmp_path / "go"
    here.running(failpoint=f"term@{gate}")
    script = f"""
    tick()
    while not os.path.exists({str(go)!r}):
        time.sleep(0.2)
    result(); print("written", flush=True)
    time.sleep(600)
    """
    trial = here.trial("late", script)
    until(lambda: Path(f"{gate}.reached").exists(), WAIT_S, "the kill is about to be sent")
    go.touch()
    until(lambda: "written" in trial.said, WAIT_S, "the result is durable")
    gate.touch()
    assert trial.done.wait(WAIT_S)
    assert trial.state == "COMPLETE"
    here.check(victims=1)


def test_unkillable_victim_stays_charged_and_closes_the_host(here: Host, tmp_path: Path) -> None:
    """A victim that SIGKILL does not end keeps its registration, closes admission, and no second trial is killed."""
    gate = tmp_path / "gate"
    group = here.cgroup("freezer", "stuck")
    here.running(failpoint=f"term@{gate}")
    stuck, healthy = here.trial("stuck", SILENT, cgroup=group), here.trial("healthy", HEALTHY)
    until(lambda: Path(f"{gate}.reached").exists(), WAIT_S, "the kill is about to be sent")
    (group / "freezer.state").write_text("FROZEN")
    second = here.trial("second", SILENT)
    gate.touch()
    closed = until(lambda: (r := here.registry.pressure()) and r.closed_reason, WAIT_S, "the host is closed")
    assert closed.startswith("unkillable")
    lives_for(second, 3.0)
    assert stuck.registration.key in {reg.key for reg in here.registry.registrations()}
    second.process.kill()
    assert second.done.wait(WAIT_S)
    (group / "freezer.state").write_text("THAWED")
    assert stuck.done.wait(WAIT_S)
    assert stuck.state == "PRUNED"
    until(lambda: (r := here.registry.pressure()) and r.closed_reason is None, WAIT_S, "the host is open again")
    here.check(victims=1, bystanders=(healthy,))


# -- memory ---------------------------------------------------------------------------------------------------------


def grown(here: Host, names: str, mib: int, group: Path, **options: Any) -> list[Any]:
    """Trials that hold so much and then tick."""
    script = f"block = hold({mib})\n" + HEALTHY
    return [here.trial(name, script, cgroup=group, **options) for name in names]


def test_four_over_the_line_lose_one(here: Host) -> None:
    """Real pressure by four trials inside one limit: one dies, its memory suffices, the others stay. By the level
    alone: how fast they load, which depends on the machine, foretells more than is to come."""
    group = here.cgroup("memory", "four", limit_in_bytes=400 * MIB)
    pace = {"run_out_s": 0.0, "run_out_soon_s": 0.0}
    here.limits.update(own_share=0.25, soft_free_share_no_swap=0.2, elevated_free_share=0.22, **pace)
    here.registry.thresholds(here.limits)
    here.running(cgroup=group)
    trials = grown(here, "abcd", 85, group)
    until(lambda: any(t.done.is_set() for t in trials), WAIT_S, "one trial is evicted")
    until(lambda: (r := here.registry.pressure()) and r.level is Pressure.NORMAL, WAIT_S, "the pressure is over")
    for trial in trials:
        trial.done.wait(0.7)  # past the cool-down: nobody else goes
    assert sum(t.done.is_set() for t in trials) == 1
    here.check(victims=1, bystanders=tuple(t for t in trials if not t.done.is_set()))
    assert here.stories()[0].reason is ExitReason.EVICTED


def test_foreign_memory_closes_admission_and_kills_nobody(here: Host) -> None:
    """When another program takes the memory, killing ours would not help: admission closes and the log says why."""
    group = here.cgroup("memory", "foreign", limit_in_bytes=400 * MIB)
    here.limits.update(own_share=0.25)
    here.registry.thresholds(here.limits)
    here.running(cgroup=group)
    trial = here.trial("small", "block = hold(8)\n" + HEALTHY, cgroup=group)
    here.foreign(
        "b = bytearray(345 << 20)\nfor i in range(0, len(b), 4096): b[i] = 1\nimport time; time.sleep(600)", group
    )
    closed = until(lambda: (r := here.registry.pressure()) and r.closed_reason, WAIT_S, "admission is closed")
    assert closed.startswith("not_ours")
    lives_for(trial, 2.0)
    here.check(victims=0, bystanders=(trial,))


def test_page_cache_flood_kills_nobody(here: Host) -> None:
    """A trial that reads and writes far more than the limit fills the page cache, which is not use."""
    group = here.cgroup("memory", "cache", limit_in_bytes=300 * MIB)
    here.running(cgroup=group)
    script = """
    path = os.path.join(folder, "big")
    chunk = bytes(1 << 20)
    with open(path, "wb") as file:
        for i in range(700):
            file.write(chunk)
            if i % 50 == 0: tick()
    while True:
        with open(path, "rb") as file:
            while file.read(1 << 20): pass
        tick()
    """
    trial = here.trial("flood", script, cgroup=group)
    lives_for(trial, 5.0)
    reading = here.registry.pressure()
    assert reading is not None and reading.closed_reason is None and reading.level <= Pressure.ELEVATED
    here.check(victims=0, bystanders=(trial,))
    (trial.folder / "big").unlink()


def test_overshoot_on_an_idle_host_is_reported_not_killed(here: Host) -> None:
    """A trial at 1.3 x its reservation on an idle host goes on; the agents are told, so that the reservation grows."""
    here.running()
    trial = here.trial("over", "block = hold(130)\n" + HEALTHY, reservation_bytes=100 * MIB)
    until(
        lambda: (r := here.registry.pressure()) and trial.registration.key in r.over,
        WAIT_S,
        "the overshoot is reported",
    )
    lives_for(trial, 2.0)
    reading = here.registry.pressure()
    assert reading is not None and reading.used_bytes[trial.registration.key] >= 130 * MIB
    here.check(victims=0, bystanders=(trial,))


def test_far_over_its_promise_is_killed_without_pressure(here: Host) -> None:
    """A trial far over what it promised dies although there is memory left."""
    here.limits.update(far_over_extra_bytes=50 * MIB)
    here.registry.thresholds(here.limits)
    here.running()
    trial = here.trial("far", "block = hold(180)\n" + HEALTHY, reservation_bytes=40 * MIB)
    assert trial.done.wait(WAIT_S)
    assert trial.story is not None and trial.story.reason is ExitReason.OVERSHOOT
    here.check(victims=1)


def test_kernel_oom_kill_is_recognised(here: Host) -> None:
    """A trial that outruns the watchdog inside a cgroup limit is killed by the kernel, and that can be told."""
    group = here.cgroup("memory", "oom", limit_in_bytes=100 * MIB)
    here.running()
    witness = vitals.OomWitness()
    trial = here.trial("fast", "tick(); block = hold(400)", cgroup=group)
    assert trial.done.wait(WAIT_S)
    assert trial.state == "FAIL(-9)"
    assert witness.is_oom_kill(trial.process.returncode)
    assert not vitals.OomWitness().is_oom_kill(trial.process.returncode)
    here.check(victims=0)


@pytest.fixture
def swap_file(tmp_path: Path) -> Iterator[Path]:
    """256 MiB of real swap, taken away again whatever happens."""
    path = tmp_path / "swap"
    if os.geteuid() != 0:
        pytest.skip("needs root for swapon")
    with open(path, "wb") as file:
        file.writelines(bytes(MIB) for _ in range(256))
    path.chmod(0o600)
    made = subprocess.run(["mkswap", path], capture_output=True, text=True, check=False)
    on = subprocess.run(["swapon", path], capture_output=True, text=True, check=False) if made.returncode == 0 else made
    try:
        if on.returncode != 0:
            pytest.skip(f"no swap on this machine: {on.stderr.strip()}")
        yield path
    finally:
        subprocess.run(["swapoff", path], capture_output=True, check=False)
        path.unlink()


TOUCH = """
tick()
block = bytearray(200 << 20)
while True:
    for i in range(0, len(block), 4096):
        block[i] = (block[i] + 1) % 256
"""


@pytest.mark.parametrize("rule", ["swap_threshold", "thrashing"])
def test_real_swapping_ends_the_trial(swap_file: Path, tmp_path: Path, rule: str) -> None:
    """A trial that pages for real is ended: by the host's swap threshold, or as thrashing, whatever its CPU."""
    limits: dict[str, Any] = {"victim_min_bytes": MIB}
    if rule == "thrashing":
        limits |= {"swap_limit_share_of_swap": 5.0, "swap_limit_share_of_ram": 5.0, "soft_free_share": 0.0}
    with host(tmp_path / "h", **limits) as here:
        group = here.cgroup("memory", "swap", limit_in_bytes=64 * MIB)
        here.running()
        healthy = here.trial("healthy", HEALTHY)
        trial = here.trial("thrash", TOUCH, cgroup=group)
        assert trial.done.wait(WAIT_S)
        assert trial.story is not None and trial.story.rule == rule
        assert trial.story.evidence["swap_bytes"] > 16 * MIB
        here.check(victims=1, bystanders=(healthy,))


def test_old_swap_that_stays_used_kills_nobody(swap_file: Path, tmp_path: Path) -> None:
    """Pages that were swapped out and are not needed are no pressure: nobody dies and ELEVATED ends."""
    with host(tmp_path / "h", elevated_swap_bytes=8 * MIB) as here:
        group = here.cgroup("memory", "old", limit_in_bytes=64 * MIB)
        trial = here.trial("cold", "block = hold(180)\n" + HEALTHY, cgroup=group)
        here.running()
        swapped = until(
            lambda: (s := vitals.sample_tree(*trial.identity)) and s.swap_bytes, WAIT_S, "part of it is swapped out"
        )
        assert swapped > 64 * MIB
        lives_for(trial, 4.0)
        until(
            lambda: (r := here.registry.pressure()) and r.level is Pressure.NORMAL, WAIT_S, "the host counts as normal"
        )
        here.check(victims=0, bystanders=(trial,))


# -- the watchdog itself --------------------------------------------------------------------------------------------

STEPS = ["intent", "recheck", "term", "term_sent", "kill", "kill_sent", "dead", "memory_back", "released"]


@pytest.mark.parametrize("step", STEPS)
def test_standby_finishes_a_kill_its_predecessor_died_in(here: Host, step: str) -> None:
    """SIGKILL at each step of a kill: the standby takes over within 2 s and there is one kill, finished once."""
    first = here.running(failpoint=step)
    here.watchdog()
    healthy = here.trial("healthy", HEALTHY)
    ignores_sigterm = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    silent = here.trial("silent", ignores_sigterm + SILENT)
    assert first.wait(WAIT_S) == -signal.SIGKILL
    died = time.time()
    until(lambda: len(here.saw("watchdog.elected")) == 2, WAIT_S, "the standby is elected")
    assert here.saw("watchdog.elected")[1]["unix"] - died < 2.0
    assert silent.done.wait(WAIT_S)
    assert silent.state == "PRUNED"
    released = [name for s in here.registry.kills() for name, _ in s.steps if name == "released"]
    assert len(released) == 1
    here.check(victims=1, bystanders=(healthy,))


def test_two_watchdogs_are_one(here: Host) -> None:
    """Of several watchdogs on a host one acts; the others wait without killing anything."""
    here.running()
    here.watchdog()
    here.watchdog()
    silent = here.trial("silent", SILENT)
    assert silent.done.wait(WAIT_S)
    assert len(here.saw("watchdog.elected")) == 1
    here.check(victims=1)


def test_starved_watchdog_does_not_kill_from_old_samples(here: Host) -> None:
    """After a gap (suspend, starvation) the windows start anew: nothing is known of the time in it."""
    process = here.running()
    silent = here.trial("silent", SILENT)
    os.kill(process.pid, signal.SIGSTOP)
    assert not silent.done.wait(2.5)
    resumed = time.monotonic()
    os.kill(process.pid, signal.SIGCONT)
    assert silent.done.wait(WAIT_S)
    assert here.saw("watchdog.gap")
    assert silent.story is not None and dict(silent.story.steps)["intent"] - resumed >= 1.4
    here.check(victims=1)


def test_full_disk_no_kill_without_a_durable_intent(tmp_path: Path) -> None:
    """When the journal cannot be written a stalled trial lives on; under HARD the spare room is used."""
    root = tmp_path / "h"
    (root / "host").mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", root / "host"], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"needs root for mount: {mounted.stderr!r}")
    try:
        with host(root) as here:
            here.running()
            until((here.root / "spare").exists, WAIT_S, "the spare room is kept")
            silent = here.trial("silent", SILENT)
            with open(here.root / "filler", "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(1024))
                except OSError:
                    pass
            lives_for(silent, 4.0)
            assert here.saw("kill.not_durable") and not here.stories()
            with open(here.root / "policy.json", "r+") as file:  # in place: there is no room for a new file
                file.write(json.dumps({**here.limits, **ALWAYS_HARD}))
            assert silent.done.wait(WAIT_S)
            assert len(here.stories()) == 1
            assert not (here.root / "spare").exists()
    finally:
        subprocess.run(["umount", "-l", root / "host"], capture_output=True, check=False)


def test_watchdog_leaves_when_its_agent_and_all_trials_are_gone(here: Host) -> None:
    """A cut lifeline ends it, but not while a registered trial lives."""
    process = here.running()
    trial = here.trial("last", HEALTHY)
    until(lambda: (r := here.registry.pressure()) and r.used_bytes, WAIT_S, "the trial is watched")
    assert process.stdin is not None
    process.stdin.close()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.0)
    trial.process.kill()
    assert process.wait(WAIT_S) == 0


# -- guards: with one taken away, a fault is no longer survived -----------------------------------------------------


def waking(here: Host, tmp_path: Path, without: str | None) -> None:
    """The victim wakes up between the choice and the signal: it must live."""
    gate, go = tmp_path / "gate", tmp_path / "go"
    here.running(failpoint=f"recheck@{gate}", without=without)
    script = f"tick()\nwhile not os.path.exists({str(go)!r}): time.sleep(0.2)\n" + HEALTHY
    trial = here.trial("waker", script)
    until(lambda: Path(f"{gate}.reached").exists(), WAIT_S, "it was chosen")
    ticks = len(trial.said)
    go.touch()
    until(lambda: len(trial.said) > ticks, WAIT_S, "it works again")
    gate.touch()
    lives_for(trial, 2.0)
    here.check(victims=0, bystanders=(trial,))
    assert any(s.aborted for s in here.registry.kills())


def reused_pid(here: Host, tmp_path: Path, without: str | None) -> None:
    """The victim ends and its pid goes to a stranger between the choice and the signal: the stranger lives."""
    gate = tmp_path / "gate"
    here.running(failpoint=f"term@{gate}", without=without)
    trial = here.trial("gone", SILENT)
    until(lambda: Path(f"{gate}.reached").exists(), WAIT_S, "the signal is about to be sent")
    pid = trial.process.pid
    trial.process.kill()
    until(lambda: vitals.start_time(pid) is None, WAIT_S, "the victim is reaped")
    stranger = process_with_pid(pid)
    here.others.append(stranger)
    gate.touch()
    assert trial.done.wait(WAIT_S)
    until(lambda: stranger.poll() is not None or here.saw("kill.released"), WAIT_S, "the kill is over")
    here.check(victims=1)


def process_with_pid(pid: int) -> subprocess.Popen[bytes]:
    """A process with this very pid: the kernel is told which number it gave last."""
    last = Path("/proc/sys/kernel/ns_last_pid")
    if not os.access(last, os.W_OK):
        pytest.skip("needs root and /proc/sys/kernel/ns_last_pid")
    for _ in range(200):
        try:
            last.write_text(str(pid - 1))
        except OSError as error:
            pytest.skip(f"the kernel does not take ns_last_pid: {error}")
        process = subprocess.Popen(["sleep", "985"], start_new_session=True)
        if process.pid == pid:
            return process
        process.kill()
        process.wait()
    pytest.skip("somebody else always was faster to take the next pid")


def one_at_a_time(here: Host, tmp_path: Path, without: str | None) -> None:
    """A victim that takes its time to die is the only one, and is killed once."""
    here.running(without=without)
    ignores_sigterm = here.trial("ignores_sigterm", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SILENT)
    assert ignores_sigterm.done.wait(WAIT_S)
    here.check(victims=1)


def one_watchdog(here: Host, tmp_path: Path, without: str | None) -> None:
    """Two watchdogs, one kill."""
    here.running(without=without)
    here.watchdog(without=without)
    until(lambda: without is None or len(here.saw("watchdog.elected")) == 2, WAIT_S, "both are up")
    silent = here.trial("silent", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SILENT)
    assert silent.done.wait(WAIT_S)
    here.check(victims=1)


def cool_down(here: Host, tmp_path: Path, without: str | None) -> None:
    """The second victim of lasting pressure comes only after the cool-down."""
    here.running(without=without)
    trials = [here.trial(name, "block = hold(20)\n" + HEALTHY) for name in "abc"]
    here.change(**ALWAYS_HARD)
    until(lambda: len(here.stories()) >= 2, WAIT_S, "a second trial is killed")
    here.change(**NEVER_HARD)
    first, second = here.stories()[:2]
    waited = dict(second.steps)["intent"] - dict(first.steps)["released"]
    assert waited >= here.limits["cooldown_s"] - 0.05, waited
    assert sum(not t.done.is_set() for t in trials) >= 1


def gap(here: Host, tmp_path: Path, without: str | None) -> None:
    """A watchdog that was starved while a trial was quiet must not count that time."""
    process = here.running(without=without)
    trial = here.trial("quiet", "tick()\ntime.sleep(3.0)\n" + HEALTHY)
    until(lambda: (r := here.registry.pressure()) and r.used_bytes, WAIT_S, "it is watched")
    os.kill(process.pid, signal.SIGSTOP)
    assert not trial.done.wait(1.9)
    os.kill(process.pid, signal.SIGCONT)
    lives_for(trial, 3.0)
    here.check(victims=0, bystanders=(trial,))


def fence(here: Host, tmp_path: Path, without: str | None) -> None:
    """The same attempt handed out twice (Dask runs a task again) trains once."""
    claims = AttemptFolder.claim if without is None else (lambda folder, run: True)
    folder = here.runs / "twice"
    folder.mkdir()
    for _ in range(2):
        if claims(AttemptFolder(folder), "run"):
            with open(folder / "starts", "a") as file:
                file.write("start\n")
    assert len((folder / "starts").read_text().splitlines()) == 1


# name -> (the fault, what takes the guard away, how the harm shows)
GUARDS: dict[str, tuple[Any, str, str]] = {
    "recheck": (
        waking,
        """
        from scheduler.host import signals
        from scheduler.watchdog import kill
        def blind(self, now):
            signals.failpoint("recheck")
            self._start_kill(now)
        kill.Kill._recheck = blind
        """,
        "PRUNED",
    ),
    "identity": (
        reused_pid,
        """
        import os
        from scheduler.watchdog import kill
        def blind(identities, number, start_time):
            for pid, _ in identities:
                try: os.kill(pid, number)
                except OSError: pass
            return 0
        kill.send_all = blind
        """,
        "a foreign process was hit",
    ),
    "token": (
        one_at_a_time,
        """
        from scheduler.watchdog import watchdog
        def drive(self, now):
            if self.kill is not None:
                self.stuck.append(self.kill)
                self.kill = None
            for each in self.stuck:
                each.step(now)
            self.stuck = [each for each in self.stuck if not each.over]
        watchdog.Watchdog._drive = drive
        """,
        "stalled.*stalled",
    ),
    "lock": (
        one_watchdog,
        "from scheduler.watchdog import watchdog\nwatchdog.Election.won = lambda self: True",
        "stalled.*stalled",
    ),
    "cooldown": (
        cool_down,
        "from scheduler.watchdog.policy import eviction\neviction.Evaluator.kill_ended = lambda self, at: None",
        "^0[.]",
    ),
    "gap": (
        gap,
        "from scheduler.watchdog.policy import eviction\neviction.Evaluator._is_gap = lambda self, sample: False",
        "PRUNED",
    ),
    "fence": (fence, "no fence", "2 == 1"),
}


@pytest.mark.parametrize("guard", GUARDS)
def test_guarded(here: Host, tmp_path: Path, guard: str) -> None:
    """With all guards in place the fault is survived."""
    GUARDS[guard][0](here, tmp_path, None)


@pytest.mark.parametrize("guard", GUARDS)
def test_without_the_guard_the_fault_does_harm(here: Host, tmp_path: Path, guard: str) -> None:
    """Each guard is needed: taken away, the same fault is no longer survived."""
    fault, without, harm = GUARDS[guard]
    with pytest.raises(AssertionError, match=harm):
        fault(here, tmp_path, without)

"""What the watchdog's fault tests share: a small agent, trials as little scripts, a watchdog with scaled thresholds.

The agent here does what `scheduler.worker.agent` does for a trial: start it in a session of its own, register it, pass
on its ticks, reap it, wait for the story of a kill, settle the end, deregister. Every process started is remembered by
identity and ended by identity; nothing else is ever signalled.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from scheduler.host import vitals
from scheduler.host.attempt_folder import AttemptFolder
from scheduler.host.registry import HostRegistry, KillStory, Registration
from tests.waiting import until

REPO = Path(__file__).resolve().parents[2]
MIB = 2**20
WAIT_S = 60.0  # how long is waited, not how long it may take: the machine may be loaded

# Limits a hundredth of the real ones, so that ten minutes pass in a second or two.
SCALED: dict[str, Any] = {
    "sample_s": 0.1,
    "host_sample_s": 0.1,
    "stall_after_s": 1.5,
    "stall_unproven_s": 2.5,
    "stall_bucket_s": 0.3,
    "stall_io_bytes_per_s": 4 * MIB,
    "thrash_after_s": 2.0,
    "over_after_s": 0.3,
    "over_first_after_s": 0.5,
    "over_extra_bytes": 8 * MIB,
    "far_over_extra_bytes": 400 * MIB,
    "paging_window_s": 1.0,
    "soft_for_s": 0.5,
    "hard_for_s": 0.3,
    "psi_hard_s": 1e9,
    "clear_after_s": 1.0,
    "own_share": 0.0,
    "victim_min_bytes": 1 * MIB,
    "stall_grace_s": 0.6,
    "soft_grace_s": 0.6,
    "unkillable_after_s": 1.5,
    "memory_back_after_s": 1.0,
    "cooldown_s": 1.0,
    "orphan_after_s": 0.6,
}

PRELUDE = """
import faulthandler, os, signal, subprocess, sys, threading, time
faulthandler.enable(); faulthandler.register(signal.SIGUSR1, all_threads=True)
folder = sys.argv[1]
def tick(n=[0]):
    n[0] += 1
    print("tick", n[0], flush=True)
def result(value=1.0):
    temporary = os.path.join(folder, "result.tmp")
    with open(temporary, "w") as file:
        file.write(str(value)); file.flush(); os.fsync(file.fileno())
    os.replace(temporary, os.path.join(folder, "result.json"))
def hold(mib):
    block = bytearray(mib << 20)
    for i in range(0, len(block), 4096):
        block[i] = 1
    return block
open(os.path.join(folder, "starts"), "a").write(f"{os.getpid()}\\n")
"""

SILENT = "tick(); lock = threading.Lock(); lock.acquire(); lock.acquire()"
BUSY = """
tick()
while True:
    sum(range(20000)); time.sleep(0.02)
"""
HEALTHY = """
while True:
    tick(); time.sleep(0.3)
"""


def alive(identity: tuple[int, float]) -> bool:
    """Is this very process there, and not a zombie?"""
    proc = vitals.system.process(identity[0])
    return proc is not None and proc.start == identity[1] and proc.state not in "ZX"


@dataclass
class Trial:
    """One attempt under the small agent. state: what a study would be told, set once, after its death."""

    name: str
    folder: Path
    process: subprocess.Popen[str]
    registration: Registration
    said: list[str] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    story: KillStory | None = None
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def identity(self) -> tuple[int, float]:
        """(pid, start time) of its root process."""
        return self.registration.pid, self.registration.start_time

    @property
    def state(self) -> str | None:
        """Its final state, None while it lives."""
        return self.states[0] if self.states else None

    @property
    def starts(self) -> int:
        """How often its training was started."""
        path = self.folder / "starts"
        return len(path.read_text().splitlines()) if path.exists() else 0


class Host:
    """A private registry root with its agent, trials and watchdogs."""

    def __init__(self, root: Path, **thresholds: Any) -> None:
        self.root = root / "host"
        self.runs = root / "run"
        self.log = root / "watchdog.log"
        self.runs.mkdir(parents=True)
        self.registry = HostRegistry(self.root)
        self.limits = {**SCALED, **thresholds}
        self.registry.thresholds(self.limits)
        self.trials: list[Trial] = []
        self.watchdogs: list[subprocess.Popen[bytes]] = []
        self.others: list[subprocess.Popen[Any]] = []
        self.cgroups: list[Path] = []
        self.closing = False

    # -- trials -------------------------------------------------------------------------------------------------

    def trial(
        self,
        name: str,
        script: str,
        *,
        reservation_bytes: int = 0,
        mode: str = "on",
        uses_device: bool = False,
        cgroup: Path | None = None,
        wait: bool = True,
    ) -> Trial:
        """Start a trial and register it, as an agent would."""
        folder = self.runs / name
        folder.mkdir()
        assert AttemptFolder(folder).claim("run")
        path = folder / "trial.py"
        path.write_text(PRELUDE + textwrap.dedent(script))
        enter = "" if cgroup is None else f"echo $$ > {cgroup}/cgroup.procs; "
        with open(folder / "trial.log", "ab") as log:
            process = subprocess.Popen(
                ["/bin/sh", "-c", f'{enter}exec "{sys.executable}" -S "{path}" "{folder}"'],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        registration = Registration(
            attempt=f"study/{len(self.trials)}/1",
            slug=name,
            pid=process.pid,
            start_time=vitals.start_time(process.pid) or 0.0,
            reservation_bytes=reservation_bytes,
            folder=str(folder),
            run="test",
            mode=mode,
            uses_device=uses_device,
            launched=time.monotonic(),
            owner_start=vitals.start_time(os.getpid()),
        )
        trial = Trial(name, folder, process, registration)
        self.trials.append(trial)
        self.registry.register(registration)
        threading.Thread(target=self._follow, args=(trial,), daemon=True).start()
        if wait:
            until(lambda: trial.said or trial.states, WAIT_S, f"{name} says something")
        return trial

    def _follow(self, trial: Trial) -> None:
        """The agent's part: ticks while it lives; then its end, settled once."""
        assert trial.process.stdout is not None
        for line in trial.process.stdout:
            trial.said.append(line.strip())
            if line.startswith("tick ") and line.endswith("\n"):  # one that is killed may leave half a line
                step = int(line.split()[1])
                self.registry.tick(trial.registration, step, time.monotonic())
        status = trial.process.wait()
        deadline = time.monotonic() + 40.0
        while (story := self.story(trial)) is not None and not story.finished and time.monotonic() < deadline:
            if self.closing:
                break
            time.sleep(0.02)
        trial.story = story
        if (trial.folder / "result.json").exists():
            state = "COMPLETE"
        elif story is not None and story.signalled:
            state = "PRUNED"
        else:
            state = f"FAIL({status})"
        trial.states.append(state)
        self.registry.deregister(trial.registration)
        trial.done.set()

    def story(self, trial: Trial) -> KillStory | None:
        """What the watchdog did to it, as an agent would ask."""
        return self.registry.kill_of(trial.registration.attempt, trial.registration.pid)

    def stories(self) -> list[KillStory]:
        """Kills in which a signal was sent."""
        return [story for story in self.registry.kills() if story.signalled]

    # -- others -------------------------------------------------------------------------------------------------

    def watchdog(
        self, *, failpoint: str | None = None, without: str | None = None, cgroup: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a watchdog. failpoint: see signals.failpoint. without: Python that takes one of its guards away."""
        environment = {**os.environ, "PYTHONPATH": str(REPO)}
        if failpoint:
            environment["HEADROOM_FAILPOINT"] = failpoint
        start = "from scheduler.watchdog import watchdog\nraise SystemExit(watchdog.main())"
        code = f"{textwrap.dedent(without or '')}\n{start}"
        with open(self.log, "ab") as log:
            enter = "" if cgroup is None else f"echo $$ > {cgroup}/cgroup.procs; "
            process = subprocess.Popen(
                ["/bin/sh", "-c", f'{enter}exec "$@"', "sh", sys.executable, "-c", code, "--root", str(self.root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        self.watchdogs.append(process)
        return process

    def running(self, **options: Any) -> subprocess.Popen[bytes]:
        """A watchdog that has published a reading."""
        process = self.watchdog(**options)
        until(
            lambda: self.registry.pressure() is not None or process.poll() is not None, WAIT_S, "the watchdog publishes"
        )
        assert process.poll() is None, self.log.read_text(errors="replace")[-2000:]
        return process

    def foreign(self, script: str = "import time; time.sleep(600)", cgroup: Path | None = None) -> Any:
        """A process that is no trial of ours."""
        enter = "" if cgroup is None else f"echo $$ > {cgroup}/cgroup.procs; "
        process = subprocess.Popen(
            ["/bin/sh", "-c", f'{enter}exec "$@"', "sh", sys.executable, "-S", "-c", script], start_new_session=True
        )
        self.others.append(process)
        return process

    def change(self, **thresholds: Any) -> None:
        """Set other thresholds and wait until the watchdog has taken them up."""
        before = len(self.saw("policy.read"))
        self.limits.update(thresholds)
        self.registry.thresholds(self.limits)
        until(lambda: len(self.saw("policy.read")) > before, WAIT_S, "the new thresholds are read")

    def cgroup(self, controller: str, name: str, **values: int) -> Path:
        """A cgroup (v1) of our own, with these values written to its files."""
        base = Path("/sys/fs/cgroup") / controller
        if not (base / "cgroup.procs").exists() or not os.access(base, os.W_OK) or os.geteuid() != 0:
            pytest.skip(f"needs root and cgroup v1 {controller}")
        group = base / f"headroom-test-{os.getpid()}-{name}"
        group.mkdir()
        self.cgroups.append(group)
        for file, value in values.items():
            (group / f"{controller}.{file}").write_text(str(value))
        return group

    def events(self) -> list[Mapping[str, Any]]:
        """The watchdog's log."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def saw(self, event: str) -> list[Mapping[str, Any]]:
        """The log lines with this event name."""
        return [line for line in self.events() if line.get("event") == event]

    # -- afterwards ---------------------------------------------------------------------------------------------

    def check(self, *, victims: int, bystanders: tuple[Trial, ...] = (), new_trial: bool = True) -> None:
        """What must hold after every fault."""
        assert len(self.stories()) == victims, [(s.attempt, s.rule, s.steps) for s in self.registry.kills()]
        for trial in bystanders:
            assert alive(trial.identity), f"bystander {trial.name} is gone"
        for process in self.others:
            assert process.poll() is None, "a foreign process was hit"
        for trial in self.trials:
            assert len(trial.states) <= 1
            assert trial.starts <= 1
        if new_trial:
            fresh = self.trial(f"fresh{len(self.trials)}", "tick(); result(); tick()")
            assert fresh.done.wait(WAIT_S)
            assert fresh.state == "COMPLETE"
        live = {t.registration.key for t in self.trials if not t.done.is_set()}
        assert {reg.key for reg in self.registry.registrations()} == live

    def close(self) -> None:
        """End everything that was started here, by identity, and take the cgroups away."""
        self.closing = True
        for group in self.cgroups:
            with contextlib.suppress(OSError):
                (group / "freezer.state").write_text("THAWED")
        for process in self.watchdogs:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGCONT)
                process.kill()
            process.wait()
        for trial in self.trials:
            lines = [line for story in self.registry.kills() for line in story.records]
            known = {(int(pid), float(start)) for line in lines for pid, start in line.get("members", ())}
            for pid, start in vitals.living(*trial.identity, known):
                if vitals.start_time(pid) == start:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        for process in self.others:
            process.kill()
            process.wait()
        for trial in self.trials:
            trial.done.wait(10.0)
        for group in self.cgroups:
            for _ in range(100):
                with contextlib.suppress(OSError):
                    group.rmdir()
                if not group.exists():
                    break
                time.sleep(0.05)


@contextlib.contextmanager
def host(root: Path, **thresholds: Any) -> Iterator[Host]:
    """A host for one test; everything on it is ended afterwards."""
    made = Host(root, **thresholds)
    try:
        yield made
    finally:
        made.close()

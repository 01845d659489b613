"""The watchdog process: one per host, outside every event loop and GIL. `python -m scheduler.watchdog --root DIR`.

Covers election by flock (a standby takes over within 2 s), sampling, publishing the host's state for the agents, and
driving a kill. What to think of the samples is `policy.eviction`, how to kill is `kill`. Marks no trial in any study.
Imports neither torch, dask, optuna nor pydantic, so that it stays below 30 MiB and answers while the host swaps.

`--replay FILE` feeds recorded samples (JSON lines of `policy.samples.HostSample`) to the same evaluator and prints its
decisions; `--record FILE` writes such a file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scheduler.files.private import opener
from scheduler.host import vitals
from scheduler.host.attempt_folder import AttemptFolder
from scheduler.host.registry import HostReading, HostRegistry, Registration, boot_id
from scheduler.host.signals import Identity, failpoint
from scheduler.model import Pressure, UsageError
from scheduler.model.samples import (
    History,
    HostMemory,
    HostSample,
    TreeSample,
    TrialSample,
    host_sample_from_json,
    to_json,
)
from scheduler.watchdog.election import Election, Lifeline, protect_self
from scheduler.watchdog.kill import STACK_WAIT_S, Kill, write_story
from scheduler.watchdog.policy.eviction import Decision, Evaluator, KillOrder, Over, State, Thresholds
from scheduler.watchdog.policy.pressure import pace_s

STANDBY_POLL_S = 0.5
KILL_STEP_S = 0.1
_LOG_LIMIT_BYTES = 1 << 20


def start(root: str | os.PathLike[str]) -> subprocess.Popen[bytes]:
    """Start a watchdog (or a standby, if one is running) for this registry root.

    Keep the handle: when its stdin is closed, or this process dies, the watchdog leaves as soon as no registered trial
    lives any more. Its log is `watchdog.log` in the root.
    """
    root = os.fspath(root)
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH", "")) if p)
    log = os.path.join(root, "watchdog.log")
    with contextlib.suppress(OSError):
        if os.path.getsize(log) > _LOG_LIMIT_BYTES:
            os.replace(log, log + ".1")
    with open(log, "ab", opener=opener) as out:
        return subprocess.Popen(
            [sys.executable, "-m", "scheduler.watchdog", "--root", root],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=out,
            cwd="/",
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C in the user's terminal is the driver's business
        )


# Said again every turn while a disk is full: once a minute is enough, or the log itself would fill what is left.
_REPEATING = ("kill.not_durable", "host.not_published")
_said_at: dict[str, float] = {}


def log(event: str, **data: Any) -> None:
    """One line of JSON on stderr: constant dotted event names, units in the keys."""
    now = time.time()
    if event in _REPEATING:
        if now - _said_at.get(event, 0.0) < 60.0:
            return
        _said_at[event] = now
    line = {"unix": round(now, 3), "event": event, **data}
    with contextlib.suppress(OSError):
        os.write(2, (json.dumps(line, default=str) + "\n").encode())


class Sampler:
    """The watchdog's sampler: registrations, ticks and measurements put together."""

    def __init__(self, registry: HostRegistry, thresholds: Thresholds) -> None:
        self._registry = registry
        self.thresholds = thresholds
        self.registrations: dict[str, Registration] = {}
        self._trees: dict[str, TreeSample] = {}
        self.known: dict[str, set[Identity]] = {}

    def registration_of(self, trial: TrialSample) -> Registration | None:
        return next(
            (r for r in self.registrations.values() if (r.pid, r.start_time) == (trial.pid, trial.start_time)), None
        )

    def host(self, now: float) -> HostMemory:
        return vitals.host_memory(now)

    def start_time(self, pid: int) -> float | None:
        return vitals.start_time(pid)

    def living(self, pid: int, start: float, known: set[Identity]) -> set[Identity]:
        """Members of a tree that still run; a zombie whose last thread has ended holds nothing."""
        return vitals.living(pid, start, known)

    def sample(self, now: float, interval_s: float | None = None) -> HostSample:
        """Read the host and every registered trial. Of a trial whose process is gone nothing is said.

        interval_s: since the last planned sample; default: that of a look right before a kill.
        """
        if interval_s is None:
            interval_s = self.thresholds.host_sample_s + STACK_WAIT_S
        self.registrations = {f"{reg.key}:{reg.start_time:g}": reg for reg in self._registry.registrations()}
        wanted = {
            key: (reg.pid, reg.start_time, self._near_a_line(key, reg), self.known.get(key, set()))
            for key, reg in self.registrations.items()
        }
        trees = vitals.sample_trees(wanted) if wanted else {}
        trials = []
        for key, reg in self.registrations.items():
            tree = trees.get(key)
            if tree is not None:
                self._trees[key] = tree
                self.known[key] = set(tree.members)
            if tree is None and self.start_time(reg.pid) != reg.start_time:
                self._forget_orphan(reg)
                continue
            trials.append(self._trial(reg, tree))
        for gone in set(self._trees) - set(self.registrations):
            self._trees.pop(gone), self.known.pop(gone, None)
        return HostSample(
            at=now,
            interval_s=interval_s,
            host=self.host(now),
            trials=tuple(trials),
            suspended_s=vitals.suspended_s(),
        )

    def _near_a_line(self, key: str, reg: Registration) -> bool:
        """Is the exact, dearer measurement worth it? Only near the promise, and where pages may be shared."""
        last = self._trees.get(key)
        if last is None or last.footprint_bytes is None or not reg.promised or last.processes < 2:
            return False
        return last.footprint_bytes >= 0.9 * reg.promised

    def _trial(self, reg: Registration, tree: TreeSample | None) -> TrialSample:
        tick = self._registry.last_tick(reg)
        owner_gone = reg.owner_start is not None and self.start_time(reg.owner_pid) != reg.owner_start
        return TrialSample(
            attempt=reg.attempt,
            pid=reg.pid,
            start_time=reg.start_time,
            launched=reg.launched,
            reservation_bytes=reg.reservation_bytes,
            promised_bytes=reg.promised,
            uses_device=reg.uses_device,
            mode=reg.mode,
            owner_gone=owner_gone,
            ticked_at=None if tick is None else tick[1],
            saved_at=None if tick is None else tick[2],
            step=0 if tick is None else tick[0],
            tree=tree,
        )

    def _forget_orphan(self, reg: Registration) -> None:
        """Deregister where the agent, who would do it, is gone too."""
        if reg.owner_start is not None and self.start_time(reg.owner_pid) != reg.owner_start:
            self._registry.deregister(reg)
            log("registration.removed", attempt=reg.attempt, pid=reg.pid, why="trial and agent are gone")


class Watchdog:
    """The elected process of a host: samples, publishes, and at most one kill under way."""

    def __init__(self, registry: HostRegistry, record_to: str | None = None) -> None:
        self.registry = registry
        self.evaluator = Evaluator()
        self.sampler = Sampler(registry, self.evaluator.thresholds)
        self.history = History()
        self.kill: Kill | None = None
        self.stuck: list[Kill] = []
        self._policy_stamp = 0.0
        self._record_to = record_to
        self._interval = 0.0
        self._sampled_at = self._trees_at = -1e18
        self._said: tuple[Any, ...] = ()
        self._suspects: set[str] = set()
        self.live = 0

    def take_over(self, now: float) -> None:
        """Finish what a predecessor left, and go on counting where it stopped."""
        self._read_policy()
        self.registry.compact()
        self.registry.keep_spare()
        for story in self.registry.kills():
            if story.boot_id == boot_id() and story.signalled:
                self.evaluator.kill_started(next(at for name, at in story.steps if name in ("term", "kill")))
                for at in (at for name, at in story.steps if name == "released"):
                    self.evaluator.kill_ended(at)
            if not story.finished:
                left = Kill(self.registry, self.sampler, self.evaluator, log)
                left.resume(story, now)
                if not left.over:
                    self._adopt(left)

    def _adopt(self, kill: Kill) -> None:
        if kill.stuck or self.kill is not None:
            self.stuck.append(kill)
        else:
            self.kill = kill

    def turn(self, now: float) -> float:
        """Do what is due now; returns seconds until the next turn."""
        t = self.evaluator.thresholds
        self._drive(now)
        if now - self._sampled_at >= self._interval - 0.01:
            self._look(now)
        self._interval = self._pace(t)
        pause = max(0.01, self._sampled_at + self._interval - time.monotonic())
        return min(pause, KILL_STEP_S, t.host_sample_s) if self.kill is not None else pause

    def _pace(self, t: Thresholds) -> float:
        """Seconds until the next look. The less there is and the faster it goes, the sooner."""
        last = self.history.samples[-1].host if self.history.samples else None
        return t.host_sample_s if last is None else pace_s(last, self.evaluator.host, t)

    def _tree_pace(self, t: Thresholds) -> float:
        """Seconds between two looks at the trees: dear, so only as often as the host once it is short of time."""
        host = self.evaluator.host
        if host.level is Pressure.NORMAL:
            return t.sample_s
        short = host.level >= Pressure.SOFT or (host.left_s is not None and host.left_s <= t.run_out_soon_s)
        return min(t.sample_s, self._interval if short else t.host_sample_s)

    def _look(self, now: float) -> None:
        self._read_policy()
        t = self.evaluator.thresholds
        planned = self._interval if self._sampled_at > 0 else t.host_sample_s
        if now - self._trees_at >= self._tree_pace(t) - 0.01:
            sample = self.sampler.sample(now, planned)
            self._trees_at = now
        else:
            host = self.sampler.host(now)
            sample = HostSample(at=now, interval_s=planned, host=host, suspended_s=vitals.suspended_s())
        self._sampled_at = now
        self._take(sample, self.evaluator.observe(sample, busy=self.kill is not None))

    def _take(self, sample: HostSample, decision: Decision) -> None:
        """Remember and publish a sample, and begin the kill it led to."""
        self.history.add(sample)
        if sample.trials is not None:
            self.live = len(sample.trials)
        if self._record_to:
            with open(self._record_to, "a") as file:
                file.write(json.dumps(to_json(sample)) + "\n")
        self._publish(sample, decision)
        self._say(decision)
        if decision.kill is not None and self.kill is None:
            self._begin(decision.kill, sample)

    def _begin(self, order: KillOrder, sample: HostSample) -> None:
        victim = order.victim
        reg = self.sampler.registration_of(victim)
        if reg is None:
            return
        past = [self._about(s, victim) for s in self.history.samples]
        if victim.mode != "on":
            self._observe_only(order, reg, sample, past)
            return
        kill = Kill(self.registry, self.sampler, self.evaluator, log)
        if kill.begin(order, AttemptFolder(Path(reg.folder)), reg.slug, sample, past):
            self.kill = kill

    def _observe_only(self, order: KillOrder, reg: Registration, sample: HostSample, past: list[Any]) -> None:
        """Tell what would have been done, in the same words, and do nothing else."""
        record: dict[str, Any] = {
            "attempt": order.victim.attempt,
            "pid": order.victim.pid,
            "rule": order.rule,
            "reason": order.reason.value,
            "level": order.level.name,
            "evidence": dict(order.evidence),
            "boot_id": boot_id(),
        }
        kill_id = f"{reg.slug}.{reg.pid}.{int(sample.at * 1000)}"
        with contextlib.suppress(OSError):
            self.registry.record(kill_id, "would_kill", sample.at, **record)
        log("kill.would_kill", kill_id=kill_id, **record)
        more = {"candidates": list(order.candidates), "samples": past}
        line = {"kill_id": kill_id, "step": "would_kill", "at": sample.at, **record}
        write_story(AttemptFolder(Path(reg.folder)), (line,), self.evaluator, more, log, would_have=True)
        self.evaluator.would_have_killed(order.victim.key, sample.at)

    def _drive(self, now: float) -> None:
        for kill in [k for k in (self.kill, *self.stuck) if k is not None]:
            decision = kill.step(now)
            if decision is not None:
                self._trees_at = self._sampled_at = now
        if self.kill is not None and (self.kill.over or self.kill.stuck):
            if self.kill.stuck:
                self.stuck.append(self.kill)  # still charged and closed, but HARD may need another victim
            self.kill = None
        self.stuck = [k for k in self.stuck if not k.over]
        if self.kill is None:  # one that was freed from being stuck still holds the token until it is over
            self.kill = next((k for k in self.stuck if not k.stuck), None)
            self.stuck = [k for k in self.stuck if k is not self.kill]

    def _read_policy(self) -> None:
        stamp, values = self.registry.policy()
        if stamp in (0.0, self._policy_stamp):  # 0: never set, or removed with its folder; what was set stays
            return
        self._policy_stamp = stamp
        try:
            self.evaluator.thresholds = Thresholds.from_mapping(values)
        except (TypeError, ValueError) as error:
            log("policy.refused", error=str(error))
            return
        self.sampler.thresholds = self.evaluator.thresholds
        log("policy.read", **{k: v for k, v in values.items() if k in Thresholds.__dataclass_fields__})

    def _publish(self, sample: HostSample, decision: Decision) -> None:
        known = [(v, reg) for v in decision.verdicts if (reg := self.sampler.registration_of(v.sample)) is not None]
        reading = HostReading(
            at=sample.at,
            level=decision.level,
            closed_reason=decision.closed_reason,
            available_bytes=sample.host.available_bytes,
            used_bytes={reg.key: v.footprint_bytes for v, reg in known if v.footprint_bytes is not None},
            over=tuple(reg.key for v, reg in known if v.over is not Over.NO),
        )
        try:
            self.registry.publish(reading)
        except OSError as error:  # a full disk: the reading goes stale, which closes admission
            log("host.not_published", error=str(error))

    def _about(self, sample: HostSample, victim: TrialSample) -> Any:
        trials = sample.trials
        mine = None if trials is None else tuple(t for t in trials if t.key == victim.key)
        return to_json(dataclasses.replace(sample, trials=mine))

    def _say(self, decision: Decision) -> None:
        """Log what changed, once."""
        now = (decision.level, decision.closed_reason, decision.held_back)
        if now != self._said:
            self._said = now
            log(
                "host.level",
                level=decision.level.name,
                reason=decision.level_reason,
                closed_reason=decision.closed_reason,
                held_back=decision.held_back,
            )
        if decision.gap:
            log("watchdog.gap", note="windows dropped: no kill from samples before it")
        suspects = {v.sample.key: v for v in decision.verdicts if v.state is State.SUSPECT}
        for key in suspects.keys() - self._suspects:
            v = suspects[key]
            log("trial.suspect", attempt=v.sample.attempt, pid=v.sample.pid, since=v.since, limit_s=v.limit_s)
        self._suspects = set(suspects)


def run(root: str, record_to: str | None = None) -> int:
    """Watch until told to stop, or until the agent is gone and no trial is left."""
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        registry, lifeline = HostRegistry(root), Lifeline()
    except UsageError as error:
        log("watchdog.left", pid=os.getpid(), why=str(error))
        return 2
    election, watchdog = Election(registry), None
    while not stop:
        if not election.won():
            watchdog = None  # lost it (see Election.won): a new term starts with nothing remembered
            if lifeline.cut:
                return 0
            lifeline.wait(STANDBY_POLL_S)
            continue
        now = time.monotonic()
        if watchdog is None:
            watchdog = Watchdog(registry, record_to)
            protect_self()
            log("watchdog.elected", pid=os.getpid(), root=root)
            failpoint("elected")
            watchdog.take_over(now)
        pause = watchdog.turn(now)
        if lifeline.cut and watchdog.live == 0 and watchdog.kill is None and not watchdog.stuck:
            log("watchdog.left", pid=os.getpid(), why="its agent is gone and no trial is left")
            return 0
        lifeline.wait(pause)
    log("watchdog.left", pid=os.getpid(), why="SIGTERM")
    return 0


def replay(path: str, thresholds: Thresholds | None = None) -> list[Decision]:
    """Return the decisions that recorded samples lead to; an ordered kill counts, though its victim lives on in
    them."""
    evaluator, decisions = Evaluator(thresholds), []
    with open(path, encoding="utf-8") as file:
        for line in file:
            data = json.loads(line)
            if "host" not in data:  # a note of the one who recorded it, or its thresholds
                if "thresholds" in data and thresholds is None:
                    evaluator.thresholds = Thresholds.from_mapping(data["thresholds"])
                continue
            sample = host_sample_from_json(data)
            decision = evaluator.observe(sample)
            decisions.append(decision)
            if decision.kill is not None:
                evaluator.kill_started(sample.at)
                evaluator.would_have_killed(decision.kill.victim.key, sample.at)  # it goes on living in the trace
    return decisions


def _told(order: KillOrder) -> dict[str, Any]:
    return {**to_json(order), "victim": order.victim.attempt, "reason": order.reason.value, "level": order.level.name}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0 for all right, 2 for wrong usage."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options: dict[str, str] = {}
    while words:
        word = words.pop(0)
        if word not in ("--root", "--replay", "--record") or not words:
            sys.stderr.write("usage: python -m scheduler.watchdog --root DIR [--record FILE] | --replay FILE\n")
            return 2
        options[word[2:]] = words.pop(0)
    if "replay" in options:
        said: tuple[Any, ...] = ()
        for d in replay(options["replay"]):
            now = (d.level, d.closed_reason, d.held_back, d.gap, d.kill is not None)
            if now != said:
                said = now
                kill = None if d.kill is None else _told(d.kill)
                out = {"at": d.at, "level": d.level.name, "why": d.level_reason, "closed": d.closed_reason}
                print(json.dumps({**out, "held_back": d.held_back, "gap": d.gap, "kill": kill}, default=str))
        return 0
    return run(options.get("root") or HostRegistry.default().root, options.get("record"))

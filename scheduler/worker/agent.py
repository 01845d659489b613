"""The agent: what runs attempts on a host, in a process of its own beside the Dask worker that started it.

Keeps a warm spare trial process, runs attempts in it, samples vitals, tells the driver of both, and answers stop, kill
and resize. How it hears and is heard, and when it lets go of its attempts, is `agent_process`. Knows neither Dask nor
policy nor study.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import os
import signal
import socket
import subprocess
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scheduler.core.leaving import allowance_s
from scheduler.host import bounds, runtimes, vitals
from scheduler.host.attempt_folder import AttemptFolder
from scheduler.host.promises import NoRoom, Promises
from scheduler.host.registry import HostRegistry, KillStory, Registration
from scheduler.model import (
    DevicePool,
    Environment,
    ExitReason,
    HeadroomError,
    Json,
    Outcome,
    Pressure,
    WorkerFacts,
    letters,
    messages,
)
from scheduler.model.fields import BadMessage
from scheduler.model.frames import AgentConfig
from scheduler.watchdog import watchdog
from scheduler.watchdog.policy.thresholds import Thresholds
from scheduler.worker import door
from scheduler.worker.families import Families
from scheduler.worker.tree_peak import TreePeak, with_children
from scheduler.worker.trial_maker import TrialMaker, why_not_forked
from scheduler.worker.trial_process import TrialProcess, TrialStartError, Witness, check_objective, conclude
from scheduler.worker.warm_spare import WarmSpare

KILL_STORY_TIMEOUT_S = 40.0  # the watchdog gives the memory 30 s to come back
WATCHDOG_EXIT_S = 10.0
WATCHDOG_GRACE_S = 10.0
SWEEP_S = 5.0
JOIN_AGAIN_S = 15.0
_BEAT_S = 0.25
GAPS = 20  # of the latest signs of life of a trial, by which the length of its steps is known
NO_VITALS = letters.Vitals(available_bytes=None, closed_reason="the host's vitals cannot be read")


@dataclass(slots=True, kw_only=True)
class AttemptRun:
    """An attempt at work on this worker."""

    attempt: str
    folder: AttemptFolder
    process: TrialProcess
    registration: Registration
    seen: Witness
    objective: str
    began: float
    function: str | None = None  # what the objective calls, where that is the user's
    saved_at: float | None = None
    has_task: bool = False  # until then nothing may be told to its process: the first line it reads is its task
    started: bool = False
    observed: bool = False  # the watchdog has said that it would have ended it
    complained: bool = False  # it was noted that a message of its was not understood
    family: set[tuple[int, float]] = field(default_factory=set)  # (pid, start time) of every descendant ever sampled
    ticks: int = 0  # its steps so far
    heard_at: float | None = None  # its last sign of life after it had started
    gaps: deque[float] = field(default_factory=lambda: deque(maxlen=GAPS))
    leave_by: float | None = None  # asked to leave by the agent itself: ended at this instant

    def step_s(self, now: float) -> float | None:
        """How long its steps take: the longest of its latest pauses, the present one included. None before it started.

        Whatever keeps it from answering is in there: a step, a validation, the writing of a checkpoint.
        """
        return None if self.heard_at is None else max([*self.gaps, now - self.heard_at])

    @property
    def peak_bytes(self) -> int | None:
        """Of the whole tree, as far as it is known while it runs."""
        return with_children(self.seen.peak_bytes or 0, self.seen.tree) or None


class Agent:
    """The attempts of one run on one worker.

    post: takes a report for the driver. news: takes the vitals.
    slots: how many single-threaded trials run at once. worker: (pid, start time) of the Dask worker, whose memory is
    charged with ours. worker_limit_bytes: the Dask worker's own memory limit, None for none. scratch: for the spares'
    log.
    """

    def __init__(
        self,
        config: AgentConfig,
        registry: HostRegistry,
        *,
        post: Callable[[letters.Report], None],
        news: Callable[[letters.Vitals], None],
        scratch: Path,
        slots: int,
        worker: tuple[int, float],
        worker_limit_bytes: int | None = None,
    ) -> None:
        self.config, self.registry, self.scratch = config, registry, scratch
        self.promises = Promises(registry, config.topic, config.reserve_bytes)
        self._limit_bytes = worker_limit_bytes if config.dask_limit else None
        self._post, self._news, self._slots, self._worker = post, news, slots, worker
        self._runs: dict[str, AttemptRun] = {}
        self._early: dict[str, letters.Stop | letters.End] = {}  # by attempt, also before it has begun
        self._lock = threading.Lock()
        self._maker = TrialMaker(
            environment=self._environment,
            scratch=scratch,
            preload=config.preload,
            why_not_forked=why_not_forked(wanted=config.fork, device=config.context.get("device", "cpu")),
        )
        self._spare = WarmSpare(self._maker)
        self._door = door.Door(door.folders([self.scratch, Path(self.registry.root)]), self._spare.ensure)
        self._thresholds = Thresholds.from_mapping(config.thresholds)
        self._closing = threading.Event()
        self._families = Families()
        self._watchdog: Any = None
        self._oom_kills: int | None = vitals.oom_kills()  # counted when it was last looked, a second ago
        self._heard_at = time.monotonic()

    def start(self) -> None:
        """Begin; everything slow happens in the agent's own threads."""
        threading.Thread(target=self._live, name="headroom-agent", daemon=True).start()

    def close(self) -> None:
        """End every attempt, the spare and the watchdog; returns when all are gone (the watchdog has 10 s)."""
        self._closing.set()
        for run in self._running():
            run.seen.ended_by = run.seen.ended_by or "orphaned"
            run.process.kill()
        self._maker.close()
        self._spare.close()
        deadline = time.monotonic() + SWEEP_S
        while self.busy and time.monotonic() < deadline:  # what a trial has left behind is ended by whoever ran it
            time.sleep(0.05)
        if self._watchdog is not None:
            if self._watchdog.stdin is not None:
                self._watchdog.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._watchdog.wait(WATCHDOG_EXIT_S)

    @property
    def busy(self) -> bool:
        """Attempts are under way here."""
        return bool(self._runs)

    def _running(self) -> list[AttemptRun]:
        with self._lock:
            return list(self._runs.values())

    # -- letting go ---------------------------------------------------------------------------------------------------

    def release(self, why: str) -> None:
        """Ask every attempt to checkpoint and leave, without being told by the driver; `overdue` ends the late ones."""
        now = time.monotonic()
        for run in self._running():
            if run.leave_by is None:
                run.leave_by = now + allowance_s(self.config.drain_timeout_s, run.step_s(now))
                self._note(run.attempt, f"asked to leave: {why}")
                self.stop(letters.Stop(attempt=run.attempt, reason="drain"))

    def end_overdue(self) -> None:
        """End those that were asked to leave and had time enough."""
        for run in self._running():
            if run.leave_by is not None and time.monotonic() > run.leave_by:
                self._end(run, "drain_timeout")

    def rest(self) -> None:
        """Nobody is there who would send a task: the memory of what is warm can go. The next task makes its own."""
        self._spare.drop()
        self._maker.drop()

    # -- the agent's own thread -------------------------------------------------------------------------------------

    def _join(self) -> None:
        """Say what is here, once a trial process has shown that trials can run. Until then why they cannot."""
        told = None
        while not self._closing.is_set():
            try:
                if self.config.watchdog_mode != "off":
                    self.registry.thresholds(self.config.thresholds)
                    self._keep_watchdog()
                ready = self._spare.warm()
                self._remember(ready)
                self._post(letters.Joined(facts=self._facts(ready)))
                return
            except (HeadroomError, OSError) as error:
                if str(error) != told:
                    told = str(error)
                    self._post(letters.Broken(detail=told))
            self._closing.wait(JOIN_AGAIN_S)

    def _live(self) -> None:
        self._join()
        next_vitals = 0.0
        while not self._closing.wait(_BEAT_S):
            self._door.look()
            with contextlib.suppress(Exception):  # as below; the vitals say that nothing can be read
                self._families.beat(self._running())
            if time.monotonic() >= next_vitals:
                next_vitals = time.monotonic() + self.config.vitals_every_s
                try:
                    self._keep_host()
                    self._news(self._vitals())
                except Exception:  # whatever a probe runs into: it closes admission, it never ends this thread
                    self._news(NO_VITALS)

    def _remember(self, ready: messages.Ready) -> None:
        """For the next plan on this host, which is made before a process has said anything."""
        if ready.environment is None or ready.rss_bytes is None:
            return
        key = runtimes.key(self.config.preload, self.config.context.get("allocator"), self.config.fork)
        with contextlib.suppress(OSError):
            runtimes.remember(self.registry.root, key, ready.environment, ready.rss_bytes)

    def _facts(self, ready: messages.Ready) -> WorkerFacts:
        """Return what is here; the driver gives it its name."""
        device, name = ready.device, ready.environment
        return WorkerFacts(
            address="",
            host=socket.gethostname(),
            slots=self._slots,
            overhead_bytes=self._overhead_bytes(),
            device=None
            if device is None
            else DevicePool(kind=device.kind, total_bytes=device.total_bytes, unified=device.kind == "mps"),
            environment=None
            if name is None
            else Environment(name=name, runtime_bytes=ready.rss_bytes or 0, origin="measured by the worker"),
            **bounds.measure(os.environ, self._limit_bytes).to_json(),
        )

    def _overhead_bytes(self) -> int:
        """Return what the Dask worker, this agent, its watchdog and what is warm hold: no trial of ours runs yet."""
        own = os.getpid()
        # Exactly: what the fork server shares with the process it has forked counts once.
        roots = {"agent": (own, vitals.start_time(own) or 0.0, True, ()), "worker": (*self._worker, True, ())}
        found = vitals.sample_trees(roots)
        agent, worker = found["agent"], found["worker"]
        trees = [worker] if worker and agent and set(agent.members) <= set(worker.members) else [agent, worker]
        held = sum(tree.footprint_bytes or 0 for tree in trees if tree is not None)
        others = self.promises.others_among(m for tree in trees if tree is not None for m in tree.members)
        return max(0, held - others)

    def _keep_host(self) -> None:
        """Make the registry again when somebody removed it (a cleaner of /tmp), and start a watchdog that goes by
        it."""
        try:
            self.registry.ensure()
            with self._lock:
                for run in self._runs.values():
                    if not self.registry.knows(run.registration):
                        self.registry.register(run.registration)
            if self.config.watchdog_mode != "off" and not self.registry.policy()[0]:
                self.registry.thresholds(self.config.thresholds)
                self._post(letters.RegistryRemade(path=self.registry.root))
            self._keep_watchdog()
        except OSError as error:
            self._door.close(f"the host registry: {door.words(error)}")

    def _keep_watchdog(self) -> None:
        """One per agent is started; flock decides which of the host's watches and which stand by."""
        if self.config.watchdog_mode == "off" or self._closing.is_set():
            return
        if self._watchdog is None or self._watchdog.poll() is not None:
            self._watchdog = watchdog.start(self.registry.root)

    def _vitals(self) -> letters.Vitals:
        memory = vitals.host_memory()
        self._oom_kills = memory.oom_kills
        runs = self._running()
        used, peaks, tree_bytes = self._measure(runs)
        if self.config.watchdog_mode == "observe":
            self._pass_on_observations(runs)
        level, closed_reason = self._pressure()
        return letters.Vitals(
            available_bytes=memory.available_bytes,
            swap_used_bytes=memory.swap_used_bytes,
            others_unclaimed_bytes=self.promises.others_unclaimed_bytes(),
            pressure=level,
            closed_reason=self._door.reason or closed_reason,
            used_bytes=used,
            peak_bytes=peaks,
            step_s={run.attempt: round(s, 1) for run in runs if (s := run.step_s(memory.at)) is not None},
            ticks={run.attempt: run.ticks for run in runs if run.ticks},
            tree_bytes=tree_bytes,
        )

    def _pass_on_observations(self, runs: list[AttemptRun]) -> None:
        """Bring what the watchdog would have ended into the run's journal, not only into the attempt's folder."""
        for run in runs:
            said = None if run.observed else run.folder.kill(would_have=True)
            if said is not None:
                run.observed = True
                self._post(letters.WouldKill(attempt=run.attempt, kill=said))

    def _pressure(self) -> tuple[Pressure, str | None]:
        """(level, why admission is closed) as the watchdog says. One that is silent closes the host: what is not
        watched may not be filled. It gets a moment at the start to say its first word."""
        if self.config.watchdog_mode == "off":
            return Pressure.NORMAL, None
        reading = self.registry.pressure()
        if reading is not None:
            self._heard_at = time.monotonic()
            return reading.level, reading.closed_reason
        silent = time.monotonic() - self._heard_at > WATCHDOG_GRACE_S
        return Pressure.NORMAL, "the watchdog does not answer" if silent else None

    def _measure(self, runs: list[AttemptRun]) -> tuple[dict[str, int], dict[str, int], int]:
        """Measure (used, peak) bytes of each attempt, and of the agent with all of them for Dask's dashboard."""
        us = os.getpid()
        wanted: dict[str, Any] = {"": (us, vitals.start_time(us), False, ())}
        for run in runs:
            wanted[run.attempt] = (run.process.pid, run.registration.start_time, False, tuple(run.family))
        samples = vitals.sample_trees(wanted)
        self._families.look([r for r in runs if (tree := samples[r.attempt]) is not None and tree.processes > 1])
        used, peaks = {}, {}
        for run in runs:
            sample = samples[run.attempt]
            if sample is None:
                continue
            run.family.update(sample.members)
            footprint, held = sample.footprint_bytes, run.seen.tree.footprint_bytes
            if sample.processes > 1 and held is not None:
                footprint = held + sample.unmapped_bytes  # pages that they share count once in this
            if footprint is not None:
                used[run.attempt] = footprint
            own = vitals.peak_bytes(run.process.pid)
            if sample.processes == 1 and own is not None:
                run.seen.tree.alone(sample.members[0], own)
            if own is not None and sample.shared_bytes:  # what a memfd or a tmpfs holds is in no VmHWM
                own = max(own, footprint or 0)
            run.seen.peak_bytes = _most(run.seen.peak_bytes, own)
            if (peak := run.peak_bytes) is not None:
                peaks[run.attempt] = peak
        tree = samples[""]
        counted_again = sum(run.process.shared_bytes for run in runs) + self._spare.shared_bytes
        return used, peaks, max(0, (tree.footprint_bytes or 0) - counted_again) if tree is not None else 0

    # -- what the driver says (in order, on the mail's threads: short) ------------------------------------------------

    def told(self, order: letters.Order) -> None:
        """Do what one letter of the driver says."""
        match order:
            case letters.Launch(task=task):
                name = f"attempt {task.attempt}"
                try:
                    threading.Thread(target=self._attempt, args=(task,), name=name, daemon=True).start()
                except RuntimeError as error:
                    self._post_end(task.attempt, self._not_started(door.words(error), Path(task.folder)))
            case letters.Stop():
                self.stop(order)
            case letters.End():
                self.kill(order)
            case letters.Resize(attempt=attempt, reserved_bytes=size):
                self.resize(attempt, size)
            case letters.Answer():
                self.answer(order)
            case letters.Dismiss():  # what becomes of all attempts is `agent_process`'s
                pass

    def refuse(self, task: messages.Task, why: str) -> None:
        """Refuse an attempt that comes when the agent leaves: nothing has begun."""
        outcome = Outcome(reason=ExitReason.INTERRUPTED, detail=f"not begun: {why}", checkpoint=task.resume_from)
        self._post_end(task.attempt, outcome)

    def not_begun(self, attempt: str, why: str) -> None:
        """Say of an attempt whose task cannot be read that it has not begun."""
        self._post_end(attempt, Outcome(reason=ExitReason.NOT_STARTED, detail=why))

    def _attempt(self, task: messages.Task) -> None:
        try:
            outcome = self.run(task)
        except Exception as error:  # a bug of ours must not look like a trial that runs for ever
            traceback.print_exc()
            outcome = Outcome(reason=ExitReason.LOST, detail=f"{type(error).__name__}: {error}")
        self._post_end(task.attempt, outcome)

    def _post_end(self, attempt: str, outcome: Outcome) -> None:
        self._post(letters.Ended(attempt=attempt, outcome=outcome))

    def _note(self, attempt: str, text: str) -> None:
        self._post(letters.TrialSaid(attempt=attempt, message=messages.Note(text=text)))

    def stop(self, order: letters.Stop) -> None:
        """Ask the attempt to checkpoint and leave; remembered when it has not started yet."""
        with self._lock:
            self._early.setdefault(order.attempt, order)
            run = self._runs.get(order.attempt)
            begun = run is not None and run.has_task
        if run is not None and begun:  # else whoever hands it its task sees to it
            run.seen.asked = run.seen.asked or order.reason
            run.process.tell(messages.StopTrial(reason=order.reason))

    def kill(self, order: letters.End) -> None:
        """End the attempt's processes now; remembered when it has not started yet."""
        with self._lock:
            self._early[order.attempt] = order
            run = self._runs.get(order.attempt)
        if run is not None:
            self._end(run, order.reason)

    def answer(self, answer: letters.Answer) -> None:
        """Pass on what the driver says to a call of the attempt's."""
        with self._lock:
            run = self._runs.get(answer.attempt)
        if run is not None:
            run.process.tell(messages.AnswerTrial(number=answer.number, body=answer.body))

    def resize(self, attempt: str, reserved_bytes: int) -> None:
        """Register the other amount that the ledger holds now; the watchdog judges by the same number."""
        with self._lock:
            if (run := self._runs.get(attempt)) is not None:
                run.registration = self.registry.resized(run.registration, reserved_bytes)
                with contextlib.suppress(OSError):  # a registry that was removed is made again with all registrations
                    self.registry.register(run.registration)

    def _environment(self) -> Mapping[str, str | None]:
        found: Mapping[str, str | None] = _resolve(self.config.environment)(self.config.context)
        return found

    def _end(self, run: AttemptRun, reason: str) -> None:
        if run.seen.ended_by is None:
            run.seen.ended_by = reason
        run.process.kill()

    # -- one attempt (in a thread of its own) ------------------------------------------------------------------------

    def run(self, task: messages.Task) -> Outcome:
        """Run one attempt to its end; every end is an outcome. Returns when its memory is back."""
        folder = AttemptFolder(Path(task.folder))
        note = functools.partial(self._note, task.attempt)
        try:
            with door.naming(folder.path):
                if not folder.claim(self.config.run_id, in_use=self._in_use, note=note):
                    return Outcome(reason=ExitReason.LOST, detail="started before; an attempt is never started twice")
                task = self._with_readable_checkpoint(task)
                folder.write_task(task)
            process = self._spare.take()
        except (OSError, TrialStartError) as error:
            return self._not_started(door.words(error), folder.path)
        run = self._begin(task, folder, process)
        try:
            try:
                with door.naming(Path(self.registry.root)):
                    self.promises.register(run.registration)
            except NoRoom as error:  # nothing is broken: the next vitals tell the driver what is promised here
                return Outcome(reason=ExitReason.NOT_STARTED, detail=str(error))
            except OSError as error:  # what cannot be watched is not run
                return self._not_started(f"cannot be registered with the watchdog: {door.words(error)}", folder.path)
            self._serve(run, task)
            return self._finish(run)
        finally:
            process.kill()  # on every normal path it is dead and reaped, and this finds nobody
            process.close()
            with self._lock:
                self._runs.pop(run.attempt, None)
                self._early.pop(run.attempt, None)
            with contextlib.suppress(OSError):
                self.registry.deregister(run.registration)

    def _with_readable_checkpoint(self, task: messages.Task) -> messages.Task:
        """Return the task with a checkpoint that is here: hosts need share no disk. What is missing is told."""
        wanted = [path for path in (task.resume_from, *task.older) if path]
        missing = []
        for path in wanted:
            try:
                _look_at(path)
                break
            except OSError as error:
                missing.append(f"{path} on {socket.gethostname()}: {error.strerror or error}")
        chosen = wanted[len(missing)] if len(missing) < len(wanted) else None
        if missing:
            self._post(letters.Restarted(attempt=task.attempt, checkpoint=chosen, detail="; ".join(missing)))
        return dataclasses.replace(task, resume_from=chosen, older=())

    def _in_use(self, folder: Path) -> bool:
        """Whether a trial process of any run on this host has this folder."""
        registrations = [reg for reg in self.registry.registrations() if reg.folder == os.fspath(folder)]
        return any(vitals.lives(reg.pid, reg.start_time) for reg in registrations)

    def _not_started(self, reason: str, folder: Path) -> Outcome:
        self._shut(reason, folder)
        return Outcome(reason=ExitReason.NOT_STARTED, detail=reason)

    def _shut(self, reason: str, folder: Path, *more: door.Probe) -> None:
        """Nothing else is started here until whatever failed has been seen to work."""
        self._door.close(reason, door.folders([folder.parent]), *more)

    def _begin(self, task: messages.Task, folder: AttemptFolder, process: TrialProcess) -> AttemptRun:
        now = time.monotonic()
        attempt = task.attempt
        registration = Registration(
            attempt=attempt,
            slug=folder.path.name,
            pid=process.pid,
            start_time=vitals.start_time(process.pid) or 0.0,
            reservation_bytes=task.reserved_bytes,
            promised_bytes=0 if task.is_guess else None,  # who goes over a guess of ours has broken no promise
            folder=os.fspath(folder.path),
            run=self.config.run,
            topic=self.config.topic,
            mode="observe" if self.config.watchdog_mode == "observe" else "on",
            uses_device=task.context.get("device", "cpu") != "cpu",
            launched=now,
            owner_start=vitals.start_time(os.getpid()),
        )
        run = AttemptRun(
            attempt=attempt,
            folder=folder,
            process=process,
            registration=registration,
            seen=Witness(
                checkpoint=task.resume_from,
                environment=process.ready.environment,
                runtime_bytes=process.ready.rss_bytes,
                tree=TreePeak(process.shared_bytes),
            ),
            objective=task.objective,
            function=task.function,
            began=now,
        )
        with self._lock:
            self._runs[attempt] = run
        return run

    def _serve(self, run: AttemptRun, task: messages.Task) -> None:
        """Hand over the task and follow its messages until the process is dead."""
        process = run.process
        process.log_to(run.folder.log)
        process.begin(task)
        with self._lock:
            run.has_task = True
            early = self._early.get(run.attempt)
        match early:
            case letters.Stop(reason=reason):
                run.seen.asked = run.seen.asked or reason
                process.tell(messages.StopTrial(reason=reason))
            case letters.End(reason=reason):
                self._end(run, reason)
        oom = vitals.OomWitness()
        for message in process.messages():
            self._on_message(run, message)
        run.seen.exit_status = process.close()
        run.seen.duration_s = time.monotonic() - run.began
        run.seen.oom_killed = oom.is_oom_kill(run.seen.exit_status)
        run.seen.allowed_bytes = self._thresholds.allowed_bytes(run.registration.promised)
        if run.seen.oom_killed and (vitals.oom_kills() or 0) - (self._oom_kills or 0) == 1:
            # The kernel kills when nothing is left: what is available now, the victim held (with others killed beside
            # it that would say too much).
            run.seen.freed_bytes = vitals.host_memory().available_bytes

    def _on_message(self, run: AttemptRun, said: Json) -> None:
        """Take in a message, and pass on what the driver must know. One that is none is dropped, and noted once."""
        now, seen = time.monotonic(), run.seen
        try:
            message = messages.parse(said)
        except BadMessage as error:
            if not run.complained:
                run.complained = True
                self._note(run.attempt, f"a message of the trial is dropped, as will be others like it: {error}")
            return
        seen.peak_bytes = _most(seen.peak_bytes, message.peak_bytes)
        seen.device_peak_bytes = _most(seen.device_peak_bytes, message.device_bytes)
        if not isinstance(message, messages.Note | messages.Last):
            if run.heard_at is not None:
                run.gaps.append(now - run.heard_at)
            run.heard_at = now
        if isinstance(message, messages.Settled) and vitals.has_children(run.process.pid):
            self._families.look([run])  # what it reserves from here on is taken from this
        if message.peak_bytes is not None:  # the driver is told of the whole tree
            message = dataclasses.replace(message, peak_bytes=run.peak_bytes)
        match message:
            case messages.Last():
                seen.last = message
            case messages.Started() if not run.started:
                run.started = True
                self._pass_on(run, message)
            case messages.Progress(step=step, value=value):
                seen.epochs, seen.value = step, value
                self._tick(run, step, now)
                self._pass_on(run, message)
            case messages.Ticked(n=n):
                run.ticks = n
                self._tick(run, n, now)
            case messages.Saved(path=path, step=step):
                seen.checkpoint, run.saved_at = path, now
                self._tick(run, step, now)
                self._pass_on(run, message)
            case messages.Settled() if seen.peak_bytes:
                self._pass_on(run, dataclasses.replace(message, peak_bytes=run.peak_bytes))
            case messages.Note() | messages.Called():
                self._pass_on(run, message)

    def _tick(self, run: AttemptRun, step: int, now: float) -> None:
        with contextlib.suppress(OSError):  # a full disk on the host must not end a healthy trial
            self.registry.tick(run.registration, step, now, run.saved_at)

    def _pass_on(self, run: AttemptRun, message: messages.PassedOn) -> None:
        self._post(letters.TrialSaid(attempt=run.attempt, pid=run.process.pid, message=message))

    def _finish(self, run: AttemptRun) -> Outcome:
        self._sweep(run)
        if run.seen.last is None:
            run.seen.last = run.folder.result()
        story = self._kill_story(run)
        if story is not None:
            run.seen.kill = story.record
        run.seen.log_tail = run.folder.log_tail()
        outcome = conclude(run.seen)
        if outcome.reason is ExitReason.NOT_STARTED:
            self._shut(outcome.detail, run.folder.path, self._imports(run))
        elif outcome.reason is ExitReason.NO_ROOM:
            try:  # at once: what is short now says more than the trial's own error
                door.folders([run.folder.path.parent])()
            except OSError as error:
                outcome = dataclasses.replace(outcome, detail=f"{door.words(error)} ({outcome.detail})")
            self._shut(outcome.detail, run.folder.path)
        return outcome

    def _imports(self, run: AttemptRun) -> door.Probe:
        objective, function = run.objective, run.function

        def probe() -> None:
            if function is None:
                check_objective(objective, self._environment())
            else:
                check_objective(function, self._environment(), objective.partition(":")[0])

        return probe

    def _kill_story(self, run: AttemptRun) -> KillStory | None:
        """Read the watchdog's record, once it says that the memory is back (or it gave up waiting)."""
        deadline = time.monotonic() + KILL_STORY_TIMEOUT_S
        while (story := self.registry.kill_of(run.attempt, run.process.pid)) is not None:
            if story.aborted or (story.finished or time.monotonic() > deadline):
                return None if story.aborted or not story.signalled else story
            time.sleep(_BEAT_S)
        return None

    def _sweep(self, run: AttemptRun) -> None:
        """End what escaped the session (setsid, double fork): every descendant sampled while it ran."""
        for pid, started in run.family:
            if pid != run.process.pid and vitals.start_time(pid) == started:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)


def _look_at(path: str) -> None:
    """Raise OSError when this checkpoint, a file or a folder, cannot be read here."""
    if os.path.isdir(path):
        os.listdir(path)
    else:
        with open(path, "rb") as file:
            file.read(1)


def _most(before: int | None, now: int | None) -> int | None:
    return before if now is None else max(before or 0, now)


def _resolve(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function

"""The agent: what runs attempts on a host, in a process of its own beside the Dask worker that started it.

Decides which attempts begin here, passes on what they are told, and says what the host has. An attempt at work is
`attempt_run`, what is measured `memory_gauge`; how the agent hears and is heard, and when it lets go of its attempts,
is `agent_process`. Knows neither Dask nor policy nor study.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scheduler.core.leaving import allowance_s
from scheduler.host import bounds, runtimes, vitals
from scheduler.host.attempt_folder import AttemptFolder, first_readable
from scheduler.host.promises import NoRoom, Promises
from scheduler.host.registry import HostRegistry
from scheduler.model import DevicePool, Environment, ExitReason, HeadroomError, Outcome, WorkerFacts, letters, messages
from scheduler.model.frames import AgentConfig
from scheduler.worker import door
from scheduler.worker.attempt_run import AttemptRun
from scheduler.worker.importable import check_objective
from scheduler.worker.memory_gauge import MemoryGauge, overhead_bytes
from scheduler.worker.trial_maker import TrialMaker, why_not_forked
from scheduler.worker.trial_process import TrialStartError
from scheduler.worker.warm_spare import WarmSpare
from scheduler.worker.watchdog_keeper import WatchdogKeeper

SWEEP_S = 5.0
JOIN_AGAIN_S = 15.0
_BEAT_S = 0.25
NO_VITALS = letters.Vitals(available_bytes=None, closed_reason="the host's vitals cannot be read")


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
        self._early: dict[str, letters.Stop | letters.End] = {}  # what attempts were told that have not begun yet
        self._lock = threading.Lock()
        self._maker = TrialMaker(
            environment=self._environment,
            scratch=scratch,
            preload=config.preload,
            why_not_forked=why_not_forked(wanted=config.fork, device=config.context.get("device", "cpu")),
        )
        self._spare = WarmSpare(self._maker)
        self._door = door.Door(door.folders([self.scratch, Path(self.registry.root)]), self._spare.ensure)
        self._closing = threading.Event()
        self._gauge = MemoryGauge()
        self._watchdog = WatchdogKeeper(config, registry)

    def start(self) -> None:
        """Begin; everything slow happens in the agent's own threads."""
        threading.Thread(target=self._live, name="headroom-agent", daemon=True).start()

    def close(self) -> None:
        """End every attempt, the spare and the watchdog; returns when all are gone (the watchdog has 10 s)."""
        self._closing.set()
        self._watchdog.begin_to_close()
        for run in self._running():
            run.end("orphaned")
        self._maker.close()
        self._spare.close()
        deadline = time.monotonic() + SWEEP_S
        while self.busy and time.monotonic() < deadline:  # what a trial has left behind is ended by whoever ran it
            time.sleep(0.05)
        self._watchdog.close()

    @property
    def busy(self) -> bool:
        """Attempts are under way here."""
        return bool(self._runs)

    def _running(self) -> list[AttemptRun]:
        with self._lock:
            return list(self._runs.values())

    def _environment(self) -> Mapping[str, str | None]:
        found: Mapping[str, str | None] = _resolve(self.config.environment)(self.config.context)
        return found

    # -- letting go ---------------------------------------------------------------------------------------------------

    def release(self, why: str) -> None:
        """Ask every attempt to checkpoint and leave, without being told by the driver; `overdue` ends the late ones."""
        now = time.monotonic()
        for run in self._running():
            if run.leave_by is None:
                run.leave_by = now + allowance_s(self.config.drain_timeout_s, run.step_s(now))
                run.note(f"asked to leave: {why}")
                run.leave("drain")

    def end_overdue(self) -> None:
        """End those that were asked to leave and had time enough."""
        for run in self._running():
            if run.leave_by is not None and time.monotonic() > run.leave_by:
                run.end("drain_timeout")

    def rest(self) -> None:
        """Nobody is there who would send a task: the memory of what is warm can go. The next task makes its own."""
        self._spare.drop()
        self._maker.drop()

    # -- the agent's own thread: what the host has --------------------------------------------------------------------

    def _live(self) -> None:
        self._join()
        next_vitals = 0.0
        while not self._closing.wait(_BEAT_S):
            self._door.look()
            with contextlib.suppress(Exception):  # as below; the vitals say that nothing can be read
                self._gauge.beat([run.tree for run in self._running()])
            if time.monotonic() >= next_vitals:
                next_vitals = time.monotonic() + self.config.vitals_every_s
                try:
                    self._keep_host()
                    self._news(self._vitals())
                except Exception:  # whatever a probe runs into: it closes admission, it never ends this thread
                    self._news(NO_VITALS)

    def _join(self) -> None:
        """Say what is here, once a trial process has shown that trials can run. Until then why they cannot."""
        told = None
        while not self._closing.is_set():
            try:
                self._watchdog.set_thresholds()
                self._watchdog.ensure()
                ready = self._spare.warm()
                self._remember(ready)
                self._post(letters.Joined(facts=self._facts(ready)))
                return
            except (HeadroomError, OSError) as error:
                if str(error) != told:
                    told = str(error)
                    self._post(letters.Broken(detail=told))
            self._closing.wait(JOIN_AGAIN_S)

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
            overhead_bytes=overhead_bytes(self._worker, self.promises),
            others_unclaimed_bytes=self.promises.others_unclaimed_bytes(),
            others_held_bytes=self.promises.others_held_bytes(),
            device=None
            if device is None
            else DevicePool(kind=device.kind, total_bytes=device.total_bytes, unified=device.kind == "mps"),
            environment=None
            if name is None
            else Environment(name=name, runtime_bytes=ready.rss_bytes or 0, origin="measured by the worker"),
            **bounds.measure(os.environ, self._limit_bytes).to_json(),
        )

    def _keep_host(self) -> None:
        """Make the registry again when somebody removed it (a cleaner of /tmp), and start a watchdog that goes by
        it."""
        try:
            self.registry.ensure()
            with self._lock:
                for run in self._runs.values():
                    run.keep_registered()
            if self._watchdog.restore_thresholds():
                self._post(letters.RegistryRemade(path=self.registry.root))
            self._watchdog.ensure()
        except OSError as error:
            self._door.close(f"the host registry: {door.words(error)}")

    def _vitals(self) -> letters.Vitals:
        memory = self._gauge.host_memory()
        runs = self._running()
        shared_bytes = sum(run.process.shared_bytes for run in runs) + self._spare.shared_bytes
        held = self._gauge.measure([run.tree for run in runs], shared_bytes=shared_bytes)
        if self.config.watchdog_mode == "observe":
            for run in runs:
                run.pass_on_observation()
        level, closed_reason = self._watchdog.pressure()
        return letters.Vitals(
            available_bytes=memory.available_bytes,
            swap_used_bytes=memory.swap_used_bytes,
            others_unclaimed_bytes=self.promises.others_unclaimed_bytes(),
            pressure=level,
            closed_reason=self._door.reason or closed_reason,
            used_bytes=held.used_bytes,
            peak_bytes=held.peak_bytes,
            step_s={run.attempt: round(s, 1) for run in runs if (s := run.step_s(memory.at)) is not None},
            ticks={run.attempt: run.ticks for run in runs if run.ticks},
            tree_bytes=held.tree_bytes,
        )

    # -- what the driver says (in order, on the mail's threads: short) ------------------------------------------------

    def told(self, order: letters.Order) -> None:
        """Do what one letter of the driver says. What an attempt is told before it has begun is remembered."""
        match order:
            case letters.Launch(task=task):
                name = f"attempt {task.attempt}"
                try:
                    threading.Thread(target=self._attempt, args=(task,), name=name, daemon=True).start()
                except RuntimeError as error:
                    self._post_end(task.attempt, self._not_started(door.words(error), Path(task.folder)))
            case letters.Stop():
                with self._lock:
                    if (run := self._runs.get(order.attempt)) is None:
                        self._early.setdefault(order.attempt, order)
                if run is not None:
                    run.leave(order.reason)
            case letters.End():
                with self._lock:
                    if (run := self._runs.get(order.attempt)) is None:
                        self._early[order.attempt] = order
                if run is not None:
                    run.end(order.reason)
            case letters.Resize(attempt=attempt, reserved_bytes=size):
                with self._lock:
                    if (run := self._runs.get(attempt)) is not None:
                        run.resize(size)
            case letters.Answer(attempt=attempt, number=number, body=body):
                with self._lock:
                    run = self._runs.get(attempt)
                if run is not None:
                    run.answer(number, body)
            case letters.Dismiss():  # what becomes of all attempts is `agent_process`'s
                pass

    def refuse(self, task: messages.Task, why: str) -> None:
        """Refuse an attempt that comes when the agent leaves: nothing has begun."""
        outcome = Outcome(reason=ExitReason.INTERRUPTED, detail=f"not begun: {why}", checkpoint=task.resume_from)
        self._post_end(task.attempt, outcome)

    def not_begun(self, attempt: str, why: str) -> None:
        """Say of an attempt whose task cannot be read that it has not begun."""
        self._post_end(attempt, Outcome(reason=ExitReason.NOT_STARTED, detail=why))

    def _post_end(self, attempt: str, outcome: Outcome) -> None:
        self._post(letters.Ended(attempt=attempt, outcome=outcome))

    # -- one attempt (in a thread of its own) -------------------------------------------------------------------------

    def _attempt(self, task: messages.Task) -> None:
        try:
            outcome = self.run(task)
        except Exception as error:  # a bug of ours must not look like a trial that runs for ever
            traceback.print_exc()
            outcome = Outcome(reason=ExitReason.LOST, detail=f"{type(error).__name__}: {error}")
        self._post_end(task.attempt, outcome)

    def run(self, task: messages.Task) -> Outcome:
        """Run one attempt to its end; every end is an outcome. Returns when its memory is back."""
        folder = AttemptFolder(Path(task.folder))
        try:
            with door.naming(folder.path):
                note = functools.partial(self._note, task.attempt)
                if not folder.claim(self.config.run_id, in_use=self._in_use, note=note):
                    return Outcome(reason=ExitReason.LOST, detail="started before; an attempt is never started twice")
                task = self._with_readable_checkpoint(task)
                folder.write_task(task)
            process = self._spare.take()
        except (OSError, TrialStartError) as error:
            return self._not_started(door.words(error), folder.path)
        run = AttemptRun(
            task,
            folder,
            process,
            config=self.config,
            registry=self.registry,
            gauge=self._gauge,
            post=self._post,
        )
        self._enter(run)
        try:
            try:
                with door.naming(Path(self.registry.root)):
                    run.registration = self.promises.register(run.registration, task.least_bytes)
            except NoRoom as error:  # nothing is broken: the next vitals tell the driver what is promised here
                return Outcome(reason=ExitReason.NOT_STARTED, detail=str(error))
            except OSError as error:  # what cannot be watched is not run
                return self._not_started(f"cannot be registered with the watchdog: {door.words(error)}", folder.path)
            run.serve()
            return self._judge_host(run, run.finish())
        finally:
            run.close()
            with self._lock:
                self._runs.pop(run.attempt, None)
            run.deregister()

    def _enter(self, run: AttemptRun) -> None:
        """Have it hear what the driver says from here on, and what was said before."""
        with self._lock:
            self._runs[run.attempt] = run
            early = self._early.pop(run.attempt, None)
        match early:
            case letters.Stop(reason=reason):
                run.leave(reason)
            case letters.End(reason=reason):
                run.end(reason)

    def _note(self, attempt: str, text: str) -> None:
        self._post(letters.TrialSaid(attempt=attempt, message=messages.Note(text=text)))

    def _with_readable_checkpoint(self, task: messages.Task) -> messages.Task:
        """Return the task with a checkpoint that is here: hosts need share no disk. What is missing is told."""
        chosen, missing = first_readable([path for path in (task.resume_from, *task.older) if path])
        if missing:
            detail = "; ".join(f"{path} on {socket.gethostname()}: {why}" for path, why in missing)
            self._post(letters.Restarted(attempt=task.attempt, checkpoint=chosen, detail=detail))
        return dataclasses.replace(task, resume_from=chosen, older=())

    def _in_use(self, folder: Path) -> bool:
        """Whether a trial process of any run on this host has this folder."""
        registrations = [reg for reg in self.registry.registrations() if reg.folder == os.fspath(folder)]
        return any(vitals.lives(reg.pid, reg.start_time) for reg in registrations)

    def _judge_host(self, run: AttemptRun, outcome: Outcome) -> Outcome:
        """Close the host if the end shows that nothing can run here; returns the outcome with the cause named."""
        if outcome.reason is ExitReason.NOT_STARTED:
            self._shut(outcome.detail, run.folder.path, self._imports(run.task))
        elif outcome.reason is ExitReason.NO_ROOM:
            try:  # at once: what is short now says more than the trial's own error
                door.folders([run.folder.path.parent])()
            except OSError as error:
                outcome = dataclasses.replace(outcome, detail=f"{door.words(error)} ({outcome.detail})")
            self._shut(outcome.detail, run.folder.path)
        return outcome

    def _not_started(self, reason: str, folder: Path) -> Outcome:
        self._shut(reason, folder)
        return Outcome(reason=ExitReason.NOT_STARTED, detail=reason)

    def _shut(self, reason: str, folder: Path, *more: door.Probe) -> None:
        """Nothing else is started here until whatever failed has been seen to work."""
        self._door.close(reason, door.folders([folder.parent]), *more)

    def _imports(self, task: messages.Task) -> door.Probe:
        objective, function = task.objective, task.function

        def probe() -> None:
            if function is None:
                check_objective(objective, self._environment())
            else:
                check_objective(function, self._environment(), objective.partition(":")[0])

        return probe


def _resolve(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function

"""One attempt at work on this host: what it is told, what it says, and what its end was.

Begins with a process that has no task yet, and ends with the outcome, once the process is dead and its memory is back.
Does not cover whether it may begin, nor what its end means for others: those are the agent's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from scheduler.host import vitals
from scheduler.host.attempt_folder import AttemptFolder
from scheduler.host.registry import HostRegistry, KillStory, Registration
from scheduler.model import Json, Outcome, letters, messages
from scheduler.model.fields import BadMessage
from scheduler.model.frames import AgentConfig
from scheduler.watchdog.policy.thresholds import Thresholds
from scheduler.worker.memory_gauge import MemoryGauge
from scheduler.worker.tree_peak import TreePeak
from scheduler.worker.trial_process import TrialProcess
from scheduler.worker.trial_tree import TrialTree
from scheduler.worker.witness import Witness, conclude

KILL_STORY_TIMEOUT_S = 40.0  # the watchdog gives the memory 30 s to come back
GAPS = 20  # of the latest signs of life of a trial, by which the length of its steps is known
_LOOK_EVERY_S = 0.25  # for the end of a kill's story


class AttemptRun:
    """One attempt's. `serve` and `finish` are called by the thread that runs it; the others by any.

    post: takes a report for the driver. ticks: its steps so far. leave_by: asked to leave by the agent itself, ended at
    this instant.
    """

    def __init__(
        self,
        task: messages.Task,
        folder: AttemptFolder,
        process: TrialProcess,
        *,
        config: AgentConfig,
        registry: HostRegistry,
        gauge: MemoryGauge,
        post: Callable[[letters.Report], None],
    ) -> None:
        self.task, self.folder, self.process = task, folder, process
        self._registry, self._gauge, self._post = registry, gauge, post
        self._thresholds = Thresholds.from_mapping(config.thresholds)
        self._began = time.monotonic()
        self.registration = _registration(task, folder, process, config, self._began)
        self.tree = TrialTree(
            attempt=task.attempt,
            pid=process.pid,
            start_time=self.registration.start_time,
            peak=TreePeak(process.shared_bytes),
        )
        self._seen = Witness(
            checkpoint=task.resume_from,
            environment=process.ready.environment,
            runtime_bytes=process.ready.rss_bytes,
            tree=self.tree.peak,
        )
        self._lock = threading.Lock()
        self._has_task = False  # until then nothing may be told to its process: the first line it reads is its task
        self._started = False
        self._observed = False  # the watchdog has said that it would have ended it
        self._complained = False  # it was noted that a message of its was not understood
        self._saved_at: float | None = None
        self.ticks = 0
        self.heard_at: float | None = None  # its last sign of life after it had started
        self.gaps: deque[float] = deque(maxlen=GAPS)
        self.leave_by: float | None = None

    @property
    def attempt(self) -> str:
        return self.task.attempt

    def step_s(self, now: float) -> float | None:
        """How long its steps take: the longest of its latest pauses, the present one included. None before it started.

        Whatever keeps it from answering is in there: a step, a validation, the writing of a checkpoint.
        """
        return None if self.heard_at is None else max([*self.gaps, now - self.heard_at])

    # -- what it is told ----------------------------------------------------------------------------------------------

    def leave(self, reason: str) -> None:
        """Ask it to checkpoint and go; as soon as it has its task."""
        with self._lock:
            self._seen.asked = self._seen.asked or reason
            if not self._has_task:
                return
        self.process.tell(messages.StopTrial(reason=reason))

    def end(self, reason: str) -> None:
        """End its processes now."""
        self._seen.ended_by = self._seen.ended_by or reason
        self.process.kill()

    def answer(self, number: int, body: Mapping[str, Any]) -> None:
        """Pass on what the driver says to a call of its."""
        self.process.tell(messages.AnswerTrial(number=number, body=body))

    def note(self, text: str) -> None:
        """Say something of it to the driver."""
        self._post(letters.TrialSaid(attempt=self.attempt, message=messages.Note(text=text)))

    # -- what the watchdog knows of it --------------------------------------------------------------------------------

    def resize(self, reserved_bytes: int) -> None:
        """Register the other amount that the ledger holds now; the watchdog judges by the same number."""
        self.registration = self._registry.resized(self.registration, reserved_bytes)
        with contextlib.suppress(OSError):  # a registry that was removed is made again with all registrations
            self._registry.register(self.registration)

    def keep_registered(self) -> None:
        """Register it again when the registry was removed and made again. Raises OSError."""
        if not self._registry.knows(self.registration):
            self._registry.register(self.registration)

    def pass_on_observation(self) -> None:
        """Bring what the watchdog would have ended into the run's journal, not only into the attempt's folder."""
        said = None if self._observed else self.folder.kill(would_have=True)
        if said is not None:
            self._observed = True
            self._post(letters.WouldKill(attempt=self.attempt, kill=said))

    # -- what it says -------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Hand over the task and follow its messages until the process is dead."""
        process, seen = self.process, self._seen
        process.log_to(self.folder.log)
        process.begin(self.task)
        with self._lock:
            self._has_task = True
            asked = seen.asked
        if asked is not None:
            process.tell(messages.StopTrial(reason=asked))
        oom = vitals.OomWitness()
        for message in process.messages():
            self._on_message(message)
        seen.exit_status = process.close()
        seen.duration_s = time.monotonic() - self._began
        seen.oom_killed = oom.is_oom_kill(seen.exit_status)
        seen.allowed_bytes = self._thresholds.allowed_bytes(self.registration.promised)
        if seen.oom_killed:
            seen.freed_bytes = self._gauge.freed_bytes()

    def _on_message(self, said: Json) -> None:
        """Take in a message, and pass on what the driver must know. One that is none is dropped, and noted once."""
        now, seen = time.monotonic(), self._seen
        try:
            message = messages.parse(said)
        except BadMessage as error:
            if not self._complained:
                self._complained = True
                self.note(f"a message of the trial is dropped, as will be others like it: {error}")
            return
        self.tree.reached(message.peak_bytes)
        if message.device_bytes is not None:
            seen.device_peak_bytes = max(seen.device_peak_bytes or 0, message.device_bytes)
        if not isinstance(message, messages.Note | messages.Last):
            if self.heard_at is not None:
                self.gaps.append(now - self.heard_at)
            self.heard_at = now
        if isinstance(message, messages.Settled) and vitals.has_children(self.process.pid):
            self._gauge.look([self.tree])  # what it reserves from here on is taken from this
        if message.peak_bytes is not None:  # the driver is told of the whole tree
            message = dataclasses.replace(message, peak_bytes=self.tree.peak_bytes)
        match message:
            case messages.Last():
                seen.last = message
            case messages.Started() if not self._started:
                self._started = True
                self._pass_on(message)
            case messages.Progress(step=step, value=value):
                seen.epochs, seen.value = step, value
                self._tick(step, now)
                self._pass_on(message)
            case messages.Ticked(n=n):
                self.ticks = n
                self._tick(n, now)
            case messages.Saved(path=path, step=step):
                seen.checkpoint, self._saved_at = path, now
                self._tick(step, now)
                self._pass_on(message)
            case messages.Settled() if self.tree.own_peak_bytes:
                self._pass_on(dataclasses.replace(message, peak_bytes=self.tree.peak_bytes))
            case messages.Note() | messages.Called():
                self._pass_on(message)

    def _tick(self, step: int, now: float) -> None:
        with contextlib.suppress(OSError):  # a full disk on the host must not end a healthy trial
            self._registry.tick(self.registration, step, now, self._saved_at)

    def _pass_on(self, message: messages.PassedOn) -> None:
        self._post(letters.TrialSaid(attempt=self.attempt, pid=self.process.pid, message=message))

    # -- its end ------------------------------------------------------------------------------------------------------

    def finish(self) -> Outcome:
        """Tell what its end was, once it is dead, nothing of it is left, and a kill's memory is back."""
        seen = self._seen
        self._sweep()
        if seen.last is None:
            seen.last = self.folder.result()
        story = self._kill_story()
        if story is not None:
            seen.kill = story.record
        seen.peak_bytes = self.tree.own_peak_bytes
        seen.log_tail = self.folder.log_tail()
        return conclude(seen)

    def _kill_story(self) -> KillStory | None:
        """Read the watchdog's record, once it says that the memory is back (or it gave up waiting)."""
        deadline = time.monotonic() + KILL_STORY_TIMEOUT_S
        while (story := self._registry.kill_of(self.attempt, self.process.pid)) is not None:
            if story.aborted or (story.finished or time.monotonic() > deadline):
                return None if story.aborted or not story.signalled else story
            time.sleep(_LOOK_EVERY_S)
        return None

    def _sweep(self) -> None:
        """End what escaped the session (setsid, double fork): every descendant sampled while it ran."""
        for pid, started in self.tree.descendants:
            if vitals.start_time(pid) == started:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """End and free the process: on every normal path it is dead and reaped, and this finds nobody."""
        self.process.kill()
        self.process.close()

    def deregister(self) -> None:
        """Have the watchdog forget it."""
        with contextlib.suppress(OSError):
            self._registry.deregister(self.registration)


def _registration(
    task: messages.Task, folder: AttemptFolder, process: TrialProcess, config: AgentConfig, now: float
) -> Registration:
    """Work out what the watchdog must know of an attempt that begins now."""
    return Registration(
        attempt=task.attempt,
        slug=folder.path.name,
        pid=process.pid,
        start_time=vitals.start_time(process.pid) or 0.0,
        reservation_bytes=task.reserved_bytes,
        promised_bytes=0 if task.is_guess else None,  # who goes over a guess of ours has broken no promise
        folder=os.fspath(folder.path),
        run=config.run,
        topic=config.topic,
        mode="observe" if config.watchdog_mode == "observe" else "on",
        uses_device=task.context.get("device", "cpu") != "cpu",
        launched=now,
        owner_start=vitals.start_time(os.getpid()),
    )

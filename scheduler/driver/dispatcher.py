"""The dispatcher: drains events, asks the brain, carries out its commands.

One loop in one thread. All else (Dask, the recorder, signals, the keyboard) only puts into its inbox, which is there
before anything else is. Translates between the agents' messages and the brain's events, journals both sides, and
decides nothing.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scheduler import model as m
from scheduler.core.admission import least_alone
from scheduler.core.state import BatchState
from scheduler.driver import decisions, event_log
from scheduler.driver.event_log import Log
from scheduler.driver.ports import Agents, Connection, StudyRecorder
from scheduler.host.attempt_folder import AttemptFolder, attempts_of, drop_checkpoints
from scheduler.model import letters, messages
from scheduler.model.calls import Answer, CallStudy
from scheduler.model.journal_events import JournalEvent
from scheduler.model.messages import Task
from scheduler.model.plain import line as one_line

TICK_S = 1.0
NO_WORKER_LOG_S = 60.0
REBUILD_AFTER_S = 60.0  # a cluster of our own without an agent for so long is made anew
REBUILDS = 3  # in a row; then something is wrong that another one will not cure

RUNNER = "scheduler.study.objective:run"  # calls an objective that asks for its parameters while it runs
Recover = Callable[[m.AttemptId, m.Outcome], m.Outcome]


@dataclass(frozen=True, slots=True)
class Said:
    """What an agent reports, or the fleet of one that is out of reach. worker: its name."""

    worker: str
    report: letters.Report | letters.Unread


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of an attempt's task, as the cluster tells it."""

    attempt: str
    outcome: m.Outcome


Item = m.Event | Said | Ended | Answer
Inbox = queue.SimpleQueue[Item]


@dataclass(slots=True)
class _InFlight:
    """What the driver knows of an attempt that its worker may take with it when it dies."""

    worker: str
    launch: m.LaunchAttempt
    checkpoint: str | None = None
    started: bool = False


class Dispatcher:
    """Runs a batch to its end.

    inbox: where everybody puts what happened. log: `log(event, durable=False, **fields)`, one constant dotted name per
    kind of event. recover: given an attempt that was lost and its outcome so far, what its outcome really was.
    missing: what the run cannot do without and is not there now; nothing is launched then. away_timeout_s: how long the
    Dask scheduler may be gone before the run ends. watch: called about once a second. told: when a trial's
    final state is in its study.
    """

    def __init__(
        self,
        brain: BatchState,
        cluster: Connection,
        fleet: Agents,
        recorder: Callable[[Callable[[m.Event | Answer], None]], StudyRecorder],
        *,
        inbox: Inbox,
        objective: str,
        folder: Path,
        log: Log,
        recover: Recover,
        missing: Callable[[], object | None] = lambda: None,
        away_timeout_s: float,
        watch: Callable[[BatchState], None] = lambda brain: None,
        handle: Callable[[m.Event, float], list[m.Command]] | None = None,
        told: Callable[[m.TrialTold], None] = lambda event: None,
    ) -> None:
        self.brain, self.cluster, self.fleet = brain, cluster, fleet
        self._handle = handle or brain.handle  # by way of a recording
        self._inbox = inbox
        self.recorder = recorder(self.post)
        self._objective, self._folder, self._log = objective, folder, log
        self._recover, self._missing, self._watch, self._told = recover, missing, watch, told
        self._inflight: dict[m.AttemptId, _InFlight] = {}
        self._tidy = ThreadPoolExecutor(1, thread_name_prefix="headroom-tidy")  # unlinking 24 GB takes its time
        self._end: m.EndBatch | None = None
        self._connected_at = self._no_worker_logged_at = time.monotonic()
        self._connected, self._abandoned = True, False
        self._away_timeout_s, self._rebuilds = away_timeout_s, 0
        self._failure: m.HeadroomError | None = None
        self._misread: set[str] = set()  # kinds of messages that could not be read
        self._broken: dict[str, str] = {}  # worker -> why it cannot run trials
        self._had_worker = False

    def post(self, event: m.Event | Answer) -> None:
        """Enqueue an event, or an answer to be carried; callable from any thread and from signal handlers."""
        self._inbox.put(event)

    def run(self, first: Iterable[Item] = ()) -> m.EndBatch:
        """Go on until the brain ends the batch. Raises HeadroomError when it cannot go on at all.

        first: what comes before anything in the inbox, in order: what was already read from it, say.
        """
        next_tick = time.monotonic() + TICK_S
        before = deque(first)
        while self._end is None:
            try:
                item = before.popleft() if before else self._inbox.get(timeout=max(0.0, next_tick - time.monotonic()))
            except queue.Empty:
                item = m.Tick()
            event = self._read(item)
            now = time.monotonic()
            self._watch_connection(now)
            if now >= next_tick:
                next_tick = now + TICK_S
                self._look_after(now)
                self._take(m.Tick(), now)
            if event is not None and not isinstance(event, m.Tick):
                self._take(event, now)
            if self._failure is not None:
                raise self._failure
        self._tidy.shutdown(wait=True)
        return self._end

    def _take(self, event: m.Event, now: float) -> None:
        ended = self._inflight.pop(event.attempt, None) if isinstance(event, m.AttemptEnded) else None
        event_log.note(self._log, event, None if ended is None else ended.launch)
        draining = self.brain.draining
        for command in self._handle(event, now):
            self._carry_out(command)
        if self.brain.draining and not draining:
            self.recorder.drain()
        if isinstance(event, m.TrialTold):
            self._told(event)

    def _watch_connection(self, now: float) -> None:
        """Before each event: a trial that was lost with the connection must not be launched again without one.

        A connection that was lost and found again since the last look counts as lost: it may lead to another scheduler.
        """
        if self._connected and not (self.cluster.is_connected and self.cluster.is_subscribed):
            self._connected, self._connected_at = False, now  # the driver itself may have been away until now
            self._log(JournalEvent.CLUSTER_DISCONNECTED, durable=True, held_s=self._away_timeout_s)
            for view in self.brain.ledger.views():  # at once: the fleet's own word for it comes through the queue
                self._take(m.WorkerLost(worker=view.address), now)
            self.fleet.disconnected()
        if self.cluster.is_connected:
            if not self._connected:
                self._log(JournalEvent.CLUSTER_BACK, after_s=round(now - self._connected_at, 1))
                self.cluster.rejoin()
            self._connected, self._connected_at = True, now
            return
        if now - self._connected_at > self._away_timeout_s:
            self._give_up(
                JournalEvent.CLUSTER_LOST, "the loss of the Dask scheduler", after_s=round(now - self._connected_at, 1)
            )

    def _give_up(self, event: JournalEvent, source: str, **fields: Any) -> None:
        """End the run: it can be resumed, but not from here."""
        if not self._abandoned:
            self._abandoned = True
            self._log(event, durable=True, **fields)
            self.post(m.QuitRequested(source=source, now=True, failed=True))

    def _look_after(self, now: float) -> None:
        self._watch(self.brain)
        self.cluster.tend()
        self.fleet.tick()
        if self.fleet.in_reach:
            self._no_worker_logged_at, self._rebuilds = now, 0
        elif now - self._no_worker_logged_at > (REBUILD_AFTER_S if self.cluster.is_ours else NO_WORKER_LOG_S):
            self._no_worker_logged_at = now
            self._log(JournalEvent.WORKER_NONE, waiting_s=NO_WORKER_LOG_S)
            if self.cluster.is_ours:
                self._rebuild()

    def _rebuild(self) -> None:
        """Our own cluster has no worker and Dask does not bring one back: make another. What runs is held meanwhile."""
        if self._rebuilds >= REBUILDS:
            self._give_up(JournalEvent.CLUSTER_LOST, "the loss of every worker", rebuilds=self._rebuilds)
            return
        self._rebuilds += 1
        self._log(JournalEvent.CLUSTER_REBUILT, durable=True, number=self._rebuilds)
        self.cluster.revive()

    # -- commands ----------------------------------------------------------------------------------------------

    def _carry_out(self, command: m.Command) -> None:
        match command:
            case m.AskTrial() | m.ReportValue():
                self.recorder.submit(command)
            case m.ReshapeTrial(trial=trial, form=form):
                size = form.footprint.host_bytes
                self._log(JournalEvent.TRIAL_RESHAPED, trial=str(trial), predicted_bytes=size, params=dict(form.params))
                self.recorder.submit(command)
            case m.TellTrial() | m.EnqueueRetry():
                # Durable before the study hears of it: if we die in between, the next start tells it instead.
                name, fields = decisions.write(command)
                self._log(name, durable=True, **fields)
                self.recorder.submit(command)
            case m.DropCheckpoints(trial=trial):
                self._tidy.submit(drop_checkpoints, attempts_of(self._folder), trial)
            case m.LaunchAttempt():
                self._launch(command)
            case m.StopAttempt(attempt=attempt, worker=worker, reason=reason):
                self._log(JournalEvent.ATTEMPT_STOPPING, attempt=str(attempt), reason=reason)
                self.fleet.tell(worker, letters.Stop(attempt=str(attempt), reason=reason))
            case m.KillAttempt(attempt=attempt, worker=worker, reason=reason):
                self._log(JournalEvent.ATTEMPT_KILLING, attempt=str(attempt), reason=reason)
                self.fleet.tell(worker, letters.End(attempt=str(attempt), reason=reason))
                self.fleet.give_up(str(attempt), f"out of reach when it was to be ended: {reason}")
            case m.ResizeReservation(attempt=attempt, worker=worker, reserved_bytes=size, reason=reason):
                self._log(JournalEvent.RESERVATION_RESIZED, attempt=str(attempt), reserved_bytes=size, reason=reason)
                self.fleet.tell(worker, letters.Resize(attempt=str(attempt), reserved_bytes=size))
            case m.NoteDeferral(trial=trial, reason=reason, numbers=numbers):
                self._log(JournalEvent.TRIAL_DEFERRED, trial=str(trial), reason=reason, **numbers)
            case m.NoteHost(worker=worker, reason=reason):
                if reason is None:
                    self._log(JournalEvent.HOST_OPENED, worker=worker)
                else:
                    self._log(JournalEvent.HOST_CLOSED, durable=True, worker=worker, reason=reason)
            case m.NoteDrain(attempt=attempt, wait_s=wait_s, step_s=step_s):
                waiting = {"wait_s": round(wait_s), "attempt": str(attempt), "step_s": round(step_s)}
                self._log(JournalEvent.BATCH_DRAINING, **waiting, hint="q again stops at once")
            case m.CloseStudy(study=study, reason=reason, early=early):
                self._log(JournalEvent.STUDY_CLOSED, durable=True, study=study, reason=reason, early=early)
            case m.EndBatch():
                self._end = command

    def _launch(self, command: m.LaunchAttempt) -> None:
        attempt = command.attempt
        if (missing := self._missing()) is not None:  # its folder would be made again where nobody looks for it
            outcome = m.Outcome(reason=m.ExitReason.NOT_STARTED, detail=str(missing), checkpoint=command.resume_from)
            self.post(m.AttemptEnded(attempt=attempt, outcome=outcome))
            return
        folder = AttemptFolder.of(self._folder, attempt).path
        spec = self.brain.studies[attempt.trial.study].spec
        self._inflight[attempt] = _InFlight(command.worker, command, command.resume_from)
        self._log(
            JournalEvent.ATTEMPT_LAUNCHED,
            durable=True,
            attempt=str(attempt),
            worker=command.worker,
            reserved_bytes=command.reserved_bytes,
            predicted_bytes=command.footprint.host_bytes or None,  # 0: nobody knows
            source=command.footprint.source.value,
            samples=command.footprint.samples,
            components=dict(command.footprint.components),
            wait_s=round(command.wait_s, 3),
            resume_from=command.resume_from,
            older=list(command.older) or None,
        )
        task = Task(
            attempt=str(attempt),
            objective=RUNNER if spec.define_by_run else self._objective,
            function=self._objective if spec.define_by_run else None,
            ahead=command.ahead,
            is_guess=command.footprint.is_guess,
            least_bytes=None if command.footprint.is_known else least_alone(command.reserved_bytes),
            params=command.params,
            context=spec.context,
            folder=str(folder),
            resume_from=command.resume_from,
            older=command.older,
            threads=spec.context.get("threads", 1),
            reserved_bytes=command.reserved_bytes,
            retries=command.retries,
            ran_s=round(command.ran_s, 3),
        )
        self.fleet.launch(task, command.worker)

    # -- what the agents say ----------------------------------------------------------------------------------------

    def _read(self, item: Item) -> m.Event | None:
        match item:
            case Said(worker=worker, report=report):
                return self._heard(worker, report)
            case Ended(attempt=attempt, outcome=outcome):
                return self._on_end(m.AttemptId.parse(attempt), outcome)
            case Answer():
                self._answer(item)
                return None
        return item

    def _answer(self, answer: Answer) -> None:
        """Carry it to its attempt, if that still runs and waits."""
        if answer.number and (flight := self._inflight.get(answer.attempt)) is not None:
            told = letters.Answer(attempt=str(answer.attempt), number=answer.number, body=answer.body)
            self.fleet.tell(flight.worker, told)
        elif "error" in answer.body:
            self._log(JournalEvent.TRIAL_CALL_FAILED, attempt=str(answer.attempt), error=answer.body["error"])

    def _called(self, attempt: m.AttemptId, call: messages.Called) -> m.Event | None:
        """Hand on what a running trial wants of its study."""
        if attempt not in self._inflight:
            return None
        if call.method == "stop":
            return m.StudyStopped(study=attempt.trial.study, source=f"trial {attempt.trial.number}")
        self.recorder.submit(
            CallStudy(attempt=attempt, method=call.method, number=call.number, arguments=call.arguments)
        )
        return None

    def _heard(self, worker: str, report: letters.Report | letters.Unread) -> m.Event | None:
        """Return a report as an event.

        One that cannot be read is dropped and noted once per kind: it must not end the loop.
        """
        try:
            return self._translate(worker, report)
        except ValueError as error:  # of no attempt of ours
            self._note_unread(letters.Unread(kind=type(report).__name__, error=one_line(error, 200)))
            return None

    def _note_unread(self, unread: letters.Unread) -> None:
        if unread.kind not in self._misread:
            self._misread.add(unread.kind)
            self._log(JournalEvent.MESSAGE_DROPPED, kind=unread.kind, error=unread.error)

    def _on_end(self, attempt: m.AttemptId, outcome: m.Outcome) -> m.Event | None:
        """Return the end of an attempt's Dask task as an event.

        One whose worker was lost is looked into first, in a thread of its own: its process may just be writing its
        result, and what is told now is final.
        """
        flight = self._inflight.get(attempt)
        if outcome.reason is not m.ExitReason.LOST or flight is None:
            return m.AttemptEnded(attempt=attempt, outcome=outcome)
        if outcome.checkpoint is None:
            outcome = dataclasses.replace(outcome, checkpoint=flight.checkpoint)
        threading.Thread(target=self._look_into, args=(attempt, outcome), name="headroom-recover").start()
        return None

    def _look_into(self, attempt: m.AttemptId, outcome: m.Outcome) -> None:
        try:
            outcome = self._recover(attempt, outcome)
        finally:
            self.post(m.AttemptEnded(attempt=attempt, outcome=outcome))

    def _note_broken(self, worker: str, detail: str) -> None:
        """Note a worker that cannot run trials: it tries again by itself; without any other at the start there is no
        batch."""
        if self._broken.get(worker) != detail:
            self._broken[worker] = detail
            self._log(JournalEvent.WORKER_BROKEN, durable=True, worker=worker, detail=detail)
        if not self._had_worker:
            self._failure = m.HeadroomError(f"worker {worker} cannot run trials: {detail}")

    def _translate(self, worker: str, report: letters.Report | letters.Unread) -> m.Event | None:
        match report:
            case letters.Joined(facts=facts):
                self._had_worker = True
                self._broken.pop(worker, None)
                return m.WorkerJoined(facts=facts)
            case letters.Left(detail=detail):
                return m.WorkerLost(worker=worker, detail=detail)
            case letters.Broken(detail=detail):
                self._note_broken(worker, detail)
            case letters.RegistryRemade(path=path):
                self._log(JournalEvent.REGISTRY_REMADE, durable=True, worker=worker, path=path)
            case letters.Vitals():
                return _vitals(worker, report)
            case letters.Restarted(attempt=name, checkpoint=checkpoint, detail=detail):
                return m.AttemptRestarted(attempt=m.AttemptId.parse(name), checkpoint=checkpoint, detail=detail)
            case letters.TrialSaid(attempt=name):
                return self._trial_said(worker, m.AttemptId.parse(name), report)
            case letters.WouldKill(attempt=name, kill=kill):
                told = kill.to_json()
                said = {key: told[key] for key in ("kill_id", "rule", "reason", "evidence")}
                self._log(JournalEvent.WATCHDOG_WOULD_KILL, durable=True, attempt=name, **said)
            case letters.Unread():
                self._note_unread(report)
        return None

    def _trial_said(self, worker: str, attempt: m.AttemptId, said: letters.TrialSaid) -> m.Event | None:
        flight = self._inflight.get(attempt)
        match said.message:
            case messages.Started():
                if flight is None or flight.started:  # said again, after a reconnection
                    return None
                flight.started = True
                return m.AttemptStarted(attempt=attempt, worker=worker, pid=said.pid or 0)
            case messages.Progress(step=step, value=value, peak_bytes=peak, device_bytes=device):
                return m.AttemptProgress(
                    attempt=attempt, step=step, value=value, peak_bytes=peak, device_bytes=device or 0
                )
            case messages.Settled(peak_bytes=int(peak), device_bytes=device):
                return m.AttemptSettled(attempt=attempt, peak_bytes=peak, device_bytes=device or 0)
            case messages.Called():
                return self._called(attempt, said.message)
            case messages.Note(text=text):
                self._log(JournalEvent.ATTEMPT_NOTE, attempt=str(attempt), text=text)
            case messages.Saved(path=path):
                if flight is not None:
                    flight.checkpoint = path
        return None


def _vitals(worker: str, said: letters.Vitals) -> m.WorkerVitals:
    return m.WorkerVitals(
        worker=worker,
        available_bytes=said.available_bytes,
        swap_used_bytes=said.swap_used_bytes,
        pressure=said.pressure,
        closed_reason=said.closed_reason,
        others_unclaimed_bytes=said.others_unclaimed_bytes,
        used_bytes={m.AttemptId.parse(name): size for name, size in said.used_bytes.items()},
        peak_bytes={m.AttemptId.parse(name): size for name, size in said.peak_bytes.items()},
        step_s={m.AttemptId.parse(name): seconds for name, seconds in said.step_s.items()},
        ticks={m.AttemptId.parse(name): count for name, count in said.ticks.items()},
    )

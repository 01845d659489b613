"""The thread between the brain and the study database: the brain never waits for storage.

Takes AskTrial, ReshapeTrial, ReportValue, TellTrial and EnqueueRetry in order, carries them out on a StudyStore, and
posts the events that follow. A storage error is retried, 0.5 s to 30 s apart, for as long as it lasts: progress
meanwhile is held here (and in the journal, which is written before a command arrives), reports of one attempt merged.
Any other error ends that command at once. Keeps the driver's lease and takes over trials of drivers that are gone. Does
not decide.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from scheduler.driver.ports import Recordable
from scheduler.masking import scrubbed
from scheduler.model import (
    AskFailed,
    AskTrial,
    AttemptId,
    EnqueueRetry,
    Event,
    FinalState,
    HeadroomError,
    PruneAdvised,
    QuotaReached,
    ReportValue,
    ReshapeTrial,
    StudyStopped,
    TellTrial,
    TrialTaken,
    TrialTold,
)
from scheduler.model.calls import Answer, CallStudy
from scheduler.model.journal_events import JournalEvent
from scheduler.study.store import LeftTrial, NotOurs, StudyStore, StudyUnavailable

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0
PARKED_S = 5.0  # between asks of a study whose remaining trials are run by other drivers

Told = Event | Answer
Note = Callable[..., None]
Settle = Callable[[LeftTrial], TellTrial | EnqueueRetry | None]


@dataclass(slots=True)
class Reports:
    """Values of one attempt that are not yet written: step -> value. However long an outage, one entry per epoch."""

    attempt: AttemptId
    values: dict[int, float] = field(default_factory=dict)

    def commands(self) -> list[ReportValue]:
        return [ReportValue(attempt=self.attempt, step=s, value=v) for s, v in self.values.items()]


_Queued = AskTrial | ReshapeTrial | Reports | TellTrial | EnqueueRetry | CallStudy


class Recorder:
    """One thread, one queue.

    store: what is written to. post: takes the events that follow (called on this thread). journal: called as
    `journal(event, **fields)` for study.unavailable, study.available, study.rejected, study.not_ours, study.takeover.
    settle: decides about a trial of another driver whose lease has expired; None leaves such trials alone.
    renew_s: how often the lease is renewed and expired ones are looked for.
    """

    def __init__(
        self,
        store: StudyStore,
        post: Callable[[Told], None],
        *,
        journal: Note | None = None,
        settle: Settle | None = None,
        renew_s: float | None = None,
        first_delay_s: float = FIRST_DELAY_S,
        max_delay_s: float = MAX_DELAY_S,
        parked_s: float = PARKED_S,
    ) -> None:
        self._store, self._post, self._settle = store, post, settle
        self._journal: Note = journal or (lambda event, **fields: None)
        self._renew_s = store.lease_s / 6 if renew_s is None else renew_s
        self._delays, self._parked_s = (first_delay_s, max_delay_s), parked_s
        self._queue: deque[_Queued] = deque()
        self._parked: list[tuple[float, AskTrial]] = []
        self._current: _Queued | None = None
        self._changed = threading.Condition()
        self._closing = self._draining = False
        self._down_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    # -- called by the driver ---------------------------------------------------------------------------------------

    def submit(self, command: Recordable) -> None:
        """Queue a command; returns at once. Raises RuntimeError after `close`."""
        with self._changed:
            if self._closing:
                raise RuntimeError(f"the recorder is closed; not recorded: {command}")
            if isinstance(command, ReportValue):
                self._merge(command)
            else:
                self._queue.append(command)
            self._changed.notify_all()

    def _merge(self, command: ReportValue) -> None:
        for queued in self._queue:
            if isinstance(queued, Reports) and queued.attempt == command.attempt:
                queued.values[command.step] = command.value
                return
        self._queue.append(Reports(command.attempt, {command.step: command.value}))

    @property
    def pending(self) -> int:
        """Commands that are not yet in the study, the one under way included."""
        with self._changed:
            return len(self._queue) + len(self._parked) + (self._current is not None)

    @property
    def down_s(self) -> float | None:
        """For how long the storage has been unavailable; None while it works."""
        since = self._down_since
        return None if since is None else time.monotonic() - since

    def drain(self) -> None:
        """Nothing new is to start: every ask that has no trial yet, now and later, is answered QuotaReached."""
        with self._changed:
            self._draining = True
            refused = [command for _, command in self._parked]
            refused += [command for command in self._queue if isinstance(command, AskTrial)]
            self._parked = []
            self._queue = deque(c for c in self._queue if not isinstance(c, AskTrial))
            self._changed.notify_all()
        for command in refused:
            self._post(QuotaReached(study=command.study))

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything is written; False when it is not after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and self._current is None, timeout_s)

    def close(self, timeout_s: float) -> list[Recordable]:
        """Write what is left, for at most `timeout_s`, and stop. Returns what is still unwritten, in order.

        That is not lost: the journal has it, and the next start settles those trials from their durable results.
        """
        self.flush(timeout_s)
        with self._changed:
            self._closing = True
            left = ([self._current] if self._current is not None else []) + list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        self._thread.join(timeout=1.0)
        unwritten: list[Recordable] = []
        for command in left:
            if isinstance(command, Reports):
                unwritten.extend(command.commands())
            elif not isinstance(command, AskTrial | CallStudy):
                unwritten.append(command)
        return unwritten

    # -- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        next_renewal = time.monotonic() + self._renew_s
        while True:
            with self._changed:
                self._current = None
                self._unpark()
                self._changed.notify_all()
                while not self._queue and not self._closing:
                    now = time.monotonic()
                    wake = min([next_renewal, *(at for at, _ in self._parked)])
                    if wake <= now:
                        break
                    self._changed.wait(wake - now)
                    self._unpark()
                if self._closing:
                    return
                self._current = self._queue.popleft() if self._queue else None
            if self._current is not None:
                self._carry_out(self._current)
            if time.monotonic() >= next_renewal:
                self._housekeep()
                next_renewal = time.monotonic() + self._renew_s

    def _unpark(self) -> None:
        now = time.monotonic()
        self._queue.extend(command for at, command in self._parked if at <= now)
        self._parked = [(at, command) for at, command in self._parked if at > now]

    def _carry_out(self, command: _Queued) -> None:
        delay_s, longest_s = self._delays
        while True:
            try:
                events = self._once(command)
            except StudyUnavailable as error:
                self._note_down(error)
                if not self._pause(delay_s, command):
                    return
                delay_s = min(delay_s * 2, longest_s)
            except NotOurs as error:
                # Another driver took it over while this one was cut off: its final state is theirs to give.
                self._note_up()
                self._journal(JournalEvent.STUDY_NOT_OURS, **_story(command), error=str(error))
                if isinstance(command, AskTrial):
                    continue  # it was gone before it was ours: the next try begins another
                events = self._taken(command)
                break
            except Exception as error:
                # Not the storage: trying again would give the same. The study is closed with this as its reason.
                # Our own errors are whole lines, written to be read.
                why = scrubbed(str(error) if isinstance(error, HeadroomError) else f"{type(error).__name__}: {error}")
                self._journal(JournalEvent.STUDY_REJECTED, **_story(command), error=why)
                events = self._rejected(command, why)
                break
            else:
                self._note_up()
                break
        for event in events:
            self._post(event)

    def _once(self, command: _Queued) -> Sequence[Told]:
        match command:
            case AskTrial():
                if self._draining:
                    return [QuotaReached(study=command.study)]
                asked = self._store.ask(command)
                if asked is None:
                    return self._park(command)
                return [asked]
            case Reports(attempt=attempt, values=values):
                stop = self._store.report(attempt, values)
                return [PruneAdvised(attempt=attempt, step=max(values))] if stop else []
            case ReshapeTrial():
                self._store.reshape(command)
                return []
            case CallStudy():
                answer, events = self._store.call(command)
                return [answer, *events]
            case TellTrial():
                told = TrialTold(trial=command.trial, state=self._store.tell(command))
                study = command.trial.study
                return [told, *([StudyStopped(study=study, source="its sampler")] if self._stopped(study) else [])]
            case EnqueueRetry():
                self._store.enqueue_retry(command)
                return [TrialTold(trial=command.trial, state=FinalState.FAIL)]

    def _stopped(self, study: str) -> bool:
        return self._store.is_stopped(study)

    @staticmethod
    def _taken(command: Reports | ReshapeTrial | TellTrial | EnqueueRetry | CallStudy) -> list[Told]:
        if isinstance(command, Reports | CallStudy):
            return [TrialTaken(trial=command.attempt.trial)]
        if isinstance(command, ReshapeTrial):
            return [TrialTaken(trial=command.trial)]
        told = command.state if isinstance(command, TellTrial) else None
        return [TrialTold(trial=command.trial, state=FinalState.FAIL), TrialTaken(trial=command.trial, told=told)]

    @staticmethod
    def _rejected(command: _Queued, why: str) -> list[Told]:
        if isinstance(command, CallStudy):
            return [Answer(attempt=command.attempt, number=command.number, body={"error": why, "kind": "RuntimeError"})]
        if isinstance(command, Reports | ReshapeTrial):
            return []  # the curve has a gap, or an attribute is missing; the trial itself is sound
        failed: list[Told] = [AskFailed(study=_study(command), detail=why)]
        if isinstance(command, AskTrial):
            return failed
        return [*failed, TrialTold(trial=command.trial, state=FinalState.FAIL)]

    def _park(self, command: AskTrial) -> Sequence[Event]:
        with self._changed:
            if self._draining:
                return [QuotaReached(study=command.study)]
            self._parked.append((time.monotonic() + self._parked_s, command))
        return []

    def _pause(self, delay_s: float, command: object) -> bool:
        """Wait before the next try; False when there is none (closing, or an ask of a driver that drains)."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closing or (self._draining and isinstance(command, AskTrial)), timeout=delay_s
            )
            if self._draining and isinstance(command, AskTrial) and not self._closing:
                return True  # the next try answers it without the storage
            return not self._closing

    def _note_down(self, error: StudyUnavailable) -> None:
        if self._down_since is None:
            self._down_since = time.monotonic()
            self._journal(JournalEvent.STUDY_UNAVAILABLE, error=str(error), pending=self.pending)

    def _note_up(self) -> None:
        if self._down_since is not None:
            down_s = time.monotonic() - self._down_since
            self._down_since = None
            self._journal(JournalEvent.STUDY_AVAILABLE, down_s=round(down_s, 3), pending=self.pending)

    def _housekeep(self) -> None:
        try:
            self._store.renew()
            for trial in self._store.taken():
                self._post(TrialTaken(trial=trial))
            if self._settle is None:
                return
            for left in self._store.expired():
                command = self._settle(left)
                if isinstance(command, TellTrial):
                    self._store.tell(command, left=left)
                elif isinstance(command, EnqueueRetry):
                    self._store.enqueue_retry(command, left=left)
                else:
                    continue
                self._journal(
                    JournalEvent.STUDY_TAKEOVER, trial=str(left.trial), run=left.run, verdict=type(command).__name__
                )
        except NotOurs:
            return  # its driver is back
        except StudyUnavailable as error:
            self._note_down(error)
        except Exception as error:
            why = scrubbed(f"{type(error).__name__}: {error}")
            self._journal(JournalEvent.STUDY_REJECTED, command="lease", error=why)
        else:
            self._note_up()


def _study(command: _Queued) -> str:
    if isinstance(command, AskTrial):
        return command.study
    return command.attempt.trial.study if isinstance(command, Reports | CallStudy) else command.trial.study


def _story(command: _Queued) -> dict[str, Any]:
    subject = command.study if isinstance(command, AskTrial) else getattr(command, "attempt", None)
    if isinstance(command, TellTrial | EnqueueRetry | ReshapeTrial):
        subject = command.trial
    return {"command": type(command).__name__, "subject": str(subject)}

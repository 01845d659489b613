"""The brain: `BatchState.handle(event, now) -> commands`.

Owns all scheduling state of a driver: studies, trials, the ledger, the corrections. It never sleeps, logs, samples or
submits; everything that races (Dask callbacks, watchdog, signals, timers, keys) reaches it as an event. The same class
runs in production and in the simulator (tests/simulator.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from scheduler import model as m
from scheduler.core import ending, fault
from scheduler.core.asking import Asking
from scheduler.core.expectation import Expectation
from scheduler.core.hosts import Hosts
from scheduler.core.leaving import Leaving
from scheduler.core.ledger import Ledger
from scheduler.core.outlook import Outlook
from scheduler.core.parting import Parting
from scheduler.core.resizing import Resizing
from scheduler.core.resume import Saved
from scheduler.core.sizing import Sizing
from scheduler.core.starting import Starting
from scheduler.core.trial import IllegalTransition, Rules, Study, Trial


class BatchState:
    """All scheduling state. The one mutator is `handle`; everything else reads.

    studies: how many will be opened; before that the batch is not over, although all that are open may be complete.
    """

    def __init__(self, rules: Rules, studies: int = 1) -> None:
        self.rules = rules
        self._expected = studies
        self.ledger = Ledger()
        self.sizing = Sizing()
        self.studies: dict[str, Study] = {}
        self.trials: dict[m.TrialId, Trial] = {}
        self._expectation = Expectation()
        self._leaving = Leaving(rules, self.ledger)
        self._asking = Asking(self.ledger, self.sizing, self.trials)
        self._outlook = Outlook(self.ledger, self.sizing, self._expectation, self.trials)
        self._hosts = Hosts(rules, self.ledger)
        self._resizing = Resizing(self.ledger)
        self._starting = Starting(self.ledger, self._outlook, self.studies, self.trials)
        self._parting = Parting(rules, self._expectation, self.studies, self.trials)
        self.failed = False
        self.timed_out = False
        self.ended = False
        self._began: float | None = None
        self._now = 0.0
        self._out: list[m.Command] = []
        self._stale = True  # something changed that could let a waiting trial start

    @property
    def draining(self) -> str | None:
        """Who asked to stop."""
        return self._leaving.source

    @property
    def at_once(self) -> bool:
        """Not even the study is waited for: what it has not heard, the next start tells it."""
        return self._leaving.at_once

    @property
    def held(self) -> Mapping[str, m.TrialId]:
        """The trial that placement last held a worker for, by worker."""
        return self._starting.held

    @property
    def drain_ends(self) -> float | None:
        """The instant at which the last trial has left or is ended; None while nothing drains."""
        return self._leaving.ends(self.trials.values())

    def handle(self, event: m.Event, now: float) -> list[m.Command]:
        """Take one event at instant `now` (monotonic seconds); return what is to be done, in order."""
        self._now, self._out = now, []
        self._began = now if self._began is None else self._began
        match event:
            case m.WorkerVitals():
                self._on_vitals(event)
                if not self._stale:  # a thousand workers send them every second, and nothing follows
                    return self._out
            case m.AttemptProgress():
                self._on_progress(event)
            case m.StudyOpened():
                self._on_study_opened(event)
            case m.WorkerJoined(facts=facts):
                self._hosts.joined(facts)
                self._stale = True
            case m.WorkerLost(worker=worker):
                self.ledger.leave(worker)
                self._stale = True
            case m.TrialAsked():
                self._on_asked(event)
            case m.ParametersAsked():
                self._on_parameters(event)
            case m.StudyStopped(study=name, source=source):
                self._parting.stop(self.studies[name], source)
            case m.AskFailed(study=name, detail=detail):
                self.studies[name].asking = False
                self._out += self._parting.close(self.studies[name], f"sampling failed: {detail}", now, early=True)
            case m.QuotaReached(study=name, completed=completed):
                self.studies[name].asking = False
                self.studies[name].completed = max(self.studies[name].completed, completed)
                if not self.draining:  # then it is the recorder's answer to an ask that is no longer wanted
                    reason = "quota reached with other drivers"
                    self._out += self._parting.close(self.studies[name], reason, now, early=False)
            case m.AttemptStarted():
                self._on_started(event)
            case m.AttemptRestarted():
                self._on_restarted(event)
            case m.AttemptSettled():
                self._on_settled(event)
            case m.AttemptEnded():
                self._on_ended(event)
            case m.PruneAdvised(attempt=attempt):
                if (trial := self._current(attempt)) is not None:
                    self._out += self._leaving.stop(trial, "prune", now)
            case m.TrialTold(trial=trial_id):
                self.studies[trial_id.study].untold -= 1
            case m.TrialTaken():
                self._on_taken(event)
            case m.QuitRequested():
                self._on_quit(event)
            case m.Tick():
                self._on_tick()
        self._advance()
        return self._out

    def check(self) -> None:
        """Re-check the invariants; tests call this after each event. Raises on the first that is broken."""
        self.ledger.check()
        for trial in self.trials.values():
            held = self.ledger.worker_of(trial.attempt_id) is not None
            if held != (trial.state in (m.TrialState.ADMITTED, m.TrialState.RUNNING)):
                raise IllegalTransition(f"{trial.id} is {trial.state.value} with reservation={held}: {trial.story}")
            study = self.studies[trial.id.study]
            if (trial.id in study.pending) != (trial.state is m.TrialState.PENDING):
                raise IllegalTransition(f"{trial.id} is {trial.state.value}, its study thinks otherwise: {trial.story}")
            if trial.id not in study.live:
                raise IllegalTransition(f"{trial.id} lives outside its study: {trial.story}")

    # -- events -----------------------------------------------------------------------------------------------------

    def _on_study_opened(self, event: m.StudyOpened) -> None:
        self.studies[event.study.name] = Study(
            spec=event.study, counted=event.counted, completed=event.completed, best=event.best
        )
        self.sizing.open(event.study.name, event.observations, event.peaks)
        self._stale = True

    def _on_vitals(self, event: m.WorkerVitals) -> None:
        row = self.ledger.row(event.worker)
        if row is None:
            return
        self._out += self._hosts.heard(row, event, self._now)
        for attempt, ticks in event.ticks.items():
            if (trial := self._current(attempt)) is not None:
                trial.ticks = ticks
        for attempt, step_s in event.step_s.items():
            if (trial := self._current(attempt)) is not None:
                trial.step_s = step_s
        for attempt, used in event.used_bytes.items():
            if (held := row.reservations.get(attempt)) is not None:
                held.saw(used, event.peak_bytes.get(attempt))
                self._resized(self._resizing.grow(held))
        self._stale = self._stale or self._starting.may_follow(row, self._now)

    def _on_asked(self, event: m.TrialAsked) -> None:
        study = self.studies[event.trial.study]
        study.asking, study.max_epochs = False, event.max_epochs
        trial = Trial(
            id=event.trial,
            params=dict(event.params),
            prior=event.footprint,
            footprint=event.footprint,
            family=event.family,
            attempt=event.attempt,
            saved=() if event.resume_from is None else (Saved(path=event.resume_from, host=event.resume_host),),
            max_epochs=event.max_epochs,
            retries=event.retries,
            ran_s=event.ran_s,
            earlier_s=event.ran_s,
            since=self._now,
            smaller=tuple(event.smaller),
            space=event.space,
            ahead=event.ahead,
            story=[f"asked at {self._now:.1f}"],
        )
        trial.footprint = self._outlook.sized(trial)
        self.trials[trial.id] = trial
        study.live.add(trial.id)
        study.pending.add(trial.id)
        self._stale = True
        if self.draining or study.closed:
            self._out += self._parting.requeue(trial, "not started", self._now)

    def _on_parameters(self, event: m.ParametersAsked) -> None:
        """Predict anew what it needs, and let it stay: it has gone where nobody knew that it would."""
        if (trial := self._current(event.attempt)) is None:
            return
        trial.params, trial.space = dict(event.params), event.space
        worker, held = self.ledger.worker_of(event.attempt), self.ledger.reservation(event.attempt)
        if trial.state is m.TrialState.PENDING or worker is None or held is None:
            return
        row = self.ledger.row(worker)
        found = self._outlook.sized(trial, row)
        if found.is_guess:
            trial.footprint, trial.flat = found, False
            wanted = max(found.host_bytes, held.used_bytes, held.peak_bytes)
            self._resized(self._resizing.resize(event.attempt, wanted, "parameters"))

    def _on_started(self, event: m.AttemptStarted) -> None:
        if (trial := self._current(event.attempt)) is not None:
            trial.move(m.TrialState.RUNNING, self._now, f"pid {event.pid} on {event.worker}")
            trial.started_at = self._now

    def _on_restarted(self, event: m.AttemptRestarted) -> None:
        if (trial := self._current(event.attempt)) is not None:
            trial.began(event.checkpoint)
            if event.checkpoint is None:
                trial.started_over = event.detail

    def _on_progress(self, event: m.AttemptProgress) -> None:
        trial = self._current(event.attempt)
        if trial is None:
            return
        trial.progressed(self._now, event.step, event.value)
        self._expectation.progressed(self.studies[trial.id.study], trial)
        self._out.append(m.ReportValue(attempt=event.attempt, step=event.step, value=event.value))
        self.ledger.saw(event.attempt, peak_bytes=event.peak_bytes)
        held = self.ledger.reservation(event.attempt)
        self._resized(self._resizing.grow(held))
        if held is None or not held.peak_bytes:  # nobody has looked yet
            return
        trial.growth.reported(held.peak_bytes)
        if not trial.flat and self.sizing.is_flat(trial):
            trial.flat = True
            self._resized(self._resizing.tighten(event.attempt, "flat"))

    def _on_settled(self, event: m.AttemptSettled) -> None:
        trial = self._current(event.attempt)
        if trial is None:
            return
        trial.settled = True
        self.ledger.saw(event.attempt, peak_bytes=event.peak_bytes)
        self._resized(self._resizing.tighten(event.attempt, "settled", event.device_bytes))

    def _on_ended(self, event: m.AttemptEnded) -> None:
        trial = self._current(event.attempt)
        if trial is None:
            return
        outcome, study = event.outcome, self.studies[trial.id.study]
        facts = trial.facts(outcome)
        verdict = fault.judge(outcome, facts, self.rules.retry)
        if isinstance(verdict, fault.Final):
            outcome = replace(outcome, reason=verdict.reason)
        self.ledger.saw(event.attempt, peak_bytes=outcome.peak_bytes)
        worker = self.ledger.worker_of(event.attempt)
        row = None if worker is None else self.ledger.row(worker)
        trial.left(outcome.checkpoint, None if row is None else row.facts.host)
        self.ledger.release(event.attempt)
        self._stale = True
        if trial.taken:
            self._parting.forget(trial, "taken over", self._now)
            return
        trusted = self.sizing.learn(study.spec.name, trial, outcome)
        if isinstance(verdict, fault.Final):
            self._out += self._parting.finish(trial, verdict, outcome, self._now, trusted_peak=trusted)
            return
        trial.retries, trial.fruitless, trial.alone = verdict.spent, verdict.fruitless, trial.alone or verdict.alone
        if facts.progress:  # what was lost is not held against it
            trial.ran_s = trial.ran_until(self._now)
        if verdict.closes_host and worker is not None:
            self._out += self._hosts.close(worker, outcome.detail)
        if self.draining:
            trial.attempt += 1
            self._out += self._parting.requeue(trial, outcome.reason.value, self._now, outcome)
        else:
            trial.earlier_s += trial.lasted_s(outcome, self._now)
            trial.retry(self._now, verdict, f"attempt {trial.attempt} {outcome.reason.value}")
            study.pending.add(trial.id)

    def _on_taken(self, event: m.TrialTaken) -> None:
        """Nothing of it is ours any more: not its state, not its place in the quota, not its checkpoints."""
        study, trial = self.studies[event.trial.study], self.trials.get(event.trial)
        if event.told is not None:
            study.counted -= 1
            study.completed -= event.told is m.FinalState.COMPLETE
        if trial is None:
            return
        trial.taken, self._stale = True, True
        if trial.state is m.TrialState.PENDING:
            self._parting.forget(trial, "taken over", self._now)
        else:
            self._out += self._leaving.kill(trial, "taken over by another driver")

    def _on_tick(self) -> None:
        self._stale = True
        self._hosts.forget_silent(self._now)
        whole_s = self.rules.timeout_s
        if whole_s is not None and not self.draining and self._now - (self._began or 0.0) > whole_s:
            self.timed_out = True
            self._on_quit(m.QuitRequested(source="its time limit (--timeout)"))
        self._out += self._leaving.overdue(self.trials.values(), self._now)

    def _on_quit(self, event: m.QuitRequested) -> None:
        again = self.draining is not None
        self.failed |= event.failed
        if not again:
            self._leaving.drain(event.source, self._now)
            for trial in list(self.trials.values()):
                if trial.state is m.TrialState.PENDING:
                    self._out += self._parting.requeue(trial, "not started", self._now)
                else:
                    self._out += self._leaving.stop(trial, "drain", self._now)
            self._out += self._leaving.note_drain(self.trials.values(), self._now)
        if again or event.now:
            self._leaving.at_once = True
            for trial in self.trials.values():
                self._out += self._leaving.kill(trial, event.source)

    # -- what follows -----------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        if self.ended:
            return
        fresh = self._stale  # only then can there be a worker or a slot that was not there before
        if self._stale and not self.draining:
            self._stale = False
            self._place()
        for study in self.studies.values():
            if study.closed is None and study.complete:
                reason = study.stopped or "quota reached"
                self._out += self._parting.close(study, reason, self._now, early=study.closed_early)
            elif fresh and not self.draining and (ask := self._asking.ask(study, self.studies.values())) is not None:
                self._out.append(ask)
        self._end_if_done()

    def _place(self) -> None:
        waiting = []
        for study in self.studies.values():
            for trial in self._parting.pending(study):
                if trial.id not in study.pending:  # the misfits before it have closed its study
                    continue
                line = self._outlook.waiting(study, trial)
                # A waiting trial profits from what others have taught meanwhile.
                trial.footprint = line.footprint
                if (never := self._starting.never(line)) is not None:
                    self._out += self._parting.misfit(trial, never, self._now)
                elif trial.not_before > self._now:
                    retry = m.Defer(m.DeferReason.RETRY_DELAY, {"attempt": trial.attempt})
                    self._out += self._starting.defer(trial, retry)
                else:
                    waiting.append(line)
        waiting = [line for line in waiting if line.trial in self.trials]  # likewise
        self._out += self._starting.place(waiting, self._now)

    def _end_if_done(self) -> None:
        over = len(self.studies) >= self._expected and all(s.closed is not None for s in self.studies.values())
        if not (over or self.draining) or self.trials:
            return
        under_way = any(s.asking or s.untold for s in self.studies.values())
        if under_way and not self.at_once:
            return
        self.ended = True
        code, reason = ending.verdict(
            self.studies.values(),
            over=over and not under_way,  # what the study has not heard of is not yet done
            draining=self.draining,
            failed=self.failed,
            timed_out=self.timed_out,
        )
        self._out.append(m.EndBatch(exit_code=code, reason=reason))

    # -- small things -----------------------------------------------------------------------------------------------

    def _current(self, attempt: m.AttemptId) -> Trial | None:
        """Return the trial whose present attempt this is; None for late news of an attempt that has already ended."""
        trial = self.trials.get(attempt.trial)
        return trial if trial is not None and trial.attempt == attempt.attempt else None

    def waiting(self, study: Study, trial: Trial) -> m.Waiting:
        """Return a pending trial as placement sees it."""
        return self._outlook.waiting(study, trial)

    def _resized(self, commands: Iterable[m.Command]) -> None:
        """Place anew where a reservation has changed: it leaves more room to others, or less."""
        before = len(self._out)
        self._out += commands
        self._stale = self._stale or len(self._out) > before

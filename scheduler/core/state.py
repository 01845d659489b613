"""The brain: `BatchState.handle(event, now) -> commands`.

Owns all scheduling state of a driver: studies, trials, the ledger, the corrections. It never sleeps, logs, samples or
submits; everything that races (Dask callbacks, watchdog, signals, timers, keys) reaches it as an event. The same class
runs in production and in the simulator (tests/simulator.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from scheduler import model as m
from scheduler.core import admission, ending, fault, parting, placement
from scheduler.core.asking import Asking
from scheduler.core.attributes import FLAT_AFTER, final_attrs
from scheduler.core.expectation import Expectation
from scheduler.core.leaving import Leaving
from scheduler.core.ledger import Ledger, Reservation, Row
from scheduler.core.outlook import Outlook
from scheduler.core.reservation import grown, tightened
from scheduler.core.resume import Saved
from scheduler.core.sizing import Sizing
from scheduler.core.trial import IllegalTransition, Rules, Study, Trial

VITALS_STALE_S = 15.0  # they come every second; a worker that is busy for some seconds is not silent
# Vitals that open no room to anybody who waits may still move a hold: placed again at most so often. With a thousand
# workers they come a thousand times a second.
REPLACE_S = 0.25


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
        self.failed = False
        self.timed_out = False
        self.ended = False
        self.held: Mapping[str, m.TrialId] = {}  # worker -> the trial that placement last held it for
        self._began: float | None = None
        self._now = 0.0
        self._out: list[m.Command] = []
        self._stale = True  # something changed that could let a waiting trial start
        self._placed_at = 0.0
        self._least_bytes: int | None = None  # that any trial which waits for memory could do with

    @property
    def draining(self) -> str | None:
        """Who asked to stop."""
        return self._leaving.source

    @property
    def at_once(self) -> bool:
        """Not even the study is waited for: what it has not heard, the next start tells it."""
        return self._leaving.at_once

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
            case m.WorkerJoined():
                self._on_worker_joined(event)
            case m.WorkerLost(worker=worker):
                self.ledger.leave(worker)
                self._stale = True
            case m.TrialAsked():
                self._on_asked(event)
            case m.ParametersAsked():
                self._on_parameters(event)
            case m.StudyStopped(study=name, source=source):
                self._stop_study(self.studies[name], source)
            case m.AskFailed(study=name, detail=detail):
                self.studies[name].asking = False
                self._close(self.studies[name], f"sampling failed: {detail}", early=True)
            case m.QuotaReached(study=name, completed=completed):
                self.studies[name].asking = False
                self.studies[name].completed = max(self.studies[name].completed, completed)
                if not self.draining:  # then it is the recorder's answer to an ask that is no longer wanted
                    self._close(self.studies[name], "quota reached with other drivers", early=False)
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

    def _on_worker_joined(self, event: m.WorkerJoined) -> None:
        facts = event.facts
        budget, beside = self.rules.memory_budget.on(facts), self.ledger.overhead_beside(facts)
        self.ledger.join(
            Row(
                facts=facts,
                own_capacity_bytes=admission.own_capacity(budget, facts),
                device_capacity_bytes=admission.device_capacity(facts.device) if facts.device else None,
                reserve_bytes=self.rules.reserve_bytes,
                available_bytes=facts.available_bytes,
            ),
            admission.capacity(budget, facts, beside),
        )
        self._stale = True

    def _on_vitals(self, event: m.WorkerVitals) -> None:
        row = self.ledger.row(event.worker)
        if row is None:
            return
        row.vitals_at = self._now
        row.available_bytes, row.pressure = event.available_bytes, event.pressure
        row.swap_used_bytes = event.swap_used_bytes
        self._shut(row, event.closed_reason)
        row.others_unclaimed_bytes = event.others_unclaimed_bytes
        row.touch()
        for attempt, ticks in event.ticks.items():
            if (trial := self._current(attempt)) is not None:
                trial.ticks = ticks
        for attempt, step_s in event.step_s.items():
            if (trial := self._current(attempt)) is not None:
                trial.step_s = step_s
        for attempt, used in event.used_bytes.items():
            if (held := row.reservations.get(attempt)) is not None:
                held.saw(used, event.peak_bytes.get(attempt))
                self._grow(held)
        if self._least_bytes is not None and not self._stale:
            due = self._now - self._placed_at >= REPLACE_S
            self._stale = due or self.ledger.opens(row, self._least_bytes)

    def _expire_vitals(self) -> None:
        """Forget what a host had free when no news of it comes: nothing is admitted there until it speaks again."""
        for row in self.ledger:
            if row.vitals_at is not None and self._now - row.vitals_at > VITALS_STALE_S:
                row.available_bytes, row.vitals_at = None, None
                row.touch()

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
            self._requeue(trial, reason="not started", outcome=None)

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
            self._resize(event.attempt, max(found.host_bytes, held.used_bytes, held.peak_bytes), "parameters")

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
        self._grow(held)
        if held is None or not held.peak_bytes:  # nobody has looked yet
            return
        trial.growth.reported(held.peak_bytes)
        if not trial.flat and self.sizing.is_flat(trial):
            trial.flat = True
            self._tighten(event.attempt, "flat")

    def _on_settled(self, event: m.AttemptSettled) -> None:
        trial = self._current(event.attempt)
        if trial is None:
            return
        trial.settled = True
        self.ledger.saw(event.attempt, peak_bytes=event.peak_bytes)
        self._tighten(event.attempt, "settled", tightened(event.device_bytes) if event.device_bytes else None)

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
            self._forget(trial, "taken over")
            return
        trusted = self.sizing.learn(study.spec.name, trial, outcome)
        if isinstance(verdict, fault.Final):
            self._finish(trial, verdict, outcome, trusted_peak=trusted)
            return
        trial.retries, trial.fruitless, trial.alone = verdict.spent, verdict.fruitless, trial.alone or verdict.alone
        if facts.progress:  # what was lost is not held against it
            trial.ran_s = trial.ran_until(self._now)
        if verdict.closes_host and worker is not None:
            self._close_host(worker, outcome.detail)
        if self.draining:
            trial.attempt += 1
            self._requeue(trial, reason=outcome.reason.value, outcome=outcome)
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
            self._forget(trial, "taken over")
        else:
            self._out += self._leaving.kill(trial, "taken over by another driver")

    def _close_host(self, worker: str, reason: str) -> None:
        """Nothing more starts there until its agent has looked and says otherwise: with its next vitals."""
        if (row := self.ledger.row(worker)) is not None:
            self._shut(row, reason)

    def _shut(self, row: Row, reason: str | None) -> None:
        if row.closed_reason != reason:
            row.closed_reason = reason
            row.touch()
            self._out.append(m.NoteHost(worker=row.facts.address, reason=reason))

    def _on_tick(self) -> None:
        self._stale = True
        self._expire_vitals()
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
                    self._requeue(trial, reason="not started", outcome=None)
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
                self._close(study, study.stopped or "quota reached", early=study.closed_early)
            elif fresh and not self.draining and (ask := self._asking.ask(study, self.studies.values())) is not None:
                self._out.append(ask)
        self._end_if_done()

    def _place(self) -> None:
        self._placed_at = self._now
        waiting = []
        for study in self.studies.values():
            for trial in self._pending(study):
                if trial.id not in study.pending:  # the misfits before it have closed its study
                    continue
                line = self._outlook.waiting(study, trial)
                # A waiting trial profits from what others have taught meanwhile.
                trial.footprint = line.footprint
                if (never := self._never(study, line)) is not None:
                    self._misfit(study, trial, never)
                elif trial.not_before > self._now:
                    self._defer(trial, m.Defer(m.DeferReason.RETRY_DELAY, {"attempt": trial.attempt}))
                else:
                    waiting.append(line)
        self._least_bytes = None
        waiting = [line for line in waiting if line.trial in self.trials]  # likewise
        if not waiting:
            return
        plan = placement.place_in(waiting, self._outlook.running_on, self.ledger.rooms, self._now)
        self.held = plan.held
        for start in plan.starts:
            self._launch(start)
        for trial_id, defer in plan.deferred.items():
            self._defer(self.trials[trial_id], defer)
        self._least_bytes = min((line.least_bytes for line in waiting if line.trial in plan.deferred), default=None)

    def _never(self, study: Study, line: m.Waiting) -> m.Reject | None:
        """Why no worker could take it, in any of its forms."""
        sizes = (line.footprint, *line.smaller)
        rejects = []
        for each in sizes:
            reject = admission.feasible(each, self.ledger.rooms.by_limit(), study.spec.slots)
            if reject is None:
                return None
            rejects.append(reject)
        return rejects[-1]

    def _defer(self, trial: Trial, defer: m.Defer) -> None:
        trial.wait = defer
        if trial.deferred != defer.reason:
            trial.deferred = defer.reason
            self._out.append(m.NoteDeferral(trial=trial.id, reason=defer.reason, numbers=defer.numbers))

    def _launch(self, start: placement.Start) -> None:
        trial = self.trials[start.trial]
        study = self.studies[trial.id.study]
        row = self.ledger.row(start.worker)
        assert row is not None  # placement saw its view
        if start.form:
            self._out.append(m.ReshapeTrial(trial=trial.id, form=trial.reshape(start.form)))
        # Placed by what it would need anywhere; here it needs what it does here.
        here = self._outlook.sized(trial, row)
        host_bytes = start.host_bytes
        if here.is_known:
            trial.footprint, host_bytes = here, min(host_bytes, here.host_bytes)
        self.ledger.reserve(
            start.worker,
            Reservation(
                attempt=trial.attempt_id,
                host_bytes=host_bytes,
                device_bytes=start.device_bytes,
                slots=study.spec.slots,
            ),
        )
        trial.move(m.TrialState.ADMITTED, self._now, f"attempt {trial.attempt} on {start.worker}")
        trial.launched_at = self._now
        trial.began(trial.resume_from)
        study.pending.discard(trial.id)
        self._out.append(
            m.LaunchAttempt(
                attempt=trial.attempt_id,
                worker=start.worker,
                params=trial.params,
                footprint=trial.footprint,
                reserved_bytes=host_bytes,
                slots=study.spec.slots,
                ahead=trial.ahead,
                resume_from=trial.resume_from,
                older=tuple(each.path for each in trial.saved[1:]),
                retries=trial.retries,
                ran_s=trial.ran_s,
                wait_s=self._now - trial.since,
            )
        )

    def _misfit(self, study: Study, trial: Trial, never: m.Reject) -> None:
        """No worker can ever hold it: pruned with a constraint, which teaches the sampler; it does not count."""
        study.misfits_in_row += 1
        attrs = {"stop_reason": "does_not_fit", "does_not_fit": dict(never.numbers)}
        excess = trial.footprint.host_bytes / max(1, never.numbers.get("limit_bytes", 1)) - 1
        self._tell(trial, m.FinalState.PRUNED, None, attrs, constraint=max(excess, 1e-3))
        if study.misfits_in_row >= self.rules.max_misfits:
            self._close(study, f"{study.misfits_in_row} trials in a row fit no worker ({never.reason})", early=True)

    def _finish(self, trial: Trial, verdict: fault.Final, outcome: m.Outcome, *, trusted_peak: bool) -> None:
        study, state = self.studies[trial.id.study], verdict.state
        study.misfits_in_row = 0
        study.counted += 1
        study.ended.append(trial.took(self._now, outcome))
        if state is m.FinalState.COMPLETE:
            study.completed += 1
            self._expectation.finished(study, trial, outcome.duration_s)
        attrs = final_attrs(
            outcome, trial.footprint, trial.attempt, trusted_peak=trusted_peak, earlier_s=trial.earlier_s
        )
        if trial.started_over is not None:
            attrs["started_over"] = trial.started_over
        if (flat_after := trial.flat_after(outcome)) is not None:
            attrs[FLAT_AFTER] = flat_after
        value = outcome.value if state is m.FinalState.COMPLETE else None
        values = outcome.values if value is not None else ()
        self._tell(trial, state, value, attrs, constraint=verdict.constraint, values=values)
        if (over := parting.unwanted(study, trial, value, self.rules.keep_checkpoints)) is not None:
            self._out.append(over)
        if outcome.fatal and state is m.FinalState.FAIL:
            self._stop_study(study, f"trial {trial.id.number} failed: {outcome.detail}", early=True)
        study.failures_in_row = fault.failures_in_row(study.failures_in_row, state)
        if fault.is_broken(study.failures_in_row, self.rules.retry):
            self._close(study, f"{study.failures_in_row} failures in a row; last: {outcome.detail}", early=True)

    def _tell(
        self,
        trial: Trial,
        state: m.FinalState,
        value: float | None,
        attrs: dict[str, Any],
        constraint: float | None,
        values: tuple[float, ...] = (),
    ) -> None:
        self._forget(trial, f"told {state.value}")
        self._out.append(
            m.TellTrial(trial=trial.id, state=state, value=value, values=values, attrs=attrs, constraint=constraint)
        )

    def _requeue(self, trial: Trial, *, reason: str, outcome: m.Outcome | None) -> None:
        self._forget(trial, f"requeued: {reason}")
        self._out.append(parting.requeued(trial, reason, outcome))

    def _forget(self, trial: Trial, why: str) -> None:
        study = self.studies[trial.id.study]
        trial.move(m.TrialState.FINISHED, self._now, why)
        del self.trials[trial.id]
        study.live.discard(trial.id)
        study.pending.discard(trial.id)
        study.untold += not trial.taken

    def _stop_study(self, study: Study, source: str, *, early: bool = False) -> None:
        """No further trial is asked for; those there are, also one that waits, run to their end."""
        if study.stopped is None and study.closed is None:
            study.stopped, study.closed_early = source, early

    def _close(self, study: Study, reason: str, *, early: bool) -> None:
        if study.closed is not None:
            return
        study.closed, study.closed_early = reason, early
        self._out.append(m.CloseStudy(study=study.spec.name, reason=reason, early=early))
        for trial in self._pending(study):
            self._requeue(trial, reason="study closed", outcome=None)

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

    def _pending(self, study: Study) -> list[Trial]:
        return [self.trials[t] for t in sorted(study.pending)]

    def waiting(self, study: Study, trial: Trial) -> m.Waiting:
        """Return a pending trial as placement sees it."""
        return self._outlook.waiting(study, trial)

    def _grow(self, held: Reservation | None) -> None:
        if held is not None and held.peak_bytes > held.host_bytes:
            self._resize(held.attempt, grown(held.peak_bytes), "over_reservation")

    def _tighten(self, attempt: m.AttemptId, reason: str, device_bytes: int | None = None) -> None:
        held = self.ledger.reservation(attempt)
        assert held is not None  # a current attempt that runs holds one: `check` proves it
        # Never upwards: a prior that was right to the MiB leaves less room than the margin above what was seen.
        host_bytes = max(held.peak_bytes, min(held.host_bytes, tightened(held.peak_bytes)))
        self._resize(attempt, host_bytes, reason, device_bytes)

    def _resize(self, attempt: m.AttemptId, host_bytes: int, reason: str, device_bytes: int | None = None) -> None:
        worker = self.ledger.worker_of(attempt)
        if worker is not None and self.ledger.resize(attempt, host_bytes, device_bytes):
            self._stale = True
            self._out.append(
                m.ResizeReservation(attempt=attempt, worker=worker, reserved_bytes=host_bytes, reason=reason)
            )

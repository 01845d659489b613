"""The driver: wires a run together from settings, runs it, and takes it apart again.

Covers the order of things at start (lock, journal, cluster, agents, settle what a dead driver left) and at the end, and
the STOP file. What happens in between is `dispatcher` (the loop) and `state` (the decisions).
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from scheduler import model as m
from scheduler.cluster import credentials
from scheduler.cluster.client import Cluster
from scheduler.core import ending
from scheduler.core.fault import RetryPolicy
from scheduler.core.state import BatchState
from scheduler.core.trial import Rules
from scheduler.driver import decisions, journal, recovery, run_folder
from scheduler.driver.arrivals import Arrivals, config_of
from scheduler.driver.caller import Caller
from scheduler.driver.dispatcher import Dispatcher, Ended, Inbox, Said
from scheduler.driver.fleet import Fleet
from scheduler.driver.lock import DriverLock
from scheduler.driver.opening import Opening
from scheduler.driver.quitting import Signals, StoppedAtStart
from scheduler.driver.recorder import Recorder
from scheduler.driver.recording import Recording
from scheduler.driver.run_files import RunFiles
from scheduler.driver.telling import Telling
from scheduler.host import vitals
from scheduler.host.registry import HostRegistry
from scheduler.model.journal_events import JournalEvent
from scheduler.settings.schema import Settings
from scheduler.study import choice
from scheduler.study.store import Functions, StudyStore, StudyUnavailable
from scheduler.ui import report
from scheduler.ui.console import View
from scheduler.workload import functions as training_side
from scheduler.workload.plan import Plan

SCRATCH = "dask"  # below the run folder, while it runs: the worker's own files and the spares' logs
CLOSE_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_AT_ONCE_S = 2.0  # the user has asked twice


def run(
    settings: Settings,
    plan_: Plan,
    view_: View,
    *,
    is_last: bool = False,
    caller: Caller | None = None,
    leave_report: Callable[[Path], str] | None = None,
) -> int:
    """Run every study of the plan to its quota, or until the user stops it; print the results; return the exit code.

    caller: what a program that calls this has beyond settings. leave_report: called with the run's folder when all
    is written, returns a line to show; must not raise. is_last: the process ends with it. A request to stop
    that comes after the end is then not heard any more: it could only put its own status in the place of the run's.

    Raises HeadroomError: a run folder that another driver holds, a cluster that does not answer, a database that is
    out of reach, workers that cannot run trials.
    """
    return _Driver(settings, plan_, view_, caller, leave_report).run(is_last)


class FilesLost(m.HeadroomError):
    """The run's folder or database was taken away while it ran."""

    exit_code = 1


class _Driver:
    def __init__(
        self,
        settings: Settings,
        plan_: Plan,
        view_: View,
        caller: Caller | None = None,
        leave_report: Callable[[Path], str] | None = None,
    ) -> None:
        self.settings, self.plan, self.view, self.caller = settings, plan_, view_, caller
        self.leave_report = leave_report
        self.owner = uuid.uuid4().hex
        self.topic = f"{settings.name}-{self.owner[:8]}"
        self.started = time.monotonic()
        self.inbox: Inbox = queue.SimpleQueue()  # one, from the first line: nothing can come too early or too late
        self.recording: Recording | None = None
        self._asked_to_quit: str | None = None

    def run(self, is_last: bool) -> int:
        registry = HostRegistry.default()
        recipes = {each.spec.name: each.recipe for each in self.plan.studies if each.recipe and not each.refusal}
        folder = run_folder.prepare(self.settings, recipes)
        with _readable(folder):
            lock = DriverLock(folder / "driver.lock")
        try:
            with _readable(folder):
                self.run_id = run_folder.run_id(folder)
                self.is_first = not (folder / "journal.jsonl").exists()
                self.journal = journal.Journal(folder / "journal.jsonl")
                self.telling = Telling(self.settings, self.plan, self.view, self.journal)
                (folder / "STOP").unlink(missing_ok=True)  # it has stopped the run before; this start is the answer
            with Signals(self._quit, is_last=is_last):
                self.view.start(on_quit=self._quit)
                try:
                    return self._run(folder, registry)
                except m.HeadroomError as error:
                    self.telling.over(error.exit_code, str(error))
                    raise
        finally:
            lock.release()

    def _may_go_on(self) -> None:
        """Between two stages of the start: leave when somebody has asked for it. Raises StoppedAtStart."""
        if self._asked_to_quit is not None:
            raise StoppedAtStart(self._asked_to_quit)

    # -- the stages -----------------------------------------------------------------------------------------------

    def _run(self, folder: Path, registry: HostRegistry) -> int:
        settings = self.settings
        if self.journal.was_torn:
            self.log(JournalEvent.JOURNAL_TORN, path=str(self.journal.path))
        self.log(JournalEvent.BATCH_STARTED, durable=True, run=settings.name, driver_pid=os.getpid(), owner=self.owner)
        for line in (*self.plan.recipes, *self.plan.devices, *self.plan.refusals):
            self.view.line(line)
        self._may_go_on()
        store = self._store(folder)
        self.files = RunFiles(folder, store)
        # Beside all that follows: connecting and creating the tables take as long as a cluster of our own.
        opening = Opening(self.plan, store, decisions.outstanding(journal.read(self.journal.path)), self.log)
        opening.begin()
        if not self.is_first and (opened := opening.finished()) is not None:
            return self._already_done(folder, store, opened)
        cluster, fleet = self._cluster(folder), None
        try:
            self._may_go_on()
            self.telling.open_page(cluster, key=self.topic)
            fleet = self._fleet(cluster)
            config = config_of(
                settings,
                self.plan,
                topic=self.topic,
                run_id=self.run_id,
                reserve_bytes=self._rules().reserve_bytes,
            )
            arrivals = Arrivals(cluster, fleet, self.inbox, self.log, where=settings.cluster or "this machine")
            joined = arrivals.begin(config, folder)
            self._may_go_on()
            ends = decisions.ends(journal.read(self.journal.path))
            evidence = recovery.Evidence(registry=registry, start_time=vitals.start_time, ends=ends)
            dispatcher = self._dispatcher(folder, cluster, fleet, store, evidence)
            opened = opening.settle(evidence, dispatcher.brain.rules.retry)
            end = dispatcher.run(first=[*opened, *joined])
            self._watch(dispatcher.brain, folder)
            self.telling.close_page(end.reason)
            unwritten = dispatcher.recorder.close(
                CLOSE_TIMEOUT_AT_ONCE_S if dispatcher.brain.at_once else CLOSE_TIMEOUT_S
            )
        finally:
            if fleet is not None:
                fleet.dismiss("the run is over")
            cluster.close()
            if self.recording is not None:
                self.recording.close()
            shutil.rmtree(folder / SCRATCH, ignore_errors=True)
        return self._conclude(folder, store, dispatcher.brain, end, len(unwritten))

    def _already_done(self, folder: Path, store: StudyStore, opened: list[m.StudyOpened]) -> int:
        """Every study has its trials: that is said without a cluster."""
        brain, end = BatchState(self._rules(), studies=len(self.plan.runnable)), None
        for event in opened:
            for command in brain.handle(event, time.monotonic()):
                match command:
                    case m.CloseStudy(study=study, reason=reason, early=early):
                        self.log(JournalEvent.STUDY_CLOSED, durable=True, study=study, reason=reason, early=early)
                    case m.EndBatch():
                        end = command
        assert end is not None  # nothing is asked, runs, or waits
        return self._conclude(folder, store, brain, end, unwritten=0)

    def _conclude(self, folder: Path, store: StudyStore, brain: BatchState, end: m.EndBatch, unwritten: int) -> int:
        """Write and say how it ended; return the exit code. Raises FilesLost."""
        loss = self.files.look(is_last=True)
        code, reason = end.exit_code if loss is None else FilesLost.exit_code, end.reason
        if code == ending.DONE and self.plan.refusals:
            refused = sum(study.refusal is not None for study in self.plan.studies)
            code, reason = ending.NOT_DONE, f"{reason}, but {refused} of {len(self.plan.studies)} were refused"
        self.log(JournalEvent.BATCH_ENDED, durable=True, exit_code=code, reason=reason, unwritten=unwritten)
        self.view.stop()
        told = None if loss is None else self.files.save(loss)
        delivered = self._report(folder, store, brain)
        store.close()
        self.files.close()
        if told is not None:
            raise FilesLost(told)
        if code == ending.DONE and not delivered:
            code, reason = ending.NOT_DONE, "the results could not be delivered"
        if self.leave_report is not None:  # before the user's own command hears of the end: it may want to send it
            self.view.line(self.leave_report(folder))
        self.telling.over(code, reason, brain)
        self.journal.close()
        if code == ending.NOT_DONE:
            self.view.line(f"exit {code}: {reason}")
        return code

    def _dispatcher(
        self, folder: Path, cluster: Cluster, fleet: Fleet, store: StudyStore, evidence: recovery.Evidence
    ) -> Dispatcher:
        brain = BatchState(self._rules(), studies=len(self.plan.runnable))
        policy = brain.rules.retry
        self.recording = Recording(folder, brain, studies=len(self.plan.runnable), note=self.view.line)
        return Dispatcher(
            brain,
            cluster,
            fleet,
            lambda post: Recorder(
                store, post, journal=self.log, settle=lambda left: recovery.settle(left, evidence, policy)
            ),
            inbox=self.inbox,
            objective=self.settings.objective or self.settings.training.objective,
            folder=folder,
            log=self.log,
            recover=lambda attempt, outcome: recovery.recover(attempt, outcome, evidence, folder),
            missing=self.files.missing,
            away_timeout_s=self.settings.away_timeout_s,
            watch=lambda brain: self._watch(brain, folder),
            handle=self.recording.handle,
            told=self._told,
        )

    def _report(self, folder: Path, store: StudyStore, brain: BatchState) -> bool:
        """Results on stdout and in the run folder, read from the study; False when they are not all there."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for spec in self.plan.runnable:
            try:
                rows[spec.name] = store.rows(spec.name)
            except StudyUnavailable as error:
                self.view.line(f"no results now, the database is out of reach ({error})")
                break
        notes = {s.spec.name: f"closed: {s.closed}" for s in brain.studies.values() if s.closed_early}
        delivered, loss = False, self.files.loss
        try:
            if len(rows) == len(self.plan.runnable):
                kept = None if loss is not None and loss.is_folder else folder
                report.finish(kept, self.plan.runnable, rows, notes=notes)
                delivered = True
        except OSError as error:
            self.view.line(f"cannot write the results into {folder}: {error}")
        left = sum(max(0, s.spec.quota - s.counted) for s in brain.studies.values() if not s.closed_early)
        if left and loss is None:
            self.view.line(f"{left} trials remain; the same command goes on with them")
        return delivered

    def _cluster(self, folder: Path) -> Cluster:
        if self.settings.cluster is not None:
            security = credentials.given(self.settings.cluster, self.settings.tls_files)
            return Cluster.connect(self.settings.cluster, topic=self.topic, security=security)
        with _readable(folder):
            return Cluster.local(
                slots=self.settings.total_slots,
                memory_bytes=self.plan.rooms[0].capacity_bytes,
                topic=self.topic,
                dashboard=self.settings.dashboard_address,
                scratch=str(folder / SCRATCH),
            )

    def _fleet(self, cluster: Cluster) -> Fleet:
        return Fleet(
            cluster,
            on_message=lambda worker, report: self.inbox.put(Said(worker, report)),
            on_end=lambda attempt, outcome: self.inbox.put(Ended(attempt, outcome)),
            hold_s=self.settings.away_timeout_s,
            lives=vitals.lives,
            clock=time.monotonic,
        )

    def _store(self, folder: Path) -> StudyStore:
        functions = training_side.load(self.settings)
        return StudyStore(
            self.settings.storage_url,
            owner=self.owner,
            run=self.run_id,
            functions=Functions(
                sample=functions["sample"],
                micro_batch=functions["micro_batch"],
                estimate=functions["estimate"],
            ),
            seed=self.settings.seed,
            pruner=self.settings.pruner,
            warm_start=self.settings.warm_start,
            begin_with=self._begin_with(),
            choice=self._choice(),
            storage=None if self.caller is None else self.caller.storage,
            folder=folder,
            lease_s=self.settings.lease_s,
        )

    def _begin_with(self) -> tuple[Mapping[str, Any], str | None] | None:
        given = self.settings.begin_with
        if given is None:
            return None
        return given.params, None if given.checkpoint is None else str(given.checkpoint.expanduser().absolute())

    def _choice(self) -> choice.Choice | None:
        if self.caller is not None:
            return self.caller.choice
        return None if self.settings.objective is None else choice.chosen(self.settings)

    def _told(self, event: m.TrialTold) -> None:
        """Call the caller's callbacks: a trial has its final state."""
        if self.caller is not None and self.caller.on_end(event.trial.number):
            self.inbox.put(m.StudyStopped(study=event.trial.study, source="a callback"))

    def _rules(self) -> Rules:
        settings = self.settings
        return Rules(
            memory_budget=settings.memory_budget,
            reserve_bytes=settings.reserve_on(min(room.facts.limit_bytes for room in self.plan.rooms)),
            retry=RetryPolicy(
                max_retries=settings.max_retries, max_consecutive_failures=settings.max_consecutive_failures
            ),
            drain_timeout_s=settings.drain_timeout_s,
            trial_timeout_s=settings.trial_timeout,
            timeout_s=settings.timeout,
            keep_checkpoints=settings.keep_checkpoints,
        )

    # -- events from outside the loop -----------------------------------------------------------------------------

    def _quit(self, source: str) -> None:
        self._asked_to_quit = source
        self.inbox.put(m.QuitRequested(source=source))

    def _watch(self, brain: BatchState, folder: Path) -> None:
        """Once a second: the STOP file, lines the journal still owes, the picture for the console and the page."""
        if (folder / "STOP").exists() and brain.draining is None:
            self._quit("the file STOP")
        if self.files.loss is None and (loss := self.files.look()) is not None:
            self.log(JournalEvent.RUN_FILES_LOST, durable=True, what=loss.what, path=str(loss.path), fate=loss.fate)
            self.inbox.put(m.QuitRequested(source=f"the loss of the {loss.what}", now=loss.is_folder, failed=True))
        self.journal.flush()
        now = time.monotonic()
        limit_s = None if self.caller is None else self.caller.timeout_s
        if limit_s is not None and now - self.started > limit_s:
            for study in brain.studies.values():
                if study.stopped is None and study.closed is None:
                    self.inbox.put(m.StudyStopped(study=study.spec.name, source="its time limit"))
        self.telling.show(brain)

    def log(self, event: JournalEvent, durable: bool = False, **fields: Any) -> None:
        """One event to the journal, and to whoever looks on."""
        self.telling.log(event, durable=durable, **fields)


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turn an OSError of the run folder's own files into the one line it deserves."""
    try:
        yield
    except OSError as error:
        raise m.UsageError(
            f"cannot use {error.filename or folder}: {error.strerror or error}; put it right, or give another --name"
        ) from None

"""The studies: sampling, pruning, and what is read from and written to them, on Optuna and its RDB storage.

Covers opening a study, asking (with the micro-batch sized for a memory limit), reports, final states, retries, leases
between drivers, and reading for reports. Does not retry: every operation may be repeated after an error in its middle
(`recorder` does), and raises StudyUnavailable when the storage is what failed. Transactions are in `study_rdb`.

Ownership: a trial carries the `run` and the `owner` (driver process) that asked it; only that run's driver finishes
it (a lock on the run folder makes that one process), and other drivers only after its lease has stood still for
`lease_s`. Both are compared under the study's lock.
"""

from __future__ import annotations

import math
import os
import socket
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import optuna
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState

from scheduler.files.pinned import Pinned
from scheduler.host.registry import boot_id
from scheduler.model import (
    AskTrial,
    AttemptId,
    EnqueueRetry,
    FinalState,
    Footprint,
    FootprintSource,
    HeadroomError,
    Observation,
    ParametersAsked,
    QuotaReached,
    ReshapeTrial,
    StudySpec,
    TellTrial,
    TrialAsked,
    TrialId,
)
from scheduler.model.calls import Answer, CallStudy
from scheduler.model.parameters import PeakObservation
from scheduler.model.plain import plain
from scheduler.study import optuna_private
from scheduler.study.ask import HeldStorage, SeenStorage, Stored, begun_trial, make_sampler
from scheduler.study.choice import Choice, check_directions, check_recipe
from scheduler.study.distributions import space
from scheduler.study.live import LiveTrials
from scheduler.study.plain_storage import PlainStorage
from scheduler.study.reserved import OURS
from scheduler.study.rows import (
    LeftTrial,
    best_of,
    is_dead,
    left_trial,
    observation,
    peak_observations,
    row,
)
from scheduler.study.sampling import CUT, Fits, Functions, Sampling, predicted
from scheduler.study.siblings import beginning
from scheduler.study.transactions import (
    Begun,
    Full,
    NotOurs,
    Rdb,
    StudyUnavailable,
    check,
    clean,
    is_storage_error,
    translated,
)
from scheduler.workload.phase6a import HOW

__all__ = ["Functions", "LeftTrial", "NotOurs", "OpenedStudy", "StudyStore", "StudyUnavailable", "check"]

MAX_MISFITS = 20  # proposals in a row that fit nowhere before asking is given up
DEAD_GRACE_S = 60.0  # a driver known dead on this host: time for its own restart to settle its trials first
LEASE_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedStudy:
    """What a study holds at the start. completed: its COMPLETE trials; best: (value, number) of the best of them.

    left: this run's RUNNING trials, to be settled before the first ask.
    """

    spec: StudySpec
    counted: int
    completed: int
    architectures: Sequence[Mapping[str, Any]]
    observations: Sequence[Observation] = ()
    peaks: Sequence[PeakObservation] = ()
    left: Sequence[LeftTrial] = ()
    best: tuple[float, int] | None = None
    waiting: int = 0
    running_elsewhere: int = 0
    notes: Sequence[str] = ()


@dataclass(slots=True, kw_only=True)
class _Open:
    spec: StudySpec
    id: int
    study: optuna.Study
    architectures: list[dict[str, Any]]
    live: LiveTrials | None = None  # of a study whose trials ask while they run
    fits: Fits = field(default_factory=Fits)
    distributions: dict[str, BaseDistribution] = field(default_factory=dict)  # of its parameters, as first drawn
    delivered: set[int] = field(default_factory=set)  # numbers of trials that `ask` has returned
    told: set[int] = field(default_factory=set)  # of these, those that this driver has given a final state
    leases_seen: dict[str, tuple[Any, float]] = field(default_factory=dict)  # run -> (lease, since when it is so)

    @property
    def as_stored(self) -> Stored:
        return Stored(id=self.id, directions=self.study.directions)


def _history(begun: Begun) -> dict[str, Any]:
    """Return what earlier attempts of the trial have left, as fields of TrialAsked."""
    attrs = begun.attrs
    return {
        "attempt": attrs.get("attempt", 1),
        "resume_from": attrs.get("resume_from"),
        "resume_host": attrs.get("resume_host"),
        "retries": attrs.get("retries", 0),
        "ran_s": attrs.get("ran_s", 0.0),
    }


class StudyStore:
    """All studies of one driver. Operations raise StudyUnavailable while the storage is; each may be repeated.

    owner: this driver process, unique. run: this run folder, unique among all that share the storage and the same
    after a restart. folder: the run's folder, for a driver that takes over. lease_s: how long another driver's lease
    must stand still (by this host's monotonic clock, so that wrong clocks do not matter) before it counts as gone.
    warm_start: how many of the best trials of a finished study nearby a new study runs first.
    begin_with: parameters of the first trial of a new study, and the checkpoint that it goes on from, or None.
    choice: sampler, pruner and the user's own sizes of studies whose trials ask while they run. storage: instead of the
    database at `url`.
    """

    def __init__(
        self,
        url: str,
        *,
        owner: str,
        run: str,
        functions: Functions,
        seed: int = 0,
        pruner: str = "median",
        warm_start: int = 0,
        begin_with: tuple[Mapping[str, Any], str | None] | None = None,
        choice: Choice | None = None,
        storage: PlainStorage | None = None,
        folder: str | os.PathLike[str] | None = None,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url, self.owner, self.run, self.functions = url, owner, run, functions
        self.lease_s = lease_s
        self._seed, self._pruner, self._warm_start, self._clock = seed, pruner, warm_start, clock
        self._begin_with = begin_with
        self._choice = choice or Choice()
        if choice is None:
            make_pruner(pruner)  # an unknown name is an error now, not at the first study
        self._folder = None if folder is None else str(Path(folder).absolute())
        self._rdb: Rdb | None = None
        self._plain = storage
        self._cached: Any = None
        self._open: dict[str, _Open] = {}

    # -- opening ----------------------------------------------------------------------------------------------------

    def open(self, spec: StudySpec, candidates: Sequence[Mapping[str, Any]] = ()) -> OpenedStudy:
        """Create the study or load it. Its list of architectures is kept as it was created."""
        with translated():
            rdb = self._connect()
            study = optuna.create_study(
                study_name=spec.name,
                storage=self._cached,
                directions=[StudyDirection[direction.upper()] for direction in spec.directions],
                load_if_exists=True,
                # One each: Hyperband keeps its brackets in it.
                pruner=self._choice.pruner() if spec.define_by_run else make_pruner(self._pruner),
            )
            check_directions(study, spec)
            study_id = self._cached.get_study_id_from_name(spec.name)
            notes = []
            given = [clean(architecture) for architecture in candidates]
            architectures = rdb.remember(study_id, "architectures", given)
            if architectures != given and given:
                notes.append(
                    f"{spec.name} keeps the {len(architectures)} architectures it was created with; "
                    f"the present list of {len(given)} differs: use another --name for it"
                )
            context = rdb.remember(study_id, "context", clean(spec.context))
            check_recipe(spec, context)
            changed = sorted(k for k, v in clean(spec.context).items() if k not in HOW and context.get(k, v) != v)
            if changed:
                notes.append(f"{spec.name} was created with other values of {', '.join(changed)}: results are mixed")
            rdb.remember(study_id, "headroom", {**spec.shown.labels, "version": 1})
            notes += self._begin_given(spec, study_id) + self._begin_warm(spec, study_id, study, architectures)
            opened = _Open(spec=spec, id=study_id, study=study, architectures=architectures)
            if spec.define_by_run:
                study.sampler = self._choice.sampler(spec.name, len(study.get_trials(deepcopy=False)))
                opened.live = LiveTrials(study, self._cached)
            if spec.name in self._open:  # opened again: what was asked stays asked
                opened.delivered, opened.told = self._open[spec.name].delivered, self._open[spec.name].told
                opened.live = self._open[spec.name].live
            self._open[spec.name] = opened
            self._renew(opened)
            trials = study.get_trials(deepcopy=False)
            running = [t for t in trials if t.state is TrialState.RUNNING and "run" in t.user_attrs]
            return OpenedStudy(
                spec=spec,
                counted=rdb.counted(study_id),
                completed=sum(t.state is TrialState.COMPLETE for t in trials),
                architectures=architectures,
                observations=[o for o in map(observation, trials) if o is not None],
                peaks=peak_observations(trials),
                left=[
                    left_trial(spec.name, t, self._folder)
                    for t in running
                    if t.user_attrs["run"] == self.run and t.user_attrs["owner"] != self.owner
                ],
                best=best_of(spec, trials),
                waiting=sum(t.state is TrialState.WAITING for t in trials),
                running_elsewhere=sum(t.user_attrs["run"] != self.run for t in running),
                notes=notes,
            )

    def _begin_given(self, spec: StudySpec, study_id: int) -> list[str]:
        """Queue the trial that the user wants first in a study without any."""
        if self._begin_with is None:
            return []
        params, checkpoint = self._begin_with
        attrs = {} if checkpoint is None else {"resume_from": checkpoint}
        if not self._connect().enqueue_first(study_id, [(params, attrs)]):
            return []
        return [f"{spec.name} begins with the given parameters" + ("" if checkpoint is None else f" from {checkpoint}")]

    def _begin_warm(
        self, spec: StudySpec, study_id: int, study: optuna.Study, architectures: Sequence[Mapping[str, Any]]
    ) -> list[str]:
        """Queue a finished sibling's best in a study without any trial; a note for the user when that was done."""
        if not self._warm_start or study.get_trials(deepcopy=False):
            return []
        found = beginning(self._cached, replace(spec, context=clean(spec.context)), architectures, self._warm_start)
        if found is None:
            return []
        queue = [(fixed, {"warm_start": f"{found.study}/{number}"}) for number, fixed in found.trials]
        if not self._connect().enqueue_first(study_id, queue):
            return []
        return [f"{spec.name} begins with the best {len(queue)} trials of {found.study} (warm_start)"]

    def _connect(self) -> Rdb:
        if self._plain is not None:
            self._rdb, self._cached = cast(Rdb, self._plain), self._plain.storage  # the same operations
        if self._rdb is None:
            rdb = Rdb(self.url)
            self._rdb, self._cached = rdb, optuna.storages.get_storage(rdb.storage)
        return self._rdb

    def close(self) -> None:
        """Give the connections back; the leases run out by themselves."""
        if self._rdb is not None:
            self._rdb.close()
            self._rdb, self._cached = None, None

    @property
    def file(self) -> Pinned | None:
        """The SQLite file that is open; None for a server, and before the first study was opened."""
        return None if self._rdb is None else self._rdb.file

    def rescue(self, target: Path) -> None:
        """Write all that the SQLite database holds to a new file, also when its own was removed. Raises OSError."""
        self._connect().rescue(target)

    # -- asking -----------------------------------------------------------------------------------------------------

    def ask(self, command: AskTrial) -> TrialAsked | QuotaReached | None:
        """Sample the next trial; waiting retries come first. None: others run what is left of the quota, ask later.

        Only architectures that fit are proposed. What fits nowhere all the same is told PRUNED with a constraint and
        does not count. Raises HeadroomError when no architecture fits, and what the user's sampler raises.
        """
        opened, rdb = self._open[command.study], self._connect()
        fitting: Sequence[Mapping[str, Any]] | None = None
        for _ in range(MAX_MISFITS):
            begun = rdb.begin(
                opened.id,
                run=self.run,
                owner=self.owner,
                quota=opened.spec.quota,
                delivered=opened.delivered,
            )
            if isinstance(begun, Full):
                full = begun.counted >= opened.spec.quota
                return QuotaReached(study=command.study, completed=rdb.completed(opened.id)) if full else None
            try:
                with translated():
                    if opened.live is not None:
                        asked = self._begin_live(opened, opened.live, begun)
                    else:
                        asked = self._sample(opened, begun, command, fitting)
            except optuna.exceptions.UpdateFinishedTrialError as error:
                raise NotOurs(str(error)) from error
            except Exception as error:
                if is_storage_error(error) or isinstance(error, NotOurs):
                    raise  # the trial is not yet delivered: the next call goes on with it
                if not hasattr(error, "needed_bytes"):
                    self._tell_ask_failed(opened, begun, error)
                    raise
                fitting = self._reject(opened, begun, command, error)
            else:
                opened.delivered.add(begun.number)
                return asked
        raise HeadroomError(f"{MAX_MISFITS} proposals in a row do not fit {command.limit_bytes} bytes")

    def _begin_live(self, opened: _Open, trials: LiveTrials, begun: Begun) -> TrialAsked:
        """Begin the trial, with what it will ask as far as that is known."""
        live, ahead = trials.begin(begun)
        params = dict(live.trial.params)
        given = self._choice.memory(params)
        attrs = {
            "asked_unix": time.time(),
            "attempt": begun.attrs.get("attempt", 1),
            "footprint.predicted_bytes": given,
        }
        assert self._rdb is not None
        self._rdb.annotate(opened.id, begun.number, self.run, {k: v for k, v in attrs.items() if v is not None})
        footprint = Footprint.unknown()
        return TrialAsked(
            trial=TrialId(opened.spec.name, begun.number),
            params=params,
            footprint=footprint if given is None else Footprint(host_bytes=given, source=FootprintSource.GIVEN),
            family=f"objective/{opened.spec.name}",
            **_history(begun),
            space=space(live.trial.distributions),
            ahead={
                "params": ahead,
                "number": begun.number,
                "study": opened.spec.name,
                "directions": list(opened.spec.directions),
                "study_attrs": opened.study.user_attrs,
                "user_attrs": {k: v for k, v in live.trial.user_attrs.items() if k not in OURS},
                "began": None if (at := live.trial.datetime_start) is None else at.isoformat(),
            },
        )

    def call(self, command: CallStudy) -> tuple[Answer, Sequence[ParametersAsked]]:
        """Answer a trial that runs. Raises NotOurs when it is no longer this driver's to run."""
        trial = command.attempt.trial
        opened = self._open[trial.study]
        assert opened.live is not None
        try:
            with translated():
                body = opened.live.answer(trial.number, command.method, command.arguments)
        except optuna.exceptions.UpdateFinishedTrialError as error:
            raise NotOurs(str(error)) from error
        answer = Answer(attempt=command.attempt, number=command.number, body=body)
        live = opened.live.get(trial.number)
        if command.method != "suggest" or live is None:
            return answer, []
        found = live.trial
        return answer, [
            ParametersAsked(attempt=command.attempt, params=plain(dict(found.params)), space=space(found.distributions))
        ]

    def _sample(
        self, opened: _Open, begun: Begun, command: AskTrial, fitting: Sequence[Mapping[str, Any]] | None
    ) -> TrialAsked:
        # Seeded by the trial's number: a restart or a second driver with the same seed does not repeat proposals, and
        # the same study gives the same ones.
        seed = zlib.crc32(f"{self._seed}/{opened.spec.name}/{begun.number}".encode())
        asking = Sampling.of(self.functions, opened.spec.context, command, opened.fits)
        if fitting is None:
            fitting = asking.fitting(opened.architectures)
        held = HeldStorage(self._cached, begun, opened.as_stored, opened.distributions)
        try:
            return self._draw(opened, begun, asking, fitting, make_sampler(seed, fitting), held)
        except Exception as error:
            if not is_storage_error(error):  # the sampler is to know what it was that failed, or did not fit
                self._connect().annotate(opened.id, begun.number, self.run, {}, held.drawn)
            raise

    def _draw(
        self,
        opened: _Open,
        begun: Begun,
        asking: Sampling,
        fitting: Sequence[Mapping[str, Any]],
        sampler: optuna.samplers.BaseSampler,
        held: HeldStorage,
    ) -> TrialAsked:
        pruner = opened.study.pruner
        trial = begun_trial(opened.spec.name, self._cached, begun, sampler=sampler, pruner=pruner, seen=held)
        previous = begun.attrs.get("micro_batch")

        def fit(params: Mapping[str, Any]) -> int | None:
            fits = asking.micro_batch(params)
            # A resumed training keeps its micro-batch where it can: only then are its losses the same to the bit.
            return min(fits, previous) if fits and previous else fits

        asked = asking.form(trial, opened.architectures, fit)
        is_resumed = previous is not None or "resume_from" in begun.attrs
        smaller = () if is_resumed else asking.smaller(asked, trial, opened.architectures)
        params, family = asked.params, asking.family(asked.params)
        epochs = params.get("epochs")
        limit = asking.context.get("max_epochs")
        # The architecture is in the attributes of every study, whatever it was searched by.
        shown = opened.architectures[0] if opened.architectures else {}
        attrs = {
            **{key: value for key, value in params.items() if key in shown or trial.params.get(key) != value},
            "asked_unix": time.time(),
            "attempt": begun.attrs.get("attempt", 1),
            **predicted(asked.footprint),
            "footprint.family": family,
        }
        self._connect().annotate(opened.id, begun.number, self.run, attrs, held.drawn)
        return TrialAsked(
            trial=TrialId(opened.spec.name, begun.number),
            params=params,
            footprint=asked.footprint,
            family=family,
            smaller=smaller,
            **_history(begun),
            max_epochs=min((e for e in (epochs, limit) if e), default=None),
            space=space(trial.distributions),
        )

    def reshape(self, command: ReshapeTrial) -> None:
        """Keep the parameters that the trial will run with. Raises NotOurs when it is no longer this driver's."""
        opened, form = self._open[command.trial.study], command.form
        attrs = {key: value for key, value in form.params.items() if key in CUT} | predicted(form.footprint)
        self._connect().annotate(opened.id, command.trial.number, self.run, attrs)

    def _reject(
        self, opened: _Open, begun: Begun, command: AskTrial, misfit: Any
    ) -> Sequence[Mapping[str, Any]] | None:
        """Tell the sampler that this proposal is infeasible; return the architectures that do fit with the rest of it,
        None where the study has no list of them."""
        needed, params = int(misfit.needed_bytes), dict(getattr(misfit, "params", {}))
        attrs = {
            **params,
            "stop_reason": "does_not_fit",
            "does_not_fit.needed_bytes": needed,
            "does_not_fit.limit_bytes": command.limit_bytes,
        }
        excess = max(needed / max(command.limit_bytes, 1) - 1, 1e-3)
        assert self._rdb is not None
        self._rdb.finish(opened.id, begun.number, self.run, TrialState.PRUNED, (), attrs, excess)
        if not opened.architectures:
            return None
        fitting = Sampling.of(self.functions, opened.spec.context, command).fitting(opened.architectures, params)
        if not fitting:
            raise HeadroomError(
                f"none of the {len(opened.architectures)} architectures of {opened.spec.name} fits "
                f"{command.limit_bytes / 2**30:.2f} GiB: raise --memory-budget or leave this budget out"
            )
        return fitting

    def _tell_ask_failed(self, opened: _Open, begun: Begun, error: Exception) -> None:
        attrs = {"stop_reason": "ask_failed", "error": f"{type(error).__name__}: {error}"}
        assert self._rdb is not None
        self._rdb.finish(opened.id, begun.number, self.run, TrialState.FAIL, (), attrs, None)

    # -- the course of a trial --------------------------------------------------------------------------------------

    def report(self, attempt: AttemptId, values: Mapping[int, float]) -> bool:
        """Write intermediate values, step -> value; True when the pruner, after the last of them, wants it stopped.

        Raises NotOurs when the trial is no longer this driver's to run.
        """
        opened, rdb = self._open[attempt.trial.study], self._connect()
        if opened.live is not None:
            with translated():
                opened.live.report(attempt.trial.number, values)
            return False  # such a trial asks itself whether it is to be pruned
        begun = rdb.report(opened.id, attempt.trial.number, self.run, values)
        pruner, sampler = opened.study.pruner, opened.study.sampler
        if isinstance(pruner, optuna.pruners.NopPruner):
            return False
        with translated():
            seen = SeenStorage(self._cached, begun, opened.as_stored)
            study = optuna.load_study(study_name=opened.spec.name, storage=seen, sampler=sampler, pruner=pruner)
            return bool(pruner.prune(study, seen.own))

    def tell(self, command: TellTrial, *, left: LeftTrial | None = None) -> FinalState:
        """Attributes, then the final state, in one transaction. Returns the state that stands: an earlier one wins.

        left: the trial is another run's and this is a takeover. Raises NotOurs when it may not be touched, or another
        driver has queued it again.
        """
        opened, state, value, attrs = self._open[command.trial.study], command.state, command.value, command.attrs
        if state is FinalState.COMPLETE and (value is None or math.isnan(value)):
            state, attrs = FinalState.FAIL, {**attrs, "stop_reason": "no_value", "error": f"the result was {value}"}
        values = command.values or (() if value is None else (value,))
        if opened.live is not None:
            with translated():
                self._after(opened, command.trial.number, TrialState[state.value], values)
            live = opened.live.get(command.trial.number)
            if live is not None:  # what the objective has said of its trial stands, under whatever name
                attrs = {key: value for key, value in attrs.items() if key not in live.named}
        stands = self._connect().finish(
            opened.id,
            command.trial.number,
            self.run if left is None else left.run,
            TrialState[state.value],
            values,
            attrs,
            command.constraint,
            None if left is None else left.lease,
        )
        opened.told.add(command.trial.number)
        if opened.live is not None:
            with translated():
                opened.live.end(command.trial.number)
        return FinalState(stands.name)

    @staticmethod
    def _after(opened: _Open, number: int, state: TrialState, values: Sequence[float]) -> None:
        """As `Study.tell` does before the state is written: samplers keep constraints, and look for the end, there."""
        study = opened.study
        trial = study.get_trials(deepcopy=False)[number]
        if not trial.state.is_finished():
            optuna_private.allow_stop(study)
            study.sampler.after_trial(study, trial, state, list(values) or None)

    def is_stopped(self, study: str) -> bool:
        """Whether somebody has called `Study.stop` (a sampler that has tried everything, say)."""
        return optuna_private.is_stopped(self._open[study].study)

    def enqueue_retry(self, command: EnqueueRetry, *, left: LeftTrial | None = None) -> int | None:
        """Queue the trial again as attempt `command.attempt` and tell it FAIL (attribute `retried`: its successor).

        Returns the successor's number, None when the trial has ended otherwise.
        """
        opened, rdb = self._open[command.trial.study], self._connect()
        with translated():
            attrs = rdb.frozen(opened.id, command.trial.number).user_attrs
        successor = {
            "attempt": command.attempt,
            "retries": command.retries,
            "ran_s": round(command.ran_s, 3) or None,
            "resume_from": command.resume_from,
            "resume_host": command.resume_host,
            "micro_batch": attrs.get("micro_batch") if command.resume_from else None,
        }
        successor_number = rdb.requeue(
            opened.id,
            command.trial.number,
            self.run if left is None else left.run,
            attrs={"stop_reason": command.reason, **command.attrs, "retry_reason": command.reason},
            successor_attrs={key: value for key, value in successor.items() if value is not None},
            lease=None if left is None else left.lease,
        )
        opened.told.add(command.trial.number)
        return successor_number

    # -- leases -----------------------------------------------------------------------------------------------------

    def renew(self) -> None:
        """Say in every study that this driver lives; to be called several times within `lease_s`."""
        for opened in list(self._open.values()):
            self._renew(opened)

    def taken(self) -> list[TrialId]:
        """Trials that this driver was given and somebody else has finished; each is told once."""
        found = []
        for name, opened in list(self._open.items()):
            gone = self._connect().finished(opened.id, opened.delivered - opened.told)
            opened.told |= gone
            found += [TrialId(name, number) for number in sorted(gone)]
        return found

    def _renew(self, opened: _Open) -> None:
        lease = {
            "owner": self.owner,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "boot_id": boot_id(),
            "unix": round(time.time(), 3),
            "folder": self._folder,
        }
        self._connect().set_study_attr(opened.id, f"driver.{self.run}", lease)

    def expired(self) -> list[LeftTrial]:
        """List RUNNING trials of other runs whose driver's lease has stood still for too long, to be taken over."""
        found: list[LeftTrial] = []
        now = self._clock()
        for name, opened in list(self._open.items()):
            with translated():
                trials = opened.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            others = [t for t in trials if t.user_attrs.get("run", self.run) != self.run]
            attrs = self._connect().study_attrs(opened.id) if others else {}
            for trial in others:
                run = trial.user_attrs["run"]
                key = f"driver.{run}"
                lease = attrs.get(key)
                seen, since = opened.leases_seen.get(run, (lease, now))
                if seen != lease:
                    since = now
                opened.leases_seen[run] = (lease, since)
                limit = min(DEAD_GRACE_S, self.lease_s) if is_dead(lease) else self.lease_s
                if now - since >= limit:
                    folder = lease.get("folder") if lease else None
                    found.append(left_trial(name, trial, folder, (key, lease)))
        return found

    # -- reading ----------------------------------------------------------------------------------------------------

    def rows(self, study: str) -> list[dict[str, Any]]:
        """One mapping per trial, for results.csv: number, state, value, times, parameters, attributes."""
        with translated():
            return [row(trial) for trial in self._open[study].study.get_trials(deepcopy=False)]

    def best(self, study: str) -> dict[str, Any] | None:
        """Return the row of the COMPLETE trial with the smallest value; None while there is none."""
        complete = [r for r in self.rows(study) if r["state"] == FinalState.COMPLETE.value]
        return min(complete, key=lambda r: (r["value"], r["number"]), default=None)


def make_pruner(name: str) -> optuna.pruners.BasePruner:
    """`median`, `hyperband` or `none`; steps are epochs from 1."""
    match name:
        case "median":
            return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=3)
        case "hyperband":
            return optuna.pruners.HyperbandPruner()
        case "none":
            return optuna.pruners.NopPruner()
    raise HeadroomError(f"unknown pruner {name!r}: choose median, hyperband or none")

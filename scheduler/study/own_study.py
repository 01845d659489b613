"""The study of a program that calls `optimize`: what a run must know of it, and its callbacks.

Covers which storage it has, its sampler and pruner, how many of its trials count, and what ended it. Runs nothing.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import importlib
import io
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import cloudpickle
import optuna
from optuna.trial import FrozenTrial, TrialState

from scheduler.files.private import opener
from scheduler.model import UsageError
from scheduler.settings.command import PICKLE_FILE, PICKLED
from scheduler.study import optuna_private, verbosity
from scheduler.study.choice import Choice
from scheduler.study.plain_storage import PlainStorage
from scheduler.study.transactions import Rdb, sqlite_path
from scheduler.workload import objective as objective_workload

Study: TypeAlias = optuna.Study
Trial: TypeAlias = optuna.Trial
Callback: TypeAlias = Callable[[Study, FrozenTrial], None]


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # not typed
    """Modules of a class of their own (`optuna.integration`, and what else is imported late) travel by name, too."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, ModuleType) and type(obj) is not ModuleType and obj.__name__ in sys.modules:
            return importlib.import_module, (obj.__name__,)
        return super().reducer_override(obj)


def _dumps(value: Any) -> bytes:
    with io.BytesIO() as file:
        _Pickler(file).dump(value)
        return file.getvalue()


class OwnStudy:
    """url: of its database; None where its storage is another one, `storage`. raised: what a callback raised."""

    def __init__(self, study: Study, callbacks: Sequence[Callback], caught: tuple[type[Exception], ...]) -> None:
        self._study, self._callbacks, self._caught = study, callbacks, caught
        backend, url = optuna_private.storage_of(study)
        is_memory = url is not None and url.startswith("sqlite") and sqlite_path(url) is None
        self.url = None if is_memory else url
        self.storage = PlainStorage(backend) if self.url is None else None
        self.name = study.study_name
        self.directions = tuple(direction.name.lower() for direction in study.directions)
        self.raised: BaseException | None = None
        self._first = len(study.get_trials(deepcopy=False))
        optuna_private.begin_loop(study)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Optuna's own log lines say what ours say."""
        try:
            with verbosity.quiet():
                yield
        finally:
            optuna_private.end_loop(self._study)

    def pickled(self, objective: Callable[..., Any], folder: Path | None) -> str:
        """Pickle the function, with what it may raise, for `study.objective`: into the folder, or as text.

        Raises UsageError when it cannot be pickled.
        """
        try:
            function = _dumps((objective, self._caught))
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UsageError(f"objective cannot be pickled ({why}); open inside it what cannot travel") from error
        # Modules beside the caller's script travel by name: a trial looks for them where this process has found them.
        data = pickle.dumps(([os.path.abspath(place) for place in sys.path], function))
        if folder is None:
            return PICKLED + base64.b64encode(data).decode()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / "objective.pkl"
        with open(path, "wb", opener=opener) as file:
            file.write(data)
        return f"{PICKLE_FILE}{path}"

    def counted(self) -> int:
        """Trials that count towards a quota now."""
        found = self.storage or Rdb(str(self.url))
        try:
            return found.counted(found.storage.get_study_id_from_name(self.name))
        finally:
            if isinstance(found, Rdb):
                found.close()

    def choice(self, memory: int | str | Callable[[Mapping[str, Any]], int | str] | None) -> Choice:
        """Its own sampler and pruner, and the caller's sizes: as the settings have them, or their function.

        Raises UsageError.
        """
        study = self._study
        if callable(memory):
            given = objective_workload.sized_by(memory, getattr(memory, "__name__", "memory"))
        else:
            given = objective_workload.memory(memory)
        return Choice(sampler=lambda name, trials: study.sampler, pruner=lambda: study.pruner, memory=given)

    def on_end(self, number: int) -> bool:
        """Call the callbacks for a trial that has ended; True when one of them has stopped the study, or raised."""
        trial = self._study.get_trials(deepcopy=False)[number]
        if "retried" in trial.user_attrs:
            return False
        for callback in self._callbacks:
            try:
                callback(self._study, copy.deepcopy(trial))
            except BaseException as error:  # as `study.optimize` would, once what runs has ended
                self.raised = self.raised or error
                return True
        return optuna_private.is_stopped(self._study)

    def failure(self) -> str | None:
        """Return what the last trial of this call that failed has said, with its traceback; None where none has."""
        for trial in reversed(self._study.get_trials(deepcopy=False)[self._first :]):
            if trial.state is TrialState.FAIL and "retried" not in trial.user_attrs:
                said = trial.user_attrs.get("traceback") or ""
                return f"trial {trial.number} failed: {trial.user_attrs.get('error')}\n{said}".rstrip()
        return None

    def has_ended(self) -> bool:
        """Whether there is nothing of this call under way: exit codes that say less are of no interest to a caller."""
        trials = self._study.get_trials(deepcopy=False)[self._first :]
        return bool(trials) and all(trial.state.is_finished() for trial in trials)

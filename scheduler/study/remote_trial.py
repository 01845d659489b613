"""The trial as the objective sees it, in the trial's own process: Optuna's API, answered by the driver.

Covers `RemoteTrial`, which is an `optuna.trial.BaseTrial`, and what can be had of its study (`RemoteStudy`). What the
driver sent ahead is answered here, and told; everything else is a call through the pipe. Holds no database, and knows
nothing of memory, agents or attempts.
"""

from __future__ import annotations

import base64
import builtins
import copy
import json
import pickle
import warnings
from collections.abc import Container, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, Protocol

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalChoiceType,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    check_distribution_compatibility,
)
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from scheduler.study import distributions, reserved

MAX_CALL = 200_000  # characters of one call; what is longer would be cut on its way


class Pipe(Protocol):
    """What carries calls: `training.protocol.TrialProgress`."""

    def call(self, method: str, arguments: Mapping[str, Any]) -> dict[str, Any]: ...
    def tell(self, method: str, arguments: Mapping[str, Any]) -> None: ...
    def report(self, step: int, value: float) -> None: ...
    def tick(self) -> None: ...
    def leave_if_asked(self) -> None: ...


class RemoteTrial(optuna.Trial):
    """told: `TrialAsked.ahead`, what the driver sent with the task.

    A Trial by its class alone: that is what Optuna's own functions (`upload_artifact`) and other people's code ask.
    """

    def __init__(self, pipe: Pipe, told: Mapping[str, Any]) -> None:
        self._pipe, self._told = pipe, told
        self._trial_id = int(told["number"])  # what `storage` is asked with: it knows no other trial
        self.study: Any = RemoteStudy(pipe, told)
        self.storage: Any = RemoteStorage(pipe)
        self._ahead: dict[str, tuple[Any, BaseDistribution]] = {
            name: (each["value"], distributions.from_json(each["distribution"]))
            for name, each in told["params"].items()
        }
        self._params: dict[str, Any] = {}
        self._distributions: dict[str, BaseDistribution] = {}
        self._user_attrs = dict(told["user_attrs"])
        self._constraints: dict[str, float] = {}
        self._reported: set[int] = set()

    # -- asking -----------------------------------------------------------------------------------------------------

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        return float(self._suggest(name, FloatDistribution(low, high, log=log, step=step)))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        return int(self._suggest(name, IntDistribution(low, high, log=log, step=step)))

    def suggest_categorical(self, name: str, choices: Sequence[CategoricalChoiceType]) -> Any:
        return self._suggest(name, CategoricalDistribution(choices))

    def suggest_uniform(self, name: str, low: float, high: float) -> float:
        _deprecated("suggest_uniform", "suggest_float")
        return self.suggest_float(name, low, high)

    def suggest_loguniform(self, name: str, low: float, high: float) -> float:
        _deprecated("suggest_loguniform", "suggest_float(..., log=True)")
        return self.suggest_float(name, low, high, log=True)

    def suggest_discrete_uniform(self, name: str, low: float, high: float, q: float) -> float:
        _deprecated("suggest_discrete_uniform", "suggest_float(..., step=...)")
        return self.suggest_float(name, low, high, step=q)

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        self._pipe.leave_if_asked()
        if name in self._distributions:
            check_distribution_compatibility(self._distributions[name], distribution)
            return self._params[name]
        value, sent = self._ahead.get(name, (None, None))
        if sent == distribution:
            data = distributions.to_json(distribution)
            self._pipe.tell("asked", {"name": name, "value": value, "distribution": data})
        else:
            value = self._call("suggest", name=name, distribution=distributions.to_json(distribution))
            self._ahead.clear()  # it goes another way than was thought: the driver has forgotten them too
        if isinstance(distribution, CategoricalDistribution):  # the very object that the objective gave
            value = next((choice for choice in distribution.choices if _same(choice, value)), value)
        self._params[name], self._distributions[name] = value, distribution
        return value

    # -- telling ----------------------------------------------------------------------------------------------------

    def report(self, value: float, step: int) -> None:
        self._require_one_objective("report")
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"The `value` argument is of type '{type(value)}' but supposed to be a float.") from None
        try:
            at = int(step)
        except (TypeError, ValueError):
            raise TypeError(f"The `step` argument is of type '{type(step)}' but supposed to be an int.") from None
        if at < 0:
            raise ValueError(f"`step={at}` must be non-negative.")
        if at in self._reported:
            warnings.warn(f"The reported value is ignored because this `step={at}` is already reported.", stacklevel=2)
            return
        self._reported.add(at)
        if number - number == 0:  # finite
            self._pipe.report(at, number)
        else:  # a study can hold these, JSON cannot
            self._pipe.tell("report", {"step": at, "value": str(number)})
            self._pipe.tick()
        self._pipe.leave_if_asked()

    def should_prune(self) -> bool:
        self._require_one_objective("should_prune")
        return bool(self._call("should_prune"))

    def set_user_attr(self, key: str, value: Any) -> None:
        reserved.check(key)
        self._pipe.tell("set_user_attr", {"key": key, "value": _bounded(value, f"user attribute {key!r}")})
        self._user_attrs[key] = value

    def set_constraint(self, key: str, value: float) -> None:
        self._pipe.tell("set_constraint", {"key": key, "value": float(value)})
        self._constraints[key] = float(value)

    def _require_one_objective(self, method: str) -> None:
        if len(self.study.directions) > 1:
            raise NotImplementedError(f"Trial.{method} is not supported for multi-objective optimization.")

    def _call(self, method: str, **arguments: Any) -> Any:
        return answer(self._pipe, method, arguments)

    # -- what it is -------------------------------------------------------------------------------------------------

    @property
    def number(self) -> int:
        return int(self._told["number"])

    @property
    def params(self) -> dict[str, Any]:
        return copy.deepcopy(self._params)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return copy.deepcopy(self._distributions)

    @property
    def user_attrs(self) -> dict[str, Any]:
        return copy.deepcopy(self._user_attrs)

    @property
    def constraints(self) -> dict[str, float]:
        return dict(self._constraints)

    @property
    def relative_params(self) -> dict[str, Any]:
        """What was sampled before it started and is not yet asked for."""
        return {name: value for name, (value, _) in self._ahead.items() if name not in self._params}

    @property
    def datetime_start(self) -> datetime | None:
        began = self._told["began"]
        return None if began is None else datetime.fromisoformat(began)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(_has_not("trial", name))


class RemoteStudy:
    """What a trial can have of its study: names, directions and attributes at once, the rest by a call each."""

    def __init__(self, pipe: Pipe, told: Mapping[str, Any]) -> None:
        self._pipe = pipe
        self.study_name = str(told["study"])
        self.directions = [StudyDirection[name.upper()] for name in told["directions"]]
        self._user_attrs = dict(told["study_attrs"])

    @property
    def direction(self) -> StudyDirection:
        if len(self.directions) > 1:
            raise RuntimeError("A single direction cannot be retrieved from a multi-objective study.")
        return self.directions[0]

    @property
    def user_attrs(self) -> dict[str, Any]:
        return copy.deepcopy(self._user_attrs)

    @property
    def best_value(self) -> float:
        return float(self._read("best_value"))

    @property
    def best_params(self) -> dict[str, Any]:
        return dict(self._read("best_params"))

    @property
    def best_trial(self) -> FrozenTrial:
        found: FrozenTrial = self._read("best_trial")
        return found

    @property
    def best_trials(self) -> list[FrozenTrial]:
        return list(self._read("best_trials"))

    @property
    def trials(self) -> list[FrozenTrial]:
        return list(self._read("trials"))

    def get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        """Trials of these states, or all; always copies."""
        return [trial for trial in self.trials if states is None or trial.state in states]

    def set_user_attr(self, key: str, value: Any) -> None:
        """Store an attribute of the study."""
        self._pipe.tell("study_attr", {"key": key, "value": _bounded(value, f"study attribute {key!r}")})
        self._user_attrs[key] = value

    def stop(self) -> None:
        """No further trial begins; those that run go on to their end."""
        self._pipe.tell("stop", {})

    def _is_multi_objective(self) -> bool:  # what Optuna's own integrations ask
        return len(self.directions) > 1

    def _read(self, name: str) -> Any:
        data = base64.b64decode(answer(self._pipe, "study", {"name": name}))
        return pickle.loads(data)  # noqa: S301 - of the driver, whose function this process runs

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(_has_not("study", name))


class RemoteStorage:
    """What Optuna's own functions keep of a trial besides its attributes: artifacts, scores of a cross-validation."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Keep it. Raises ValueError for a key that is none of these."""
        reserved.check_system(key)
        self._pipe.tell("system_attr", {"key": key, "value": _bounded(value, f"system attribute {key!r}")})

    def get_trial_system_attrs(self, trial_id: int) -> dict[str, Any]:
        """All that the trial has."""
        return dict(answer(self._pipe, "system_attrs", {}))

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(_has_not("storage", name))


def answer(pipe: Pipe, method: str, arguments: Mapping[str, Any]) -> Any:
    """Return the value of a call; what Optuna raised is raised again here."""
    found = pipe.call(method, _bounded(arguments, method))
    if "error" not in found:
        return found["value"]
    kind = getattr(builtins, str(found.get("kind")), None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        raise kind(found["error"])
    raise RuntimeError(found["error"])


def _bounded(value: Any, what: str) -> Any:
    """Return the value as JSON holds it, if it can travel whole; arrays and numbers of numpy's as lists and numbers.

    Raises TypeError and ValueError as JSON does, ValueError for one too long.
    """
    told = json.dumps(value, default=_numbers)
    if len(told) > MAX_CALL:
        raise ValueError(f"{what} is longer than {MAX_CALL} characters; keep it in a file, and its path in the study")
    return json.loads(told)


def _numbers(value: Any) -> Any:
    """Return what numpy or torch holds in plain numbers: a study in memory takes them as they are."""
    if callable(found := getattr(value, "tolist", None)):
        return found()
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _same(choice: Any, value: Any) -> bool:
    return choice == value and isinstance(choice, bool) == isinstance(value, bool)


def _has_not(what: str, name: str) -> str:
    return (
        f"{name!r}: the {what} of an objective that Headroom runs has no such attribute (the study is in another "
        "process); what there is: suggest_*, report, should_prune, set_user_attr, set_constraint, number, params, "
        "distributions, user_attrs, datetime_start, and of the study its name, directions, trials, best_*, stop()"
    )


def _deprecated(name: str, instead: str) -> None:
    warnings.warn(f"{name} has been deprecated. Use {instead} instead.", FutureWarning, stacklevel=3)


def is_pruned(error: BaseException) -> bool:
    """Whether the objective says so that it is to be pruned."""
    return isinstance(error, optuna.TrialPruned)

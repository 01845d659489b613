"""An Optuna objective as a workload: what is checked of it before a run, and what the run needs to know of it.

Covers the settings `objective` and `memory`. The study and its plan follow from `settings` and `plan` as for any
workload; its sampler and pruner (`study.choice`), how it is run and how it is answered are the study's affair.
"""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from scheduler.host.facts import resolve_device
from scheduler.model import StudySpec, UsageError
from scheduler.model.plain import line
from scheduler.settings import command
from scheduler.settings.schema import Settings
from scheduler.units import parse_size
from scheduler.workload import functions as training_side

RUNNER_MODULE = "scheduler.study.objective"


def study(settings: Settings) -> StudySpec:
    """Return the study of an Optuna objective: all that is known of it before it is asked."""
    threads = settings.threads or 1
    return StudySpec(
        name=settings.study or settings.name,
        quota=settings.trials,
        slots=min(threads, settings.total_slots),
        directions=settings.direction,
        define_by_run=True,
        context={"device": resolve_device(settings.device), "threads": threads, "allocator": settings.heap},
    )


def meaning(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return per study what gives its trials their meaning: the function, without its file's folder, which may move."""
    function = os.path.basename(settings.objective or "")
    if (settings.objective or "").startswith("pickle"):
        function = "a function"  # handed over by a program: only that knows what it is
    elif (settings.objective or "").startswith(command.PREFIX):
        function = command.meaning(str(settings.objective))
    return {study(settings).name: {"objective": function, "direction": list(settings.direction)}}


def memory(given: int | str | None) -> Callable[[Mapping[str, Any]], int | None]:
    """Return the user's own size of a trial by its parameters: bytes for all, or what their function says of these."""
    if not isinstance(given, str):
        return lambda params: given
    return sized_by(training_side.find(given, "--memory"), given)


def sized_by(function: Callable[[Mapping[str, Any]], Any], path: str) -> Callable[[Mapping[str, Any]], int | None]:
    """Hold the function to what it promises: bytes or a text such as "3 GiB". None where it lacks a parameter.

    Raises UsageError when it returns something else, or raises anything but KeyError.
    """

    def of(params: Mapping[str, Any]) -> int | None:
        try:
            found = function(dict(params))
        except KeyError:  # of a branch that is not known yet
            return None
        except Exception as error:
            raise UsageError(f"--memory: {path} raised {type(error).__name__}: {line(error, 200)}") from error
        if isinstance(found, str):
            return parse_size(found, "--memory")
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < 2**63:
            raise UsageError(f"--memory: {path} returned {line(repr(found), 80)}: it must be bytes, or text like 3GiB")
        return int(found)

    return of


def preload(objective: str) -> tuple[str, ...]:
    """Return what a warm process imports before its trial is known: Optuna, and what the objective's file imports.

    The user's own modules are left to the trial: what they do when they are imported is theirs.
    """
    if objective.startswith(("pickle", command.PREFIX)):
        return ("optuna",)
    where, _, _ = objective.rpartition(":")
    if not where.endswith(".py"):
        found = importlib.util.find_spec(where.partition(".")[0])
        where = "" if found is None or found.origin is None or "." in where else found.origin
    try:
        tree = ast.parse(Path(where).read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return ("optuna",)
    return tuple(dict.fromkeys(["optuna", *_installed(tree.body, Path(where).parent)]))


def _installed(body: Iterable[ast.stmt], beside: Path) -> Iterable[str]:
    for statement in body:
        names: list[str] = []
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            names = [statement.module]
        for name in names:
            top = name.partition(".")[0]
            own = (beside / top).exists() or (beside / f"{top}.py").exists()
            if name != "__future__" and not own and _is_installed(top):
                yield name


def _is_installed(top: str) -> bool:
    found = importlib.util.find_spec(top)
    return found is not None and "site-packages" in str(found.origin)

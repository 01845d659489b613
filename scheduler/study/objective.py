"""Runs an Optuna objective in a trial process: `run(task, progress)`, called as any other training function is.

Covers finding the function (a file and a name, a module and a name, or a pickle), its trial, and what it returned or
raised in the words of a result. `--check=FUNCTION` as an argument only finds it, and says on stderr why it cannot.
"""

from __future__ import annotations

import base64
import difflib
import importlib
import importlib.util
import inspect
import math
import os
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scheduler import attempt
from scheduler.model import HeadroomError, Json
from scheduler.model.plain import line
from scheduler.settings.command import PICKLE_FILE, PICKLED
from scheduler.settings.command import PREFIX as COMMAND

Objective = Callable[[Any], Any]


class NotImported(HeadroomError):
    """The objective is not to be had: no trial has begun, and none is to blame."""

    not_started = True


def run(task: Mapping[str, Any], progress: Any) -> Json:
    """Call the task's function with a trial of its own; the result has `values`, or says that it is pruned."""
    function, caught = load(task["function"])
    from scheduler.study.remote_trial import RemoteTrial, is_pruned  # Optuna: only trials of this kind need it

    attempt.begin(task, progress)
    trial = RemoteTrial(progress, task["ahead"])
    try:
        found = function(trial)
    except Exception as error:
        if is_pruned(error):
            return {"values": [], "stop_reason": "pruned"}
        error.ends_study = not isinstance(error, caught)  # type: ignore[attr-defined]  # read by `training.objective`
        raise
    return {"values": [str(value) for value in checked(found, len(trial.study.directions))]}


def checked(found: Any, objectives: int) -> list[float]:
    """Return the values, as many as there are directions, none of them NaN. Raises ValueError in Optuna's words."""
    given = list(found) if isinstance(found, Sequence) and not isinstance(found, str | bytes) else [found]
    values = []
    for value in given:
        try:
            values.append(float(value))
        except (TypeError, ValueError):
            raise ValueError(f"The value {line(repr(value), 80)} could not be cast to float") from None
        if math.isnan(values[-1]):
            raise ValueError(f"The value {value} is not acceptable")
    if len(values) != objectives:
        raise ValueError(
            f"The number of the values {len(values)} did not match the number of the objectives {objectives}"
        )
    return values


# -- finding it -----------------------------------------------------------------------------------------------------


def load(function: str) -> tuple[Objective, tuple[type[BaseException], ...]]:
    """Import the objective: (the function, the errors that do not end its study).

    Raises NotImported, whatever its module raises.
    """
    try:
        if function.startswith((PICKLE_FILE, PICKLED)):
            return _unpickled(function)
        if function.startswith(COMMAND):
            from scheduler.study import command

            return command.objective(function.removeprefix(COMMAND)), (Exception,)
        found = _named(function)
        if not callable(found):
            raise TypeError(f"it is a {type(found).__name__}, not a function")
        _require_one_argument(found)
    except BaseException as error:  # a module may do anything when it is imported, sys.exit() too
        raise NotImported(
            f"objective {shown(function)!r} cannot be used: {type(error).__name__}: {line(error, 300)}"
        ) from error
    return found, (Exception,)


def _unpickled(function: str) -> tuple[Objective, tuple[type[BaseException], ...]]:
    import cloudpickle

    if function.startswith(PICKLE_FILE):
        data = Path(function.removeprefix(PICKLE_FILE)).read_bytes()
    else:
        data = base64.b64decode(function.removeprefix(PICKLED))
    places, pickled = pickle.loads(data)  # noqa: S301 - of the program that started this run, like the function itself
    sys.path += [place for place in places if place not in sys.path]
    found, caught = cloudpickle.loads(pickled)
    return found, tuple(caught)


def _named(function: str) -> Any:
    where, _, name = function.rpartition(":")
    if not where or not name:
        raise ValueError("write FILE.py:NAME or package.module:NAME")
    found: Any = _file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, vars(found), n=1)
            raise AttributeError(f"{where} has no {part!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        found = getattr(found, part)
    return found


def _file(path: Path) -> Any:
    """Import the file as a module; what lies beside it can be imported, as when it is started."""
    path = path.absolute()
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    name = path.stem if path.stem.isidentifier() and path.stem not in sys.modules else f"objective_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    sys.path.insert(0, os.fspath(path.parent))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where pickle looks for its classes
    spec.loader.exec_module(module)
    return module


def _require_one_argument(found: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(found)
    except ValueError:  # one written in C does not tell
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise TypeError(f"it must take one argument, the trial ({error}); it is {signature}") from None


def shown(function: str) -> str:
    """Return the function as a user knows it."""
    return "the given function" if function.startswith((PICKLE_FILE, PICKLED)) else function


def main() -> int:
    """`--check=FUNCTION` (`-`: it is on stdin): 0, or 1 with one line on stderr."""
    for argument in sys.argv[1:]:
        if argument.startswith("--check="):
            function = argument.removeprefix("--check=")
            try:
                load(sys.stdin.read() if function == "-" else function)
            except NotImported as error:
                print(line(error), file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    os._exit(main())  # what an import has started must not keep it

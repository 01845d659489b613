"""The training side's functions, found by dotted path and held to what they promise.

Whatever one of them raises or wrongly returns is one line (`UsageError`): the setting, the function, the place, what it
was asked, the fix. Covers finding them and checking answers; what is done with these is `plan`'s and the study's. The
objective is not among them: it may import torch, so only the trial process looks for it.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from scheduler.model import HeadroomError, UsageError
from scheduler.settings.schema import Settings, Training

Function = Callable[..., Any]

# What each must look like, and what to do when it goes wrong.
SIGNATURES = {
    "candidates": "candidates(context) -> list of mappings",
    "estimate": "estimate(params, context) -> {'host_bytes': bytes, ...}",
    "micro_batch": "micro_batch(params, context, limit_bytes, device_limit_bytes=, target_effective_batch=) -> whole "
    "number or None",
    "check_data": "check_data(path, horizon) -> facts or None",
    "sample": "sample(trial, context, architectures, fit) -> mapping",
}
BARE = "it is asked about bare candidates, too: what they lack needs a default, as params.get(name, default)"
FIXES = {"estimate": BARE, "micro_batch": BARE}
LARGEST = 2**63  # bytes and counts travel as 64-bit integers
STUDY_LIBRARIES = ("optuna", "sqlalchemy")  # what their errors say of a study's storage is not the sampler's fault
SHOWN_CHARS = 200


def load(settings: Settings) -> dict[str, TrainingFunction | None]:
    """Import the functions by their key, None where the settings have none.

    Raises UsageError for one that is not there.
    """
    paths = settings.training.functions
    paths.pop("objective")
    if settings.objective is not None:  # it asks for its parameters itself, and nobody has a formula for it
        return dict.fromkeys(paths)
    return {
        key: None if path is None else TrainingFunction(key=key, path=path, function=find(path, f"training.{key}"))
        for key, path in paths.items()
    }


def find(path: str, key: str) -> Function:
    """Import the function `package.module:function` or `FILE.py:function`. Raises UsageError naming the key."""
    module_name, _, name = path.rpartition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a user's own module usually lies where the command is started
    if module_name.endswith(".py"):
        file = os.path.abspath(module_name)
        if not os.path.isfile(file):
            raise UsageError(f"{key}: cannot find {path}: no file {file}")
        module_name = os.path.basename(file).removesuffix(".py")
        sys.path.insert(0, os.path.dirname(file))
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(f"{key}: cannot find {path} ({error}); check the spelling, or PYTHONPATH") from None
    except (Exception, SystemExit) as error:  # a module of the user's may do anything while it is imported
        raise UsageError(f"{key}: importing {module_name} {_raised(error)}; fix the module") from error
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise UsageError(f"{key}: cannot find {path} ({error}); check the spelling, or PYTHONPATH") from None
    if not callable(found):
        raise UsageError(f"{key}: {path} is not a function")
    return cast(Function, found)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFunction:
    """One of them: called like the function itself, it gives a checked answer or raises UsageError.

    Passed on as they are: our own errors, a sampler's "does not fit" (an error with `needed_bytes`), and what the
    study's libraries raise.
    """

    key: str
    path: str
    function: Function

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        try:
            found = self.function(*arguments, **named)
            if self.key == "candidates" and isinstance(found, Iterator):
                found = list(found)  # a generator raises while it is read
        except HeadroomError:
            raise
        except (Exception, SystemExit) as error:
            library = type(error).__module__.partition(".")[0]
            if hasattr(error, "needed_bytes") or (self.key == "sample" and library in STUDY_LIBRARIES):
                raise
            raise UsageError(self._fault(error, arguments)) from error
        try:
            return ANSWERS[self.key](found, self.path, arguments)
        except ValueError as error:
            wanted = SIGNATURES[self.key]
            raise UsageError(f"training.{self.key}: {self.path} {error}; it must be {wanted}") from None

    def _fault(self, error: BaseException, arguments: tuple[Any, ...]) -> str:
        if self.key == "check_data" and isinstance(error, ValueError | OSError) and str(error):
            # Its way to refuse a file. Ours writes whole lines of its own.
            built_in = self.path == Training().check_data
            return str(error) if built_in else f"training.check_data: {self.path} refuses the data: {error}"
        asked = ""
        if self.key in ("estimate", "micro_batch"):
            asked = f" for {_shown(arguments[0])}"
        elif self.key in ("candidates", "sample"):
            context = arguments[0] if self.key == "candidates" else arguments[1]
            asked = f" for budget {context.get('budget')}"
        return f"training.{self.key}: {self.path} {_raised(error)}{asked}; {self._fix(error)}"

    def _fix(self, error: BaseException) -> str:
        if isinstance(error, TypeError) and error.__traceback__ is not None and error.__traceback__.tb_next is None:
            return f"it must be {SIGNATURES[self.key]}"  # it was not entered: its arguments do not match
        if self.path == getattr(Training(), self.key):
            return (
                f"it knows the built-in model only: name a training.{self.key} of your own, or null to do without "
                "(not for sample)"
            )
        return FIXES.get(self.key, "fix the function")


# -- answers --------------------------------------------------------------------------------------------------------


def _candidates(found: Any, path: str, arguments: tuple[Any, ...]) -> list[dict[str, Any]]:
    if isinstance(found, str | bytes | Mapping) or not hasattr(found, "__iter__"):
        raise ValueError(f"returned {_shown(found)}")
    listed = list(found)
    for number, each in enumerate(listed):
        if not isinstance(each, Mapping):
            raise ValueError(f"returned a list whose entry {number} is {_shown(each)}")
    return [{str(name): _plain(value, f"entry {i}: {name}") for name, value in c.items()} for i, c in enumerate(listed)]


def _estimate(found: Any, path: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise ValueError(f"returned {_shown(found)} for {_shown(arguments[0])}")
    if "host_bytes" not in found:
        raise ValueError(f"returned no host_bytes for {_shown(arguments[0])}, only {', '.join(map(str, found))}")
    components = found.get("components") or {}
    if not isinstance(components, Mapping):
        raise ValueError(f"returned components {_shown(components)}, not a mapping of names to bytes")
    runtime_bytes = _count(found.get("runtime_bytes") or 0, "runtime_bytes", 0)
    if runtime_bytes > _count(found["host_bytes"], "host_bytes", 1):
        raise ValueError(f"returned runtime_bytes {runtime_bytes}, more than the host_bytes they are a part of")
    context = arguments[1] if len(arguments) > 1 else {}
    heap = f"{context.get('device', 'cpu')}/{context.get('allocator', 'auto')}"
    return {
        **found,
        "host_bytes": _count(found["host_bytes"], "host_bytes", 1),
        "device_bytes": _count(found.get("device_bytes") or 0, "device_bytes", 0),
        "runtime_bytes": runtime_bytes,
        "components": {str(name): _count(size, f"component {name}", 0) for name, size in components.items()},
        "family": str(found.get("family") or f"{path}/{heap}"),
    }


def _micro_batch(found: Any, path: str, arguments: tuple[Any, ...]) -> int | None:
    if found is None:
        return None
    if isinstance(found, float) and not found.is_integer():
        raise ValueError(f"returned {found} samples")
    return _count(found, "micro-batch", 1)


def _data_facts(found: Any, path: str, arguments: tuple[Any, ...]) -> dict[str, int]:
    """Return what the file tells the context: n_features, n_rows, n_columns, as far as the answer has them."""
    known = {}
    for ours, theirs in (("n_features", "n_features"), ("n_rows", "rows"), ("n_columns", "columns")):
        value = found.get(theirs) if isinstance(found, Mapping) else getattr(found, theirs, None)
        if value is not None:
            known[ours] = _count(value, theirs, 1)
    return known


def _sample(found: Any, path: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise ValueError(f"returned {_shown(found)}")
    return {str(name): _plain(value, str(name)) for name, value in found.items()}


ANSWERS: dict[str, Callable[[Any, str, tuple[Any, ...]], Any]] = {
    "candidates": _candidates,
    "estimate": _estimate,
    "micro_batch": _micro_batch,
    "check_data": _data_facts,
    "sample": _sample,
}


def _count(value: Any, what: str, least: int) -> int:
    """Return a number as whole bytes or pieces, rounded up. Raises ValueError for what is none."""
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(f"returned {what} {_shown(value)}, not a number")
    if not least <= number < LARGEST:
        raise ValueError(f"returned {what} {_shown(value)}, not a number from {least} on")
    return math.ceil(number)


def _plain(value: Any, name: str) -> Any:
    """Return the value as JSON has it: parameters travel to the trial as text. Raises ValueError."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Mapping():
            return {str(key): _plain(entry, f"{name}.{key}") for key, entry in value.items()}
        case list() | tuple():
            return [_plain(entry, name) for entry in value]
        case _ if hasattr(value, "tolist"):  # numpy's and torch's numbers and arrays
            return value.tolist()
    raise ValueError(f"returned {name} = {_shown(value)}, which JSON cannot hold")


# -- words ----------------------------------------------------------------------------------------------------------


def _raised(error: BaseException) -> str:
    """Return `raised KeyError: 'lr' (mine.py, line 12)`."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if len(frames) > 1 else ""
    return f"raised {type(error).__name__}: {' '.join(str(error).split())}{where}"


def _shown(value: Any) -> str:
    text = " ".join(repr(dict(value) if isinstance(value, Mapping) else value).split())
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."

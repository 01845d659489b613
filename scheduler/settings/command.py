"""A command line as an objective: `--command`, `--space` and `--metric`, checked and described."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Mapping
from typing import Any

from scheduler.model import UsageError

PREFIX, PICKLE_FILE, PICKLED = "command:", "pickle-file:", "pickled:"
HANDED_OVER = (PREFIX, PICKLE_FILE, PICKLED)  # how an objective begins that has no name to be found by


def describe(command: str, space: Mapping[str, Any], metric: str | None) -> str:
    """Return what `study.objective.load` takes for a function. Raises UsageError for what cannot be run.

    space: name -> {type, low, high | choices}.
    """
    if metric is None:
        raise UsageError("--command needs --metric, e.g. 'val_loss=([0-9.eE+-]+)': the value in what it writes")
    try:
        if re.compile(metric).groups != 1:
            raise UsageError(f"--metric {metric!r} must have one group, (...), which is the value")
    except re.error as error:
        raise UsageError(f"--metric {metric!r} is no regular expression: {error}") from None
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--command {command!r} cannot be read: {error}") from None
    if not words or shutil.which(words[0]) is None:
        raise UsageError(f"--command {command!r}: there is no program {words[0] if words else ''!r}")
    asked = _Names(space)
    try:
        for word in words:
            word.format_map(asked)
    except KeyError as error:
        raise UsageError(f"--command has {{{error.args[0]}}}, --space only {', '.join(space)}") from None
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise UsageError(f"--command {command!r}: {error}; write {{{{ for a brace that stays") from None
    if unused := sorted(set(space) - asked.used):
        raise UsageError(f"--space has {unused[0]}, which is nowhere in --command: write {{{unused[0]}}} there")
    # In the order of the file: trials ask in it, which is the order of the dashboard's columns, and of a grid.
    return PREFIX + json.dumps({"command": command, "space": dict(space), "metric": metric})


def meaning(described: str) -> str:
    """Return the same text for the same command and space, in whatever order the space's file has them."""
    return PREFIX + json.dumps(json.loads(described.removeprefix(PREFIX)), sort_keys=True)


class _Names(dict[str, Any]):
    """The space's names, and which of them were asked for."""

    def __init__(self, space: Mapping[str, Any]) -> None:
        super().__init__(dict.fromkeys(space, 0))
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        found = super().__getitem__(name)
        self.used.add(name)
        return found

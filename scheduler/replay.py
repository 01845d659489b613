"""`python -m scheduler.replay RUN` goes through a run again: each event it recorded is given to the brain anew.

Whatever the brain decided follows from its rules and from what it was told, and from nothing else; so the same commands
come out, and where they do not (another version of the code), the first difference is shown. Prints what was told and
what followed with `--show`.

Covers the core only: nothing is started, written or asked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scheduler.core.state import BatchState
from scheduler.driver import recording


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: 0 when everything came out the same, 1 when not, 2 for a run without a recording."""
    parser = argparse.ArgumentParser(prog="python -m scheduler.replay", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--show", action="store_true", help="print each event and its commands")
    options = parser.parse_args(arguments)
    try:
        for start in recording.read(options.run):
            if (difference := _go_through(start, show=options.show)) is not None:
                print(f"{start.path}: {difference}")
                return 1
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2
    return 0


def _go_through(start: recording.Start, *, show: bool) -> str | None:
    """Return what came out differently first, None when nothing did."""
    brain = BatchState(start.rules, studies=start.studies)
    events = orders = 0
    began: float | None = None
    for events, step in enumerate(start.steps, 1):
        began = step.at if began is None else began
        raised, commands = None, []
        try:
            commands = recording.encode(brain.handle(step.event, step.at))
        except Exception as error:
            raised = type(error).__name__
        orders += len(commands)
        if show:
            print(f"{step.at - began:10.3f} {_short(recording.encode(step.event))}")
            for command in commands:
                print(f"{'':10}   -> {_short(command)}")
        if (commands, raised) != (list(step.commands), step.raised):
            return (
                f"event {events} ({_short(recording.encode(step.event))}) led to {commands or raised}, "
                f"and in the run to {list(step.commands) or step.raised}"
            )
    print(f"{start.path}: {events} events led to {orders} commands, the same as in the run")
    return None


def _short(data: Any) -> str:
    """Return a recorded value on one line: `AttemptEnded attempt=s/0/1 outcome=...`."""
    fields = {key: value for key, value in data.items() if key != "$" and value not in (None, [], {}, "")}
    return " ".join([data["$"].partition(":")[2], *(f"{key}={_plain(value)}" for key, value in fields.items())])


def _plain(value: Any) -> str:
    match value:
        case {"$": name, "study": study, "number": number} if name.endswith(":TrialId"):
            return f"{study}/{number}"
        case {"$": name, "trial": trial, "attempt": attempt} if name.endswith(":AttemptId"):
            return f"{_plain(trial)}/{attempt}"
        case {"$enum": [_, member]}:
            return str(member).lower()
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


if __name__ == "__main__":
    sys.exit(main())

"""A script as an objective: a command with places for parameters, and an expression that finds its value.

Covers suggesting the parameters, running the command, a report for each match, and its end: exit status 0 gives the
last value, any other is a failure. It runs in the trial's process; what it takes of memory is the trial's.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import optuna

TAIL = 20  # lines of its output that a failure shows


def objective(described: str) -> Callable[[Any], float]:
    """Return the objective that `settings.command.describe` has described."""
    data = json.loads(described)
    words, space, metric = shlex.split(data["command"]), data["space"], re.compile(data["metric"])

    def run(trial: Any) -> float:
        params = {name: suggest(trial, name, each) for name, each in space.items()}
        return _run([word.format_map(params) for word in words], metric, trial)

    return run


def suggest(trial: Any, name: str, parameter: Mapping[str, Any]) -> Any:
    """Ask for a parameter of the space."""
    match parameter["type"]:
        case "categorical":
            return trial.suggest_categorical(name, parameter["choices"])
        case "int":
            return trial.suggest_int(name, int(parameter["low"]), int(parameter["high"]))
        case kind:
            return trial.suggest_float(name, parameter["low"], parameter["high"], log=kind == "log_uniform")


def _run(command: list[str], metric: re.Pattern[str], trial: Any) -> float:
    """Run it to its end. Raises TrialPruned, and RuntimeError for a status other than 0 and without a value."""
    value, step, lines = None, 0, list[str]()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    try:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)  # the trial's log
            lines = [*lines[1 - TAIL :], line]
            for match in metric.finditer(line):
                value = float(match[1])
                trial.report(value, step)
                step += 1
                if trial.should_prune():
                    raise optuna.TrialPruned
        status = process.wait()
    finally:
        process.kill()  # when it is pruned, or asked to leave; one that has ended is not there any more
        process.wait()
    if status:
        print("".join(lines), file=sys.stderr)
        last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
        raise RuntimeError(f"exit status {status}; its last line: {last}")
    if value is None:
        raise RuntimeError(f"the command wrote nothing that matches {metric.pattern!r}")
    return value

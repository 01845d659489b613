"""Completion by the shell: what `bin/schedule --completion bash|zsh|fish` prints, and which values are offered.

The work is click's: the script calls the command itself, which knows its options. Ours are the command's path, since
bin/schedule need not be on the PATH, and the values of options that have only a few.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from scheduler.cli.execution import COMPLETE
from scheduler.model import UsageError

SHELLS = ("bash", "zsh", "fish")
Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def script(command: click.Command, shell: str, program: Path) -> str:
    """Return what the shell is to evaluate. program: the command's path. Raises UsageError: not one of SHELLS."""
    found = get_completion_class(shell) if shell in SHELLS else None
    if found is None:
        raise UsageError(f"--completion {shell!r}: bash, zsh or fish")
    text = found(command, {}, program.name, COMPLETE).source()
    if shell == "bash":
        return text  # bash hands over the command as it was typed
    # The others are given its name, which need not be on the PATH.
    text = "\n".join(line for line in text.splitlines() if "$+commands" not in line) + "\n"
    for before in (f"{shell}_complete ", "(commandline -t) "):
        text = text.replace(f"{before}{program.name})", f"{before}{program})")
    return text


def values(*offered: str) -> Completer:
    """Offer these, also as the last of a list with commas."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",")
        there = before.split(",") if comma else []
        left = [each for each in offered if each.startswith(last) and each not in there]
        return [CompletionItem(before + comma + each) for each in left]

    return complete


def files(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Leave it to the shell to complete a path."""
    return [CompletionItem(incomplete, type="file")]


# Option -> how its value is completed; that of any other is the user's own word.
OFFERED: dict[str, Completer] = {
    "--budgets": values("2M", "20M", "200M", "2B"),
    "--device": values("auto", "cpu", "mps", "cuda"),
    "--direction": values("minimize", "maximize"),
    "--log-level": values("debug", "info", "warning", "error"),
    "--pruner": values("median", "hyperband", "none"),
    "--sampler": values("tpe", "random", "gp", "cmaes", "qmc", "nsgaii"),
    "--watchdog": values("on", "observe", "off"),
    **dict.fromkeys(("--data", "--objective", "--space", "--tls-ca-file", "--tls-cert", "--tls-key"), files),
}

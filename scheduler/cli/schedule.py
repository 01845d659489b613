"""The command line: arguments become Settings, Settings a plan, the plan a run; errors one line and an exit code.

Holds no decision of its own. Neither `--help` nor `--dry-run` imports torch, Dask or Optuna.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from scheduler import __version__, masking
from scheduler.cli import completion, execution, remarks, report
from scheduler.cli.execution import NOTHING_FITS, OK, STOPPED, TIMED_OUT, say
from scheduler.model import NothingFits, UsageError

if TYPE_CHECKING:
    from scheduler.settings.schema import Settings
    from scheduler.worker.importable import ToImport
    from scheduler.workload.plan import Plan


EPILOG = """\b
Examples:
  bin/schedule --budgets 2M,20M,200M,2B
      12 studies (4 budgets x horizons 1, 3, 5), 50 trials each
  bin/schedule --budgets 2M,20M --horizons 1 --trials 2 --max-epochs 2
      a first try, minutes
  bin/schedule --budgets 2M,20M,200M,2B --dry-run
      what fits, how many at once, what never fits and why; starts nothing
  bin/schedule --budgets 2M --data bars.csv --memory-budget 100GiB
      your own daily bars (open, high, low, close, volume)
  bin/schedule --experiment configs/experiments/phase6a/hpo_2M_h1.yaml
      an experiment file
  bin/schedule --budgets 2M --cluster tcp://host:8786
      on a Dask cluster that runs already

\b
The same command again resumes the run. q, Ctrl-C, SIGTERM or a file STOP in
the run folder ends it: running trials write a checkpoint and leave; a second
time ends it at once.

\b
Every key of configs/schedule.yaml can be set in a file (--config), as
HEADROOM_<KEY> in the environment, and most as an argument; arguments go
first, then the environment, then the experiment file, then the configuration.

\b
Exit codes: 0 all studies reached their quota; 1 some study closed early, was
refused or has no completed trial; 2 wrong usage or configuration; 3 nothing
can fit; 124 stopped by --timeout; 130 stopped by the user (both resume).
"""

FILE = click.Path(path_type=Path)
Command = TypeVar("Command", bound=Callable[..., Any] | click.Command)  # what an option is put on


def _argument(*names: str, key: str | None = None, **extra: Any) -> Callable[[Command], Command]:
    """Make an option that sets the settings key of the same name. Values stay text: `settings` alone knows the
    types."""
    default = () if extra.get("multiple") else None
    offered = completion.OFFERED.get(names[0])
    return click.option(*names, *([key] if key else []), default=default, shell_complete=offered, **extra)


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@_argument("--objective", metavar="FUNCTION", help="An Optuna objective: FILE.py:NAME or package.module:NAME.")
@_argument("--command", metavar="LINE", help="A script instead: 'python train.py --lr {lr}'.")
@_argument("--space", metavar="FILE", help="Its parameters: YAML, name: {type, low, high | choices}.")
@_argument("--metric", metavar="REGEX", help="Its value in what it writes: 'loss=([0-9.eE+-]+)'; the last counts.")
@_argument("--study", metavar="NAME", help="Its study (default: the run's name).")
@_argument("--direction", metavar="WAY", multiple=True, help="minimize (default) or maximize; once per value.")
@_argument("--sampler", metavar="NAME", help="tpe (default), random, gp, cmaes, qmc, nsgaii or module:function.")
@_argument("--memory", metavar="SIZE", help="What a trial takes, or module:function(params); default: learnt.")
@_argument("--budgets", metavar="LIST", help="Parameter budgets: any of 2M,20M,200M,2B (default: all).")
@_argument("--horizons", metavar="LIST", help="Days ahead that are predicted (default: 1,3,5).")
@_argument("--trials", metavar="N", help="Trials per study (default: 50).")
@_argument("--memory-budget", metavar="SIZE", help="What trials may take of each host: 90% (default) or e.g. 100GiB.")
@_argument("--slots", metavar="N", help="Single-threaded trials per worker at once (default: one per core).")
@_argument("--threads", metavar="N", help="Threads, and slots, of each trial (default: 1, more for large models).")
@_argument("--storage", metavar="URL", help="Study database (default: SQLite in the run folder).")
@_argument("--cluster", metavar="ADDRESS", help="Dask scheduler to use, tcp://host:port (default: this machine).")
@_argument("--tls-ca-file", metavar="FILE", help="For --cluster tls://host:port: PEM file of the authority.")
@_argument("--tls-cert", metavar="FILE", help="PEM file of our own certificate.")
@_argument("--tls-key", metavar="FILE", help="PEM file of its key (default: in --tls-cert).")
@_argument("--data", metavar="FILE", help="CSV or Parquet of daily bars (default: built-in S&P 500 sample).")
@_argument("--name", metavar="RUN", help="Name of the run and its folder (default: phase6a, and what differs).")
@_argument("--runs-dir", metavar="DIR", help="Where run folders are (default: runs).")
@_argument("--max-epochs", metavar="N", help="At most so many epochs per trial.")
@_argument("--max-steps", metavar="N", help="At most so many optimizer steps per trial.")
@_argument("--recipe", metavar="NAME", help="What the training is computed in (default: auto, the first that fits).")
@_argument("--pruner", metavar="NAME", help="median (default), hyperband, none; with --objective module:function too.")
@_argument("--device", metavar="NAME", help="auto (default), cpu, mps or cuda.")
@_argument("--seed", metavar="N", help="Seed of samplers and trials (default: 0).")
@_argument("--max-retries", metavar="N", help="Retries of a trial that is lost without progress (default: 3).")
@_argument("--trial-timeout", metavar="TIME", help="Longest a trial may run, e.g. 30m or 12h; then it is PRUNED.")
@_argument("--timeout", metavar="TIME", help="Longest this command may run, e.g. 8h; then it drains, resumable.")
@_argument("--watchdog", metavar="MODE", help="on (default), observe (say, never kill) or off.")
@_argument("--dashboard", metavar="ADDRESS", help="Port or host:port of the Dask dashboard (default: 8787), or off.")
@_argument("--on-kill", metavar="COMMAND", help="Called for each killed trial: HOOK_* set, JSON on stdin.")
@_argument("--on-end", metavar="COMMAND", help="Called when the run ends, likewise.")
@click.option("--config", type=FILE, metavar="FILE", help="Configuration instead of configs/schedule.yaml.")
@click.option(
    "--experiment", type=FILE, metavar="FILE", multiple=True, help="Experiment file; may be given many times."
)
@click.option("--dry-run", is_flag=True, help="Print the plan, start and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: the plan as JSON.")
@_argument("--log-level", metavar="LEVEL", help="debug, info (default), warning or error.")
@click.option("--completion", "shell", metavar="SHELL", help="Print the completion for bash, zsh or fish, and end.")
@click.version_option(__version__, prog_name="headroom")
@click.argument("files", nargs=-1, metavar="", type=FILE)
def command(
    config: Path | None,
    experiment: tuple[Path, ...],
    dry_run: bool,
    as_json: bool,
    shell: str | None,
    files: tuple[Path, ...],
    **given: Any,
) -> int:
    """Run Optuna studies in parallel on Dask, each trial only where its memory fits."""
    from scheduler.settings import load

    if shell is not None:
        click.echo(completion.script(command, shell, _program()), nl=False)
        return OK
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError("the working directory is gone: cd to one that is there") from None
    if files and not experiment:
        what = str(files[0])
        raise click.UsageError(f"unexpected argument {what!r}; name a file with --experiment, --config or --data")
    if as_json and not dry_run:
        raise click.UsageError("--json goes with --dry-run")
    # `--experiment a.yaml b.yaml`, as a shell's *.yaml gives it, means both.
    given["direction"] = ",".join(given["direction"]) or None
    settings = load.load(_parsed(given), config=config, experiments=(*experiment, *files))
    if settings.storage is not None:
        masking.learn(settings.storage)
        if given["storage"] and masking.has_secret(given["storage"]):
            say("a password among the arguments is seen by every user of this machine (ps); HEADROOM_STORAGE or "
                 "~/.pgpass is safer", 0)  # fmt: skip
    plan = make_plan(settings)
    if settings.objective is not None:
        from scheduler.study import choice

        choice.chosen(settings)
    elif settings.training.is_own:
        from scheduler.study import rehearsal

        rehearsal.rehearse(settings, plan)
    told = remarks.remarks(settings, plan)
    if dry_run:
        from scheduler.ui import report as tables

        foreseen, forecast = foresee(settings, plan)
        foreseen = [*foreseen, *told]
        tables.print_plan(plan, as_json=as_json, foreseen=foreseen, forecast=forecast)
        return OK if plan.runnable else NOTHING_FITS
    return run(settings, plan, told)


def _program() -> Path:
    """Return the command as the user called it: bin/schedule of the checkout, or the installed one."""
    own = Path(__file__).resolve().parents[2] / "bin" / "schedule"
    called = Path(sys.argv[0]).absolute()
    return own if called.suffix == ".py" and own.exists() else called


def foresee(settings: Settings, plan: Plan) -> tuple[list[str], dict[str, Any] | None]:
    """Play the plan forward with what earlier runs' trials took: in lines, and for a program. Reads journals only."""
    import random

    from scheduler.driver import history
    from scheduler.workload import makespan

    if not plan.runnable:
        return [], None
    past, counted = history.past(settings), history.counted(settings)
    found = makespan.foresee(plan, past, random.Random(0).random, counted)
    return makespan.lines(found, plan, sum(map(len, past.values())), counted), makespan.to_json(found)


def make_plan(settings: Settings) -> Plan:
    """Make the plan for the cluster's workers, or for this machine. Raises HeadroomError; writes nothing."""
    from scheduler.driver import run_folder
    from scheduler.host import facts as host_facts
    from scheduler.host import registry, runtimes
    from scheduler.workload import functions, plan, studies

    begun = run_folder.recipes(settings)
    if settings.cluster is None:
        key = runtimes.key(settings.training.preload, settings.heap, settings.training.fork)
        environment = runtimes.known(registry.host_folder(), key)
        remarks.check_device(settings)
        device = host_facts.resolve_device(settings.device)
        made = plan.make(settings, [host_facts.facts(device, settings.total_slots, environment)], begun)
        check_objective(settings)
        return made
    # The quick and usual mistakes first: functions and data, then whether anybody answers, then what the workers have.
    plan.with_data_facts(studies.studies(settings), functions.load(settings)["check_data"])
    from scheduler.cluster import client, credentials

    security = credentials.given(settings.cluster, settings.tls_files)
    client.check(settings.cluster, security)
    from scheduler.driver import survey

    return plan.make(settings, survey.cluster_facts(settings, settings.cluster, security, to_import(settings)), begun)


def to_import(settings: Settings) -> ToImport | None:
    """Return what a trial must be able to import, None when it is ours: that the first worker imports before it says
    that it is ready."""
    from scheduler.settings.schema import Training
    from scheduler.worker.importable import ToImport
    from scheduler.workload.objective import RUNNER_MODULE

    if settings.objective is not None:
        if settings.objective.startswith("command:"):
            return None
        return ToImport(path=settings.objective, module=RUNNER_MODULE, flag="--objective")
    path = settings.training.objective
    if path == Training().objective:
        return None
    hint = "; check the spelling, or PYTHONPATH"
    return ToImport(path=path, module="training.trial", flag="training.objective", hint=hint)


def check_objective(settings: Settings) -> None:
    """Import the objective as a trial would, in a process: it may take torch along. Raises UsageError."""
    from scheduler.worker import importable
    from scheduler.worker.trial_process import TrialStartError

    imported = to_import(settings)
    if imported is None:
        return
    try:
        importable.check_objective(imported.path, module=imported.module)
    except TrialStartError as error:
        raise imported.refused(str(error)) from None


def run(settings: Settings, plan: Plan, told: Sequence[str] = ()) -> int:
    """Run the batch; return the exit code. Nothing is written before everything that can be checked has been.

    told: what there is to know beforehand, a line each.
    """
    from scheduler.driver import run_folder
    from scheduler.ui import console, log

    if not plan.runnable:
        *others, last = plan.refusals
        for refusal in others:
            click.echo(refusal, err=True)
        raise NothingFits(f"nothing fits: {last}")
    run_folder.check(settings)
    from scheduler.study import choice, store

    if settings.storage is not None or (settings.run_folder / "study.db").exists():
        store.check(settings.storage_url)
        for spec in plan.runnable if settings.objective is not None else ():
            choice.check_there(settings.storage_url, spec)
    from scheduler.driver import driver

    for line in told:
        say(line, OK)
    view = console.choose()
    log.configure(settings.log_level, view.line)
    with view:
        # Shows the results itself: the study is open there.
        code = driver.run(settings, plan, view, is_last=True, leave_report=report.leave)
    if code in (STOPPED, TIMED_OUT):
        say(f"stopped; to go on where it stopped: {_again(sys.argv[1:])}", 0)
    return code


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: runs the command and ends the process with its exit code."""
    sys.exit(execute(sys.argv[1:] if arguments is None else arguments))


def execute(arguments: Sequence[str]) -> int:
    """Run the command; every expected error is one line on stderr and its exit code."""
    return execution.execute(command, _called(), arguments)


def _called() -> str:
    """Return the command's name: in a checkout bin/schedule, where it is installed headroom."""
    return "headroom" if os.path.basename(sys.argv[0]) == "headroom" else "bin/schedule"


def _again(arguments: Sequence[str]) -> str:
    """Return the command line to give again; its passwords are the user's to fill in."""
    words = []
    for word in arguments:
        flag, found, url = word.partition("=")
        words.append(f"{flag}={masking.masked(url)}" if found and flag.startswith("-") and "://" in url else
                     masking.masked(word) if "://" in word else word)  # fmt: skip
    hidden = " (with its password, which is not shown)" if words != list(arguments) else ""
    return shlex.join([_called(), *words]) + hidden


def _parsed(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments as the settings know them: YAML values under dotted keys."""
    from scheduler.settings.layers import parse_scalar

    text_only = {"budgets", "horizons", "name", "data", "storage", "cluster", "runs_dir", "memory_budget", "dashboard"}
    text_only |= {"command", "space", "metric", "objective", "study", "direction", "sampler", "memory", "pruner"}
    text_only |= {"tls_ca_file", "tls_cert", "tls_key", "on_kill", "on_end"}
    keys = {"watchdog": "watchdog.mode"}
    return {
        keys.get(key, key): value if value is None or key in text_only else parse_scalar(value)
        for key, value in given.items()
    }

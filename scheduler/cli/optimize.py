"""`optimize(study, objective)`: the same as the command, from Python; also in a notebook.

Covers turning the caller's study, function and words into the settings of a run, callbacks, and the run's end as
`Study.optimize` would have it. Everything else is `driver`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from scheduler.model import HeadroomError, UsageError

if TYPE_CHECKING:
    from scheduler.settings.schema import Settings
    from scheduler.study.own_study import Callback, OwnStudy, Study, Trial

FOREVER = 2**31 - 1  # trials of a study that only its time or somebody's word ends


class ObjectiveFailed(HeadroomError):
    """A trial raised what the caller did not ask to catch: the study has ended. The trial's traceback is in it."""

    exit_code = 1


def optimize(
    study: Study,
    objective: Callable[[Trial], float | Sequence[float]],
    n_trials: int | None = None,
    timeout: float | None = None,
    *,
    n_jobs: int | str = "auto",
    memory: int | str | Callable[[Mapping[str, Any]], int | str] | None = None,
    memory_budget: int | str = "90%",
    threads: int = 1,
    catch: type[Exception] | Iterable[type[Exception]] = (),
    callbacks: Iterable[Callback] | None = None,
    cluster: str | None = None,
) -> None:
    """Run trials as `study.optimize` does, each in a process of its own, as many at once as fit into memory.

    study: goes on with its own sampler, pruner, directions, queue and storage. A database is shared and survives
    everything; any other storage is for this call alone. objective: travels by cloudpickle. n_jobs: trials at once at
    most; "auto" and -1: one per core. memory: what a trial takes, in bytes or as "3GiB", or a function of its
    parameters that says so; None: learnt. memory_budget: of each host, a share or a size. threads: of each trial.
    timeout: seconds after which no further trial begins. catch, callbacks: as for `study.optimize`; callbacks run here.
    cluster: address of a Dask scheduler; None: this machine.

    Raises UsageError before anything starts, ObjectiveFailed, what a callback raises, KeyboardInterrupt (running trials
    are run again by the next call), HeadroomError.
    """
    from scheduler.cli.report import leave
    from scheduler.cli.schedule import make_plan
    from scheduler.driver import driver
    from scheduler.driver.caller import Caller
    from scheduler.study import own_study
    from scheduler.ui import console, log

    _check(objective, n_trials, timeout, n_jobs, threads)
    caught = tuple(catch) if isinstance(catch, Iterable) else (catch,)
    mine = own_study.OwnStudy(study, tuple(callbacks or ()), caught)
    with mine.quiet(), _main_left_alone():
        settings = _settings(
            mine,
            objective,
            trials=FOREVER if n_trials is None else mine.counted() + n_trials,
            slots=None if n_jobs in ("auto", -1) else n_jobs,
            memory=None if callable(memory) else memory,
            memory_budget=str(memory_budget),
            threads=threads,
            cluster=cluster,
        )
        settings = _with_function(settings, mine, objective)
        plan = make_plan(settings)
        if plan.refusals:
            raise UsageError(plan.refusals[0])
        caller = Caller(
            choice=mine.choice(memory if callable(memory) else settings.memory),
            storage=mine.storage,
            on_end=mine.on_end,
            timeout_s=timeout,
        )
        with console.View() as view:
            log.configure(settings.log_level, view.line)
            code = driver.run(settings, plan, view, caller=caller, leave_report=leave)
    _conclude(mine, code)


def _conclude(mine: OwnStudy, code: int) -> None:
    """Make the run's end what it would be in the words of `Study.optimize`."""
    if mine.raised is not None:
        raise mine.raised
    if code == 130:
        raise KeyboardInterrupt
    if (failure := mine.failure()) is not None and code:
        raise ObjectiveFailed(failure)
    if code and not mine.has_ended():
        raise HeadroomError("the run ended before it was done; its last lines say why")


def _check(objective: Any, n_trials: Any, timeout: Any, n_jobs: Any, threads: Any) -> None:
    """Raise UsageError for the first argument that cannot be used."""
    if not callable(objective):
        raise UsageError(f"objective must be a function of a trial, not {type(objective).__name__}")
    with contextlib.suppress(ValueError):
        try:
            inspect.signature(objective).bind(None)
        except TypeError as error:
            raise UsageError(f"objective must take one argument, the trial: {error}") from None
    for name, value, least in (("n_trials", n_trials, 1), ("threads", threads, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise UsageError(f"{name}={value!r} must be a whole number, at least {least}")
    if timeout is not None and not (isinstance(timeout, int | float) and 0 < timeout < math.inf):
        raise UsageError(f"timeout={timeout!r} must be seconds, more than 0")
    if n_jobs != "auto" and not (isinstance(n_jobs, int) and (n_jobs == -1 or n_jobs > 0)):
        raise UsageError(f'n_jobs={n_jobs!r} must be "auto", -1, or a whole number from 1')


def _settings(mine: OwnStudy, objective: Callable[..., Any], **given: Any) -> Settings:
    """Return the run's settings; what environment and configuration file say of the rest holds here, too."""
    from scheduler.settings import load

    arguments = {
        "objective": "optimize:objective",
        "study": mine.name,
        "storage": mine.url,
        "direction": list(mine.directions),
        "dashboard": "off",
        "max_consecutive_failures": FOREVER,  # `catch` says what is borne
        **given,
    }
    return load.load(arguments)


def _with_function(settings: Settings, mine: OwnStudy, objective: Callable[..., Any]) -> Settings:
    """Add the pickled function: a file on this machine, its text for a cluster, which need not share a disk."""
    function = mine.pickled(objective, settings.run_folder if settings.cluster is None else None)
    training = settings.training.model_copy(update={"preload": _preload(objective)})
    return settings.model_copy(update={"objective": function, "training": training})


def _preload(objective: Callable[..., Any]) -> tuple[str, ...]:
    """Name what a warm process imports before it has the function: Optuna, and installed modules it refers to."""
    names = getattr(inspect.unwrap(objective), "__globals__", {}).values()
    modules = [value.__name__ for value in names if isinstance(value, ModuleType)]
    found = [name for name in modules if "site-packages" in str(getattr(sys.modules.get(name), "__file__", ""))]
    return tuple(dict.fromkeys(["optuna", *found]))


@contextlib.contextmanager
def _main_left_alone() -> Iterator[None]:
    """Dask's nanny starts its worker with multiprocessing, which runs the caller's script again in it, unless that is
    guarded by `if __name__ == "__main__"`: a script would start itself without end. It gets a module of ours to run."""
    main = sys.modules["__main__"]
    before = getattr(main, "__spec__", None)
    if before is None:
        main.__spec__ = importlib.util.find_spec("scheduler.units")
    try:
        yield
    finally:
        main.__spec__ = before

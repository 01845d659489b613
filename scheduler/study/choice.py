"""Samplers and pruners by name, or by a function of the user's, and the user's own sizes: what a study is opened with.

Covers studies whose trials ask for their parameters while they run; the built-in training has its own (`study_ask`).
What is wrong with a name or a function is one line (`UsageError`), before anything is written.
"""

from __future__ import annotations

import contextlib
import inspect
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import optuna
import sqlalchemy
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from scheduler.model import StudySpec, UsageError
from scheduler.settings.schema import Settings
from scheduler.study import optuna_private
from scheduler.study.transactions import StudyUnavailable, translated
from scheduler.workload import functions, objective

SAMPLERS: Mapping[str, Callable[..., BaseSampler]] = {
    "tpe": optuna.samplers.TPESampler,
    "random": optuna.samplers.RandomSampler,
    "gp": optuna.samplers.GPSampler,
    "cmaes": optuna.samplers.CmaEsSampler,
    "qmc": optuna.samplers.QMCSampler,
    "nsgaii": optuna.samplers.NSGAIISampler,
    "nsgaiii": optuna.samplers.NSGAIIISampler,
    "brute-force": optuna.samplers.BruteForceSampler,
}
PRUNERS: Mapping[str, Callable[[], BasePruner]] = {
    "median": optuna.pruners.MedianPruner,
    "hyperband": optuna.pruners.HyperbandPruner,
    "halving": optuna.pruners.SuccessiveHalvingPruner,
    "none": optuna.pruners.NopPruner,
}
NEEDS = {"gp": ("scipy", "torch"), "cmaes": ("cmaes",), "qmc": ("scipy",)}


def default_sampler(study: str, trials: int) -> BaseSampler:
    """Optuna's own default."""
    return optuna.samplers.TPESampler()


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """sampler(study, trials in it) and pruner() make new ones. memory(params): the user's number of bytes, or None."""

    sampler: Callable[[str, int], BaseSampler] = default_sampler
    pruner: Callable[[], BasePruner] = optuna.pruners.MedianPruner
    memory: Callable[[Mapping[str, Any]], int | None] = lambda params: None


def sampler_named(name: str, seed: int) -> Callable[[str, int], BaseSampler]:
    """Return a maker of the sampler.

    Raises UsageError for a name that is none, or that needs a library that is not here.
    """
    if name not in SAMPLERS:
        raise UsageError(f"--sampler {name!r} must be one of {', '.join(SAMPLERS)}, or module:function")
    for library in NEEDS.get(name, ()):
        try:
            __import__(library)
        except ImportError:
            raise UsageError(
                f"--sampler {name} needs {library}, which is not installed: pip install {library}"
            ) from None

    def make(study: str, trials: int) -> BaseSampler:
        # Started again it must not draw again what it drew before; but a quasi-random sequence is one by its seed.
        mixed = seed if name == "qmc" else zlib.crc32(f"{seed}/{study}/{trials}".encode())
        return SAMPLERS[name](seed=mixed)

    make("", 0)
    return make


def pruner_named(name: str) -> Callable[[], BasePruner]:
    """Return a maker of the pruner. Raises UsageError for a name that is none."""
    if name not in PRUNERS:
        raise UsageError(f"--pruner {name!r} must be one of {', '.join(PRUNERS)}, or module:function")
    return PRUNERS[name]


def made_by(function: Callable[[], Any], path: str, kind: type[Any], flag: str) -> Any:
    """Call the user's function and return what it makes. Raises UsageError when it raises, or makes something else."""
    if inspect.isclass(function) and not issubclass(function, kind):
        raise UsageError(f"{flag} {path} is a {function.__name__}, not a {kind.__name__} of Optuna")
    try:
        made = function()
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UsageError(f"{flag} {path} raised {said}; it is called without arguments") from error
    if not isinstance(made, kind):
        raise UsageError(f"{flag} {path} returned a {type(made).__name__}, not a {kind.__name__} of Optuna")
    return made


def check_there(url: str, spec: StudySpec) -> None:
    """Raise UsageError when the database has this study with other directions; creates nothing.

    A database that cannot be read now is waited for later.
    """
    with contextlib.suppress(KeyError, StudyUnavailable, sqlalchemy.exc.SQLAlchemyError), translated():
        storage = optuna.storages.RDBStorage(url, skip_table_creation=True, skip_compatibility_check=True)
        try:
            check_directions(optuna.load_study(study_name=spec.name, storage=storage), spec)
        finally:
            storage.remove_session()
            optuna_private.engine(storage).dispose()


def check_directions(study: optuna.Study, spec: StudySpec) -> None:
    """Raise UsageError when the study that is there goes another way than this one is to."""
    there = tuple(direction.name.lower() for direction in study.directions)
    if there != spec.directions:
        raise UsageError(
            f"study {spec.name!r} exists with --direction {' '.join(there)}, now it is {' '.join(spec.directions)}: "
            "give that, or another --study"
        )


def check_recipe(spec: StudySpec, context: Mapping[str, Any]) -> None:
    """Raise UsageError when the study that is there trains by another recipe: its values would not be comparable.

    context: the one it was created with.
    """
    there, now = context.get("recipe", "fp32_adamw"), spec.context.get("recipe")
    if now is not None and there != now:
        raise UsageError(
            f"study {spec.name!r} exists with recipe {there}, now it is {now}: give --recipe {there}, or another --name"
        )


def chosen(settings: Settings) -> Choice:
    """Sampler, pruner and sizes as the settings name them. Raises UsageError, one line, for what cannot be used."""
    sampler, pruner = settings.sampler, settings.pruner
    return Choice(
        sampler=_sampler_of(sampler) if ":" in sampler else sampler_named(sampler, settings.seed),
        pruner=_pruner_of(pruner) if ":" in pruner else pruner_named(pruner),
        memory=objective.memory(settings.memory),
    )


def _sampler_of(path: str) -> Callable[[str, int], BaseSampler]:
    function = functions.find(path, "--sampler")
    made_by(function, path, BaseSampler, "--sampler")
    return lambda study, trials: function()


def _pruner_of(path: str) -> Callable[[], BasePruner]:
    function = functions.find(path, "--pruner")
    made_by(function, path, BasePruner, "--pruner")
    return function

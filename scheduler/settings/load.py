"""Loading: files, environment and arguments become one validated `Settings`.

Covers precedence (arguments, environment, experiment file, configuration file, defaults), paths in files, the search
space's own file, and several experiment files in one batch. Reading and error lines are `layers`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from scheduler import masking
from scheduler.model import UsageError
from scheduler.settings import command
from scheduler.settings import layers as sources
from scheduler.settings.schema import PRUNERS, Settings, Training, configs_root
from scheduler.settings.study_keys import EarlyStopping, Frozen, SearchParameter, StudyKeys

PATHS = ("data", "hpo", "space", "tls_ca_file", "tls_cert", "tls_key")
GROUPS = ("training", "watchdog", "early_stopping")  # nested keys that merge one by one
Model = TypeVar("Model", bound=BaseModel)


class _SearchFile(Frozen):
    """The file `hpo`: the plan's two keys."""

    training_search_space: dict[str, SearchParameter] | None = None
    early_stopping: EarlyStopping = EarlyStopping()


def load(
    arguments: Mapping[str, Any] | None = None,
    *,
    config: Path | None = None,
    experiments: tuple[Path, ...] = (),
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Make Settings of arguments (dotted key -> value, None: not given), environment, files and defaults, in this
    order.

    config: instead of configs/schedule.yaml. experiments: files that each name studies of their own; keys that belong
    to the batch must agree between them. Raises UsageError, one line.
    """
    arguments = {key: value for key, value in (arguments or {}).items() if value is not None}
    variables = sources.from_environment(os.environ if environ is None else environ, Settings)
    base = sources.Layers()
    shipped = configs_root() / "schedule.yaml"
    _lay_file(base, config or shipped)
    batch, per_file = base.copy(), []
    for path in experiments:
        mine = base.copy()
        for layers in (batch, mine):
            _lay_file(layers, path)
        per_file.append((path, mine))
    _check_agreement(experiments, name_given="name" in arguments or ("name",) in variables)
    for layers in (batch, *(mine for _, mine in per_file)):
        _lay_environment(layers, variables)
        _lay_arguments(layers, arguments)
        _lay_search_space(layers)
    settings = _validate(Settings, batch)
    found = []
    for path, mine in per_file:
        keys = {key: value for key, value in mine.values.items() if key in StudyKeys.model_fields}
        found.append(_validate(StudyKeys, sources.Layers(keys, mine.origin), str(path)))
    if settings.command is not None:
        settings = settings.model_copy(update={"objective": _command(settings)})
    _check_what_goes_with(settings, {*arguments, *(path[0] for path in variables)})
    if settings.objective is not None:
        _check_objective_keys(arguments, variables, experiments)
        name = settings.name or _as_name(settings.study or settings.command or settings.objective)
        return settings.model_copy(update={"name": name})
    if settings.pruner not in PRUNERS:
        raise UsageError(f"--pruner {settings.pruner} goes with --objective; here it is {', '.join(PRUNERS)}")
    settings = settings.model_copy(update={"name": settings.name or default_name(found[0] if found else settings)})
    for each in (settings, *found):
        _check_search_names(each, settings.training.sample)
    studies = sum(len(each.budgets) * len(each.horizons) for each in found or [settings])
    if settings.begin_with is not None and studies > 1:
        raise UsageError(
            f"begin_with names one configuration, and there are {studies} studies: give one --budgets, one --horizons"
        )
    settings._experiments = tuple(found)  # a private attribute: set once, here, before anybody sees the object
    return settings


def resolved(path: Path) -> Settings:
    """Read back the settings that a run's folder keeps. Neither environment nor arguments count any more, but for the
    whole URL of the database, whose password is not in the file. Keys that only another version of ours has are left
    out. Raises UsageError.
    """
    values = sources.read_yaml(path)
    experiments = values.pop("experiments", None) or []
    values = _known(values, Settings)
    if (url := os.environ.get("HEADROOM_STORAGE")) and masking.bare(url) == values.get("storage"):
        values["storage"] = url
    settings = _validate(Settings, sources.Layers(values, {}), str(path))
    keys = (sources.Layers(_known(dict(each), StudyKeys), {}) for each in experiments)
    settings._experiments = tuple(_validate(StudyKeys, each, str(path)) for each in keys)
    return settings


def _known(values: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        info = model.model_fields.get(key)
        if info is not None:
            inner = sources.group_of(info)
            found[key] = _known(value, inner) if inner is not None and isinstance(value, Mapping) else value
    return found


def default_name(keys: StudyKeys) -> str:
    """ "phase6a", and what makes trials shorter or the data different, so that such runs do not share studies."""
    parts = ["phase6a"]
    if keys.max_epochs is not None:
        parts.append(f"e{keys.max_epochs}")
    if keys.max_steps is not None:
        parts.append(f"s{keys.max_steps}")
    if keys.data is not None:
        parts.append(re.sub(r"[^A-Za-z0-9._]+", "-", keys.data.stem)[:40].strip("-") or "data")
    return "-".join(parts)


def _command(settings: Settings) -> str:
    """Describe the command as an objective. Raises UsageError for whatever of it is missing or wrong."""
    if settings.objective is not None:
        raise UsageError("--command and --objective both say what is to be run: give one of them")
    if settings.space is None:
        raise UsageError("--command needs --space FILE: a YAML file of name: {type, low, high | choices}")
    if len(settings.direction) > 1:
        raise UsageError("--command has one value: give one --direction")
    layers = sources.Layers()
    layers.lay(str(settings.space), {"training_search_space": sources.read_yaml(settings.space)}, groups=())
    found = _validate(_SearchFile, layers).training_search_space
    if not found:
        raise UsageError(f"--space {settings.space} has no parameter: write name: {{type, low, high | choices}}")
    space = {name: parameter.model_dump(mode="json") for name, parameter in found.items()}
    return command.describe(str(settings.command), space, settings.metric)


def _as_name(objective: str) -> str:
    """Make a run's name of a study's, or out of `FILE.py:NAME`: letters, digits, dots, dashes and underscores."""
    where, _, function = objective.rpartition(":")
    words = f"{Path(where).stem}-{function}" if where.endswith(".py") else objective
    return re.sub(r"[^A-Za-z0-9._]+", "-", words)[:80].strip("-._") or "study"


def _check_objective_keys(
    arguments: Mapping[str, Any], variables: Mapping[sources.KeyPath, Any], experiments: tuple[Path, ...]
) -> None:
    """Refuse what belongs to the built-in training: it means nothing to an objective."""
    if experiments:
        raise UsageError(f"--experiment {experiments[0]} is for the built-in training; leave it out with --objective")
    given = {*arguments, *(path[0] for path in variables)}
    for key in sorted(given & (set(StudyKeys.model_fields) - {"trials", "seed"})):
        raise UsageError(f"--{key.replace('_', '-')} is for the built-in training; leave it out with --objective")


def _check_what_goes_with(settings: Settings, given: set[str]) -> None:
    """Refuse what would say nothing where it stands: who gives it has forgotten what it belongs to."""
    needs = {"space": "command", "metric": "command"} if settings.command is None else {}
    if settings.objective is None:
        needs |= dict.fromkeys(("study", "direction", "sampler", "memory"), "objective")
    for key in sorted(given & set(needs)):
        raise UsageError(f"--{key} goes with --{needs[key]}, which is not given")


def _validate(model: type[Model], layers: sources.Layers, file: str | None = None) -> Model:
    try:
        return model.model_validate(layers.values)
    except ValidationError as error:
        raise UsageError(sources.explain(error, layers, model)) from None


def _lay_file(layers: sources.Layers, path: Path) -> None:
    values = sources.read_yaml(path)
    sources.check_keys(str(path), values, Settings)
    if ".py:" in (objective := str(values.get("objective"))):
        values["objective"] = os.path.join(os.path.abspath(path.parent), os.path.expanduser(objective))
    for key in PATHS:  # a path in a file is relative to that file
        if isinstance(values.get(key), str):
            values[key] = os.path.join(os.path.abspath(path.parent), os.path.expanduser(values[key]))
    layers.lay(str(path), values, groups=GROUPS)


def _lay_environment(layers: sources.Layers, variables: Mapping[sources.KeyPath, tuple[str, Any]]) -> None:
    for key_path, (variable, value) in variables.items():
        layers.lay(variable, _nested(key_path, _absolute(key_path, value)), groups=GROUPS)


def _lay_arguments(layers: sources.Layers, arguments: Mapping[str, Any]) -> None:
    for dotted, value in arguments.items():
        key_path = tuple(dotted.split("."))
        flag = {"watchdog.mode": "--watchdog"}.get(dotted, "--" + dotted.replace("_", "-"))
        layers.lay(flag, _nested(key_path, _absolute(key_path, value)), groups=GROUPS)


def _nested(key_path: sources.KeyPath, value: Any) -> dict[str, Any]:
    *outer, innermost = key_path
    nested = {innermost: value}
    for key in reversed(outer):
        nested = {key: nested}
    return nested


def _absolute(key_path: sources.KeyPath, value: Any) -> Any:
    """Make a path absolute that is relative to where the command was started (by argument or variable)."""
    return os.path.abspath(os.path.expanduser(str(value))) if key_path[0] in PATHS and value else value


def _lay_search_space(layers: sources.Layers) -> None:
    """Take what no file says of the search from the file `hpo`; it lies under everything else."""
    given = layers.values.get("hpo")
    if not isinstance(given, str | Path | None):
        raise UsageError(f"{layers.source_of(('hpo',))}: hpo {sources.short(given)} must be the name of a file")
    path = Path(given or configs_root() / Settings.model_fields["hpo"].default)
    layers.values["hpo"] = path
    values = sources.read_yaml(path)
    sources.check_keys(str(path), values, _SearchFile)
    under = sources.Layers()
    under.lay(str(path), values, groups=GROUPS)
    if layers.values.get("training_search_space") is None and "training_search_space" in under.values:
        layers.values["training_search_space"] = under.values["training_search_space"]
        layers.origin["training_search_space",] = str(path)
    stopping = layers.values.get("early_stopping") or {}
    if isinstance(stopping, dict):
        layers.values["early_stopping"] = {**under.values.get("early_stopping", {}), **stopping}
        for key, label in under.origin.items():
            layers.origin.setdefault(key, label)


def _check_search_names(keys: StudyKeys, sample: str) -> None:
    """Refuse parameters that the built-in sampler does not read; a user's own may know more."""
    if sample != Training().sample:
        return
    known = sources.read_yaml(configs_root() / "hpo" / "architectural_search.yaml")["training_search_space"]
    for name in keys.training_search_space or {}:
        if name not in known:
            close = sources.closest(name, known)
            hint = f"did you mean {close}?" if close else f"known parameters: {', '.join(known)}"
            raise UsageError(f"training_search_space: unknown parameter {name}; {hint}")


def _check_agreement(paths: tuple[Path, ...], *, name_given: bool) -> None:
    """Keys that belong to the whole batch must be the same in all experiment files that set them."""
    seen: dict[str, tuple[Path, Any]] = {}
    for path in paths:
        for key, value in sources.read_yaml(path).items():
            if key in StudyKeys.model_fields or (key == "name" and name_given):
                continue
            other, before = seen.setdefault(key, (path, value))
            if before != value:
                fix = "give --name" if key == "name" else f"--{key.replace('_', '-')} or the same value in both"
                now, was = sources.short(value), sources.short(before)
                raise UsageError(f"{path}: {key} {now} differs from {was} in {other}; {fix}")

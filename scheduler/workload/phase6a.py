"""The built-in workload: parameter budgets x horizons of PatchTST, one study each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scheduler.host.facts import cores, resolve_device
from scheduler.model import Presentation, StudySpec, UsageError
from scheduler.settings import layers
from scheduler.settings.schema import Settings
from scheduler.settings.study_keys import BUDGETS, EarlyStopping, StudyKeys

# Below some 10^8 parameters a second thread makes a step hardly faster, but takes a core from another trial.
THREADS = {"2M": 1, "20M": 1, "200M": 2, "2B": 4}
# Of a context: how trials run, not what they compute.
HOW = ("device", "threads", "allocator", "checkpoint_every_minutes", "drain_timeout_s")
# What its trials have, in the order in which a reader wants it.
COLUMNS = (
    "d_model",
    "n_layers",
    "n_heads",
    "d_ff",
    "param_count",
    "micro_batch",
    "accumulation_steps",
    "recipe",
    "learning_rate",
    "weight_decay",
    "warmup_steps",
    "dropout",
)


def studies(settings: Settings) -> tuple[StudySpec, ...]:
    """Return every study, in the order in which they were named. Raises UsageError for one named twice."""
    specs: dict[str, StudySpec] = {}
    for experiment in settings.experiments:
        for budget in experiment.budgets:
            for horizon in experiment.horizons:
                spec = _study(settings, experiment, budget, horizon)
                if spec.name in specs:
                    raise UsageError(f"study {spec.name} is in two experiment files; keep one of them")
                specs[spec.name] = spec
    return tuple(specs.values())


def meaning(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return per study what gives its trials their meaning.

    The data file counts by its content, so that it may move.
    """
    functions = {f"training.{k}": getattr(settings.training, k) for k in ("objective", "sample", "candidates")}
    return {spec.name: {**_flat(spec.context), **functions} for spec in studies(settings)}


def _study(settings: Settings, keys: StudyKeys, budget: str, horizon: int) -> StudySpec:
    threads = settings.threads or min(THREADS[budget], cores())
    context = {
        "budget": budget,
        "horizon": horizon,
        "data": None if keys.data is None else str(keys.data),
        "max_epochs": keys.max_epochs,
        "max_steps": keys.max_steps,
        "device": resolve_device(settings.device),
        "recipe": keys.recipe,
        "threads": threads,
        "allocator": settings.heap,
        "target_effective_batch": keys.target_effective_batch,
        "seed": keys.seed,
        "checkpoint_every_minutes": settings.checkpoint_every_minutes,
        "drain_timeout_s": settings.drain_timeout_s,
        "context_length": 60,
        "patch_length": 10,
        "stride": 5,
        "n_features": 25,
        "head_dropout": 0.0,
        "training_search_space": {
            name: parameter.model_dump(mode="json")
            for name, parameter in sorted((keys.training_search_space or {}).items())
        },
        "early_stopping": (keys.early_stopping or EarlyStopping()).model_dump(mode="json"),
    }
    return StudySpec(
        name=f"{settings.name}_{budget}_h{horizon}",
        quota=keys.trials,
        slots=min(threads, settings.total_slots),
        context=context,
        shown=Presentation(
            labels={"budget": budget, "horizon": horizon},
            columns=COLUMNS,
            shape={"d_model": "d_model", "layers": "n_layers"},
            value="best loss",
            smaller=_smaller(budget),
            size="param_count",
            compare="horizon",
        ),
    )


def _smaller(budget: str) -> str:
    less = [name for name, count in BUDGETS.items() if count < BUDGETS[budget]]
    return f"a smaller budget than {budget} ({', '.join(less)})" if less else ""


def _flat(context: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in context.items():
        if key in (*HOW, "budget", "horizon"):
            continue
        if key == "data":
            flat["data"] = None if value is None else layers.content_hash(Path(value))
        elif key in ("training_search_space", "early_stopping"):
            flat.update({f"{key}.{inner}": each for inner, each in value.items()})
        else:
            flat[key] = value
    return flat

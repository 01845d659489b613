"""Which training parameters are searched, and within which bounds: the search space file, its checks, a sample.

Does not cover the architecture, whose choices are a list (`training.arch_grid`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.errors import TrainingInputError

FILE = Path(__file__).resolve().parent.parent / "configs" / "hpo" / "architectural_search.yaml"
DEFAULTS = {
    "learning_rate": 3e-4,
    "epochs": 50,
    "weight_decay": 1e-3,
    "warmup_steps": 100,
    "dropout": 0.1,
}


def load(path: str | Path = FILE) -> dict[str, Any]:
    """Read `training_search_space` and `early_stopping` from a YAML file.

    Raises TrainingInputError naming the file, the key and the fix.
    """
    import yaml

    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingInputError(f"{path}: cannot be read: {error.strerror}: check the path") from error
    except yaml.YAMLError as error:
        raise TrainingInputError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict) or set(config) != {"training_search_space", "early_stopping"}:
        seen = ", ".join(map(str, config)) if isinstance(config, dict) else type(config).__name__
        raise TrainingInputError(f"{path}: needs the keys training_search_space and early_stopping, has: {seen}")
    check(config["training_search_space"], str(path))
    return config


def check(space: Any, where: str = "training_search_space") -> None:
    """Raise TrainingInputError when a parameter's entry cannot be sampled."""
    if not isinstance(space, dict):
        raise TrainingInputError(f"{where}: training_search_space must be a mapping, not {space!r}")
    for name, entry in space.items():
        if name not in DEFAULTS:
            raise TrainingInputError(f"{where}: unknown parameter {name!r}: choose from {', '.join(DEFAULTS)}")
        kind = entry.get("type") if isinstance(entry, dict) else None
        if kind == "categorical":
            if not isinstance(entry.get("choices"), list) or not entry["choices"]:
                raise TrainingInputError(f"{where}: {name}.choices must be a list, not {entry.get('choices')!r}")
        elif kind in {"uniform", "log_uniform", "int"}:
            low, high = entry.get("low"), entry.get("high")
            numeric = all(isinstance(bound, (int, float)) and not isinstance(bound, bool) for bound in (low, high))
            if not numeric or low > high or (kind == "log_uniform" and low <= 0):
                raise TrainingInputError(
                    f"{where}: {name} needs numbers low <= high{' above 0' if kind == 'log_uniform' else ''}, "
                    f"not low={low!r} high={high!r} (YAML reads 1e-4 as text: write 1.0e-4)"
                )
        else:
            raise TrainingInputError(
                f"{where}: {name}.type is {kind!r}: choose from categorical, int, log_uniform, uniform"
            )


def sample(trial: Any, space: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Suggest every parameter of the search space, with a default for those it does not name."""
    found: dict[str, Any] = dict(DEFAULTS)
    for name, entry in space.items():
        match entry["type"]:
            case "categorical":
                found[name] = trial.suggest_categorical(name, list(entry["choices"]))
            case "int":
                found[name] = trial.suggest_int(name, int(entry["low"]), int(entry["high"]))
            case kind:
                low, high = float(entry["low"]), float(entry["high"])
                found[name] = trial.suggest_float(name, low, high, log=kind == "log_uniform")
    return found

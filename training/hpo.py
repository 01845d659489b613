"""What the search needs of training: the candidates, a sample, and the objective of one trial.

Covers the four functions the scheduler names by dotted path (`candidates`, `sample`, `objective`; `estimate` is in
`training.footprint`), the search space file, and `create_architectural_objective` for those who use Optuna without the
scheduler. Imports torch inside the objective only: the scheduler's driver asks and never trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training import arch_grid, batch_size, recipe
from training.context import Context
from training.errors import CheckpointRejected, DoesNotFit, TrainingInputError

if TYPE_CHECKING:
    import torch

    from training.data import Dataset, Part
    from training.trainer import Progress

SEARCH_SPACE_FILE = Path(__file__).resolve().parent.parent / "configs" / "hpo" / "architectural_search.yaml"
CHECKPOINT = "checkpoint.safetensors"  # in the attempt's folder
DEVICES = ("cpu", "cuda", "mps")
TARGET_EFFECTIVE_BATCH = 256
DROPOUT_WHEN_NOT_SEARCHED = 0.1
DEFAULTS = {
    "learning_rate": 3e-4,
    "epochs": 50,
    "weight_decay": 1e-3,
    "warmup_steps": 100,
    "dropout": DROPOUT_WHEN_NOT_SEARCHED,
}

Fit = Callable[[Mapping[str, Any]], "int | None"]


# -- the search space -----------------------------------------------------------------------------------------------


def load_search_space(path: str | Path = SEARCH_SPACE_FILE) -> dict[str, Any]:
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
    check_search_space(config["training_search_space"], str(path))
    return config


def check_search_space(space: Any, where: str = "training_search_space") -> None:
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


def sample_training(trial: Any, space: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
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


# -- what the scheduler calls ---------------------------------------------------------------------------------------


def candidates(context: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every architecture of the study's budget, in a stable order, with its exact parameter count."""
    known = Context.of(context)
    return [
        {
            "d_model": a.d_model,
            "n_layers": a.n_layers,
            "n_heads": a.n_heads,
            "d_ff_ratio": a.d_ff // a.d_model,
            "d_ff": a.d_ff,
            "param_count": a.param_count,
        }
        for a in arch_grid.architectures(
            known.budget, known.n_features, known.context_length, known.patch_length, known.stride
        )
    ]


def sample(
    trial: Any, context: Mapping[str, Any], architectures: Sequence[Mapping[str, Any]], fit: Fit
) -> dict[str, Any]:
    """Sample one trial: the architecture (d_model, n_layers, n_heads, d_ff_ratio) and the training parameters.

    trial: an Optuna trial. architectures: the study's stored `candidates`. fit: sizes the micro-batch of parameters
    without one, None when nothing fits. Raises DoesNotFit.
    """
    known = Context.of(context)
    params = sample_architecture(trial, architectures) | sample_training(trial, known.training_search_space)
    if known.max_epochs is not None:
        params["epochs"] = min(params["epochs"], known.max_epochs)
    micro_batch = fit(params)
    if micro_batch is None:
        raise DoesNotFit(params, _smallest_footprint(params, context))
    return params | {"recipe": known.recipe} | batch_size.batch_config(micro_batch, known.target_effective_batch)


def sample_architecture(trial: Any, architectures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Suggest the four fields and return the architecture of the list that has them.

    The scheduler's sampler proposes only what is in the list; of another's proposal the nearest is taken. A study whose
    list is from before the ratio was in it goes on as it began: with one integer, an index into the list.
    """
    if "d_ff_ratio" not in architectures[0]:
        return dict(architectures[trial.suggest_int("architecture", 0, len(architectures) - 1)])
    wanted, span = {}, {}
    for name in ("d_model", "n_layers", "n_heads", "d_ff_ratio"):
        low, high = min(a[name] for a in architectures), max(a[name] for a in architectures)
        wanted[name] = trial.suggest_int(name, low, high, log=True)
        span[name] = math.log(high / low) or 1.0

    def distance(architecture: Mapping[str, Any]) -> float:
        return sum((math.log(architecture[name] / value) / span[name]) ** 2 for name, value in wanted.items())

    nearest: Mapping[str, Any] = min(architectures, key=distance)
    return dict(nearest)


def _smallest_footprint(params: Mapping[str, Any], context: Mapping[str, Any]) -> int:
    from training import footprint

    return int(footprint.estimate({**params, "micro_batch": 1}, context)["host_bytes"])


def objective(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Train one trial in this process and return its result.

    task: `params`, `context`, `folder` (checkpoints go there), `resume_from`, `threads`. The result has `value` (best
    validation loss), `epochs`, `best_epoch`, `stop_reason`, `recipe`, `model` (its file) and `metrics`. Raises
    TrainingInputError, NonFiniteLoss.
    """
    import torch

    from training import checkpoint, data, products
    from training.trainer import Trainer

    params, context = task["params"], Context.of(task["context"])
    chosen = recipe.named(context.recipe)
    torch.set_num_threads(int(task.get("threads") or 1))
    torch.manual_seed(context.seed)
    dataset = data.load(context.data, context.horizon, context.context_length)
    device, every = _device(context), context.checkpoint_every_minutes
    speedup = None
    if device == "cpu" and chosen.compute == "bf16":
        speedup = products.bf16_speedup(params["d_model"], params["d_ff"])
        if warning := products.warning(chosen.name, speedup):
            progress.note(warning)
    trainer = Trainer(
        build_model(params, task["context"], dataset.n_features),
        samples(dataset, dataset.train, device),
        samples(dataset, dataset.validation, device),
        epochs=params["epochs"],
        batch_size=params["micro_batch"],
        accumulation_steps=params["accumulation_steps"],
        lr=params["learning_rate"],
        weight_decay=params["weight_decay"],
        warmup_steps=params["warmup_steps"],
        early_stopping_patience=context.early_stopping.get("patience"),
        early_stopping_min_delta=context.early_stopping.get("min_delta", 0.001),
        max_steps=context.max_steps,
        seed=context.seed,
        device=device,
        recipe=chosen,
        progress=progress,
        checkpoint_path=Path(task["folder"]) / CHECKPOINT if task.get("folder") else None,
        checkpoint_every_s=None if every is None else 60 * every,
        drain_s=context.drain_timeout_s,
        task=checkpoint.task_digest(params, task["context"], dataset.fingerprint),
        model_facts={
            "params": dict(params),
            "context": {key: value for key, value in task["context"].items() if key != "training_search_space"},
            "features": dataset.names,
            "mean": dataset.mean,
            "std": dataset.std,
        },
    )
    resumed_epoch, rejected = None, None
    if task.get("resume_from"):
        try:
            trainer.resume(Path(task["resume_from"]))
            resumed_epoch = trainer.epoch
        except CheckpointRejected as error:
            rejected = str(error)
            progress.note(f"starting over: checkpoint rejected: {rejected}")
    found = trainer.train(verbose=True)
    validation_labels = dataset.labels[dataset.validation.first : dataset.validation.last]
    metrics = {
        "steps": found["steps"],
        "train_losses": found["train_losses"],
        "val_losses": found["val_losses"],
        "validation_positive_rate": data.positive_rate(validation_labels),
        "resumed_epoch": resumed_epoch,
        "checkpoint_rejected": rejected,
        "bf16_speedup": speedup,
    }
    model = trainer.model_path if trainer.model_path is not None and trainer.model_path.exists() else None
    result = {key: found[key] for key in ("value", "epochs", "best_epoch", "stop_reason")}
    return result | {"recipe": context.recipe} | {"model": None if model is None else str(model), "metrics": metrics}


# -- parts of the objective -----------------------------------------------------------------------------------------


def build_model(params: Mapping[str, Any], context: Mapping[str, Any], n_features: int) -> torch.nn.Module:
    """Build the PatchTST of these parameters, with as many features as the data has."""
    from training import computing
    from training.patchtst import PatchTST, PatchTSTConfig

    known = Context.of(context)
    return PatchTST(
        PatchTSTConfig(
            n_features=n_features,
            context_length=known.context_length,
            patch_length=known.patch_length,
            stride=known.stride,
            d_model=params["d_model"],
            n_layers=params["n_layers"],
            n_heads=params["n_heads"],
            d_ff=params["d_ff"],
            dropout=params["dropout"],
            head_dropout=known.head_dropout,
        ),
        computing.storage(recipe.named(known.recipe)),
    )


def samples(dataset: Dataset, part: Part, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (n, context_length, n_features) and labels (n,) of a part, on the device.

    The windows overlap in one array of days (60 times smaller than their copies): a batch is gathered from it.
    """
    import torch

    days = torch.from_numpy(dataset.features[part.first - dataset.context_length + 1 : part.last]).to(device)
    windows = days.unfold(0, dataset.context_length, 1).transpose(1, 2)
    return windows, torch.from_numpy(dataset.labels[part.first : part.last]).to(device)


def _device(context: Context) -> str:
    if context.device not in DEVICES:
        raise TrainingInputError(f"device is {context.device!r}: choose from {', '.join(DEVICES)}")
    return context.device


# -- for plain Optuna -----------------------------------------------------------------------------------------------


class OptunaProgress:
    """Reports to an Optuna trial of this process and asks its pruner."""

    def __init__(self, trial: Any) -> None:
        self.trial = trial
        self.stop_requested: str | None = None

    def report(self, step: int, value: float) -> None:
        self.trial.report(value, step)
        if self.trial.should_prune():
            self.stop_requested = "prune"

    def tick(self) -> None: ...
    def settled(self) -> None: ...
    def checkpoint(self, path: str, step: int = 0) -> None: ...
    def note(self, text: str) -> None: ...


def create_architectural_objective(
    budget: str,
    horizon: int = 1,
    *,
    data: str | None = None,
    training_search_space: Mapping[str, Any] | None = None,
    early_stopping_config: Mapping[str, Any] | None = None,
    max_epochs: int | None = None,
    max_steps: int | None = None,
    memory_limit_bytes: int | None = None,
    device: str = "cpu",
    threads: int = 1,
    seed: int = 0,
) -> Callable[[Any], float]:
    """Make an objective for `optuna.Study.optimize`, without the scheduler: trains in this process, one trial at a
    time.

    Search space and early stopping come from configs/hpo/architectural_search.yaml unless given. Without
    `memory_limit_bytes` the published batch tiers are used as they are. The returned function raises
    `optuna.TrialPruned` when the pruner says so or when no micro-batch fits the limit.
    """
    if training_search_space is None or early_stopping_config is None:
        config = load_search_space()
        training_search_space = training_search_space or config["training_search_space"]
        early_stopping_config = early_stopping_config or config["early_stopping"]
    check_search_space(training_search_space)
    context = {
        "budget": budget,
        "horizon": horizon,
        "data": data,
        "max_epochs": max_epochs,
        "max_steps": max_steps,
        "device": device,
        "threads": threads,
        "seed": seed,
        "target_effective_batch": TARGET_EFFECTIVE_BATCH,
        "training_search_space": training_search_space,
        "early_stopping": early_stopping_config,
    }
    architectures = candidates(context)

    def fit(params: Mapping[str, Any]) -> int | None:
        batch = batch_size.get_memory_safe_batch_config(
            d_model=params["d_model"],
            n_layers=params["n_layers"],
            target_effective_batch=TARGET_EFFECTIVE_BATCH,
            memory_limit_bytes=memory_limit_bytes,
            n_heads=params["n_heads"],
            d_ff=params["d_ff"],
            context=context,
        )
        return None if batch is None else batch["micro_batch"]

    def run(trial: Any) -> float:
        import optuna

        try:
            params = sample(trial, context, architectures, fit)
        except DoesNotFit as error:
            raise optuna.TrialPruned(str(error)) from error
        for name in ("d_model", "n_layers", "n_heads", "d_ff", "param_count", "micro_batch", "accumulation_steps"):
            trial.set_user_attr(name, params[name])
        found = objective({"params": params, "context": context, "threads": threads}, OptunaProgress(trial))
        trial.set_user_attr("stop_reason", found["stop_reason"])
        if found["stop_reason"] == "pruned":
            raise optuna.TrialPruned
        return float(found["value"])

    return run

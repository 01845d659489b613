"""What the search needs of training: the candidates, a sample, and the objective of one trial.

Covers the functions the scheduler names by dotted path (`candidates`, `sample`, `objective`; `estimate` is in
`training.footprint`), and `create_architectural_objective` for those who use Optuna without the scheduler. Which
training parameters are searched, and within which bounds, is `training.search_space`. Imports torch inside the
objective only: the scheduler's driver asks and never trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training import arch_grid, batch_size, recipe, search_space
from training.context import Context
from training.errors import CheckpointRejected, DoesNotFit, TrainingInputError
from training.progress import Silent

if TYPE_CHECKING:
    import torch

    from training.data import Dataset, Part
    from training.progress import Progress
    from training.saver import Saver
    from training.trainer import Trainer

CHECKPOINT = "checkpoint.safetensors"  # in the attempt's folder
DEVICES = ("cpu", "cuda", "mps")
TARGET_EFFECTIVE_BATCH = 256

Fit = Callable[[Mapping[str, Any]], "int | None"]


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
    params = sample_architecture(trial, architectures) | search_space.sample(trial, known.training_search_space)
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

    from training import data

    params, context = task["params"], Context.of(task["context"])
    torch.set_num_threads(int(task.get("threads") or 1))
    torch.manual_seed(context.seed)
    dataset = data.load(context.data, context.horizon, context.context_length)
    speedup = _bf16_speedup(params, context, progress)
    trainer = _trainer(task, context, dataset, progress)
    resumed = _resume(trainer, task.get("resume_from"), progress)
    found = trainer.train(verbose=True)
    validation_labels = dataset.labels[dataset.validation.first : dataset.validation.last]
    metrics = {
        "steps": found["steps"],
        "train_losses": found["train_losses"],
        "val_losses": found["val_losses"],
        "validation_positive_rate": data.positive_rate(validation_labels),
        **resumed,
        "bf16_speedup": speedup,
    }
    model = trainer.saver.model_path
    result = {key: found[key] for key in ("value", "epochs", "best_epoch", "stop_reason")}
    kept = str(model) if model is not None and model.exists() else None
    return result | {"recipe": context.recipe, "model": kept, "metrics": metrics}


# -- parts of the objective -----------------------------------------------------------------------------------------


def _bf16_speedup(params: Mapping[str, Any], context: Context, progress: Progress) -> float | None:
    """Time a product in bf16 and in fp32 where the trial has bf16 products on a CPU; note it where bf16 is slower."""
    from training import products

    chosen = recipe.named(context.recipe)
    if context.device != "cpu" or chosen.compute != "bf16":
        return None
    speedup = products.bf16_speedup(params["d_model"], params["d_ff"])
    if warning := products.warning(chosen.name, speedup):
        progress.note(warning)
    return speedup


def _trainer(task: Mapping[str, Any], context: Context, dataset: Dataset, progress: Progress) -> Trainer:
    """Make the training of a task, from its beginning."""
    from training.trainer import Trainer

    params, device = task["params"], _device(context)
    return Trainer(
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
        recipe=recipe.named(context.recipe),
        progress=progress,
        saver=_saver(task, context, dataset),
    )


def _saver(task: Mapping[str, Any], context: Context, dataset: Dataset) -> Saver:
    """Say what the training of a task saves, where and when."""
    from training import checkpoint
    from training.saver import Saver

    every = context.checkpoint_every_minutes
    return Saver(
        Path(task["folder"]) / CHECKPOINT if task.get("folder") else None,
        task=checkpoint.task_digest(task["params"], task["context"], dataset.fingerprint),
        every_s=None if every is None else 60 * every,
        drain_s=context.drain_timeout_s,
        model_facts={
            "params": dict(task["params"]),
            "context": {key: value for key, value in task["context"].items() if key != "training_search_space"},
            "features": dataset.names,
            "mean": dataset.mean,
            "std": dataset.std,
        },
    )


def _resume(trainer: Trainer, path: str | None, progress: Progress) -> dict[str, Any]:
    """Go on from a checkpoint, if there is one that can be used; returns what the metrics say of that."""
    rejected = None
    if path:
        try:
            trainer.resume(Path(path))
            return {"resumed_epoch": trainer.epoch, "checkpoint_rejected": None}
        except CheckpointRejected as error:
            rejected = str(error)
            progress.note(f"starting over: checkpoint rejected: {rejected}")
    return {"resumed_epoch": None, "checkpoint_rejected": rejected}


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


class OptunaProgress(Silent):
    """Reports to an Optuna trial of this process and asks its pruner."""

    def __init__(self, trial: Any) -> None:
        self.trial = trial

    def report(self, step: int, value: float) -> None:
        self.trial.report(value, step)
        if self.trial.should_prune():
            self.stop_requested = "prune"


class ArchitecturalObjective:
    """An objective for `optuna.Study.optimize`: each call trains one trial of a study of this context."""

    def __init__(self, context: Mapping[str, Any], *, memory_limit_bytes: int | None, threads: int) -> None:
        self._context, self._memory_limit_bytes, self._threads = context, memory_limit_bytes, threads
        self._architectures = candidates(context)

    def __call__(self, trial: Any) -> float:
        """Return its best validation loss. Raises `optuna.TrialPruned`."""
        import optuna

        try:
            params = sample(trial, self._context, self._architectures, self._fit)
        except DoesNotFit as error:
            raise optuna.TrialPruned(str(error)) from error
        for name in ("d_model", "n_layers", "n_heads", "d_ff", "param_count", "micro_batch", "accumulation_steps"):
            trial.set_user_attr(name, params[name])
        task = {"params": params, "context": self._context, "threads": self._threads}
        found = objective(task, OptunaProgress(trial))
        trial.set_user_attr("stop_reason", found["stop_reason"])
        if found["stop_reason"] == "pruned":
            raise optuna.TrialPruned
        return float(found["value"])

    def _fit(self, params: Mapping[str, Any]) -> int | None:
        batch = batch_size.get_memory_safe_batch_config(
            d_model=params["d_model"],
            n_layers=params["n_layers"],
            target_effective_batch=TARGET_EFFECTIVE_BATCH,
            memory_limit_bytes=self._memory_limit_bytes,
            n_heads=params["n_heads"],
            d_ff=params["d_ff"],
            context=self._context,
        )
        return None if batch is None else batch["micro_batch"]


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
        config = search_space.load()
        training_search_space = training_search_space or config["training_search_space"]
        early_stopping_config = early_stopping_config or config["early_stopping"]
    search_space.check(training_search_space)
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
    return ArchitecturalObjective(context, memory_limit_bytes=memory_limit_bytes, threads=threads)

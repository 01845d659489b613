"""The search: its configuration, what a sample holds, and the objective for those who use Optuna alone."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from torch import nn

from training import arch_grid, batch_size, hpo, search_space, trainer
from training.errors import DoesNotFit, TrainingInputError
from training.progress import Silent

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 32, "param_count": 7000}

optuna.logging.set_verbosity(optuna.logging.WARNING)


def make_context(**changes: Any) -> dict[str, Any]:
    """A study's context, as the scheduler makes it."""
    return {"budget": "2M", "horizon": 1, "max_epochs": None, **search_space.load(), **changes}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the objective hands to the real Trainer and the real model, with one small architecture to be quick."""
    calls: dict[str, Any] = {"batches": []}

    class Recording(trainer.Trainer):
        """The real Trainer; notes its arguments."""

        def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
            calls.update(kwargs, model=model)
            super().__init__(model, *args, **kwargs)

    def batch_config(**kwargs: Any) -> dict[str, int] | None:
        calls["batches"].append(kwargs)
        return real(**kwargs)

    real = batch_size.get_memory_safe_batch_config
    monkeypatch.setattr(trainer, "Trainer", Recording)
    monkeypatch.setattr(batch_size, "get_memory_safe_batch_config", batch_config)
    monkeypatch.setattr(hpo, "candidates", lambda context: [SMALL])
    return calls


def optimize(
    objective: Callable[[optuna.Trial], float], params: dict[str, Any] | None = None
) -> optuna.trial.FrozenTrial:
    """Run one trial of an in-memory study."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    if params:
        study.enqueue_trial(params)
    study.optimize(objective, n_trials=1)
    return study.trials[0]


# -- the tests the source plan names --------------------------------------------------------------------------------


def test_architectural_search_config_has_dropout() -> None:
    """Dropout is searched: uniform from 0.1 to 0.3."""
    space = search_space.load()["training_search_space"]
    assert space["dropout"] == {"type": "uniform", "low": 0.1, "high": 0.3}


def test_architectural_search_config_no_batch_size() -> None:
    """The batch size is not searched; the rest of the plan's keys are there, and no others."""
    space = search_space.load()["training_search_space"]
    assert "batch_size" not in space
    assert space == {
        "learning_rate": {"type": "log_uniform", "low": 1e-4, "high": 1e-3},
        "epochs": {"type": "categorical", "choices": [50, 75, 100]},
        "weight_decay": {"type": "log_uniform", "low": 1e-4, "high": 5e-3},
        "warmup_steps": {"type": "categorical", "choices": [100, 200, 300, 500]},
        "dropout": {"type": "uniform", "low": 0.1, "high": 0.3},
    }


def test_architectural_search_config_has_early_stopping() -> None:
    """Early stopping: patience 10, min_delta 0.001."""
    assert search_space.load()["early_stopping"] == {"patience": 10, "min_delta": 0.001}


def test_architectural_objective_samples_dropout(seen: dict[str, Any]) -> None:
    """The sampled dropout is the model's; the head's stays 0.

    The plan mocks a trial for this; here a real one of a real study is enough.
    """
    trial = optimize(hpo.create_architectural_objective("2M", max_steps=1), {"dropout": 0.2345})
    assert trial.params["dropout"] == 0.2345
    assert (seen["model"].config.dropout, seen["model"].config.head_dropout) == (0.2345, 0.0)


def test_architectural_objective_uses_dynamic_batch(seen: dict[str, Any]) -> None:
    """The batch comes from get_memory_safe_batch_config, asked about the sampled architecture."""
    trial = optimize(hpo.create_architectural_objective("2M", max_steps=1, memory_limit_bytes=360 * 2**20))
    (asked,) = seen["batches"]
    assert (asked["d_model"], asked["n_layers"], asked["target_effective_batch"]) == (16, 1, 256)
    assert seen["batch_size"] == trial.user_attrs["micro_batch"]
    assert seen["batch_size"] * seen["accumulation_steps"] == 256


def test_architectural_objective_passes_early_stopping(seen: dict[str, Any]) -> None:
    """Patience and min_delta reach the Trainer, from the file or as given."""
    optimize(hpo.create_architectural_objective("2M", max_steps=1))
    assert (seen["early_stopping_patience"], seen["early_stopping_min_delta"]) == (10, 0.001)
    given = {"patience": 3, "min_delta": 0.5}
    optimize(hpo.create_architectural_objective("2M", max_steps=1, early_stopping_config=given))
    assert (seen["early_stopping_patience"], seen["early_stopping_min_delta"]) == (3, 0.5)


# -- the objective for plain Optuna ---------------------------------------------------------------------------------


def test_objective_reports_and_finishes(seen: dict[str, Any]) -> None:
    """A trial ends COMPLETE with its best validation loss, a value per epoch, and readable attributes."""
    trial = optimize(hpo.create_architectural_objective("2M", max_epochs=2))
    assert trial.state is optuna.trial.TrialState.COMPLETE
    assert list(trial.intermediate_values) == [1, 2] and trial.value == min(trial.intermediate_values.values())
    assert trial.user_attrs["param_count"] == 7000 and trial.user_attrs["stop_reason"] == "completed"


def test_objective_obeys_the_pruner(seen: dict[str, Any]) -> None:
    """A pruner's advice ends the trial as PRUNED."""
    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=0.0))
    study.optimize(hpo.create_architectural_objective("2M", max_epochs=5), n_trials=1)
    (trial,) = study.trials
    assert trial.state is optuna.trial.TrialState.PRUNED and list(trial.intermediate_values) == [1]


def test_objective_that_does_not_fit_is_pruned() -> None:
    """Where no micro-batch fits nothing is trained."""
    trial = optimize(hpo.create_architectural_objective("2B", memory_limit_bytes=8 * 2**30))
    assert trial.state is optuna.trial.TrialState.PRUNED


# -- what the scheduler calls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", arch_grid.BUDGETS)
def test_candidates_are_stable_and_complete(budget: str) -> None:
    """Same list at every call, each with the numbers that describe an architecture."""
    found = hpo.candidates({"budget": budget})
    assert found == hpo.candidates({"budget": budget}) and len(found) == len(arch_grid.architectures(budget))
    assert all(set(each) == {"d_model", "n_layers", "n_heads", "d_ff_ratio", "d_ff", "param_count"} for each in found)
    assert all(each["d_ff"] == each["d_ff_ratio"] * each["d_model"] for each in found)


def test_candidates_count_the_studys_features() -> None:
    """Further columns of the data make the embedding larger, and the count says so."""
    plain, more = (hpo.candidates({"budget": "2M", "n_features": n})[0] for n in (25, 30))
    assert more["param_count"] - plain["param_count"] == 5 * 10 * plain["d_model"]


def test_sample_has_everything() -> None:
    """Every parameter of an attempt is there, within its range; the architecture is searched by its four fields."""
    context = make_context()
    architectures = hpo.candidates(context)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        params = hpo.sample(trial, context, architectures, lambda params: 64)
        fields = {"d_model", "n_layers", "n_heads", "d_ff_ratio"}
        names = {*fields, "d_ff", "param_count", "learning_rate", "weight_decay", "warmup_steps"}
        names |= {"epochs", "dropout", "micro_batch", "accumulation_steps", "effective_batch", "recipe"}
        assert set(params) == names
        assert set(trial.params) == {*fields, *context["training_search_space"]}
        assert {key: params[key] for key in architectures[0]} in architectures
        assert 1e-4 <= params["learning_rate"] <= 1e-3 and 0.1 <= params["dropout"] <= 0.3
        assert (params["micro_batch"], params["accumulation_steps"], params["effective_batch"]) == (64, 4, 256)


def test_a_study_from_before_the_fields_goes_on_with_its_index() -> None:
    """A stored list without the ratio was searched by an index, and still is: the same study holds no two kinds."""
    context = make_context()
    before = [{key: a[key] for key in a if key != "d_ff_ratio"} for a in hpo.candidates(context)]
    trial = optuna.create_study().ask()
    params = hpo.sample(trial, context, before, lambda params: 64)
    assert set(trial.params) == {"architecture", *context["training_search_space"]}
    assert {key: params[key] for key in before[0]} == before[trial.params["architecture"]]


def test_sample_asks_fit_about_the_whole_trial() -> None:
    """`fit` sees architecture and training parameters, and no micro-batch yet."""
    asked: list[dict[str, Any]] = []

    def fit(params: Mapping[str, Any]) -> int:
        asked.append(dict(params))
        return 16

    hpo.sample(optuna.create_study().ask({}), make_context(), [SMALL], fit)
    assert asked[0]["d_model"] == 16 and "dropout" in asked[0] and "micro_batch" not in asked[0]


def test_sample_that_does_not_fit() -> None:
    """Nothing fits: DoesNotFit with the parameters and the bytes that micro-batch 1 would take."""
    context = make_context(budget="2B")
    with pytest.raises(DoesNotFit, match="GiB at micro-batch 1") as caught:
        hpo.sample(optuna.create_study().ask(), context, hpo.candidates(context), lambda params: None)
    assert caught.value.needed_bytes > 16 * caught.value.params["param_count"]


def test_max_epochs_caps_the_sample() -> None:
    """max_epochs lowers the sampled epochs and leaves the searched value as it is."""
    trial = optuna.create_study().ask()
    params = hpo.sample(trial, make_context(max_epochs=3), [SMALL], lambda params: 64)
    assert params["epochs"] == 3 and trial.params["epochs"] in (50, 75, 100)


def test_parameters_that_are_not_searched_have_defaults() -> None:
    """A search space without dropout trains with 0.1, as before it was searched."""
    params = hpo.sample(optuna.create_study().ask(), make_context(training_search_space={}), [SMALL], lambda p: 64)
    assert params["dropout"] == 0.1 and params["epochs"] == 50


def test_int_parameters() -> None:
    """The type int gives whole numbers."""
    space = {"warmup_steps": {"type": "int", "low": 3, "high": 3}}
    assert search_space.sample(optuna.create_study().ask(), space)["warmup_steps"] == 3


def test_driver_side_imports_no_torch() -> None:
    """Candidates and a sample cost the driver neither torch nor Optuna's import by us."""
    code = "import sys; from training import hpo, search_space; hpo.candidates({'budget': '2B'}); search_space.load(); "
    code += "from training import footprint; print({'torch', 'optuna', 'pandas', 'numpy'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_objective_trains_on_further_features(tmp_path: Path) -> None:
    """The model has as many inputs as the data has columns."""
    from tests.training.test_data import HEADER, make_rows, write

    path = write(tmp_path / "a.csv", [[*row, str(i % 5)] for i, row in enumerate(make_rows())], HEADER + ",Breadth")
    params = {**SMALL, "learning_rate": 1e-3, "weight_decay": 0.0, "warmup_steps": 1, "epochs": 1, "dropout": 0.1}
    params |= {"micro_batch": 64, "accumulation_steps": 4}
    result = hpo.objective({"params": params, "context": make_context(data=path), "folder": str(tmp_path)}, Silent())
    assert math.isfinite(result["value"]) and (tmp_path / "checkpoint.safetensors").exists()


@pytest.mark.parametrize(("key", "value"), [("device", "tpu"), ("recipe", "fp8")])
def test_unknown_context_values_are_refused(key: str, value: str) -> None:
    """A device or recipe there is not: one line with the value and the choices."""
    with pytest.raises(TrainingInputError, match=f"{key}.* '{value}': choose from"):
        hpo.objective({"params": SMALL, "context": make_context(**{key: value})}, Silent())


# -- mistakes in the search space file ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training_search_space: {}", "needs the keys training_search_space and early_stopping"),
        ("[1, 2]", "has: list"),
        ("a: b: c", "is not YAML"),
        ("early_stopping: {}\ntraining_search_space: 5", "must be a mapping, not 5"),
        ("early_stopping: {}\ntraining_search_space: {batch_size: {}}", "unknown parameter 'batch_size'"),
        ("early_stopping: {}\ntraining_search_space: {epochs: {type: list}}", "epochs.type is 'list'"),
        (
            "early_stopping: {}\ntraining_search_space: {epochs: {type: categorical}}",
            "choices must be a list, not None",
        ),
        (
            "early_stopping: {}\ntraining_search_space: {dropout: {type: uniform, low: 2, high: 1}}",
            "low=2 high=1",
        ),
        (
            "early_stopping: {}\ntraining_search_space: {learning_rate: {type: log_uniform, low: 1e-4, high: 1.0}}",
            "YAML reads 1e-4 as text",
        ),
    ],
)
def test_bad_search_space(tmp_path: Path, text: str, message: str) -> None:
    """Each mistake is one line with the file, the key and the value."""
    path = tmp_path / "search.yaml"
    path.write_text(text)
    with pytest.raises(TrainingInputError) as caught:
        search_space.load(path)
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_absent_search_space(tmp_path: Path) -> None:
    """A file that is not there is named."""
    with pytest.raises(TrainingInputError, match="cannot be read: No such file"):
        search_space.load(tmp_path / "absent.yaml")

"""Optuna objectives in the style of its public examples: nothing here knows of anything but Optuna."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import optuna
from optuna.terminator import report_cross_validation_scores


def quadratic(trial: optuna.Trial) -> float:
    """One number in, one number out."""
    x = trial.suggest_float("x", -10, 10)
    return (x - 2) ** 2


def conditional(trial: optuna.Trial) -> float:
    """Another space for each kind of classifier, and as many parameters as there are layers."""
    kind = trial.suggest_categorical("classifier", ["SVC", "MLP"])
    if kind == "SVC":
        c = trial.suggest_float("svc_c", 1e-10, 1e10, log=True)
        return abs(math.log10(c) - 1)
    layers = trial.suggest_int("n_layers", 1, 3)
    units = [trial.suggest_int(f"n_units_l{i}", 4, 128, log=True) for i in range(layers)]
    dropout = trial.suggest_float("dropout", 0.2, 0.5, step=0.1)
    return abs(sum(units) - 100) / 100 + dropout


def two_objectives(trial: optuna.Trial) -> tuple[float, float]:
    """Binh and Korn: one value to be small, one to be large."""
    x = trial.suggest_float("x", 0, 5)
    y = trial.suggest_float("y", 0, 3)
    trial.set_user_attr("sum", x + y)
    return 4 * x**2 + 4 * y**2, -((x - 5) ** 2) - (y - 5) ** 2


def pruned(trial: optuna.Trial) -> float:
    """Logistic regression by gradient descent, its accuracy reported at each step."""
    random = np.random.default_rng(0)
    points = random.normal(size=(200, 5))
    labels = (points @ np.arange(1, 6) > 0).astype(float)
    rate = trial.suggest_float("rate", 1e-5, 10, log=True)
    weights = -np.arange(1, 6) / 2
    for step in range(10):
        likely = 1 / (1 + np.exp(-np.clip(points @ weights, -30, 30)))
        weights -= rate * points.T @ (likely - labels) / len(labels)
        accuracy = float(np.mean((points @ weights > 0) == labels))
        trial.report(accuracy, step)
        if trial.should_prune():
            raise optuna.TrialPruned
    return accuracy


def fails(trial: optuna.Trial) -> float | None:
    """A region where it cannot be computed, one where it is not a number, and one where it is infinite."""
    x = trial.suggest_categorical("x", ["good", "raises", "nan", "none", "infinite"])
    if x == "raises":
        raise ArithmeticError("singular matrix")
    return {"good": 1.0, "nan": float("nan"), "none": None, "infinite": float("inf")}[x]


def looks_around(trial: optuna.Trial) -> float:
    """What a trial can be asked for besides its parameters, and a study that is stopped by one of its trials."""
    x = trial.suggest_float("x", 0, 1)
    assert trial.suggest_float("x", 0, 1) == x
    assert trial.params == {"x": x} and set(trial.distributions) == {"x"}
    assert isinstance(trial, optuna.trial.BaseTrial) and trial.datetime_start is not None
    trial.set_user_attr("names", {"study": trial.study.study_name, "number": trial.number})
    assert trial.user_attrs["names"]["number"] == trial.number
    assert trial.study.direction is optuna.study.StudyDirection.MINIMIZE
    if any(t.state.is_finished() for t in trial.study.trials):
        assert trial.study.best_value == trial.study.best_trial.value
        trial.study.stop()
    return x


def keeps_an_artifact(trial: optuna.Trial) -> float:
    """Hands a file to Optuna's artifact store, and its cross-validation to Optuna's terminator."""
    folder = Path("artifacts")
    folder.mkdir(exist_ok=True)
    store = optuna.artifacts.FileSystemArtifactStore(folder)
    x = trial.suggest_float("x", 0, 1)
    assert isinstance(trial, optuna.Trial)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(str(x))
        file.flush()
        optuna.artifacts.upload_artifact(artifact_store=store, file_path=file.name, study_or_trial=trial)
    (kept,) = optuna.artifacts.get_all_artifact_meta(trial)
    trial.set_user_attr("artifact", kept.artifact_id)
    report_cross_validation_scores(trial, np.array([x, x + 0.5]))  # type: ignore[arg-type]  # as cross_val_score gives them
    trial.set_user_attr("count", {"n": np.int64(3)})
    return x


def leaves_the_beaten_track(trial: optuna.Trial) -> float:
    """Asks for something else than the trials before it: nobody could know."""
    x = trial.suggest_float("x", 0, 1)
    if trial.number % 2:
        return x + trial.suggest_float(f"only_in_{trial.number}", 0, 1)
    return x + trial.suggest_int("y", 0, 9)


def own_names(trial: optuna.Trial) -> float:
    """Says of its trial, under names that others use too, what it wants to be kept."""
    x = trial.suggest_float("x", 0, 1)
    for name, value in (
        ("epochs", 7),
        ("metrics", {"f1": x}),
        ("duration_s", "long"),
        ("error", None),
        ("model", "svm"),
    ):
        trial.set_user_attr(name, value)
    return x


def takes_a_reserved_name(trial: optuna.Trial) -> float:
    """Uses a name that this project needs for itself."""
    trial.set_user_attr("owner", "me")
    return 0.0


def slow_reports(trial: optuna.Trial) -> float:
    """Ten reports, two a second: time enough to be asked to leave."""
    x = trial.suggest_float("x", 0, 1)
    for step in range(20):
        trial.report(x + step, step)
        time.sleep(0.25)
    return x


def goes_on(trial: optuna.Trial) -> float:
    """Keeps a checkpoint, says how far it came, and goes on from there; under plain Optuna it runs through."""
    from scheduler import attempt

    x = trial.suggest_float("x", 0, 1)
    first = 0 if attempt.resume_from is None else int(attempt.resume_from.read_text())
    trial.set_user_attr("first", first)
    for step in range(first, 20):
        (attempt.folder / "checkpoint.pt").write_text(str(step + 1))
        attempt.checkpointed(attempt.folder / "checkpoint.pt", step)
        attempt.tick()
        trial.report(x + step, step)
        time.sleep(0.0 if attempt.folder.name in ("", ".") else 0.25)
    return x


RELAY = "import os\nwhile word := os.read(0, 1):\n    sum(range(75_000))\n    os.write(1, word)"  # works for 1 ms


def asks_often(trial: optuna.Trial) -> float:
    """How long an answer takes: a hundred parameters that no trial before could have told of.

    And how long a word takes meanwhile that is handed round by pipes between processes that work on it for about as
    long, and wait for nothing else. Whatever else the machine has to do makes both longer.
    """
    relays = [
        subprocess.Popen([sys.executable, "-S", "-c", RELAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        for _ in range(6)
    ]
    answers, rounds = [], []
    for number in range(100):
        began = time.perf_counter()
        trial.suggest_float(f"p{trial.number}_{number}", 0, 1)
        asked = time.perf_counter()
        for relay in relays:
            relay.stdin.write(b".")  # type: ignore[union-attr]
            relay.stdout.read(1)  # type: ignore[union-attr]
        answers.append(asked - began)
        rounds.append(time.perf_counter() - asked)
    for relay in relays:
        relay.communicate()
    trial.set_user_attr("answers_ms", [1000 * each for each in sorted(answers)])
    trial.set_user_attr("rounds_ms", [1000 * each for each in sorted(rounds)])
    return 0.0


def torch_net(trial: optuna.Trial) -> float:
    """A small network, built layer by layer as the trial says; accuracy after each epoch."""
    import torch

    torch.manual_seed(0)
    points = torch.randn(256, 8)
    labels = (points.sum(dim=1) > 0).long()
    layers: list[torch.nn.Module] = []
    width = 8
    for i in range(trial.suggest_int("n_layers", 1, 3)):
        units = trial.suggest_int(f"n_units_l{i}", 4, 64)
        layers += [torch.nn.Linear(width, units), torch.nn.ReLU()]
        layers += [torch.nn.Dropout(trial.suggest_float(f"dropout_l{i}", 0.0, 0.2))]
        width = units
    model = torch.nn.Sequential(*layers, torch.nn.Linear(width, 2))
    name = trial.suggest_categorical("optimizer", ["Adam", "SGD"])
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True))
    accuracy = 0.0
    for epoch in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(points), labels).backward()
        optimizer.step()
        accuracy = (model(points).argmax(dim=1) == labels).float().mean().item()
        trial.report(accuracy, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return accuracy


not_a_function = 3


def needs_two(trial: optuna.Trial, data: object) -> None:
    """Not an objective: somebody forgot a functools.partial."""


def random_seeded() -> optuna.samplers.RandomSampler:
    """A sampler of the user's."""
    return optuna.samplers.RandomSampler(seed=1)


def sized(params: Mapping[str, float]) -> str:
    """What a trial takes, by its parameters."""
    return f"{100 + int(params['x'])}MiB"


def not_a_sampler() -> str:
    """Returns the wrong thing."""
    return "random"

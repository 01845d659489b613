"""A whole batch of real trainings, end to end: ours beside what one would do without a scheduler.

    python -m tests.benchmarks.batch [--steps 3] [--rounds 3] [--each 12] [--ways NAME ...]

24 trials with fixed parameters (12 architectures of 2M, 12 of 20M, drawn once by a seed), each so many optimizer steps
of 256 samples of the built-in data and one validation. The ways take turns, in a new order each round:

- `ours`: the command, two studies, one slot a core, from its start to its exit;
- `ours bf16`: the same with `--recipe bf16_autocast`;
- `sequence`: the same trainings in one process, one after another, each with all cores;
- `two optuna`: two processes of plain Optuna share a study in SQLite; our trainings, each with half of the cores;
- `plain sequence`, `two plain optuna`: the same with the loop that a user would write (`tests.benchmarks.training`).

Prints the wall time of each and the ratio of ours to it in the same round. Imports are in all of them; a cluster and
its end are in ours. The losses of `ours`, `sequence` and `two optuna`, which train the same models, are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from training import batch_size, hpo, runtime
from training.progress import Silent

ROOT, HERE = Path(__file__).resolve().parents[2], "tests.benchmarks.batch"
BUDGETS, SEED, BATCH = ("2M", "20M"), 24, 256
FIXED: dict[str, Any] = {"learning_rate": 3e-4, "weight_decay": 1e-3, "warmup_steps": 100, "dropout": 0.1, "epochs": 1}
MOST_OF_SEQUENCE, LEAST_OVER_PLAIN = 0.55, 3.0


# -- the trials -----------------------------------------------------------------------------------------------------


def trials(budget: str, count: int) -> list[dict[str, Any]]:
    """Return the parameters of that many trials, always the same."""
    shuffled = hpo.candidates({"budget": budget})
    random.Random(f"{SEED}/{budget}").shuffle(shuffled)
    return [{**shape, **FIXED, **batch_size.batch_config(BATCH, BATCH)} for shape in shuffled[:count]]


def sample(trial: Any, context: Mapping[str, Any], architectures: Any, fit: Any) -> dict[str, Any]:
    """Give a study's n-th trial the n-th parameters: `training.sample` of the command."""
    return {**trials(context["budget"], trial.number + 1)[trial.number], "recipe": context["recipe"]}


def context_of(budget: str, steps: int) -> dict[str, Any]:
    """What the command gives our objective."""
    return {"budget": budget, "horizon": 1, "max_steps": steps, "seed": 0, "early_stopping": {}}


def train(budget: str, params: Mapping[str, Any], steps: int, threads: int) -> float:
    """Train with our loop; return the validation loss."""
    import torch

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        task = {"params": params, "context": context_of(budget, steps), "folder": folder, "threads": threads}
        return float(hpo.objective(task, Silent())["value"])


def train_plainly(budget: str, params: Mapping[str, Any], steps: int, threads: int) -> float:
    """Train with the loop that a user would write: Adam, the whole batch at once."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from tests.benchmarks.training import plain_model
    from training import data

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dataset = data.load(None, 1, 60)
    parts = [TensorDataset(*hpo.samples(dataset, part, "cpu")) for part in (dataset.train, dataset.validation)]
    model = plain_model(
        params["d_model"],
        params["n_layers"],
        features=dataset.n_features,
        heads=params["n_heads"],
        d_ff=params["d_ff"],
        dropout=params["dropout"],
    )
    optimizer, loss_of = torch.optim.Adam(model.parameters(), lr=params["learning_rate"]), nn.BCEWithLogitsLoss()
    for step, (x, y) in enumerate(DataLoader(parts[0], batch_size=BATCH, shuffle=True, drop_last=True), 1):
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
        if step == steps:
            break
    model.eval()
    with torch.no_grad():
        losses = [(len(y), loss_of(model(x), y).item()) for x, y in DataLoader(parts[1], batch_size=BATCH)]
    return float(sum(n * loss for n, loss in losses) / sum(n for n, _ in losses))


# -- the ways -------------------------------------------------------------------------------------------------------

Values = dict[tuple[str, int], float]


def ours(each: int, steps: int, recipe: str = "fp32_adamw") -> Values:
    """Run the command; return the validation loss of each trial."""
    import optuna

    with tempfile.TemporaryDirectory() as root:
        config = Path(root) / "settings.yaml"
        config.write_text(json.dumps({"training": {"sample": f"{HERE}:sample"}}))
        command = [
            sys.executable, "-m", "scheduler", "--config", str(config), "--budgets", ",".join(BUDGETS),
            "--horizons", "1", "--trials", str(each), "--max-steps", str(steps), "--runs-dir", root, "--name", "batch",
            "--dashboard", "off", "--pruner", "none", "--recipe", recipe,
        ]  # fmt: skip
        environment = {**os.environ, "HEADROOM_HOST_DIR": f"{root}/host", "HEADROOM_WARM_START": "0"}
        _run([command], environment)
        storage = f"sqlite:///{root}/batch/study.db"
        return {
            (budget, trial.number): trial.value
            for budget in BUDGETS
            for trial in optuna.load_study(study_name=f"batch_{budget}_h1", storage=storage).trials
            if trial.value is not None
        }


def sequence(each: int, steps: int, how: str = "ours") -> Values:
    """One process, one trial after another, each with all cores."""
    return _children("sequence", 1, each, steps, how)


def two_optuna(each: int, steps: int, how: str = "ours") -> Values:
    """Two processes of plain Optuna on a study in SQLite."""
    return _children("optuna", 2, each, steps, how)


def _children(kind: str, processes: int, each: int, steps: int, how: str) -> Values:
    with tempfile.TemporaryDirectory() as root:
        threads = max(1, (os.cpu_count() or 1) // processes)
        if kind == "optuna":
            import optuna

            optuna.logging.set_verbosity(optuna.logging.WARNING)
            optuna.create_study(study_name="batch", storage=f"sqlite:///{root}/study.db")
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        if how == "ours":  # the environment that the command gives a trial
            settings = runtime.environment({"threads": threads})
            environment = {k: v for k, v in {**environment, **settings}.items() if v is not None}
        arguments = [sys.executable, "-m", HERE, "--child", kind, how, root, str(threads)]
        arguments += ["--each", str(each), "--steps", str(steps)]
        _run([arguments] * processes, environment)
        lines = [line for path in Path(root).glob("values-*") for line in path.read_text().splitlines()]
        return {(budget, number): value for budget, number, value in map(json.loads, lines)}


def child(kind: str, how: str, root: str, threads: int, each: int, steps: int) -> None:
    """Train the trials in turn, or those that Optuna gives."""
    method = train if how == "ours" else train_plainly
    with (Path(root) / f"values-{os.getpid()}").open("w", encoding="utf-8") as file:

        def one(budget: str, number: int) -> float:
            value = method(budget, trials(budget, each)[number], steps, threads)
            file.write(json.dumps([budget, number, value]) + "\n")
            return value

        if kind == "sequence":
            for budget, number in _all(each):
                one(budget, number)
            return
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.load_study(study_name="batch", storage=f"sqlite:///{root}/study.db")

        def objective(trial: optuna.Trial) -> float:
            # By number: of trials that were enqueued, two processes have been seen to take the same one.
            if trial.number >= 2 * each:
                study.stop()
                raise optuna.TrialPruned
            return one(*_all(each)[trial.number])

        study.optimize(objective)


def _all(each: int) -> list[tuple[str, int]]:
    return [(budget, number) for number in range(each) for budget in BUDGETS]


def _run(commands: Sequence[Sequence[str]], environment: Mapping[str, str]) -> None:
    """Run these at the same time, to the end."""
    quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "cwd": ROOT}
    processes = [subprocess.Popen(command, env=environment, **quiet) for command in commands]
    if any(statuses := [process.wait() for process in processes]):
        raise SystemExit(f"ended with {statuses}")


WAYS: dict[str, Callable[[int, int], Values]] = {
    "ours": ours,
    "ours bf16": lambda each, steps: ours(each, steps, "bf16_autocast"),
    "sequence": sequence,
    "two optuna": two_optuna,
    "plain sequence": lambda each, steps: sequence(each, steps, "plain"),
    "two plain optuna": lambda each, steps: two_optuna(each, steps, "plain"),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--each", type=int, default=12, help="trials of each budget")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        kind, how, root, threads = chosen.child
        child(kind, how, root, int(threads), chosen.each, chosen.steps)
        return
    times: dict[str, list[float]] = {name: [] for name in chosen.ways}
    values: dict[str, Values] = {}
    for round_ in range(chosen.rounds):
        for name in random.Random(round_).sample(chosen.ways, len(chosen.ways)):
            began = time.monotonic()
            found = WAYS[name](chosen.each, chosen.steps)
            times[name].append(time.monotonic() - began)
            if set(found) != set(_all(chosen.each)):
                raise SystemExit(f"{name} ended {len(found)} of {len(_all(chosen.each))} trials")
            values[name] = found
            print(f"round {round_ + 1}: {name:<17}{times[name][-1]:7.1f} s", flush=True)
    print(f"\n{2 * chosen.each} trials, {chosen.steps} steps each, {os.cpu_count()} cores; medians of {chosen.rounds}")
    for name in chosen.ways:
        ratios = [ours / other for ours, other in zip(times.get("ours", []), times[name], strict=False)]
        of = f"   ours / it {statistics.median(ratios):.2f}" if ratios else ""
        print(f"{name:<17}{statistics.median(times[name]):7.1f} s{of}")
    for name in sorted({"sequence", "two optuna"} & set(values)) if "ours" in values else ():
        apart = max(abs(values[name][key] - values["ours"][key]) for key in values["ours"])
        print(f"largest difference of a loss between ours and {name}: {apart:.2g}")


if __name__ == "__main__":
    main()

"""Collect short real trainings of the 2M budget for the search benchmark: `python -m tests.benchmarks.short_trainings`.

Appends to tests/benchmarks/data/short-2M.csv until it holds all points (one at a time; stop and start it as you like).
A point is the project's own objective on its built-in data: an architecture of the budget and training parameters of
configs/hpo/architectural_search.yaml, drawn from a scrambled Sobol sequence. Two epochs with an effective batch of 16
are some 450 optimizer steps, so that learning rate and warm-up matter as they do in a long training. The first
REPEATED points are trained with SEEDS seeds each: their spread is the noise of a value.
"""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path
from typing import Any

from scipy.stats import qmc

from training import arch_grid, batch_size, hpo, search_space
from training.progress import Silent

FILE = Path(__file__).parent / "data" / "short-2M.csv"
POINTS, REPEATED, SEEDS = 96, 8, 3
EPOCHS, BATCH = 2, 16
COLUMNS = ("point", "seed", "architecture", "d_model", "n_layers", "n_heads", "d_ff", "learning_rate", "weight_decay",
           "warmup_steps", "dropout", "epoch_1", "epoch_2", "value", "seconds")  # fmt: skip


class Curve(Silent):
    """The trial's side of the protocol: keeps the validation losses."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def report(self, step: int, value: float) -> None:
        """Keep one epoch's loss."""
        self.values.append(value)


def points() -> list[dict[str, Any]]:
    """Every point's parameters, always the same."""
    grid, space = arch_grid.architectures("2M"), search_space.load()["training_search_space"]
    names = ("learning_rate", "weight_decay", "dropout")
    found = []
    for unit in qmc.Sobol(d=5, seed=20261124).random(256)[:POINTS]:
        params: dict[str, Any] = {"architecture": int(unit[0] * len(grid))}
        choices = space["warmup_steps"]["choices"]
        params["warmup_steps"] = choices[int(unit[1] * len(choices))]
        for u, name in zip(unit[2:], names, strict=True):
            low, high, log = space[name]["low"], space[name]["high"], space[name]["type"] == "log_uniform"
            params[name] = float(low * (high / low) ** u if log else low + u * (high - low))
        found.append(params)
    return found


def train(params: dict[str, Any], seed: int) -> dict[str, Any]:
    """One training; returns the row's last columns."""
    a = arch_grid.architectures("2M")[params["architecture"]]
    shape = {"d_model": a.d_model, "n_layers": a.n_layers, "n_heads": a.n_heads, "d_ff": a.d_ff}
    task = {
        "params": {**params, **shape, "epochs": EPOCHS, **batch_size.batch_config(BATCH, BATCH)},
        "context": {"budget": "2M", "horizon": 1, "seed": seed},
        "threads": 1,
    }
    curve, began = Curve(), time.monotonic()
    value = hpo.objective(task, curve)["value"]
    epochs = {f"epoch_{n}": round(v, 6) for n, v in enumerate(curve.values, 1)}
    return {**shape, **epochs, "value": round(value, 6), "seconds": round(time.monotonic() - began, 1)}


def main(at_most: str = "1000") -> None:
    """Train what is missing, at most so many now."""
    rows = list(csv.DictReader(FILE.open())) if FILE.exists() else []
    have = {(int(row["point"]), int(row["seed"])) for row in rows}
    drawn = points()
    wanted = [(point, point) for point in range(POINTS)]
    wanted += [(point, 1000 * n + point) for n in range(1, SEEDS) for point in range(REPEATED)]
    missing = [key for key in wanted if key not in have][: int(at_most)]
    with FILE.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not rows:
            writer.writeheader()
        for point, seed in missing:
            writer.writerow({"point": point, "seed": seed, **drawn[point], **train(drawn[point], seed)})
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])

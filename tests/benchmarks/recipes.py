"""What a recipe does to the result: validation loss after the same epochs, less fp32 AdamW's, paired.

    .venv/bin/python -m tests.benchmarks.recipes --save FILE [--budgets 2M,20M] [--pairs 8] [--epochs 3] [--minutes 30]

A pair is an architecture of the budget with learning rate, weight decay, warm-up, dropout and a seed, drawn once for
all recipes: initial weights, order of the samples and dropout are the same, as far as a recipe holds the same numbers.
Trained are the last BARS days of the built-in data with an effective batch of BATCH, so that a few epochs are some
hundred optimizer steps. `fp32_recompute` is left out: it is fp32 AdamW to the bit (tests/training/test_recipes.py).

The pairs go in order and a pair is whole before the next begins, so that what is there at any time is paired. Started
again with the same --save it goes on where it stopped; --minutes ends it after the training that is under way. Prints,
for each budget and recipe: pairs, mean difference (above 0 is worse than fp32 AdamW), its 95 % interval by Student's t,
the worst pair, how many diverged (a loss that is no number, or more than log 2 above fp32's), and the spread that the
seed alone makes, from pairs of fp32 AdamW trainings that differ in nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scipy import stats

from tests.benchmarks.footprint_trials import write_bars
from tests.benchmarks.short_trainings import Curve
from training import arch_grid, batch_size, hpo, search_space
from training.errors import NonFiniteLoss
from training.recipe import FP32_ADAMW, RECIPES

SEED, BARS, BATCH, MICRO_BATCH = 20261124, 1200, 32, 16
REFERENCE, OTHER_SEED = FP32_ADAMW.name, "fp32_adamw, another seed"
JUDGED = tuple(r.name for r in RECIPES if r.name not in (REFERENCE, "fp32_recompute"))
GUESSING = math.log(2)
MOST_LAYERS = 64  # deeper ones take minutes an epoch for their many small kernels


def pairs(budget: str, count: int) -> list[dict[str, Any]]:
    """Architectures and training parameters, always the same."""
    rng = random.Random(f"{SEED}/{budget}")
    grid = [a for a in arch_grid.architectures(budget) if a.n_layers <= MOST_LAYERS]
    space = search_space.load()["training_search_space"]
    found = []
    for number in range(count):
        a = rng.choice(grid)
        params: dict[str, Any] = {"d_model": a.d_model, "n_layers": a.n_layers, "n_heads": a.n_heads, "d_ff": a.d_ff}
        for name in ("learning_rate", "weight_decay", "dropout"):
            low, high, log = space[name]["low"], space[name]["high"], space[name]["type"] == "log_uniform"
            unit = rng.random()
            params[name] = float(low * (high / low) ** unit if log else low + unit * (high - low))
        params["warmup_steps"] = 20
        found.append({"params": params, "seed": number})
    return found


def train(pair: dict[str, Any], recipe: str, epochs: int, bars: Path) -> dict[str, Any]:
    """Train it once. Returns value (the last epoch's validation loss, None when it diverged) and seconds."""
    seed = pair["seed"] + (1000 if recipe == OTHER_SEED else 0)
    task = {
        "params": {**pair["params"], "epochs": epochs, **batch_size.batch_config(MICRO_BATCH, BATCH)},
        "context": {
            "horizon": 1,
            "seed": seed,
            "data": str(bars),
            "recipe": REFERENCE if recipe == OTHER_SEED else recipe,
        },
        "threads": 1,
    }
    curve, began = Curve(), time.process_time()
    try:
        hpo.objective(task, curve)
    except NonFiniteLoss:
        return {"value": None, "seconds": time.process_time() - began}
    return {"value": curve.values[-1], "curve": curve.values, "seconds": round(time.process_time() - began, 1)}


def report(known: list[dict[str, Any]], budget: str, epochs: int) -> None:
    """The table of one budget."""
    runs = {(k["pair"], k["recipe"]): k for k in known if (k["budget"], k["epochs"]) == (budget, epochs)}
    print(f"\n{budget}, {epochs} epochs: validation loss less that of {REFERENCE}")
    print(f"{'':<28} {'pairs':>5} {'mean':>9} {'95 %':>20} {'worst':>9} {'diverged':>8} {'CPU':>6}")
    for name in (*JUDGED, OTHER_SEED):
        here = [number for number, recipe in runs if recipe == name and (number, REFERENCE) in runs]
        both = [(runs[n, name]["value"], runs[n, REFERENCE]["value"]) for n in here]
        diverged = sum(value is None or (r is not None and value > r + GUESSING) for value, r in both)
        found = [value - reference for value, reference in both if value is not None and reference is not None]
        if not found:
            continue
        ratio = statistics.median(runs[n, name]["seconds"] / runs[n, REFERENCE]["seconds"] for n in here)
        interval = "-"
        if len(found) > 1:
            half = stats.t.ppf(0.975, len(found) - 1) * statistics.stdev(found) / math.sqrt(len(found))
            interval = f"[{statistics.mean(found) - half:+.4f}, {statistics.mean(found) + half:+.4f}]"
        print(
            f"{name:<28} {len(found):>5} {statistics.mean(found):>+9.4f} {interval:>20} {max(found):>+9.4f} "
            f"{diverged:>8} {ratio:>6.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, required=True, metavar="FILE")
    parser.add_argument("--budgets", default="2M,20M")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=math.inf)
    arguments = parser.parse_args()
    known: list[dict[str, Any]] = json.loads(arguments.save.read_text()) if arguments.save.exists() else []
    have = {(k["budget"], k["epochs"], k["pair"], k["recipe"]) for k in known}
    until = time.monotonic() + 60 * arguments.minutes
    budgets = [budget.strip() for budget in arguments.budgets.split(",")]
    with tempfile.TemporaryDirectory(prefix="recipes-") as folder:
        bars = write_bars(Path(folder), 25, BARS)
        for budget in budgets:
            for number, pair in enumerate(pairs(budget, arguments.pairs)):
                for recipe in (REFERENCE, *JUDGED, OTHER_SEED):
                    key = (budget, arguments.epochs, number, recipe)
                    if key in have or time.monotonic() > until:
                        continue
                    found = train(pair, recipe, arguments.epochs, bars)
                    known.append({**dict(zip(("budget", "epochs", "pair", "recipe"), key, strict=True)), **found})
                    arguments.save.write_text(json.dumps(known))
                    print(f"{budget} {number} {recipe}: {found['value']} {found['seconds']} s", file=sys.stderr)
    for budget in budgets:
        report(known, budget, arguments.epochs)


if __name__ == "__main__":
    main()

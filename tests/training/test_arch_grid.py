"""The architecture grid, its parameter counts, and the batch configuration."""

from __future__ import annotations

from typing import Any

import pytest

from training import batch_size, footprint, hpo
from training.arch_grid import BUDGETS, architectures, param_count
from training.batch_size import get_memory_safe_batch_config
from training.errors import TrainingInputError

GIB = 2**30


# -- the tests the source plan names --------------------------------------------------------------------------------


def config(*args: Any, **kwargs: Any) -> dict[str, int]:
    """`get_memory_safe_batch_config` where something fits."""
    found = get_memory_safe_batch_config(*args, **kwargs)
    assert found is not None
    return found


def test_get_memory_safe_batch_config_small_model() -> None:
    """d=256, L=16 trains with the full batch at once."""
    assert config(256, 16) == {
        "micro_batch": 256,
        "accumulation_steps": 1,
        "effective_batch": 256,
    }


def test_get_memory_safe_batch_config_medium_model() -> None:
    """d=768, L=32 trains with 256, as the plan's code and table say (its test list leaves 128 or 256 open)."""
    assert config(768, 32)["micro_batch"] == 256


def test_get_memory_safe_batch_config_large_model() -> None:
    """d=1024, L=256: 128 without a limit, 64 or less on a 128 GB Mac.

    The plan's test list asks for 64, its code and table give 128 (d^2 L = 2^28). The tier sees weights only, and batch
    128 is the configuration that took 115 GB; so the tier stays as published and the memory limit brings it down.
    """
    assert config(1024, 256)["micro_batch"] == 128
    limited = config(1024, 256, memory_limit_bytes=int(0.9 * 128 * GIB), d_ff=2048, context={"device": "mps"})
    assert 16 <= limited["micro_batch"] <= 64
    assert limited["effective_batch"] == 256


def test_get_memory_safe_batch_config_xlarge_model() -> None:
    """d=2048, L=64: 128 without a limit, less on a machine where that does not fit.

    The plan's test list asks for 32, but the model has the very score d^2 L = 2^28 of d=1024, L=256, for which the
    plan's code and table give 128.
    """
    assert config(2048, 64)["micro_batch"] == 128
    limited = config(2048, 64, memory_limit_bytes=40 * GIB, d_ff=4096)
    assert limited["micro_batch"] < 128


@pytest.mark.parametrize("limit", [None, 64 * GIB, 200 * GIB])
def test_effective_batch_maintained(limit: int | None) -> None:
    """micro_batch x accumulation_steps is the target for every architecture that fits."""
    for budget in BUDGETS:
        for a in architectures(budget):
            batch = get_memory_safe_batch_config(
                a.d_model, a.n_layers, memory_limit_bytes=limit, n_heads=a.n_heads, d_ff=a.d_ff
            )
            if batch is not None:
                assert batch["micro_batch"] * batch["accumulation_steps"] == batch["effective_batch"] == 256


# -- the batch configuration beyond the plan ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("d_model", "n_layers", "micro_batch"),
    [(256, 192, 256), (768, 32, 256), (768, 256, 128), (1024, 256, 128), (1536, 64, 128), (2048, 32, 128)],
)
def test_published_table(d_model: int, n_layers: int, micro_batch: int) -> None:
    """The plan's table of memory estimates holds, row by row."""
    batch = config(d_model, n_layers)
    assert batch["micro_batch"] == micro_batch and batch["effective_batch"] == 256


@pytest.mark.parametrize(
    ("n_layers", "micro_batch"), [(100, 256), (101, 128), (500, 128), (501, 64), (1500, 64), (1501, 32), (3001, 16)]
)
def test_tiers_end_where_the_plan_says(n_layers: int, micro_batch: int) -> None:
    """The boundaries 0.1, 0.5, 1.5 and 3.0 belong to the tier below (d=1000 makes the score n_layers / 1000)."""
    assert batch_size.published_micro_batch(1000, n_layers) == micro_batch


def test_limit_gives_the_largest_power_of_two_that_fits() -> None:
    """With a limit the answer fits, the double of it does not (or is above the tier), and it is a power of two."""
    a = architectures("200M")[40]
    params = {"d_model": a.d_model, "n_layers": a.n_layers, "n_heads": a.n_heads, "d_ff": a.d_ff}

    def need(micro_batch: int) -> int:
        return int(footprint.estimate({**params, "micro_batch": micro_batch}, {})["host_bytes"])

    for micro_batch in (1, 4, 32):
        for limit in (need(micro_batch), need(2 * micro_batch) - 1):
            batch = config(**params, memory_limit_bytes=limit)
            assert batch["micro_batch"] == micro_batch


def test_does_not_fit_is_an_answer() -> None:
    """2B parameters in fp32 with AdamW do not fit 24 GiB at any micro-batch: None, not batch 1 for ever."""
    assert get_memory_safe_batch_config(1024, 256, memory_limit_bytes=24 * GIB) is None


def test_factor_makes_it_smaller() -> None:
    """Observed peaks above the prediction shrink the micro-batch."""
    plain = config(512, 64, memory_limit_bytes=12 * GIB)
    wary = config(512, 64, memory_limit_bytes=12 * GIB, factor=2.0)
    assert wary["micro_batch"] < plain["micro_batch"]


def test_micro_batch_is_at_most_the_target() -> None:
    """A target below the tier is not exceeded."""
    assert config(64, 2, target_effective_batch=32)["micro_batch"] == 32


def test_silly_target_is_refused() -> None:
    """A target below 1 is a user's mistake with a message."""
    with pytest.raises(TrainingInputError, match="at least 1, not 0"):
        get_memory_safe_batch_config(64, 2, target_effective_batch=0)


# -- the grid -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
def test_grid_is_within_tolerance_sorted_and_unique(budget: str) -> None:
    """Each architecture is within 25 % of its budget, buildable, and listed once, in a stable order."""
    grid = architectures(budget)
    assert len(grid) >= 20
    keys = [(a.d_model, a.n_layers, a.d_ff, a.n_heads) for a in grid]
    assert keys == sorted(set(keys))
    for a in grid:
        assert abs(a.param_count - BUDGETS[budget]) <= 0.25 * BUDGETS[budget]
        assert a.d_model % a.n_heads == 0 and a.d_model // a.n_heads >= 2
        assert a.d_ff in (2 * a.d_model, 4 * a.d_model)


def test_grid_has_the_case_that_started_all_this() -> None:
    """d_model=1024, n_layers=256 is in the 2B grid: the search space was not cut to fit."""
    assert any((a.d_model, a.n_layers) == (1024, 256) for a in architectures("2B"))


@pytest.mark.parametrize(
    "shape",
    [{}, {"n_features": 31}, {"context_length": 80, "patch_length": 16, "stride": 8}],
)
def test_param_count_is_exact(shape: dict[str, int]) -> None:
    """The count equals the real model's, for other inputs too."""
    for d_model, n_layers, n_heads, d_ff in ((64, 3, 4, 128), (192, 2, 2, 768)):
        params = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "d_ff": d_ff, "dropout": 0.1}
        model = hpo.build_model(params, shape, shape.get("n_features", 25))
        assert param_count(d_model, n_layers, d_ff, **shape) == sum(p.numel() for p in model.parameters())


def test_budget_names() -> None:
    """Budgets are known in either case; an unknown one is an error that lists the known."""
    assert architectures("2m") == architectures("2M")
    with pytest.raises(TrainingInputError, match="unknown budget '5M': choose from 2M, 20M, 200M, 2B"):
        architectures("5M")

"""The architectures of a parameter budget, and their exact parameter count.

Covers the grid of d_model x n_layers x d_ff x n_heads and `param_count`. Does not know how many bytes a training step
takes (`training.footprint` does), nor with which batch one trains (`training.batch_size`). Imports neither torch nor
numpy, because the scheduler's driver asks for architectures and never trains.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

from training.errors import TrainingInputError

BUDGETS: dict[str, int] = {"2M": 2_000_000, "20M": 20_000_000, "200M": 200_000_000, "2B": 2_000_000_000}
TOLERANCE = 0.25  # an architecture belongs to a budget when its count is within this part of it

D_MODELS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
N_LAYERS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 180, 192, 256)
N_HEADS = (2, 4, 8, 16, 32)
FF_RATIOS = (2, 4)
# Below two numbers a head has no direction left to attend by. Every combination of the lists above meets this (64 / 32
# is the narrowest): the bound is for grids that somebody extends. Head count changes neither parameters nor, much, the
# quality of a head of 2..1024 that the search is there to judge, so nothing more is cut from the user's search space.
MIN_HEAD_DIM = 2


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Architecture:
    """One point of the grid."""

    d_model: int
    n_layers: int
    d_ff: int
    n_heads: int
    param_count: int


def token_count(context_length: int = 60, patch_length: int = 10, stride: int = 5) -> int:
    """How many patches (tokens) a window is cut into."""
    return (context_length - patch_length) // stride + 1


def param_count(
    d_model: int,
    n_layers: int,
    d_ff: int,
    n_features: int = 25,
    context_length: int = 60,
    patch_length: int = 10,
    stride: int = 5,
) -> int:
    """Exact number of parameters of `training.patchtst.PatchTST` (a test compares it with the real model)."""
    tokens = token_count(context_length, patch_length, stride)
    attention = 4 * d_model**2 + 4 * d_model
    feed_forward = 2 * d_model * d_ff + d_ff + d_model
    norms = 4 * d_model
    embedding = patch_length * n_features * d_model + d_model
    positions = tokens * d_model
    final_norm = 2 * d_model
    head = tokens * d_model + 1
    return n_layers * (attention + feed_forward + norms) + embedding + positions + final_norm + head


def budget_params(budget: str) -> int:
    """Return the number of parameters a budget's name stands for. Raises TrainingInputError for an unknown name."""
    try:
        return BUDGETS[budget.upper()]
    except KeyError:
        raise TrainingInputError(f"unknown budget {budget!r}: choose from {', '.join(BUDGETS)}") from None


@functools.cache
def architectures(
    budget: str,
    n_features: int = 25,
    context_length: int = 60,
    patch_length: int = 10,
    stride: int = 5,
) -> tuple[Architecture, ...]:
    """Every architecture of a budget, sorted by d_model, n_layers, d_ff, n_heads.

    The order is stable: an index into it means the same architecture in every process. It is no axis to search along,
    since depth and heads start again at each width.
    """
    target = budget_params(budget)
    found = []
    for d_model, n_layers, ratio, n_heads in itertools.product(D_MODELS, N_LAYERS, FF_RATIOS, N_HEADS):
        if d_model % n_heads or d_model // n_heads < MIN_HEAD_DIM:
            continue
        d_ff = ratio * d_model
        count = param_count(d_model, n_layers, d_ff, n_features, context_length, patch_length, stride)
        if abs(count - target) <= TOLERANCE * target:
            found.append(
                Architecture(d_model=d_model, n_layers=n_layers, d_ff=d_ff, n_heads=n_heads, param_count=count)
            )
    return tuple(sorted(found))

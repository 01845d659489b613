"""The batch an architecture trains with: the published tier, and the largest micro-batch whose footprint fits.

Covers how the effective batch is reached, by micro-batch and gradient accumulation. Imports neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training import footprint
from training.arch_grid import param_count
from training.context import Context
from training.errors import TrainingInputError

METAL_SHARE = 0.75  # of RAM, what Metal can safely hold (torch.mps.recommended_max_memory)


def published_micro_batch(d_model: int, n_layers: int) -> int:
    """Return the source plan's tier: a micro-batch by d_model^2 x n_layers.

    It sees the weights only, while activations grow with d_model x n_layers x micro-batch: an upper bound to try, not
    a promise that it fits.
    """
    memory_score = d_model**2 * n_layers / 1e9
    if memory_score <= 0.1:
        return 256
    if memory_score <= 0.5:
        return 128
    if memory_score <= 1.5:
        return 64
    if memory_score <= 3.0:
        return 32
    return 16


def micro_batch(
    params: Mapping[str, Any],
    context: Mapping[str, Any],
    limit_bytes: int,
    device_limit_bytes: int | None = None,
    factor: float = 1.0,
    target_effective_batch: int = 256,
) -> int | None:
    """Return the largest power of two, at most the published tier, whose footprint times `factor` fits; None: not even
    1."""
    tier = published_micro_batch(int(params["d_model"]), int(params["n_layers"]))
    if device_limit_bytes is None and Context.of(context).device == "mps":
        device_limit_bytes = int(METAL_SHARE * limit_bytes)
    size = min(tier, _power_of_two(target_effective_batch))
    while size >= 1:
        need = footprint.estimate({**params, "micro_batch": size}, context)
        if need["host_bytes"] * factor <= limit_bytes and (
            device_limit_bytes is None or need["device_bytes"] * factor <= device_limit_bytes
        ):
            return size
        size //= 2
    return None


def get_memory_safe_batch_config(
    d_model: int,
    n_layers: int,
    target_effective_batch: int = 256,
    *,
    memory_limit_bytes: int | None = None,
    device_limit_bytes: int | None = None,
    factor: float = 1.0,
    n_heads: int = 8,
    d_ff: int | None = None,
    context: Mapping[str, Any] | None = None,
) -> dict[str, int] | None:
    """Return how to reach the effective batch: micro-batch, accumulation steps, and their product.

    Without a memory limit this is the published tier. With one the tier is an upper bound, and the largest power of
    two whose footprint fits is taken.

    Args:
        d_model: Width.
        n_layers: Depth.
        target_effective_batch: Samples per optimizer step; a power of two keeps it exact.
        memory_limit_bytes: Host memory (on unified memory, all of it) the trial may take.
        device_limit_bytes: The same for the device's own pool or cap; None where there is none.
        factor: What the footprint is multiplied with before it is compared (observed / predicted so far).
        n_heads: Heads; they weigh in the attention matrices only.
        d_ff: Width of the feed-forward part; None means 4 x d_model, the larger of the grid's two.
        context: The study's context (device, allocator, threads, ...), None for its defaults.

    Returns:
        `micro_batch`, `accumulation_steps`, `effective_batch`; or None: not even a micro-batch of 1 fits.

    """
    if target_effective_batch < 1:
        raise TrainingInputError(f"target_effective_batch must be at least 1, not {target_effective_batch}")
    size: int | None = min(published_micro_batch(d_model, n_layers), _power_of_two(target_effective_batch))
    if memory_limit_bytes is not None:
        d_ff = 4 * d_model if d_ff is None else d_ff
        params = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "d_ff": d_ff}
        params["param_count"] = param_count(d_model, n_layers, d_ff)
        size = micro_batch(
            params,
            dict(context or {}),
            memory_limit_bytes,
            device_limit_bytes,
            factor=factor,
            target_effective_batch=target_effective_batch,
        )
    if size is None:
        return None
    return batch_config(size, target_effective_batch)


def batch_config(micro_batch: int, target_effective_batch: int = 256) -> dict[str, int]:
    """Complete a micro-batch to the effective batch."""
    steps = max(1, target_effective_batch // micro_batch)
    return {"micro_batch": micro_batch, "accumulation_steps": steps, "effective_batch": micro_batch * steps}


def _power_of_two(n: int) -> int:
    """Return the largest power of two not above n."""
    return 1 << (n.bit_length() - 1)

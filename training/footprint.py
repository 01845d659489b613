"""How many bytes a training attempt takes at its peak, by component, before it starts.

Covers the closed formula for `patchtst.PatchTST` under `trainer.Trainer`, and the largest micro-batch that fits a
limit. Pure arithmetic in microseconds: no torch, no I/O, so that the driver sizes a whole grid at once. The
correction by observed peaks is not here: see scheduler/policy/footprint.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training import runtime
from training.arch_grid import param_count, published_micro_batch, token_count

MIB = 2**20
# On Apple's unified memory the only observation there is (d=1024, L=256, batch 128: 115 GB) is about twice the
# formula. Until a study has observed peaks of its own on that device, twice the formula is the prior.
MPS_FACTOR = 2.0
METAL_SHARE = 0.75  # of RAM, what Metal can safely hold (torch.mps.recommended_max_memory)


def estimate(params: Mapping[str, Any], context: Mapping[str, Any]) -> dict[str, Any]:
    """Peak bytes of one attempt: host_bytes, device_bytes, components (their sum is host + device), family."""
    d, layers, f = int(params["d_model"]), int(params["n_layers"]), int(params["d_ff"])
    batch = int(params.get("micro_batch", 1))
    features, length = int(context.get("n_features", 25)), int(context.get("context_length", 60))
    patch, stride = int(context.get("patch_length", 10)), int(context.get("stride", 5))
    tokens = token_count(length, patch, stride)
    weights = 4 * param_count(d, layers, f, features, length, patch, stride)
    u = 4 * batch * tokens * d
    layer = u * (8.5 + 2.25 * f / d)
    components = {
        "runtime": 330 * MIB,
        "weights": weights,
        "gradients": weights,
        "optimizer_state": 2 * weights,
        "activations": int(layers * layer + batch * tokens * features * patch * 4 + 4 * u),
        "workspace": int(4 * max(3 * d * d, d * f) + u * (2 + 2 * f / d)),
        "data": 8 * MIB,
    }
    device = str(context.get("device", "cpu"))
    family = f"patchtst/{device}/{runtime.allocator(context)}"
    total = sum(components.values())
    if device == "mps":
        components["metal"] = int(total * (MPS_FACTOR - 1))
        total += components["metal"]
        on_device = total
    elif device == "cuda":
        on_device = total - components["runtime"]
        total = components["runtime"] + components["data"]
    else:
        on_device = 0
    return {"host_bytes": total, "device_bytes": on_device, "components": components, "family": family}


def micro_batch(
    params: Mapping[str, Any],
    context: Mapping[str, Any],
    limit_bytes: int,
    device_limit_bytes: int | None = None,
    factor: float = 1.0,
    target_effective_batch: int = 256,
) -> int | None:
    """The largest power of two, at most the published tier, whose footprint times `factor` fits; None: not even 1."""
    tier = published_micro_batch(int(params["d_model"]), int(params["n_layers"]))
    if device_limit_bytes is None and context.get("device") == "mps":
        device_limit_bytes = int(METAL_SHARE * limit_bytes)
    size = min(tier, 1 << (target_effective_batch.bit_length() - 1))
    while size >= 1:
        need = estimate({**params, "micro_batch": size}, context)
        if need["host_bytes"] * factor <= limit_bytes and (
            device_limit_bytes is None or need["device_bytes"] * factor <= device_limit_bytes
        ):
            return size
        size //= 2
    return None

"""How many bytes a training attempt takes at its peak, by component, before it starts.

Covers the formula for `patchtst.PatchTST` under `trainer.Trainer`, and the largest micro-batch that fits a limit. Pure
arithmetic in microseconds: no torch, no I/O, so that the driver sizes a whole grid at once. The correction by observed
peaks is not here: see scheduler/policy/footprint.py.

The formula (fp32; B micro-batch, T patches, d d_model, f d_ff, h heads, L layers, P parameters, N = B T rows):

    peak = runtime + data + weights 4P + optimizer_state 8P + gradients + activations + workspace + heap

weights, optimizer_state  AdamW keeps two moments, allocated with the optimizer; its fused kernel needs nothing more.
gradients    4P throughout under accumulation (`AdamW.keep_gradients`). Without, they grow while backward frees the
             activations, so that the peak is either before the first or after the last of them: the larger one counts.
activations  what a layer keeps for backward, in the order of `EncoderLayer.forward`, each 4 N d bytes unless noted:
             norm1, q, k, v, attended, x after attention, norm2, up (4 N f), gelu (4 N f), x after feed-forward: 8 N d +
             2 N f floats; one-byte masks of the three dropouts, N (2 d + f); mean and 1/deviation of two norms, 16 N;
             attention's log-sum-exp, 4 N h. Around the layers: the gathered windows, the patches cut from them, the
             embedding and its mask, the last norm.
workspace    the top of backward, at the last layer's `down`: the gradient of the stream, its scaled copy and that of
             the hidden units beside a new weight gradient (4 d f), less the stream and mask already freed.
heap         what the allocator adds: fitted, see the constants.
runtime      interpreter, torch, the indicator library; measured. Threads bring stacks and packing buffers.
data         the days of the file and the windows' indices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training import runtime
from training.arch_grid import param_count, published_micro_batch, token_count

MIB = 2**20
# On Apple's unified memory the only observation there is (d=1024, L=256, batch 128: 115 GB) is about twice the
# formula. Until a study has observed peaks of its own on that device, twice the formula is the prior.
MPS_FACTOR = 2.0
METAL_SHARE = 0.75  # of RAM, what Metal can safely hold (torch.mps.recommended_max_memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The numbers a footprint depends on, read from a trial's parameters and its study's context."""

    d: int
    f: int
    heads: int
    layers: int
    batch: int
    accumulation: int
    features: int
    length: int
    patch: int
    stride: int
    dropout: bool
    threads: int

    @classmethod
    def of(cls, params: Mapping[str, Any], context: Mapping[str, Any]) -> Shape:
        batch = int(params.get("micro_batch", 1))
        effective = int(context.get("target_effective_batch", 256))
        return cls(
            d=int(params["d_model"]),
            f=int(params["d_ff"]),
            heads=int(params.get("n_heads", 8)),
            layers=int(params["n_layers"]),
            batch=batch,
            accumulation=int(params.get("accumulation_steps") or max(1, effective // batch)),
            features=int(context.get("n_features", 25)),
            length=int(context.get("context_length", 60)),
            patch=int(context.get("patch_length", 10)),
            stride=int(context.get("stride", 5)),
            dropout=float(params.get("dropout", 0.1)) > 0,
            threads=int(context.get("threads") or 1),
        )

    @property
    def rows(self) -> int:
        return self.batch * token_count(self.length, self.patch, self.stride)

    @property
    def params(self) -> int:
        return param_count(self.d, self.layers, self.f, self.features, self.length, self.patch, self.stride)


def layer_bytes(s: Shape) -> int:
    """What one encoder layer keeps for backward."""
    masks = s.rows * (2 * s.d + s.f) if s.dropout else 0
    return 4 * s.rows * (8 * s.d + 2 * s.f) + masks + 16 * s.rows + 4 * s.rows * s.heads


def input_bytes(s: Shape) -> int:
    """What is kept before the first layer: windows, patches, the embedding and its mask."""
    windows = 4 * s.batch * s.length * s.features
    patches = 4 * s.rows * s.patch * s.features
    return windows + patches + 4 * s.rows * s.d + (s.rows * s.d if s.dropout else 0)


def peak_parts(s: Shape) -> dict[str, int]:
    """Gradients, activations and workspace at the moment when their sum is largest."""
    stream, hidden, weight = 4 * s.rows * s.d, 4 * s.rows * s.f, 4 * s.d * s.f
    kept = input_bytes(s) + s.layers * layer_bytes(s)
    freed = s.rows * s.d if s.dropout else 0
    top = {
        "gradients": 4 * s.params if s.accumulation > 1 else 0,
        "activations": kept,
        "workspace": stream + hidden + weight - freed,
    }
    bottom = {"gradients": 4 * s.params, "activations": input_bytes(s), "workspace": 2 * stream}
    return max(top, bottom, key=lambda parts: sum(parts.values()))


def estimate(params: Mapping[str, Any], context: Mapping[str, Any]) -> dict[str, Any]:
    """Peak bytes of one attempt: host_bytes, device_bytes, components (their sum is host + device), family."""
    s = Shape.of(params, context)
    weights = 4 * s.params
    components = {
        "runtime": 260 * MIB,
        "data": 8 * MIB,
        "weights": weights,
        "optimizer_state": 2 * weights,
        **peak_parts(s),
    }
    components["heap"] = int(0.03 * sum(components.values()))
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
        need = estimate({**params, "micro_batch": size}, {**context, "target_effective_batch": target_effective_batch})
        if need["host_bytes"] * factor <= limit_bytes and (
            device_limit_bytes is None or need["device_bytes"] * factor <= device_limit_bytes
        ):
            return size
        size //= 2
    return None

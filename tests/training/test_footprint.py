"""The formula: what it counts, how it grows, the micro-batch it allows, and the pools of MPS and CUDA."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training import arch_grid, batch_size, footprint, runtime

GIB = 2**30
PLAN_CASE = {"d_model": 1024, "n_layers": 256, "n_heads": 16, "d_ff": 2048}  # what took 115 GB of a Mac
RECORDED_MPS_PEAK = 115_000_000_000  # its observed peak, micro-batch 128 (the source plan's trial 4 of 2B_h1)

shapes = st.fixed_dictionaries(
    {
        "d_model": st.sampled_from(arch_grid.D_MODELS),
        "n_layers": st.sampled_from(arch_grid.N_LAYERS),
        "n_heads": st.sampled_from(arch_grid.N_HEADS),
    }
).flatmap(lambda p: st.sampled_from([{**p, "d_ff": ratio * p["d_model"]} for ratio in arch_grid.FF_RATIOS]))


def host_bytes(params: dict[str, Any], **context: Any) -> int:
    return int(footprint.estimate(params, context)["host_bytes"])


def test_components_add_up_and_are_positive() -> None:
    """The table's parts are the whole, and no part is missing or negative."""
    found = footprint.estimate({**PLAN_CASE, "micro_batch": 64}, {})
    assert sum(found["components"].values()) == found["host_bytes"]
    assert all(isinstance(part, int) and part > 0 for part in found["components"].values())
    assert {"runtime", "weights", "gradients", "optimizer_state", "activations", "workspace", "data"} <= set(
        found["components"]
    )


def test_parameters_cost_sixteen_bytes() -> None:
    """Weights, gradients and two moments, 4 bytes each, of the exact parameter count; a step count for each tensor."""
    found = footprint.estimate({**PLAN_CASE, "micro_batch": 1}, {})["components"]
    count = arch_grid.param_count(1024, 256, 2048)
    assert found["weights"] + found["gradients"] + found["optimizer_state"] == 16 * count + 4 * (12 * 256 + 7)


@given(shapes, st.sampled_from([8, 16, 32, 64, 128]))
def test_more_of_anything_never_needs_less(params: dict[str, Any], batch: int) -> None:
    """Batch, depth, threads, features and context never lower the estimate."""
    base = host_bytes({**params, "micro_batch": batch})
    assert host_bytes({**params, "micro_batch": 2 * batch}) > base
    assert host_bytes({**params, "micro_batch": batch, "n_layers": params["n_layers"] + 1}) > base
    assert host_bytes({**params, "micro_batch": batch}, threads=2) >= base
    assert host_bytes({**params, "micro_batch": batch}, n_features=40) > base
    assert host_bytes({**params, "micro_batch": batch}, context_length=120) > base


def test_no_dropout_needs_no_masks() -> None:
    """Without dropout the one-byte masks are not charged."""
    with_masks = footprint.estimate({**PLAN_CASE, "micro_batch": 64, "dropout": 0.1}, {})["components"]
    without = footprint.estimate({**PLAN_CASE, "micro_batch": 64, "dropout": 0.0}, {})["components"]
    rows = 64 * 11
    assert with_masks["activations"] - without["activations"] == 256 * rows * (2 * 1024 + 2048) + rows * 1024


def test_a_whole_grid_is_sized_in_no_time() -> None:
    """Some hundred architectures at start: microseconds each, and torch is not imported for it."""
    grid = [a for budget in arch_grid.BUDGETS for a in arch_grid.architectures(budget)]
    started = time.perf_counter()
    for a in grid:
        host_bytes({"d_model": a.d_model, "n_layers": a.n_layers, "n_heads": a.n_heads, "d_ff": a.d_ff})
    assert (time.perf_counter() - started) / len(grid) < 1e-3
    code = "import sys; from training import footprint, runtime; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- micro-batch ------------------------------------------------------------------------------------------------------


@given(shapes, st.integers(2**28, 200 * 2**30), st.floats(0.5, 3.0))
def test_the_micro_batch_is_the_largest_that_fits(params: dict[str, Any], limit: int, factor: float) -> None:
    """It fits, the next power of two does not or is above the published tier; None means not even 1 fits."""
    found = batch_size.micro_batch(params, {}, limit, factor=factor)
    tier = batch_size.published_micro_batch(params["d_model"], params["n_layers"])
    if found is None:
        assert host_bytes({**params, "micro_batch": 1}) * factor > limit
        return
    assert found & (found - 1) == 0
    assert host_bytes({**params, "micro_batch": found}) * factor <= limit
    assert found == tier or host_bytes({**params, "micro_batch": 2 * found}) * factor > limit


@given(shapes, st.integers(2**28, 2**37), st.integers(0, 2**36), st.floats(1.0, 2.0))
def test_sizing_is_monotone(params: dict[str, Any], limit: int, more: int, factor: float) -> None:
    """More memory never means a smaller micro-batch, a larger factor or a device's limit never a larger one."""
    base = batch_size.micro_batch(params, {}, limit) or 0
    assert (batch_size.micro_batch(params, {}, limit + more) or 0) >= base
    assert (batch_size.micro_batch(params, {}, limit, factor=factor) or 0) <= base
    assert (batch_size.micro_batch(params, {"device": "cuda"}, limit, limit // 2) or 0) <= (
        batch_size.micro_batch(params, {"device": "cuda"}, limit, limit) or 0
    )


def test_the_effective_batch_is_an_upper_bound() -> None:
    """A micro-batch above the effective batch would change what is trained."""
    small = {"d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 128}
    assert batch_size.micro_batch(small, {}, 100 * GIB, target_effective_batch=32) == 32
    assert batch_size.micro_batch(small, {}, 100 * GIB, target_effective_batch=48) == 32


# -- pools ------------------------------------------------------------------------------------------------------------


def test_mps_prior_is_near_the_recorded_peak() -> None:
    """The one recorded peak of this model on a Mac: the prior is within 15 % of it."""
    found = host_bytes({**PLAN_CASE, "micro_batch": 128}, device="mps")
    assert found == pytest.approx(RECORDED_MPS_PEAK, rel=0.15)


@pytest.mark.parametrize("total", [128 * 10**9, 128 * GIB])
def test_the_trial_that_swapped_comes_out_smaller(total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """d=1024, L=256 at 128 GB of unified memory: 64 fits under Metal's cap, 128 does not; also with a Mac's heap."""
    monkeypatch.setattr(runtime, "allocator", lambda context: "system")
    cap = int(batch_size.METAL_SHARE * total)
    assert batch_size.micro_batch(PLAN_CASE, {"device": "mps"}, total, cap) == 64
    assert batch_size.micro_batch(PLAN_CASE, {"device": "mps"}, total) == 64


def test_unified_memory_is_charged_to_both() -> None:
    """On MPS the device's bytes are the host's bytes, against both limits."""
    found = footprint.estimate({**PLAN_CASE, "micro_batch": 16}, {"device": "mps"})
    assert found["device_bytes"] == found["host_bytes"]
    assert found["family"].startswith("patchtst/mps/")


def test_cuda_has_two_pools() -> None:
    """On CUDA tensors are on the device, the interpreter and the data on the host."""
    params = {**PLAN_CASE, "micro_batch": 16}
    found = footprint.estimate(params, {"device": "cuda"})
    components = found["components"]
    assert found["host_bytes"] + found["device_bytes"] == sum(components.values())
    assert found["device_bytes"] > 16 * arch_grid.param_count(1024, 256, 2048)
    assert found["host_bytes"] < 8 * GIB
    assert batch_size.micro_batch(params, {"device": "cuda"}, 16 * GIB, 80 * GIB) == 128
    assert batch_size.micro_batch(params, {"device": "cuda"}, 16 * GIB, 24 * GIB) is None


@pytest.mark.gpu
def test_cuda_peak_is_below_the_estimate() -> None:
    """Two real steps on a GPU stay below the device estimate, and within a fifth of it."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs CUDA; MPS has no counter of its peak")
    from training.patchtst import PatchTST, PatchTSTConfig
    from training.trainer import Trainer

    params = {"d_model": 512, "n_layers": 16, "n_heads": 8, "d_ff": 2048, "micro_batch": 64}
    torch.cuda.reset_peak_memory_stats()
    model = PatchTST(PatchTSTConfig(**{k: v for k, v in params.items() if k != "micro_batch"}))
    x, y = torch.randn(128, 60, 25, device="cuda"), torch.ones(128, device="cuda")
    Trainer(model, (x, y), (x, y), epochs=1, batch_size=64, accumulation_steps=2, device="cuda").train()
    predicted = footprint.estimate(params, {"device": "cuda"})["device_bytes"]
    assert 0.8 * predicted < torch.cuda.max_memory_allocated() < predicted

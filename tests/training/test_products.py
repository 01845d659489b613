"""What bf16 is worth here: measured, and said where it is worth nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from training import hpo, products
from training.progress import Silent

PARAMS = {
    "d_model": 16,
    "n_layers": 1,
    "n_heads": 2,
    "d_ff": 32,
    "dropout": 0.1,
    "epochs": 1,
    "micro_batch": 32,
    "accumulation_steps": 1,
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "warmup_steps": 1,
}


class Heard(Silent):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_it_is_a_ratio_and_draws_nothing() -> None:
    """Positive, finite, and random numbers go on as if it had not been."""
    state = torch.get_rng_state()
    speedup = products.bf16_speedup(64, 256)
    assert speedup > 0 and math.isfinite(speedup)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("speedup", "is_said"), [(0.4, True), (2.2, False)])
def test_a_trial_says_where_bf16_is_slower(speedup: float, is_said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line that names recipe and factor; the factor is in the result either way, and the recipe stays."""
    monkeypatch.setattr(products, "bf16_speedup", lambda d_model, d_ff: speedup)
    heard = Heard()
    context: dict[str, Any] = {"recipe": "bf16_autocast", "max_steps": 1}
    found = hpo.objective({"params": PARAMS, "context": context}, heard)
    said = [note for note in heard.notes if "bf16" in note]
    assert found["metrics"]["bf16_speedup"] == speedup and found["recipe"] == "bf16_autocast"
    assert bool(said) is is_said
    assert all("0.40 times" in note and "bf16_autocast" in note for note in said)


def test_fp32_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a recipe without bf16 there is no factor, and no kernel is made for one."""
    monkeypatch.setattr(products, "bf16_speedup", lambda d_model, d_ff: pytest.fail("measured"))
    found = hpo.objective({"params": PARAMS, "context": {"max_steps": 1}}, Silent())
    assert found["metrics"]["bf16_speedup"] is None

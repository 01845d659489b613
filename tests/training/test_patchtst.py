"""The model: its shapes, its dropout, and that it sees the whole window."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from training.patchtst import PatchTST, PatchTSTConfig

SHAPE = {"d_model": 16, "n_layers": 2, "n_heads": 4, "d_ff": 32}


def make_model(**changes: Any) -> PatchTST:
    """A small model with the study's input shape."""
    torch.manual_seed(0)
    return PatchTST(PatchTSTConfig(**{**SHAPE, **changes}))


@pytest.mark.parametrize("batch", [1, 7])
def test_one_logit_per_window(batch: int) -> None:
    """(B, 60, 25) becomes (B,) finite logits."""
    logits = make_model()(torch.randn(batch, 60, 25))
    assert logits.shape == (batch,) and torch.isfinite(logits).all()


def test_eleven_tokens() -> None:
    """60 days in patches of 10 with stride 5 are 11 tokens."""
    assert PatchTSTConfig(**SHAPE).n_patches == 11


def test_dropout_acts_in_training_only() -> None:
    """With dropout two training passes differ, two evaluations do not; without it training is deterministic."""
    x = torch.randn(4, 60, 25)
    model = make_model(dropout=0.3)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    plain = make_model(dropout=0.0)
    assert torch.equal(plain(x), plain(x))


def test_head_dropout_is_its_own() -> None:
    """head_dropout acts although dropout is 0."""
    x = torch.randn(4, 60, 25)
    model = make_model(dropout=0.0, head_dropout=0.5)
    assert not torch.equal(model(x), model(x))


def test_every_day_and_feature_counts() -> None:
    """The gradient of the output reaches each day and each feature of the window."""
    x = torch.randn(2, 60, 25, requires_grad=True)
    make_model(dropout=0.0)(x).sum().backward()
    assert x.grad is not None and bool(torch.ne(x.grad, 0).all())


def test_samples_do_not_mix() -> None:
    """A window's logit does not depend on the other windows of its batch."""
    model = make_model().eval()
    x = torch.randn(5, 60, 25)
    torch.testing.assert_close(model(x)[2], model(x[2:3])[0])


def test_every_parameter_is_trained() -> None:
    """Each parameter gets a gradient."""
    model = make_model(dropout=0.0)
    model(torch.randn(3, 60, 25)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_wrong_shapes_are_refused() -> None:
    """Heads that do not divide the width, and windows of another length, are errors."""
    with pytest.raises(ValueError, match="not a multiple"):
        make_model(n_heads=3)
    with pytest.raises(ValueError, match="windows of 60 days, got 50"):
        make_model()(torch.randn(1, 50, 25))

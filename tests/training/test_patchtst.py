"""The model: its shapes, its dropout, and that it sees the whole window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from training import dropout
from training.patchtst import EncoderLayer, PatchTST, PatchTSTConfig

torch.set_num_threads(1)
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


# -- beside the straightforward implementation ----------------------------------------------------------------------


def straightforward(model: PatchTST, x: torch.Tensor, factors: list[torch.Tensor]) -> torch.Tensor:
    """The same logits written without regard for time or memory. factors: mask times scale of each dropout in turn,
    rows ordered (T, B); none: no dropout."""
    c, left = model.config, list(factors)
    batch = len(x)

    def drop(rows: torch.Tensor) -> torch.Tensor:
        if not left:
            return rows
        return rows * left.pop(0).view(c.n_patches, batch, -1).transpose(0, 1)

    used = (c.n_patches - 1) * c.stride + c.patch_length
    patches = x[:, c.context_length - used :].unfold(1, c.patch_length, c.stride).flatten(2)
    x = drop(model.embedding(patches) + model.positions)
    for layer in model.layers:
        assert isinstance(layer, EncoderLayer)
        q, k, v = layer.qkv(layer.norm1(x)).view(batch, c.n_patches, 3, c.n_heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + drop(layer.out(attended))
        x = x + drop(layer.down(drop(F.gelu(layer.up(layer.norm2(x))))))
    logits: torch.Tensor = model.head(model.norm(x).flatten(1))
    return logits.squeeze(1)


@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize(("shape", "batch"), [({}, 64), ({"n_heads": 2}, 16), ({"d_model": 96, "n_heads": 8}, 6)])
def test_it_computes_what_the_straightforward_one_does(
    probability: float, shape: dict[str, Any], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and every gradient, by either way of attention, with the same masks where there are any."""
    model = make_model(**shape, dropout=probability)
    factors: list[torch.Tensor] = []
    original = dropout.keep_mask

    def recorded(x: torch.Tensor, p: float) -> tuple[torch.Tensor, float]:
        mask, scale = original(x, p)
        factors.append(mask.float() * scale)
        return mask, scale

    monkeypatch.setattr(dropout, "keep_mask", recorded)
    x, upstream = torch.randn(batch, 60, 25), torch.randn(batch)
    logits = model(x)
    assert len(factors) == (1 + 3 * len(model.layers) if probability else 0)
    logits.backward(upstream)
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    wanted = straightforward(model, x, factors)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    wanted.backward(upstream)
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-4 * float(p.grad.abs().max()) + 1e-6)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("matrices", [torch.float32, torch.bfloat16])
def test_bf16_branches_are_near(recompute: bool, matrices: torch.dtype) -> None:
    """Under autocast logits differ from fp32's by bf16's rounding; running layers again changes no bit of it."""
    torch.manual_seed(0)
    config = PatchTSTConfig(**{**SHAPE, "n_layers": 4}, dropout=0.1)
    model, x = PatchTST(config, matrices), torch.randn(32, 60, 25)

    def run(again: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.recompute = again
        model.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            logits = model(x)
        assert logits.dtype == torch.float32
        logits.sum().backward()
        return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    logits, gradients = run(recompute)
    again, same = run(not recompute)
    assert torch.equal(logits, again) and all(torch.equal(gradients[name], same[name]) for name in gradients)
    exact = PatchTST(config)
    exact.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    wanted = exact(x)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=0.02 * float(wanted.detach().abs().max()))


def test_dropout_of_both_kinds_trains_alike() -> None:
    """Losses of 25 steps with our masks and with nn.Dropout's: over 6 seeds the difference is within its own noise."""

    def final_loss(seed: int, is_ours: bool) -> float:
        torch.manual_seed(seed)
        model = PatchTST(PatchTSTConfig(**SHAPE, dropout=0.2))
        x = torch.randn(32, 60, 25)
        y = (x[:, -10:, 0].mean(1) > 0).float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        torch.manual_seed(seed + 1000 * is_ours)
        losses = []
        for _ in range(25):
            rows = 11 * 32
            sizes = [16] + [16, 32, 16] * len(model.layers)
            factors = [] if is_ours else [F.dropout(torch.ones(rows, size), 0.2) for size in sizes]
            logits = model(x) if is_ours else straightforward(model, x, factors)
            loss = F.binary_cross_entropy_with_logits(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return sum(losses[-5:]) / 5

    differences = torch.tensor([final_loss(seed, True) - final_loss(seed, False) for seed in range(6)])
    assert abs(float(differences.mean())) < 4 * float(differences.std()) / 6**0.5
    assert float(differences.abs().max()) < 0.3

"""Attention: each way against torch's own, what each keeps, and which is chosen."""

from __future__ import annotations

import pytest
import torch

from training import attention
from training.attention import attend
from training.attention_choice import Attention, attention_for

torch.set_num_threads(1)
SHAPES = [(11, 8, 2, 32), (11, 4, 8, 5), (5, 2, 16, 64), (1, 1, 3, 7), (17, 3, 4, 1)]  # patches, heads, width, samples


def reference(rows: torch.Tensor, patches: int, heads: int) -> torch.Tensor:
    """softmax(q k' / sqrt(c)) v, written out, in float64. rows: (T B, 3 d)."""
    split = rows.double().view(patches, -1, 3, heads, rows.shape[1] // (3 * heads)).permute(2, 1, 3, 0, 4)
    q, k, v = split
    weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
    attended: torch.Tensor = weights @ v
    return attended.permute(2, 0, 1, 3).reshape(len(rows), -1)


def computed(rows: torch.Tensor, way: Attention, patches: int, heads: int) -> torch.Tensor:
    """The same by this way."""
    return attend(rows.t().contiguous() if way is Attention.LANES else rows, way, patches, heads)


@pytest.mark.parametrize("way", Attention)
@pytest.mark.parametrize(("patches", "heads", "width", "samples"), SHAPES)
@pytest.mark.parametrize("elements", [2**18, 100], ids=["at once", "head by head"])
def test_each_way_is_attention(
    way: Attention,
    patches: int,
    heads: int,
    width: int,
    samples: int,
    elements: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Output and gradient equal the formula in float64, up to fp32's rounding."""
    monkeypatch.setattr(attention, "LANES_ELEMENTS", elements)
    torch.manual_seed(0)
    rows = torch.randn(patches * samples, 3 * heads * width)
    upstream = torch.randn(patches * samples, heads * width)
    ours, theirs = rows.clone().requires_grad_(), rows.double().requires_grad_()
    found, wanted = computed(ours, way, patches, heads), reference(theirs, patches, heads)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-5)
    found.backward(upstream)
    wanted.backward(upstream.double())
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", Attention)
def test_bf16_is_as_near_as_bf16_is(way: Attention) -> None:
    """From bf16 operands, output and gradient within some hundredths of the formula's size."""
    torch.manual_seed(1)
    rows = torch.randn(11 * 16, 3 * 32).bfloat16()
    ours, theirs = rows.clone().requires_grad_(), rows.double().requires_grad_()
    found, wanted = computed(ours, way, 11, 4), reference(theirs, 11, 4)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=0.02)
    found.sum().backward()
    wanted.sum().backward()
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=0.04)


@pytest.mark.parametrize("way", Attention)
def test_scores_of_any_size_are_taken(way: Attention) -> None:
    """Scores of thousands, beyond what exp holds: the largest takes all, and nothing becomes inf or nan."""
    torch.manual_seed(2)
    rows = (torch.randn(11 * 8, 3 * 16) * 200).requires_grad_()
    found = computed(rows, way, 11, 2)
    torch.testing.assert_close(found, reference(rows.detach(), 11, 2).float(), rtol=1e-3, atol=0.5)
    found.sum().backward()
    assert rows.grad is not None and bool(torch.isfinite(rows.grad).all())


@pytest.mark.parametrize("way", [Attention.LANES, Attention.PRODUCTS])
def test_nothing_but_the_projection_is_kept(way: Attention) -> None:
    """No (T, T) matrix waits for backward."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    rows = torch.randn(11 * 8, 3 * 16, requires_grad=True)
    given = rows.t().contiguous() if way is Attention.LANES else rows * 1
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attend(given, way, 11, 2)
    assert [tensor.data_ptr() for tensor in kept] == [given.data_ptr()]


def test_the_choice_is_a_rule() -> None:
    """Few features a head and many samples: lanes. Otherwise products in bf16, torch's own in fp32 and on a device."""
    assert attention_for(8, 256) is attention_for(64, 256) is Attention.LANES
    assert attention_for(128, 512) is attention_for(64, 255) is attention_for(8, 31) is Attention.FUSED
    assert attention_for(8, 256, is_bf16=True) is Attention.LANES
    assert attention_for(24, 256, is_bf16=True) is attention_for(8, 16, is_bf16=True) is Attention.PRODUCTS
    assert attention_for(8, 256, device="cuda") is attention_for(8, 256, is_bf16=True, device="mps") is Attention.FUSED

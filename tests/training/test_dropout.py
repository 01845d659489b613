"""Dropout from words: the comparison bit by bit, the statistics, and the independence of layers, samples and steps."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from training import dropout
from training.dropout import drop_, drop_add, drop_add_to_stream, keep_mask
from training.patchtst import PatchTST, PatchTSTConfig

torch.set_num_threads(1)
SIGMAS = 5.0  # seeds are fixed: what passes once passes always


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two masks of one size, in units of its standard error under independence."""
    x, y = (each.flatten().double() - each.double().mean() for each in (a, b))
    return float((x * y).mean() / (x.pow(2).mean() * y.pow(2).mean()).sqrt() * math.sqrt(x.numel()))


@pytest.mark.parametrize("threshold", range(1, 256))
def test_a_byte_is_kept_exactly_from_the_threshold_on(threshold: int) -> None:
    """All 256 bytes at each of the eight places of a word, among neighbours of every kind."""
    values = torch.arange(256, dtype=torch.uint8)
    data = torch.stack([values.roll(13 * place) for place in range(8)], dim=1).flatten()
    words = data.clone().view(torch.int64)
    dropout._bytes_not_below_(words, threshold)
    assert torch.equal(words.view(torch.uint8), (data.int() >= threshold).to(torch.uint8))


@pytest.mark.parametrize("probability", [0.001, 0.05, 0.1, 0.25, 0.5, 0.7, 0.999])
def test_the_probability_is_the_one_asked_for(probability: float) -> None:
    """Over many masks the share that is dropped is p, also where p is no multiple of 1/256; so is its variance."""
    torch.manual_seed(1)
    size, n = 4096, 1500
    dropped = torch.tensor([size - int(keep_mask(torch.empty(size), probability)[0].sum()) for _ in range(n)]).double()
    rest = probability * 256 % 1
    of_threshold = size * (size - 1) * rest * (1 - rest) / 256**2  # the masks share a threshold of two neighbours
    variance = size * probability * (1 - probability) + of_threshold
    expected = min(probability, 255 / 256)  # something is kept always
    slack = 1 / 256 if probability > 255 / 256 else 0.0
    assert abs(float(dropped.mean()) / size - expected) < SIGMAS * math.sqrt(variance / n) / size + slack
    if not slack:
        assert abs(float(dropped.var()) / variance - 1) < SIGMAS * math.sqrt(2 / n)


@pytest.mark.parametrize("probability", [0.1, 0.23, 0.5])
def test_the_scale_is_that_of_the_very_mask(probability: float) -> None:
    """Each mask's scale times its threshold's chance to keep is 1: expectations are exact. Both thresholds occur."""
    torch.manual_seed(0)
    scales = {keep_mask(torch.empty(8), probability)[1] for _ in range(200)}
    kept = sorted(1 / scale * 256 for scale in scales)
    assert kept == pytest.approx(sorted({math.floor(256 * (1 - probability)), math.ceil(256 * (1 - probability))}))


def test_the_expectation_holds() -> None:
    """Dropped ones have mean 1 and variance p / (1 - p)."""
    torch.manual_seed(2)
    n, p = 2**22, 0.1
    x = drop_(torch.ones(n), p).double()
    assert abs(float(x.mean()) - 1) < SIGMAS * math.sqrt(p / (1 - p) / n)
    assert float(x.var()) == pytest.approx(p / (1 - p), rel=0.03)  # of 25 or 26 in 256


def test_neighbours_are_independent() -> None:
    """Elements up to 64 apart, within one word and across words, and the eight places of a word alike."""
    torch.manual_seed(3)
    mask, _ = keep_mask(torch.empty(2**21), 0.1)
    for lag in (*range(1, 18), 32, 64):
        assert abs(correlation(mask[lag:], mask[:-lag])) < SIGMAS, lag
    places = mask.view(-1, 8).double().mean(0)
    assert float((places - mask.double().mean()).abs().max()) < SIGMAS * math.sqrt(0.09 / (2**21 / 8))


def test_layers_samples_and_steps_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every two masks that a real model draws in two steps, and every two samples of a mask, are uncorrelated."""
    drawn: list[torch.Tensor] = []
    original = keep_mask

    def recorded(x: torch.Tensor, probability: float) -> tuple[torch.Tensor, float]:
        mask, scale = original(x, probability)
        drawn.append(mask.clone())
        return mask, scale

    monkeypatch.setattr(dropout, "keep_mask", recorded)
    torch.manual_seed(4)
    model = PatchTST(PatchTSTConfig(d_model=64, n_layers=4, n_heads=4, d_ff=64, dropout=0.1))
    samples, patches = 64, model.config.n_patches
    for _ in range(2):
        model(torch.randn(samples, 60, 25))
    assert len(drawn) == 2 * (1 + 3 * 4)
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert abs(correlation(a, b)) < SIGMAS
    rows = [mask.view(patches, samples, -1).transpose(0, 1).flatten(1) for mask in drawn]
    by_sample = torch.stack(rows, 1).flatten(1)
    standard = (by_sample.double() - by_sample.double().mean(1, keepdim=True)) / by_sample.double().std(1, keepdim=True)
    between = (standard @ standard.t() / math.sqrt(by_sample.shape[1])).fill_diagonal_(0.0)
    assert float(between.abs().max()) < SIGMAS


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_each_way_is_mask_times_scale(dtype: torch.dtype, tolerance: float) -> None:
    """Forward and gradient of the three functions, against the product written out, with the same mask."""
    torch.manual_seed(5)
    branch, stream = torch.randn(37, 24).to(dtype), torch.randn(37, 24)
    upstream = torch.randn(37, 24)

    def mask_after(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        mask, scale = keep_mask(branch, 0.3)
        return mask.float() * scale

    factor = mask_after(7)
    near = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    leaf, into = branch.clone().requires_grad_(), stream.clone().requires_grad_()
    torch.manual_seed(7)
    dropped = drop_(leaf * 1, 0.3)
    near(dropped.float(), branch.float() * factor)
    dropped.backward(upstream.to(dtype))
    assert leaf.grad is not None and leaf.grad.dtype == dtype
    near(leaf.grad.float(), upstream * factor)

    for in_place in (False, True):
        leaf, into = branch.clone().requires_grad_(), stream.clone().requires_grad_()
        torch.manual_seed(7)
        if dtype == torch.float32:
            added = drop_add(leaf * 1, into, 0.3)
        else:
            added = drop_add_to_stream(leaf * 1, into * 1, 0.3, in_place=in_place)
        assert added.dtype == torch.float32
        torch.testing.assert_close(added, stream + branch.float() * factor)
        added.backward(upstream)
        assert leaf.grad is not None and into.grad is not None
        near(leaf.grad.float(), upstream * factor)
        assert torch.equal(into.grad, upstream)


def test_the_same_state_draws_the_same_masks() -> None:
    """Masks come from torch's default generator alone, whose state is in a checkpoint."""
    torch.manual_seed(6)
    state = torch.get_rng_state()
    first = [keep_mask(torch.empty(100, 7), 0.1) for _ in range(5)]
    torch.set_rng_state(state)
    for mask, scale in first:
        again, scale_again = keep_mask(torch.empty(100, 7), 0.1)
        assert torch.equal(mask, again) and scale == scale_again


def test_a_mask_is_one_byte_an_element() -> None:
    """It and the scale are all that backward keeps of a dropout."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(33, 5, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        drop_(x, 0.1)
    (mask,) = kept
    assert mask.dtype == torch.uint8 and 165 <= mask.untyped_storage().nbytes() < 165 + 8


@pytest.mark.parametrize("probability", [-0.1, 1.0, float("nan")])
def test_no_probability_is_refused(probability: float) -> None:
    """What is not in [0, 1)."""
    with pytest.raises(ValueError, match="dropout is"):
        keep_mask(torch.empty(8), probability)

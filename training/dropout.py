"""Inverted dropout whose masks cost a tenth of `bernoulli_`'s: one random 64-bit word gives eight of them.

Covers masks, and dropping a tensor's elements in place, or while it is added to the residual stream.

A mask is one byte an element, 1 to keep. Eight bytes of a word from torch's default generator (whose state is in every
checkpoint, so that a resume is bit-equal) are compared with a threshold k all at once, by arithmetic on the word; an
element is dropped where its byte is below k. Each byte of the generator is used once, by one element of one mask.

A byte has 256 values, so one mask drops k / 256 of the elements in the mean. What is kept is scaled by that very
share: an element's expectation is exact in each mask. And of the two k around 256 p each mask draws one, so that over
the masks an element is dropped with probability p: 0.1 is 0.1, not 26 / 256. (Two elements of one mask then correlate
by at most 4e-5 at p = 0.1, for they share the threshold.)

Measured (Zen 4, one thread, ns an element): `bernoulli_` 5.9, a mask from words 0.6; `masked_fill_` 1.5 and a product
with a byte 0.6 to 0.9 (torch's vector code wants one type), a byte widened and multiplied 0.2 to 0.9; with a bool 4.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

LOW_BITS, LOW_BIT = 0x7F7F7F7F7F7F7F7F, 0x0101010101010101
LEVELS = 256


def drop_(x: Tensor, probability: float) -> Tensor:
    """Drop elements of x in place and scale the others. x: contiguous, and a tensor nothing else has saved."""
    dropped: Tensor = _Drop.apply(x, *keep_mask(x, probability))  # type: ignore[no-untyped-call]  # not typed by torch
    return dropped


def drop_add(branch: Tensor, stream: Tensor, probability: float) -> Tensor:
    """Return stream + dropped branch, written over the branch, which nothing else may have saved; both of one type."""
    added: Tensor = _DropAdd.apply(branch, stream, *keep_mask(branch, probability))  # type: ignore[no-untyped-call]  # not typed by torch
    return added


def drop_add_to_stream(branch: Tensor, stream: Tensor, probability: float, *, in_place: bool) -> Tensor:
    """Return stream + dropped branch in the stream's type, which is wider.

    in_place: written over the stream, which nothing else may have saved.
    """
    added: Tensor = _DropAddWide.apply(branch, stream, *keep_mask(branch, probability), in_place)  # type: ignore[no-untyped-call]  # not typed by torch
    return added


def keep_mask(x: Tensor, probability: float) -> tuple[Tensor, float]:
    """Return a mask of x's shape (uint8, 1: kept) and what to multiply the kept elements with.

    probability: of an element to be dropped, from 0 to below 1.
    """
    if not 0 <= probability < 1:
        raise ValueError(f"dropout is {probability}: it must be at least 0 and below 1")
    if x.device.type != "cpu":  # counter-based there, and fast
        kept = torch.empty(x.shape, dtype=torch.uint8, device=x.device).bernoulli_(1 - probability)
        return kept, 1 / (1 - probability)
    threshold = _threshold(probability)
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64)
    if threshold:
        words.random_(-(2**63), None)
        _bytes_not_below_(words, threshold)
    else:
        words.fill_(LOW_BIT)
    return words.view(torch.uint8)[: x.numel()].view(x.shape), LEVELS / (LEVELS - threshold)


def _threshold(probability: float) -> int:
    """Draw one of the two whole numbers around 256 p, whose mean is 256 p; never 256, which would keep nothing."""
    lower = math.floor(probability * LEVELS)
    rest = probability * LEVELS - lower
    drawn = lower + (rest > 0 and float(torch.rand((), dtype=torch.float64)) < rest)
    return min(drawn, LEVELS - 1)


def _bytes_not_below_(words: Tensor, threshold: int) -> None:
    """Replace each byte of the words by 1 where it is at least the threshold (1 to 255), by 0 elsewhere.

    The lower seven bits plus a constant carry into the eighth exactly when they reach the threshold's (or the threshold
    less 128); with the byte's own eighth bit that decides the whole comparison.
    """
    is_high = threshold > LEVELS // 2
    carry = (LEVELS if is_high else LEVELS // 2) - threshold
    carried = words.bitwise_and(LOW_BITS).add_(carry * LOW_BIT)
    carried = carried.bitwise_and_(words) if is_high else carried.bitwise_or_(words)
    torch.bitwise_right_shift(carried, 7, out=words)
    words.bitwise_and_(LOW_BIT)


def _apply(x: Tensor, mask: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return x * mask * scale as a new tensor."""
    wide = mask.to(dtype)
    return torch.addcmul(wide.new_zeros(()), x.to(dtype), wide, value=scale, out=wide)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        ctx.mark_dirty(x)
        wide = mask.to(x.dtype)
        return torch.addcmul(wide.new_zeros(()), x, wide, value=scale, out=x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return _apply(gradient, mask, ctx.scale, gradient.dtype), None, None


class _DropAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, branch: Tensor, stream: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        ctx.mark_dirty(branch)
        return torch.addcmul(stream, branch, mask.to(branch.dtype), value=scale, out=branch)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return _apply(gradient, mask, ctx.scale, gradient.dtype), gradient, None, None


class _DropAddWide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, branch: Tensor, stream: Tensor, mask: Tensor, scale: float, in_place: bool) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale, ctx.dtype = scale, branch.dtype
        if in_place:
            ctx.mark_dirty(stream)
        into = stream if in_place else torch.empty_like(stream)
        return torch.addcmul(stream, branch.to(stream.dtype), mask.to(stream.dtype), value=scale, out=into)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return _apply(gradient, mask, ctx.scale, ctx.dtype), gradient, None, None, None

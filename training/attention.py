"""Attention among the few patches of a window, in ways that keep nothing but what they were given.

Covers softmax(q k' / sqrt(c)) v for T patches, h heads of c features, and B samples, and its gradient: `attend`. Which
way is taken is `attention_choice`'s. Rows of the stream are ordered (T, B): sample by sample within a patch.

Why not `scaled_dot_product_attention` throughout: a (T, T) matrix of 11 x 11 is too small for a product's or a
softmax's own loops. `Lanes` turns the computation round: each step is elementwise over the B samples, which lie side by
side, as many in a register as it holds. It takes the projection transposed, (3 d, T B), which a matrix product writes
as readily. Both ways compute the attention weights again in backward (a seventh of the work) instead of keeping them,
and allocate their result before their temporaries, as `patchtst` needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.attention_choice import Attention

LANES_ELEMENTS = 2**18  # of the attention weights at a time: 1 MiB in fp32, which a second-level cache holds


def attend(qkv: Tensor, way: Attention, patches: int, heads: int) -> Tensor:
    """Attended rows (T B, d). qkv: (3 d, T B) for Attention.LANES, (T B, 3 d) otherwise; rows ordered (T, B)."""
    if way is Attention.LANES:
        width, rows = qkv.shape
        split = qkv.view(3, heads, width // (3 * heads), patches, rows // patches)
        attended: Tensor = Lanes.apply(split)  # type: ignore[no-untyped-call]  # not typed by torch
        return attended.view(width // 3, rows).t()
    rows, width = qkv.shape
    split = qkv.view(patches, rows // patches, 3, heads, width // (3 * heads))
    if way is Attention.PRODUCTS:
        attended = Products.apply(split)  # type: ignore[no-untyped-call]
        return attended.view(rows, width // 3)
    q, k, v = split.permute(2, 1, 3, 0, 4)
    return F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).reshape(rows, width // 3)


class Lanes(torch.autograd.Function):
    """(3, h, c, T, B) -> (h, c, T, B), in fp32 whatever the type of its operand."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        ctx.save_for_backward(qkv)
        attended = torch.empty_like(qkv[0])
        for some in _groups(qkv):
            q, k, v = (part[some].float() for part in qkv)
            into = attended[some] if attended.dtype == torch.float32 else torch.empty_like(q)
            _weighted(_weights(q, k), v, into)
            if into.dtype != attended.dtype:
                attended[some] = into
        return attended

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (qkv,) = ctx.saved_tensors
        found = torch.empty_like(qkv)
        for some in _groups(qkv):
            q, k, v = (part[some].float() for part in qkv)
            g = gradient[some].float()
            is_direct = found.dtype == torch.float32
            into = [part[some] if is_direct else torch.empty_like(q) for part in found]
            weights = _weights(q, k)
            _gathered(weights, g, into[2])
            scores = torch._softmax_backward_data(_products(g, v), weights, 2, torch.float32).mul_(q.shape[1] ** -0.5)
            _weighted(scores, k, into[0])
            _gathered(scores, q, into[1])
            if not is_direct:
                for part, computed in zip(found, into, strict=True):
                    part[some] = computed
        return found


def _groups(qkv: Tensor) -> list[slice]:
    """Heads to compute at a time."""
    _, heads, _, patches, samples = qkv.shape
    step = max(1, LANES_ELEMENTS // (patches * patches * samples))
    return [slice(first, first + step) for first in range(0, heads, step)]


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Sum a[h, c, t, b] b[h, c, s, b] over c: (h, t, s, b)."""
    found = torch.mul(a[:, 0, :, None], b[:, 0, None])
    for c in range(1, a.shape[1]):
        found.addcmul_(a[:, c, :, None], b[:, c, None])
    return found


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """(h, t, s, b): how much patch t attends to patch s; sums to 1 over s."""
    return torch.softmax(_products(q, k).mul_(q.shape[1] ** -0.5), 2)


def _weighted(weights: Tensor, v: Tensor, into: Tensor) -> None:
    """Sum weights[h, t, s, b] v[h, c, s, b] over s, into (h, c, t, b)."""
    torch.mul(weights[:, None, :, 0], v[:, :, None, 0], out=into)
    for s in range(1, weights.shape[2]):
        into.addcmul_(weights[:, None, :, s], v[:, :, None, s])


def _gathered(weights: Tensor, v: Tensor, into: Tensor) -> None:
    """Sum weights[h, t, s, b] v[h, c, t, b] over t, into (h, c, s, b)."""
    torch.mul(weights[:, None, 0], v[:, :, 0, None], out=into)
    for t in range(1, weights.shape[1]):
        into.addcmul_(weights[:, None, t], v[:, :, t, None])


class Products(torch.autograd.Function):
    """(T, B, 3, h, c) -> (T, B, h, c): two batched products and a softmax between them."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        ctx.save_for_backward(qkv)
        patches, samples, _, heads, width = qkv.shape
        attended = qkv.new_empty(patches, samples, heads, width)
        q, k, v = _by_head(qkv)
        attended.permute(1, 2, 0, 3).copy_(torch.bmm(_head_weights(q, k), v).view(samples, heads, patches, width))
        return attended

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (qkv,) = ctx.saved_tensors
        patches, samples, _, heads, width = qkv.shape
        found = torch.empty_like(qkv)
        by_head = found.permute(2, 1, 3, 0, 4)  # (3, B, h, T, c)
        shape = by_head.shape[1:]
        q, k, v = _by_head(qkv)
        g = gradient.permute(1, 2, 0, 3).reshape(samples * heads, patches, width)
        weights = _head_weights(q, k)
        by_head[2].copy_(torch.bmm(weights.transpose(1, 2), g).view(shape))
        scores = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), weights, 2, weights.dtype)
        scores.mul_(width**-0.5)
        by_head[0].copy_(torch.bmm(scores, k).view(shape))
        by_head[1].copy_(torch.bmm(scores.transpose(1, 2), q).view(shape))
        return found


def _by_head(qkv: Tensor) -> Tensor:
    """(3, B h, T, c), one matrix after the other."""
    patches, samples, _, heads, width = qkv.shape
    return qkv.permute(2, 1, 3, 0, 4).reshape(3, samples * heads, patches, width)


def _head_weights(q: Tensor, k: Tensor) -> Tensor:
    """(B h, T, T), which sum to 1 over the last."""
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
    return torch.softmax(scores, -1)

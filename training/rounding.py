"""Rounding that is right on average: what a bf16 weight or an 8-bit moment cannot hold, it takes by chance.

Rounded to the nearest, an update of less than half a step of the type is lost, each time; rounded up as often as the
value lies above the lower neighbour, its mean over the steps is the value's own. The random numbers are those of
torch's default generator of the device, which a checkpoint keeps: a resumed training rounds the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sixteen_bits(count: int, like: Tensor) -> Tensor:
    """Return uniform random int16, all 65,536 values: four from each 64-bit word that the generator makes."""
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device)
    return words.random_(-(2**63), None).view(torch.int16)[:count]


def uniform(count: int, like: Tensor) -> Tensor:
    """Return fp32 numbers in [0, 1), a multiple of 2**-16 each."""
    return sixteen_bits(count, like).to(torch.float32).mul_(2.0**-16).add_(0.5)


def to_bf16_(target: Tensor, values: Tensor) -> None:
    """Round fp32 values (n,) into a bf16 tensor of the same size. values: overwritten."""
    bits = values.view(torch.int32)
    bits.add_(sixteen_bits(len(values), values).to(torch.int32).bitwise_and_(0xFFFF)).bitwise_and_(-0x10000)
    target.copy_(values)


def to_power_(values: Tensor, power: int, levels: int) -> Tensor:
    """Round numbers of 0 to 1 to (k / levels)**power with whole k, and return the k; power 2 or 4. values: overwritten.

    Unlike even steps these keep small numbers apart. By chance, so that the mean of what is read back is the number.
    """
    values.clamp_(0.0, 1.0)
    root = values.sqrt() if power == 2 else values.sqrt().sqrt_()
    low = root.mul_(levels).floor_().clamp_(max=levels - 1)
    below, above = low.square(), low.add(1.0).square_()
    if power == 4:
        below.square_(), above.square_()
    chance = values.mul_(float(levels) ** power).sub_(below).div_(above.sub_(below))
    return low.add_(chance.gt_(uniform(len(values), values)))

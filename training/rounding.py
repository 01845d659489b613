"""Rounding that is right on average: what a bf16 weight or an 8-bit moment cannot hold, it takes by chance.

Rounded to the nearest, an update of less than half a step of the type is lost, each time; rounded up as often as the
value lies above the lower neighbour, its mean over the steps is the value's own. The random numbers are a generator's
of its own, so that dropout draws the same ones under every recipe; it begins anew with each step, from a seed and the
step's number, both of which a checkpoint keeps: a resumed training rounds the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Chance:
    """Where an optimizer's random numbers come from. The seed is that of torch's default generator."""

    def __init__(self) -> None:
        self.seed = torch.tensor(torch.initial_seed() % 2**31, dtype=torch.int64)

    def at(self, step: int, device: torch.device) -> torch.Generator:
        """Return a generator for this step."""
        return torch.Generator(device).manual_seed(int(self.seed) * 1_000_003 + step)


def sixteen_bits(count: int, chance: torch.Generator) -> Tensor:
    """Return uniform random int16, all 65,536 values: four from each 64-bit word that the generator makes."""
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=chance.device)
    return words.random_(-(2**63), None, generator=chance).view(torch.int16)[:count]


def uniform(count: int, chance: torch.Generator) -> Tensor:
    """Return fp32 numbers in [0, 1), a multiple of 2**-16 each."""
    return sixteen_bits(count, chance).to(torch.float32).mul_(2.0**-16).add_(0.5)


def to_bf16_(target: Tensor, values: Tensor, chance: torch.Generator) -> None:
    """Round fp32 values (n,) into a bf16 tensor of the same size. values: overwritten."""
    bits = values.view(torch.int32)
    bits.add_(sixteen_bits(len(values), chance).to(torch.int32).bitwise_and_(0xFFFF)).bitwise_and_(-0x10000)
    target.copy_(values)


def to_power_(values: Tensor, power: int, levels: int, chance: torch.Generator) -> Tensor:
    """Round numbers of 0 to 1 to (k / levels)**power with whole k, and return the k; power 2 or 4. values: overwritten.

    Unlike even steps these keep small numbers apart. By chance, so that the mean of what is read back is the number.
    """
    values.clamp_(0.0, 1.0)
    root = values.sqrt() if power == 2 else values.sqrt().sqrt_()
    low = root.mul_(levels).floor_().clamp_(max=levels - 1)
    below, above = low.square(), low.add(1.0).square_()
    if power == 4:
        below.square_(), above.square_()
    share = values.mul_(float(levels) ** power).sub_(below).div_(above.sub_(below))
    return low.add_(share.gt_(uniform(len(values), chance)))

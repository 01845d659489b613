"""Adam whose two moments take 8 bits each, in blocks of 256 with a scale of their own: 2.03 bytes a parameter.

The arithmetic is AdamW's, in fp32, a piece of a matrix at a time. Between steps a moment is kept as a whole number k of
0 to 127 (with a sign) or 1 to 255, which stands for (k / 127)**2 of the block's largest first moment, (k / 255)**4 of
its largest second one: of a block's numbers, the smallest that is told from nothing is 6e-5 and 2e-10 of the largest.
Both are rounded by chance (training/rounding.py): a second moment that decays by a thousandth a step is otherwise never
rounded down. bf16 weights are, too.

Why not a library's: bitsandbytes brings 125 MB and rounds to the nearest only; torchao's needs a C++ compiler where a
trial runs; either keeps gradients and temporaries in an order of its own, which training.footprint could not count on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from training import rounding

BLOCK = 256
PIECE = 2**17  # numbers at a time: temporaries of 512 KiB stay in the processor's cache
FIRST_LEVELS, SECOND_LEVELS = 127, 255


def divides(parameter: Tensor) -> bool:
    """Whether it consists of whole blocks."""
    return parameter.numel() % BLOCK == 0


class Adam8bit:
    """For parameters of whole blocks, fp32 or bf16; gradients, of the parameters' types, are allocated at once."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        lr: float,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.parameters = list(parameters)
        self.lr, self.weight_decay, self.betas, self.eps = lr, weight_decay, betas, eps
        beta1, beta2 = betas
        # What an exact Adam never exceeds (Cauchy-Schwarz). A moment that was rounded up beside one rounded down might.
        self._largest_update = (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
        self.steps = torch.zeros((), dtype=torch.float32)
        self.chance = rounding.Chance()
        self.first = [torch.zeros_like(p, dtype=torch.int8) for p in self.parameters]
        self.second = [torch.zeros_like(p, dtype=torch.uint8) for p in self.parameters]
        self.first_scales = [self._scales(p) for p in self.parameters]
        self.second_scales = [self._scales(p) for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)

    @staticmethod
    def _scales(parameter: Tensor) -> Tensor:
        return torch.zeros(parameter.numel() // BLOCK, dtype=torch.float32, device=parameter.device)

    @torch.no_grad()
    def step(self) -> None:
        """One update with `self.lr` from the gradients."""
        self.steps += 1
        count = float(self.steps)
        corrections = (1 - self.betas[0] ** count, 1 - self.betas[1] ** count)
        chance = self.chance.at(int(count), self.parameters[0].device)
        for i, parameter in enumerate(self.parameters):
            assert parameter.grad is not None
            whole = (parameter, parameter.grad, self.first[i], self.second[i])
            pieces = [tensor.view(-1).split(PIECE) for tensor in whole]
            pieces += [tensor.split(PIECE // BLOCK) for tensor in (self.first_scales[i], self.second_scales[i])]
            for piece in zip(*pieces, strict=True):
                self._update(piece, corrections, chance)

    def _update(self, piece: Sequence[Tensor], corrections: tuple[float, float], chance: torch.Generator) -> None:
        """Move weights and moments on. piece: of weights, gradients, both moments, and their blocks' scales."""
        weights, gradients, first, second, first_scales, second_scales = piece
        beta1, beta2 = self.betas
        gradient = gradients.float()
        m = first.float()
        m.mul_(m.abs()).view(-1, BLOCK).mul_(first_scales[:, None])
        m.lerp_(gradient, 1 - beta1)
        v = second.float().square_().square_()
        v.view(-1, BLOCK).mul_(second_scales[:, None])
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = v.div(corrections[1]).sqrt_().add_(self.eps)
        update = torch.div(m, update, out=update).div_(corrections[0])
        update.clamp_(-self._largest_update, self._largest_update)
        wide = weights.float()
        wide.mul_(1 - self.lr * self.weight_decay).add_(update, alpha=-self.lr)
        if weights.dtype == torch.bfloat16:
            rounding.to_bf16_(weights, wide, chance)
        _keep(m.abs(), first, first_scales, 2, FIRST_LEVELS, chance)
        first.mul_(m.sign_().to(torch.int8))
        _keep(v, second, second_scales, 4, SECOND_LEVELS, chance)
        second.clamp_(min=1)  # 0 would be an unbounded step for a weight whose gradient is small, not nothing

    @torch.no_grad()
    def zero_grad(self) -> None:
        """Fill the gradients with zeros, in place; see AdamW for why."""
        torch._foreach_zero_([p.grad for p in self.parameters if p.grad is not None])

    def state(self) -> dict[str, Tensor]:
        """Return moments, scales, step count and seed by name: the tensors themselves, not copies."""
        lists = {
            "first": self.first,
            "second": self.second,
            "first_scales": self.first_scales,
            "second_scales": self.second_scales,
        }
        found = {f"{name}.{i}": tensor for name, tensors in lists.items() for i, tensor in enumerate(tensors)}
        return found | {"steps": self.steps, "seed": self.chance.seed}


def _keep(moment: Tensor, target: Tensor, scales: Tensor, power: int, levels: int, chance: torch.Generator) -> None:
    """Round a moment's absolute values, overwritten, to 8 bits; a block's scale is what one level**power stands for."""
    blocks = moment.view(-1, BLOCK)
    largest = blocks.amax(1)
    scales.copy_(largest).div_(float(levels) ** power)
    blocks.div_(largest.clamp_(min=torch.finfo(torch.float32).tiny)[:, None])
    target.copy_(rounding.to_power_(moment, power, levels, chance))

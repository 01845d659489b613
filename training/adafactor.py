"""Adafactor for matrices: of the second moment only its sums over rows and columns are kept, of the first nothing.

The arithmetic is torch's own function (`torch.optim.Adafactor` without its class, whose construction imports
torch._dynamo: 72 MiB), given an fp32 copy of each matrix and gradient in turn; bf16 weights are then rounded by chance,
which torch's does not do. The learning rate is absolute, as AdamW's, so that one search space serves both; torch's
default scales it by a matrix's own size.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim._adafactor import adafactor

from training import rounding


class Adafactor:
    """For 2-D parameters, fp32 or bf16; gradients, of the parameters' types, are allocated at once.

    lr: as AdamW's. Its updates have about the size that AdamW's have when scaled by `UPDATE_SHARE`: without a first
    moment nothing averages the noise of a batch away.
    """

    UPDATE_SHARE = 0.3

    def __init__(self, parameters: Iterable[Tensor], *, lr: float, weight_decay: float = 0.01) -> None:
        self.parameters = list(parameters)
        self.lr, self.weight_decay = lr, weight_decay
        self.rows = [torch.zeros(len(p), 1, dtype=torch.float32, device=p.device) for p in self.parameters]
        self.columns = [torch.zeros(1, p.shape[1], dtype=torch.float32, device=p.device) for p in self.parameters]
        self.chance = rounding.Chance()
        self.steps = [torch.zeros((), dtype=torch.float32) for _ in self.parameters]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self) -> None:
        """One update with `self.lr` from the gradients, one matrix after the other."""
        chance = self.chance.at(int(self.steps[0]) + 1, self.parameters[0].device)
        for parameter, row, column, steps in zip(self.parameters, self.rows, self.columns, self.steps, strict=True):
            assert parameter.grad is not None
            weights = parameter.float()
            adafactor(
                [weights],
                [parameter.grad.float()],
                [row],
                [column],
                [None],
                [steps],
                foreach=False,
                d=1.0,
                lr=self.UPDATE_SHARE * self.lr,
                beta2_decay=-0.8,
                weight_decay=self.weight_decay / self.UPDATE_SHARE,
                eps1=torch.finfo(torch.float32).eps,
                eps2=1.0,  # at least this times lr, and a matrix's own mean square is below it: lr as it is
                maximize=False,
            )
            if parameter.dtype == torch.bfloat16:
                rounding.to_bf16_(parameter.view(-1), weights.view(-1), chance)

    @torch.no_grad()
    def zero_grad(self) -> None:
        """Fill the gradients with zeros, in place; see AdamW for why."""
        torch._foreach_zero_([p.grad for p in self.parameters if p.grad is not None])

    def state(self) -> dict[str, Tensor]:
        """Return sums, step counts and the seed by name: the tensors themselves, not copies."""
        lists = {"rows": self.rows, "columns": self.columns, "steps": self.steps}
        found = {f"{name}.{i}": tensor for name, tensors in lists.items() for i, tensor in enumerate(tensors)}
        return found | {"seed": self.chance.seed}

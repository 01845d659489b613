"""Which optimizer a recipe has: the one place that knows them all.

An optimizer allocates all it ever needs at once, gradients included, and has `lr`, `step()`, `zero_grad()` and
`state()`: the tensors by name that a checkpoint keeps, themselves and not copies.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from training import computing
from training.adam8bit import Adam8bit, divides
from training.adamw import AdamW
from training.recipe import Recipe


class Optimizer(Protocol):
    """What the training loop needs of one."""

    lr: float

    def step(self) -> None:
        """One update with `lr` from the gradients there are."""

    def zero_grad(self) -> None:
        """Fill the gradients with zeros, in place."""

    def state(self) -> dict[str, Tensor]:
        """Return its tensors by name: the tensors themselves."""


class Split:
    """One optimizer for the matrices of the layers, nearly all of a model, and AdamW in fp32 for the rest: embedding,
    norms, biases, head. The rest is small, and what goes wrong in a model most easily."""

    def __init__(self, matrices: Optimizer, rest: Optimizer) -> None:
        self._parts = {"matrices": matrices, "rest": rest}
        self._lr = matrices.lr

    @property
    def lr(self) -> float:
        """The learning rate of both."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = value
        for part in self._parts.values():
            part.lr = value

    def step(self) -> None:
        """One update of either."""
        for part in self._parts.values():
            part.step()

    def zero_grad(self) -> None:
        """Fill all gradients with zeros, in place."""
        for part in self._parts.values():
            part.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of both by name."""
        return {f"{name}.{key}": t for name, part in self._parts.items() for key, t in part.state().items()}


def make(recipe: Recipe, model: nn.Module, *, lr: float, weight_decay: float) -> Optimizer:
    """Make the recipe's optimizer for a model that `computing.prepare` has prepared."""
    if recipe.optimizer == "adamw":
        return AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    matrices = computing.matrices(model)
    chosen = set(map(id, matrices))
    rest = AdamW([p for p in model.parameters() if id(p) not in chosen], lr=lr, weight_decay=weight_decay)
    if recipe.optimizer == "adafactor":
        from training.adafactor import Adafactor

        return Split(Adafactor(matrices, lr=lr, weight_decay=weight_decay), rest)
    assert all(map(divides, matrices)), "d_model is no multiple of 16"
    return Split(Adam8bit(matrices, lr=lr, weight_decay=weight_decay), rest)

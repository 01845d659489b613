"""How a recipe is computed: the type of its products, the type its matrices are stored in, and layers that run again.

Covers what surrounds the model. Which tensors the optimizer keeps, and how it rounds, is `optimizers`'.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from training.recipe import Recipe


@contextlib.contextmanager
def products(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Compute matrix products of the forward pass in the recipe's type; backward follows by itself, outside of this.

    In bf16 this is torch's autocast: tensors that enter a product are cast, what comes out is bf16, norms and sums with
    an fp32 tensor stay fp32. Casts of weights are not cached: a cache would hold them all during validation.
    """
    if recipe.compute == "fp32":
        yield
        return
    with torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False):
        yield


def storage(recipe: Recipe) -> torch.dtype:
    """Return the type in which the matrices of the layers are stored: all but some thousandths of the parameters."""
    return torch.bfloat16 if recipe.weights == "bf16" else torch.float32


def stored_in(dtype: torch.dtype, layer: nn.Module) -> nn.Module:
    """Store a layer's matrices in this type, in place. Layer by layer: a large model never stands there in fp32."""
    for matrix in matrices(layer):
        matrix.data = matrix.data.to(dtype)
    return layer


def matrices(model: nn.Module) -> list[Tensor]:
    """Return the weights that are multiplied with, of one layer or of all layers of a model."""
    layers = getattr(model, "layers", model)
    return [module.weight for module in layers.modules() if isinstance(module, nn.Linear)]


def prepare(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Make an initialised model what the recipe stores and keeps; in place."""
    stored_in(storage(recipe), model)
    if hasattr(model, "recompute"):
        setattr(model, "recompute", recipe.recompute)  # noqa: B010  # no attribute of every module
    return model


def recomputed(layer: nn.Module, x: Tensor) -> Tensor:
    """Return layer(x), keeping x alone for backward, where the layer runs again with the same random numbers.

    torch.utils.checkpoint does the same, and more, and imports torch._dynamo for it at the first call: 72 MiB for every
    trial process (torch 2.13).
    """
    found: Tensor = _Recomputed.apply(layer, x)  # type: ignore[no-untyped-call]
    return found


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: nn.Module, x: Tensor) -> Tensor:
        ctx.layer, ctx.random = layer, _random_state(x.device)
        ctx.autocast = torch.is_autocast_enabled(x.device.type)
        ctx.save_for_backward(x)
        with torch.no_grad():
            found: Tensor = layer(x)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None]:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        after = _random_state(x.device)
        _set_random_state(x.device, ctx.random)
        kind = x.device.type
        with torch.enable_grad():
            with torch.autocast(kind, dtype=torch.bfloat16, enabled=ctx.autocast, cache_enabled=False):
                y = ctx.layer(x)
            # A number whose gradient with respect to y is the one that came in. Given as an argument, torch would
            # import sympy to look at its shape: 25 MiB.
            number = torch.dot(y.flatten(), gradients[0].flatten())
        _set_random_state(x.device, after)
        number.backward()
        return None, x.grad


def _random_state(device: torch.device) -> Tensor:
    match device.type:
        case "cuda":
            return torch.cuda.get_rng_state(device)
        case "mps":
            return torch.mps.get_rng_state()
    return torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    match device.type:
        case "cuda":
            torch.cuda.set_rng_state(state, device)
        case "mps":
            torch.mps.set_rng_state(state)
        case _:
            torch.set_rng_state(state)

"""Recipes: what a training is computed and stored in, and which optimizer moves it. One per study, for its whole life.

Covers the names, what each stands for, and their order of faithfulness to fp32 AdamW; imports no torch, since the
driver names recipes and sizes trials by them. How a recipe is computed is `computing`'s, its optimizer is made by
`optimizers`, its memory is `footprint`'s.

With P parameters, bytes a parameter for weights, gradients and the optimizer's state:

    fp32_adamw       16  everything in fp32; AdamW
    fp32_recompute   16  the same numbers to the bit; activations of a layer are computed again in backward
    bf16_autocast    18  products in bf16, for which the weights are cast and kept until backward; the rest as above
    adam8bit         10  fp32 weights and gradients, moments in 8 bits; products in bf16, activations computed again
    bf16_adam8bit     6  the matrices and their gradients in bf16, rounded stochastically; otherwise as `adam8bit`
    bf16_adafactor    4  the same with Adafactor in Adam's place: no first moment, a factored second
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from training.errors import TrainingInputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """compute: type of the matrix products (and of what they keep for backward). weights: type in which the matrices
    and their gradients are stored, and gradients accumulated; vectors, embedding and head are fp32 always. recompute:
    a layer keeps its input alone and runs again in backward (activation checkpointing). says: the recipe in a few
    words.
    """

    name: str
    says: str
    compute: Literal["fp32", "bf16"] = "fp32"
    weights: Literal["fp32", "bf16"] = "fp32"
    optimizer: Literal["adamw", "adam8bit", "adafactor"] = "adamw"
    recompute: bool = False


FP32_ADAMW = Recipe(name="fp32_adamw", says="fp32, AdamW")
# In order of faithfulness to fp32 AdamW: `auto` takes the first under which a study's architectures fit.
RECIPES = (
    FP32_ADAMW,
    Recipe(name="fp32_recompute", says="fp32, AdamW, activations computed again", recompute=True),
    Recipe(name="bf16_autocast", says="fp32 weights, products in bf16, AdamW", compute="bf16"),
    Recipe(
        name="adam8bit",
        says="fp32 weights, products in bf16, Adam with 8-bit moments, activations computed again",
        compute="bf16",
        optimizer="adam8bit",
        recompute=True,
    ),
    Recipe(
        name="bf16_adam8bit",
        says="bf16 weights rounded stochastically, bf16 gradients, Adam with 8-bit moments, activations computed again",
        compute="bf16",
        weights="bf16",
        optimizer="adam8bit",
        recompute=True,
    ),
    Recipe(
        name="bf16_adafactor",
        says="bf16 weights rounded stochastically, bf16 gradients, Adafactor, activations computed again",
        compute="bf16",
        weights="bf16",
        optimizer="adafactor",
        recompute=True,
    ),
)
_BY_NAME = {recipe.name: recipe for recipe in RECIPES}


def named(name: str) -> Recipe:
    """Return the recipe of this name. Raises TrainingInputError for an unknown one."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise TrainingInputError(f"unknown recipe {name!r}: choose from {', '.join(_BY_NAME)}") from None


# -- bytes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """Parameters: of the layers' matrices, whose storage is the recipe's, and of all else, which is fp32; tensors that
    have a step count of their own."""

    matrices: int
    rest: int
    tensors: int


def counted(d_model: int, n_layers: int, d_ff: int, total: int) -> Counted:
    """Count them. total: parameters of the whole model."""
    matrices = n_layers * (4 * d_model**2 + 2 * d_model * d_ff)
    # Of a layer: two norms and four biases; around them: embedding, positions, last norm, head.
    return Counted(matrices=matrices, rest=total - matrices, tensors=8 * n_layers + 7)


def held(recipe: Recipe, d_model: int, n_layers: int, d_ff: int, total: int) -> dict[str, int]:
    """Return the bytes of weights, gradients and optimizer_state of a model with `total` parameters."""
    n = counted(d_model, n_layers, d_ff, total)
    stored = 2 if recipe.weights == "bf16" else 4
    rest_state = 8 * n.rest + 4 * n.tensors
    match recipe.optimizer:
        case "adamw":
            state = 8 * n.matrices + 4 * 4 * n_layers
        case "adam8bit":
            state = 2 * n.matrices + 2 * 4 * (n.matrices // 256) + 4 + 8  # steps and seed
        case "adafactor":  # rows and columns of qkv, out, up, down; a step count each; a seed
            state = 4 * n_layers * ((3 + 1) * d_model + 2 * d_model + 2 * (d_ff + d_model) + 4) + 8
    return {
        "weights": stored * n.matrices + 4 * n.rest,
        "gradients": stored * n.matrices + 4 * n.rest,
        "optimizer_state": state + rest_state,
    }

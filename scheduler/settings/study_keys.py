"""The keys of the built-in studies: what an experiment file may set, with types, ranges and defaults."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# What the built-in training is computed and stored in, in order of faithfulness to the first (training/recipe.py).
RECIPES = ("fp32_adamw", "fp32_recompute", "bf16_autocast", "adam8bit", "bf16_adam8bit", "bf16_adafactor")
BUDGETS = {"2M": 2_000_000, "20M": 20_000_000, "200M": 200_000_000, "2B": 2_000_000_000}


def _whole(value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError("must be a whole number")
    return value


def _number(value: Any) -> Any:
    # YAML 1.1 reads `1e-4` as text (it wants 1.0e-4): what looks like a number to a person is one.
    if isinstance(value, bool):
        raise ValueError("must be a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def listed(value: Any) -> Any:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int | float) else value


def _budgets(value: Any) -> Any:
    parts = listed(value)
    if not isinstance(parts, list | tuple):
        raise ValueError("must be a list such as 2M,20M")
    for part in parts:
        if str(part).upper() not in BUDGETS:
            raise ValueError(f"has the unknown budget {part!r}: choose from {', '.join(BUDGETS)}")
    return list(dict.fromkeys(str(part).upper() for part in parts))


def _horizons(value: Any) -> Any:
    parts = listed(value)
    if not isinstance(parts, list | tuple):
        raise ValueError("must be a list of days such as 1,3,5")
    days = []
    for part in parts:
        if isinstance(part, bool) or not re.fullmatch(r"\d+", str(part)) or not 1 <= int(part) <= 250:
            raise ValueError(f"has the horizon {part!r}: must be whole days from 1 to 250")
        days.append(int(part))
    return list(dict.fromkeys(days))


def _recipe(value: str) -> str:
    if value not in ("auto", *RECIPES):
        raise ValueError(f"must be auto or one of {', '.join(RECIPES)}")
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_number)]


class Frozen(BaseModel):
    """Base of all settings: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RangeParameter(Frozen):
    """A searched number between low and high."""

    type: Literal["log_uniform", "uniform", "int"]
    low: Number
    high: Number

    @model_validator(mode="after")
    def _ordered(self) -> RangeParameter:
        if self.low > self.high:
            raise ValueError(f"has low {self.low:g} above high {self.high:g}")
        if self.type == "log_uniform" and self.low <= 0:
            raise ValueError(f"has low {self.low:g}: log_uniform needs more than 0")
        if self.type == "int" and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError("of type int needs whole numbers as low and high")
        return self


class ChoiceParameter(Frozen):
    """A searched value out of a list."""

    type: Literal["categorical"]
    choices: tuple[int | float | str | bool, ...] = Field(min_length=1)


SearchParameter = Annotated[RangeParameter | ChoiceParameter, Field(discriminator="type")]


class EarlyStopping(Frozen):
    """When a trial that no longer improves ends."""

    patience: Annotated[Whole, Field(ge=1)] | None = 10
    min_delta: Annotated[Number, Field(ge=0)] = 0.001


class StudyKeys(Frozen):
    """What an experiment file may set for its own studies."""

    budgets: Annotated[tuple[str, ...], BeforeValidator(_budgets), Field(min_length=1)] = tuple(BUDGETS)
    horizons: Annotated[tuple[int, ...], BeforeValidator(_horizons), Field(min_length=1)] = (1, 3, 5)
    trials: Annotated[Whole, Field(ge=1)] = 50
    data: Path | None = None
    max_epochs: Annotated[Whole, Field(ge=1)] | None = None
    max_steps: Annotated[Whole, Field(ge=1)] | None = None
    target_effective_batch: Annotated[Whole, Field(ge=1, le=2**20)] = 256
    training_search_space: dict[str, SearchParameter] | None = None  # None: from the file `hpo`
    early_stopping: EarlyStopping | None = None  # None, and keys it lacks: from the file `hpo`
    recipe: Annotated[str, AfterValidator(_recipe)] = "auto"
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 0

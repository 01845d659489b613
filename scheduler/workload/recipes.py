"""Which recipe a study of the built-in training gets, and what another one would change.

Covers `auto`: the first recipe, in order of faithfulness to fp32 AdamW, under which all of a study's architectures fit;
where none holds them all, the first of those that hold most. Pure: whoever plans gives the function that sizes a study.
What the recipes are is the training side's: training/recipe.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from scheduler.model import StudySpec
from scheduler.settings.study_keys import RECIPES

if TYPE_CHECKING:
    from scheduler.workload.plan import StudyPlan

# What `auto` may take, in this order. Not Adafactor: another optimizer, whose trainings went elsewhere than AdamW's in
# each of the few pairs measured (scheduler/README.md). It has to be asked for; a refusal names it.
AUTO = tuple(name for name in RECIPES if name != "bf16_adafactor")
Sized = Callable[[StudySpec], "StudyPlan"]


def planned(spec: StudySpec, sized: Sized, begun: str | None = None) -> StudyPlan:
    """Plan a study with its recipe: the one it was begun with, the one that was asked for, or the first that fits.

    sized: plans a study whose recipe is settled. Of a refused study the plan names the recipe that would fit.
    """
    asked = spec.context["recipe"]
    if asked == "auto" and begun is None:
        return _first(spec, sized)
    name = begun if asked == "auto" and begun is not None else asked
    found = sized(having(spec, name))
    others = _others(spec, sized, name)
    why = "as the study was begun" if asked == "auto" else ""
    return dataclasses.replace(_helped(found, others), recipe_why=why, others=_more(found, others))


def having(spec: StudySpec, name: str) -> StudySpec:
    """Return the study with this recipe in its context."""
    return dataclasses.replace(spec, context={**spec.context, "recipe": name})


def _first(spec: StudySpec, sized: Sized) -> StudyPlan:
    plans = {name: sized(having(spec, name)) for name in RECIPES}
    most = max(plans[name].fits for name in AUTO)
    name = next(name for name in AUTO if plans[name].fits == most)
    if not most:  # refused: by the one that needs least
        name = min(AUTO, key=lambda each: plans[each].smallest_bytes or 0)
    before = AUTO[: AUTO.index(name)]
    found, why = plans.pop(name), "the first under which every architecture fits"
    if found.never:
        why = "the first of those under which most architectures fit"
    if not before:
        why += ", and the most faithful"
    elif found.fits:
        why += ": " + ", ".join(f"{each} holds {_count(plans[each])}" for each in before)
    return dataclasses.replace(_helped(found, plans), recipe_why=f"auto: {why}", others=_more(found, plans))


def _others(spec: StudySpec, sized: Sized, name: str) -> dict[str, StudyPlan]:
    return {other: sized(having(spec, other)) for other in RECIPES if other != name}


def _helped(found: StudyPlan, others: dict[str, StudyPlan]) -> StudyPlan:
    """Name the recipe under which a refused study could run, the most faithful of those that hold most."""
    most = max((plan.fits for plan in others.values()), default=0)
    if found.refusal is None or not most:
        return found
    name = next(name for name, plan in others.items() if plan.fits == most)
    return dataclasses.replace(found, refusal=f"{found.refusal} or --recipe {name} ({_count(others[name])} fit)")


def _count(plan: StudyPlan) -> str:
    return f"{plan.fits} of {plan.fits + plan.never}"


def _more(found: StudyPlan, others: dict[str, StudyPlan]) -> dict[str, tuple[int, int]]:
    """How many trials would run at once under the recipes that let more do so, all architectures held."""
    now = found.at_once or (0, 0)
    return {
        name: plan.at_once
        for name, plan in others.items()
        if plan.at_once is not None and plan.never <= found.never and plan.at_once > now and plan.at_once[1] >= now[1]
    }

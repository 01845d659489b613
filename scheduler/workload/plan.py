"""The plan: what of each study fits the workers there are, how much at once, and what never will and why.

Pure: settings and workers' facts in, a `Plan` out; starts nothing, prints nothing. The dry run is this plan shown, the
real run begins with it. Sizes come from the training side's functions, named by dotted path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scheduler.core import admission
from scheduler.model import Json, StudySpec, UsageError, WorkerFacts
from scheduler.settings.schema import Settings, Training
from scheduler.settings.study_keys import RECIPES
from scheduler.units import GIB, gib
from scheduler.workload import functions as training_side
from scheduler.workload import recipes
from scheduler.workload.functions import Function
from scheduler.workload.studies import studies as studies_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """One worker's share of the plan: what it may promise in all, and what is left of it for trials.

    domain_bytes: what all workers that draw from its memory may give to trials together. device_bytes: of the device's
    own pool or cap; None where there is none or it cannot be asked.
    """

    facts: WorkerFacts
    capacity_bytes: int
    domain_bytes: int
    device_bytes: int | None

    @property
    def trial_bytes(self) -> int:
        """The most a single trial may take: the workers' own processes are charged first."""
        return max(0, min(self.capacity_bytes - self.facts.overhead_bytes, self.domain_bytes))

    @property
    def domain(self) -> str:
        """The memory it draws from."""
        return self.facts.domain or self.facts.address


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyPlan:
    """One study's part. Ranges are (smallest, largest); None where no estimator can say.

    fits, never: numbers of architectures; footprint_bytes: at the micro-batch each would get on the largest worker.
    smallest_bytes: the least any architecture needs, at micro-batch 1; runtime_bytes: the part of each footprint that
    is the process itself, None where the estimator does not tell it apart. at_once: with the largest, with the smallest
    footprint. refusal: why the study cannot run at all, a line without its name; None when it can. architectures:
    those that fit, in the order of the candidates. recipe_why: how the recipe in the spec's context was chosen, in
    words; others: at_once under the recipes that would let more trials run at once.
    """

    spec: StudySpec
    fits: int
    never: int
    footprint_bytes: tuple[int, int] | None = None
    micro_batch: tuple[int, int] | None = None
    at_once: tuple[int, int] | None = None
    smallest_bytes: int | None = None
    runtime_bytes: int | None = None
    refusal: str | None = None
    recipe_why: str = ""
    others: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    architectures: tuple[Mapping[str, Any], ...] = ()

    @property
    def recipe(self) -> str | None:
        """What its trainings are computed in; None where that is not the built-in training's affair."""
        found: str | None = self.spec.context.get("recipe")
        return found

    def to_json(self) -> Json:
        told = {
            "recipe": self.recipe,
            "recipe_why": self.recipe_why,
            "more_at_once": {name: _span("min", "max", pair) for name, pair in self.others.items()},
        }
        return {
            "study": self.spec.name,
            **self.spec.shown.labels,
            **(told if self.recipe else {}),
            "trials": self.spec.quota,
            "slots_per_trial": self.spec.slots,
            "architectures_fit": self.fits,
            "architectures_never_fit": self.never,
            "footprint_bytes": _span("min", "max", self.footprint_bytes),
            "micro_batch": _span("min", "max", self.micro_batch),
            "at_once": _span("min", "max", self.at_once),
            "smallest_footprint_bytes": self.smallest_bytes,
            "runtime_bytes": self.runtime_bytes,
            "refusal": self.refusal,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All studies and the room there is for them."""

    name: str
    rooms: tuple[Room, ...]
    studies: tuple[StudyPlan, ...]
    memory_budget: str

    @property
    def runnable(self) -> tuple[StudySpec, ...]:
        """The studies that can run, in order."""
        return tuple(each.spec for each in self.studies if each.refusal is None)

    @property
    def refusals(self) -> tuple[str, ...]:
        """A line per reason; studies that are refused for the same one (horizons of a budget) share it."""
        names: dict[str, list[str]] = {}
        for study in self.studies:
            if study.refusal is not None:
                names.setdefault(study.refusal, []).append(study.spec.name)
        return tuple(f"{_listing(studies)} cannot run: {reason}" for reason, studies in names.items())

    @property
    def runtimes(self) -> tuple[str, ...]:
        """Whose runtime the footprints have in them: a line for each environment; none where no estimator tells."""
        told = max((study.runtime_bytes or 0 for study in self.studies), default=0)
        measured = {(room.facts.host, room.facts.environment) for room in self.rooms if room.facts.environment}
        lines = [f"{each.name} on {host}: {gib(each.runtime_bytes)}, {each.origin}" for host, each in measured]
        if not measured:
            lines = [f"{gib(told)}, as known of the installed torch; no trial process was measured here yet"]
        return tuple(f"runtime of a trial: {line}" for line in sorted(lines)) if told else ()

    @property
    def recipes(self) -> tuple[str, ...]:
        """A line for each recipe and why it was taken; and one for each that would let more trials run at once."""
        lines: dict[str, list[str]] = {}
        for study in self.studies:
            if study.recipe is None or study.refusal is not None:
                continue
            why = f" ({study.recipe_why})" if study.recipe_why else ""
            lines.setdefault(f"recipe {study.recipe}{why}", []).append(study.spec.name)
            for name, at_once in study.others.items():
                now = "" if study.at_once is None else f" instead of {_range(*study.at_once)}"
                lines.setdefault(f"with --recipe {name} {_range(*at_once)} trials{now} run at once", []).append(
                    study.spec.name
                )
        return tuple(f"{_listing(names)}: {line}" for line, names in lines.items())

    @property
    def devices(self) -> tuple[str, ...]:
        """A line for each device that trials share: one trial of a small model leaves most of it idle."""
        lines = []
        for room in self.rooms:
            if room.facts.device is None or room.device_bytes is None:
                continue
            shared = [
                s for s in self.studies if s.refusal is None and s.at_once and s.spec.context.get("device") != "cpu"
            ]
            told = ", ".join(f"{_range(*s.at_once)} of {s.spec.name}" for s in shared if s.at_once)
            bound = f"{gib(room.device_bytes)} and {room.facts.slots} slots"
            if told:
                lines.append(f"{room.facts.device.kind} of {room.facts.host}, {bound}: trials share it, at once {told}")
        return tuple(lines)

    def to_json(self) -> Json:
        workers = [
            {
                "address": room.facts.address,
                "host": room.facts.host,
                "slots": room.facts.slots,
                "limit_bytes": room.facts.worker_limit_bytes or room.facts.limit_bytes,
                "limit_source": room.facts.limit_source,
                "available_bytes": room.facts.available_bytes,
                "capacity_bytes": room.capacity_bytes,
                "overhead_bytes": room.facts.overhead_bytes,
                "device_capacity_bytes": room.device_bytes,
                "environment": None if room.facts.environment is None else room.facts.environment.name,
                "runtime_bytes": None if room.facts.environment is None else room.facts.environment.runtime_bytes,
            }
            for room in self.rooms
        ]
        studies = [study.to_json() for study in self.studies]
        return {"run": self.name, "memory_budget": self.memory_budget, "workers": workers, "studies": studies}


def make(settings: Settings, workers: Sequence[WorkerFacts], begun: Mapping[str, str] | None = None) -> Plan:
    """Make the plan for these workers. begun: the recipe that a study has, where it was begun before.

    Raises UsageError: budget above what exists, bad data file, unknown function.
    """
    budget = settings.memory_budget
    rooms = tuple(_room(budget, facts, workers) for facts in workers)
    if settings.objective is not None:
        studies = [_objective(spec, rooms, settings) for spec in studies_of(settings)]
        return Plan(name=settings.name, rooms=rooms, studies=tuple(studies), memory_budget=budget.text)
    functions = training_side.load(settings)
    specs = with_data_facts(studies_of(settings), functions["check_data"])
    sized: dict[str, StudyPlan] = {}
    studies = []
    for spec in specs:
        # Studies that differ by horizon alone need the same memory: size the grid once.
        before = (begun or {}).get(spec.name)
        key = repr(sorted((k, v) for k, v in spec.context.items() if k != "horizon")) + f"{spec.slots} {before}"
        if key not in sized:
            sized[key] = _with_recipe(spec, rooms, settings, functions, before)
        planned = sized[key]
        own = spec if planned.recipe is None else recipes.having(spec, planned.recipe)
        studies.append(dataclasses.replace(planned, spec=own))
    return Plan(name=settings.name, rooms=rooms, studies=tuple(studies), memory_budget=budget.text)


def _room(budget: admission.MemoryBudget, facts: WorkerFacts, workers: Sequence[WorkerFacts]) -> Room:
    sharing = [other for other in workers if (other.domain or other.address) == (facts.domain or facts.address)]
    beside = sum(other.overhead_bytes for other in sharing) - facts.overhead_bytes
    # These workers do not run yet, or hold next to nothing: what the others will hold is not somebody else's memory.
    capacity, own = admission.capacity(budget, facts), admission.own_capacity(budget, facts)
    return Room(
        facts=facts,
        capacity_bytes=capacity if own is None else min(own, capacity),
        domain_bytes=max(0, capacity - facts.overhead_bytes - beside),
        device_bytes=admission.device_capacity(facts.device),
    )


def with_data_facts(specs: Sequence[StudySpec], check: Function | None) -> tuple[StudySpec, ...]:
    """Check the specs' data file and note in them what it holds. Raises UsageError for a bad file."""
    if check is None:
        return tuple(specs)
    seen: dict[tuple[Any, int], Mapping[str, int]] = {}
    done = []
    for spec in specs:
        key = (spec.context["data"], spec.context["horizon"])
        if key not in seen:
            seen[key] = check(*key)
        done.append(dataclasses.replace(spec, context={**spec.context, **seen[key]}))
    return tuple(done)


def _with_recipe(
    spec: StudySpec,
    rooms: Sequence[Room],
    settings: Settings,
    functions: Mapping[str, Function | None],
    begun: str | None,
) -> StudyPlan:
    if settings.training.estimate != Training().estimate or functions["candidates"] is None:
        # Somebody else's training, or one that nobody can size: there is nothing to choose by.
        asked = spec.context["recipe"]
        return _study(recipes.having(spec, RECIPES[0] if asked == "auto" else asked), rooms, settings, functions)
    return recipes.planned(spec, lambda each: _study(each, rooms, settings, functions), begun)


def _study(
    spec: StudySpec, rooms: Sequence[Room], settings: Settings, functions: Mapping[str, Function | None]
) -> StudyPlan:
    candidates, estimate = functions["candidates"], functions["estimate"]
    context = {**spec.context, **_where(rooms)}
    if candidates is None or estimate is None:
        known = () if candidates is None else tuple(candidates(context))
        # Nobody can size it: its trials are measured alone first.
        return StudyPlan(spec=spec, fits=0, never=0, architectures=known)
    architectures = tuple(candidates(context))
    if not architectures:
        raise UsageError(f"study {spec.name}: {settings.training.candidates} gives no architecture")
    largest = max(rooms, key=lambda room: room.trial_bytes)
    smallest = min(architectures, key=lambda params: _need(estimate, params, 1, context))
    smallest_bytes = _need(estimate, smallest, 1, context)
    runtime_bytes = estimate({**smallest, "micro_batch": 1}, context).get("runtime_bytes") or None
    sizes, batches, fitting, counts = [], [], [], []
    for params in architectures:
        batch = _micro_batch(functions["micro_batch"], estimate, params, context, largest)
        if batch is not None:
            batches.append(batch)
            fitting.append(params)
            need = estimate({**params, "micro_batch": batch}, context)
            sizes.append(int(need["host_bytes"]))
            counts.append(_at_once(spec, sizes[-1], rooms, int(need.get("device_bytes") or 0)))
    never = len(architectures) - len(sizes)
    if not sizes:
        refusal = _refusal(spec, smallest, smallest_bytes, largest, settings)
        return StudyPlan(
            spec=spec,
            fits=0,
            never=never,
            smallest_bytes=smallest_bytes,
            runtime_bytes=runtime_bytes,
            refusal=refusal,
        )
    return StudyPlan(
        spec=spec,
        fits=len(sizes),
        never=never,
        footprint_bytes=(min(sizes), max(sizes)),
        micro_batch=(min(batches), max(batches)),
        at_once=(min(counts), max(counts)),
        smallest_bytes=smallest_bytes,
        runtime_bytes=runtime_bytes,
        architectures=tuple(fitting),
    )


def _objective(spec: StudySpec, rooms: Sequence[Room], settings: Settings) -> StudyPlan:
    """Return the study of an objective: what a trial takes is not known, unless the user has given one size for all."""
    size, largest = settings.memory, max(rooms, key=lambda room: room.trial_bytes)
    if not isinstance(size, int):
        return StudyPlan(spec=spec, fits=0, never=0)
    refusal = None
    if size > largest.trial_bytes:
        refusal = f"--memory {gib(size)} is more than any worker has for a trial: {gib(largest.trial_bytes)}"
    at_once = _at_once(spec, size, rooms)
    return StudyPlan(
        spec=spec, fits=0, never=0, footprint_bytes=(size, size), at_once=(at_once, at_once), refusal=refusal
    )


def _where(rooms: Sequence[Room]) -> Json:
    """Return what an estimator is told of where a trial may run; as the run itself does (`study.store`)."""
    known = [room.facts.environment for room in rooms if room.facts.environment is not None]
    if not known:
        return {}
    names = sorted({environment.name for environment in known})
    return {"runtime_bytes": max(environment.runtime_bytes for environment in known), "environments": names}


def _need(estimate: Function, params: Mapping[str, Any], batch: int, context: Mapping[str, Any]) -> int:
    return int(estimate({**params, "micro_batch": batch}, context)["host_bytes"])


def _micro_batch(
    micro_batch: Function | None, estimate: Function, params: Mapping[str, Any], context: Mapping[str, Any], room: Room
) -> int | None:
    if micro_batch is None:
        return 1 if _need(estimate, params, 1, context) <= room.trial_bytes else None
    return largest_micro_batch(micro_batch, params, context, room)


def largest_micro_batch(
    micro_batch: Function, params: Mapping[str, Any], context: Mapping[str, Any], room: Room
) -> int | None:
    """Return the micro-batch that the training side gives these parameters when they are alone in the room."""
    found: int | None = micro_batch(
        params,
        context,
        room.trial_bytes,
        device_limit_bytes=room.device_bytes,
        target_effective_batch=context["target_effective_batch"],
    )
    return found


def _at_once(spec: StudySpec, footprint_bytes: int, rooms: Sequence[Room], device_bytes: int = 0) -> int:
    """How many trials of this size run together, by memory, by slots and by their device's memory, all workers empty
    otherwise."""
    size, by_domain, room_for = max(1, footprint_bytes), dict[str, int](), dict[str, int]()
    for room in rooms:
        fit = min(room.trial_bytes // size, room.facts.slots // min(spec.slots, room.facts.slots))
        if device_bytes and room.device_bytes is not None:
            fit = min(fit, room.device_bytes // device_bytes)
        by_domain[room.domain] = by_domain.get(room.domain, 0) + fit
        room_for[room.domain] = room.domain_bytes // size
    return sum(min(fit, room_for[domain]) for domain, fit in by_domain.items())


def _refusal(spec: StudySpec, params: Mapping[str, Any], needed: int, room: Room, settings: Settings) -> str:
    shape = ", ".join(f"{key}={params[key]}" for key in spec.shown.shape.values() if key in params)
    total = needed + room.facts.overhead_bytes
    budget = settings.memory_budget
    limit = room.facts.worker_limit_bytes or room.facts.limit_bytes
    helps = []
    if total <= limit * 0.95:
        helps.append(f"--memory-budget {_round_up_gib(total)}GiB")
    else:
        share = (budget.percent or 90.0) / 100
        others = max(0, limit - room.facts.available_bytes - room.facts.overhead_bytes)
        helps.append(f"a host with {_round_up_gib(int((total + others) / share))} GiB or more (--cluster)")
    if spec.shown.smaller:
        helps.append(spec.shown.smaller)
    what = (
        "the device is too small" if needed <= room.trial_bytes else f"the largest worker has {gib(room.trial_bytes)}"
    )
    return (
        f"the smallest trial ({shape}, micro-batch 1) needs {gib(needed)}, {what} for a "
        f"trial (memory budget {budget.text} of {gib(limit)}, less what others and the worker itself hold); what would "
        f"help: {' or '.join(helps)}"
    )


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _listing(names: Sequence[str]) -> str:
    return f"study {names[0]}" if len(names) == 1 else f"studies {', '.join(names[:-1])} and {names[-1]}"


def _round_up_gib(size_bytes: int) -> int:
    return -(-size_bytes // GIB)


def _span(low: str, high: str, pair: tuple[int, int] | None) -> Json | None:
    return None if pair is None else {low: pair[0], high: pair[1]}

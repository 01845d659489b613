"""How long a plan will take, before anything is started: the plan as work for a forecast.

Pure. Durations are those of earlier trials that meant the same (`past`); without any nothing can be foreseen. Of a run
that was begun already (`counted`) it is what is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from scheduler.core.durations import Evidence, Took, Uniform
from scheduler.core.forecast import Forecast, StudyWork, Work, forecast
from scheduler.core.ledger import Row
from scheduler.model import Json
from scheduler.units import duration
from scheduler.workload.plan import Plan, StudyPlan

UNKNOWN = "makespan: unknown until the first trials end; no earlier run in this folder had such trials"
_SIZES = 8  # footprints between a study's smallest and largest, evenly on the scale of factors


def foresee(
    plan: Plan, past: Mapping[str, Sequence[Took]], chance: Uniform, counted: Mapping[str, int] | None = None
) -> Forecast | None:
    """Play the plan forward; None: nothing is known of how long its trials take.

    counted: by study, trials that it has already.
    """
    left = work(plan, past, counted)
    return forecast(left, chance) if left.is_known else None


def work(plan: Plan, past: Mapping[str, Sequence[Took]], counted: Mapping[str, int] | None = None) -> Work:
    """Return all that the plan would still do, on its workers as if they were empty."""
    rows = []
    for room in plan.rooms:
        together = [other.facts for other in plan.rooms if other.domain == room.domain]
        row = Row(
            facts=room.facts,
            own_capacity_bytes=room.capacity_bytes,
            device_capacity_bytes=room.device_bytes,
            reserve_bytes=0,
            available_bytes=room.facts.limit_bytes,
        )
        rows.append((row, room.domain_bytes + sum(facts.overhead_bytes for facts in together)))
    has = counted or {}
    studies = tuple(
        _study(each, past.get(each.spec.name, ()), has.get(each.spec.name, 0))
        for each in plan.studies
        if each.refusal is None
    )
    return Work(studies=studies, trials=(), rows=tuple(rows), now=0.0)


def _study(study: StudyPlan, past: Sequence[Took], counted: int) -> StudyWork:
    spec = study.spec
    sizes: tuple[int, ...] = tuple(took.size_bytes for took in past if took.size_bytes)
    if not sizes and study.footprint_bytes is not None:
        low, high = (max(1, size) for size in study.footprint_bytes)
        sizes = tuple(int(low * math.pow(high / low, step / (_SIZES - 1))) for step in range(_SIZES))
    bound = spec.context.get("max_epochs")
    return StudyWork(
        name=spec.name,
        slots=spec.slots,
        quota=spec.quota,
        counted=min(counted, spec.quota),
        left=max(0, spec.quota - counted),
        sizes=sizes,
        evidence=Evidence(
            ended=past,
            size_bytes=sum(sizes) // len(sizes) if sizes else 0,
            max_epochs=bound if isinstance(bound, int) else None,
        ),
    )


def lines(found: Forecast | None, plan: Plan, known: int, counted: Mapping[str, int] | None = None) -> list[str]:
    """Say it in lines. known: how many trials of earlier runs it rests on."""
    trials = sum(spec.quota for spec in plan.runnable)
    has = sum(min(spec.quota, (counted or {}).get(spec.name, 0)) for spec in plan.runnable)
    if has == trials:
        return [f"makespan: nothing is left to do, all {trials} trials of this run have ended"]
    if found is None or found.serial is None:
        return [UNKNOWN]
    whole, serial = found.whole, found.serial
    gain = serial.middle_s / max(1e-9, whole.middle_s)
    between = f"{duration(whole.low_s)} to {duration(whole.high_s)}, 4 times in 5"
    of = f"{known} trial{'s' * (known != 1)} of earlier runs"
    what = f"the {trials - has} trials left of {trials}" if has else f"{trials} trial{'s' * (trials != 1)}"
    return [
        f"makespan: about {duration(whole.middle_s)} for {what} ({between}), from {of}",
        f"one after another: about {duration(serial.middle_s)}, {gain:.1f} times as long",
        f"at once: {concurrency(found)}",
    ]


def concurrency(found: Forecast, parts: int = 8) -> str:
    """Say how many trials run over time, in so many parts of the run: "4 until 2h05m, 2 until 3h10m"."""
    if not found.busy:
        return "nothing"
    width = max(1, len(found.busy) // parts)
    steps = [found.busy[at : at + width] for at in range(0, len(found.busy), width)]
    told: list[tuple[int, float]] = []
    for number, step in enumerate(steps, 1):
        mean = round(sum(count for _, count in step) / len(step))
        until = found.whole.middle_s * number / len(steps)
        if told and told[-1][0] == mean:
            told.pop()
        told.append((mean, until))
    return ", ".join(f"{mean} until {duration(until)}" for mean, until in told)


def to_json(found: Forecast | None) -> Json | None:
    """Return it for a program: seconds from the start."""
    if found is None or found.serial is None:
        return None
    spans = {"makespan_s": found.whole, "one_after_another_s": found.serial}
    told: Json = {key: {"low": s.low_s, "middle": s.middle_s, "high": s.high_s} for key, s in spans.items()}
    return {**told, "at_once": [[round(at, 3), count] for at, count in found.busy]}

"""Results: the table at the end, `results.csv` (a row per trial), `best/<study>.json` (of several values the front).

Works on plain rows as `StudyStore.rows(study)` gives them: flat mappings with the keys `number`, `state` (RUNNING,
COMPLETE, PRUNED, FAIL, WAITING), `value`, `started`, `ended`, `steps`, the sampled parameters and the trial's
attributes (d_model, n_layers, n_heads, d_ff, param_count, micro_batch, `footprint.predicted_bytes`,
`footprint.observed_peak_bytes`, `duration_s`, `stop_reason`, ...). No key but number and state must be there. Asks no
study and knows no database.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from scheduler.files.durable import write
from scheduler.model import WATCHDOG_REASONS, ExitReason, StudySpec, WorkerFacts
from scheduler.model.plain import line
from scheduler.units import duration, gib
from scheduler.workload.plan import Plan, StudyPlan

Row = Mapping[str, Any]
# results.csv begins with the study and its labels, RESULT, the workload's own columns, and COST; what else the rows
# hold follows, sorted.
RESULT = ("number", "state", "value", "stop_reason")
COST = (
    "epochs",
    "steps",
    "attempts",
    "duration_s",
    "footprint.predicted_bytes",
    "footprint.observed_peak_bytes",
    "started",
    "ended",
)
FINAL = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}  # state -> the table's word for it
# PRUNED in the study, but no pruner's doing: stop reason -> the table's word for it.
KILLED = {reason.value: "killed" for reason in (*WATCHDOG_REASONS, ExitReason.KERNEL_OOM, ExitReason.TIMED_OUT)}
WORDS = ("complete", "pruned", "killed", "too large", "failed")
FILES = ("checkpoint", "model")  # attributes that name a file


def finish(
    folder: Path | None,
    studies: Sequence[StudySpec],
    rows: Mapping[str, Sequence[Row]],
    *,
    notes: Mapping[str, str] | None = None,
    stream: TextIO | None = None,
) -> None:
    """Write results.csv and best/ into `folder` (None: nowhere), then print the table to `stream` (default: stdout).

    rows: by the study's name. notes: a study's closing remark ("closed: 5 failures in a row: ..."). One of which no
    trial completed says so, with the last error there was.
    """
    if folder is not None:
        write_files(folder, studies, rows)
    console = _console(stream)
    console.print(results_table(studies, rows, {**barren(studies, rows), **(notes or {})}))
    for said in best_lines(studies, rows):
        console.print(said, soft_wrap=True, markup=False)
    if folder is not None:
        console.print(f"results in {folder}", soft_wrap=True, markup=False)


def write_files(folder: Path, studies: Sequence[StudySpec], rows: Mapping[str, Sequence[Row]]) -> None:
    """results.csv and best/<study>.json; each file is replaced as a whole. Raises OSError."""
    rows = {name: [present(row) for row in found] for name, found in rows.items()}
    write(folder / "results.csv", to_csv(studies, rows), durable=True)
    (folder / "best").mkdir(parents=True, exist_ok=True)
    for spec in studies:
        found: Row | None = best_row(rows.get(spec.name, ()), spec)
        if len(spec.directions) > 1 and (front := pareto_front(rows.get(spec.name, ()), spec)):
            found = {"directions": spec.directions, "pareto_front": front}
        if found is not None:
            text = json.dumps({"study": spec.name, **found}, indent=1, sort_keys=True, default=str)
            write(folder / "best" / f"{spec.name}.json", text + "\n", durable=True)


def present(row: Row, is_there: Callable[[str], bool] = os.path.exists) -> Row:
    """Return the row with its reason, and without files that are not there: most checkpoints are dropped in time."""
    gone = {key for key in FILES if isinstance(row.get(key), str) and not is_there(row[key])}
    return {**{key: value for key, value in row.items() if key not in gone}, "stop_reason": reason(row)}


def reason(row: Row) -> str:
    """Return why the trial ended, or that it has not: never nothing."""
    said = row.get("stop_reason") or row.get("watchdog.reason") or row.get("retry_reason")
    if said:
        return str(said)
    return {"RUNNING": "running", "WAITING": "queued"}.get(row["state"], "ended by another program")


def ended_as(row: Row) -> str | None:
    """Return the table's word for how the trial ended; None for one that has not, or that runs again as another.

    A trial that was interrupted and queued again is FAIL in the study, but nothing failed: its successor counts.
    """
    if row["state"] not in FINAL or row.get("retried") is not None:
        return None
    if row["state"] == "PRUNED":
        told = str(row.get("watchdog.reason") or row.get("stop_reason"))
        return "too large" if told == "does_not_fit" else KILLED.get(told, "pruned")
    return FINAL[row["state"]]


def to_csv(studies: Sequence[StudySpec], rows: Mapping[str, Sequence[Row]]) -> str:
    """Return the CSV text: one line per trial, empty where a trial lacks a value."""
    full = [{"study": spec.name, **spec.shown.labels, **row} for spec in studies for row in rows.get(spec.name, ())]
    there = {key for row in full for key in row} - {"asked.params"}
    labels = dict.fromkeys(key for spec in studies for key in spec.shown.labels)
    own = dict.fromkeys(key for spec in studies for key in spec.shown.columns)
    first = ("study", *labels, *RESULT, *own, *COST)
    # Columns of a workload are there also while no trial has them: what reads the file finds the same ones every time.
    columns = [key for key in first if key in there or own]
    others = sorted(there - set(first))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, *others], restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in full)
    return text.getvalue()


def best_row(rows: Iterable[Row], spec: StudySpec | None = None) -> Row | None:
    """Return the completed trial with the best value (the smallest), the earliest of equals; None while there is none,
    and where a trial has several values."""
    if spec is not None and len(spec.directions) > 1:
        return None
    sign = -1 if spec is not None and spec.directions[0] == "maximize" else 1
    complete = [row for row in rows if row["state"] == "COMPLETE" and row.get("value") is not None]
    return min(complete, key=lambda row: (sign * row["value"], row["number"]), default=None)


def results_table(
    studies: Sequence[StudySpec], rows: Mapping[str, Sequence[Row]], notes: Mapping[str, str] | None = None
) -> Table:
    """One line per study: how many trials ended how, and the best of them."""
    ended = {spec.name: [ended_as(row) for row in rows.get(spec.name, ())] for spec in studies}
    # Most runs have nothing pruned or failed; a terminal of 80 columns has no room for empty columns.
    shown = ["complete", *(word for word in WORDS[1:] if any(word in words for words in ended.values()))]
    shape = {heading: key for spec in studies for heading, key in spec.shown.shape.items()}
    table = _table(
        "study",
        *shown,
        *(spec.shown.value for spec in studies[:1]),
        "trial",
        *shape,
        "peak",
        "time",
    )
    if notes:
        table.add_column("note", overflow="fold")
    for spec in studies:
        counts = [ended[spec.name].count(word) for word in shown]
        best: Row = best_row(rows.get(spec.name, ()), spec) or {}
        value, peak, took = best.get("value"), best.get("footprint.observed_peak_bytes"), best.get("duration_s")
        table.add_row(
            spec.name,
            f"{counts[0]}/{spec.quota}",
            *(str(count or "") for count in counts[1:]),
            "" if value is None else f"{value:.4f}",
            str(best.get("number", "")),
            *(str(best.get(key, "")) for key in shape.values()),
            gib(int(peak)) if isinstance(peak, int | float) else "",
            duration(float(took)) if isinstance(took, int | float) else "",  # an objective may keep its own there
            *([notes.get(spec.name, "")] if notes else []),
        )
    return table


def best_lines(studies: Sequence[StudySpec], rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """Of studies whose parameters are no columns of the table: those of the best trial, one line each."""
    found = []
    for spec in studies:
        if len(spec.directions) > 1:
            count = len(pareto_front(rows.get(spec.name, ()), spec))
            found.append(f"{spec.name}: {count} trial{'s' if count != 1 else ''} on the Pareto front")
            continue
        best = best_row(rows.get(spec.name, ()), spec) if spec.define_by_run else None
        if best is not None:
            params = " ".join(f"{name}={best[name]}" for name in best.get("asked.params", ()))
            found.append(f"best of {spec.name}: {best['value']:.6g} with {params or 'no parameters'}")
    return found


def pareto_front(rows: Iterable[Row], spec: StudySpec) -> list[Row]:
    """Return the completed trials whose values no other's are at least as good as, one of them better; by number."""
    signs = [-1 if direction == "maximize" else 1 for direction in spec.directions]
    complete = [row for row in rows if row["state"] == "COMPLETE"]
    points = [tuple(sign * row[f"value.{i}"] for i, sign in enumerate(signs)) for row in complete]
    front: set[tuple[float, ...]] = set()
    # In this order nobody is dominated by one that comes later.
    for point in sorted(set(points)):
        if not any(all(a <= b for a, b in zip(other, point, strict=True)) for other in front):
            front.add(point)
    return [row for row, point in zip(complete, points, strict=True) if point in front]


def barren(studies: Sequence[StudySpec], rows: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    """Make a remark for each study that has ended trials and not one of them COMPLETE."""
    found = {}
    for spec in studies:
        ended = [row for row in rows.get(spec.name, ()) if ended_as(row) is not None]
        if ended and not any(row["state"] == "COMPLETE" for row in ended):
            said = next((row["error"] for row in reversed(ended) if row.get("error")), None)
            last = line(said, 160) if said else str(ended[-1].get("stop_reason") or "unknown")
            found[spec.name] = f"no trial completed; last: {last}"
    return found


def plan_table(plan: Plan) -> Table:
    """Make the dry run's table: one line per study."""
    if all(study.spec.define_by_run for study in plan.studies):
        table = _table("study", "trials", "directions", "footprint", "at once")
        for study in plan.studies:
            size, _, at_once = _plan_cells(study)
            table.add_row(study.spec.name, str(study.spec.quota), " ".join(study.spec.directions), size, at_once)
        return table
    table = _table("study", "trials", "fit", "never", "footprint", "micro-batch", "at once")
    for study in plan.studies:
        table.add_row(study.spec.name, str(study.spec.quota), str(study.fits), str(study.never), *_plan_cells(study))
    return table


def print_plan(
    plan: Plan,
    *,
    as_json: bool,
    stream: TextIO | None = None,
    foreseen: Sequence[str] = (),
    forecast: Mapping[str, Any] | None = None,
) -> None:
    """Show the plan on `stream` (default: stdout), as tables or as one JSON object.

    foreseen, forecast: how long it will take, in lines for people and for a program (None: unknown).
    """
    console = _console(stream)
    if as_json:
        console.out(json.dumps({**plan.to_json(), "forecast": forecast}, indent=2), highlight=False)
        return
    for room in plan.rooms:
        console.print(
            f"worker {room.facts.host}: memory budget {plan.memory_budget} of {_limit(room.facts)} -> "
            f"capacity {gib(room.capacity_bytes)}, {gib(room.trial_bytes)} of it for trials; {room.facts.slots} slots",
            soft_wrap=True,
            markup=False,
        )
    console.print(plan_table(plan))
    for runtime in plan.runtimes:
        console.print(runtime, soft_wrap=True, markup=False)
    for line_ in (*plan.recipes, *plan.devices, *foreseen, *plan.refusals):
        console.print(line_, soft_wrap=True, markup=False)
    console.print("dry run: nothing was started or written")


def _limit(facts: WorkerFacts) -> str:
    """Return what the worker may use, and what says so where it is not simply all of the RAM."""
    size = gib(facts.worker_limit_bytes or facts.limit_bytes)
    source = {"cgroup": "cgroup", "slurm": "Slurm's --mem", "dask": "dask worker --memory-limit"}.get(
        facts.limit_source
    )
    return size if source is None else f"{size} ({source})"


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _console(stream: TextIO | None) -> Console:
    """As wide as the terminal; into a file or pipe as wide as it needs, since nothing there wraps or cuts."""
    console = Console(file=stream, highlight=False)
    return console if console.is_terminal else Console(file=stream, highlight=False, width=200)


def _plan_cells(study: StudyPlan) -> tuple[str, str, str]:
    if study.refusal is not None:
        least = "" if study.smallest_bytes is None else f"from {gib(study.smallest_bytes)}"
        return least, "", "refused"
    if study.footprint_bytes is None or study.at_once is None:
        return "unknown: measured alone first", "", ""
    low, high = study.footprint_bytes
    batch = "" if study.micro_batch is None else _range(*study.micro_batch)
    return f"{gib(low)} to {gib(high)}", batch, _range(*study.at_once)


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _cell(value: Any) -> Any:
    return json.dumps(value, sort_keys=True, default=str) if isinstance(value, dict | list | tuple) else value

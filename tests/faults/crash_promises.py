"""What a run promises whatever is done to it, checked from outside: each function yields what was broken, in words.

The database is read by plain Optuna, the rest from the journal, the results on disk, what the trials themselves noted,
the host registry and /proc. Nothing here asks the code under test except for the replay of its journal.
"""

from __future__ import annotations

import collections
import json
import threading
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from scheduler.driver import decisions, journal
from tests.faults.crash_plan import EPOCHS, STUDIES, Allowance
from tests.faults.sandbox import Sandbox

AGAIN = {"lost": "lost", "interrupted": "left", "no_room": "no_room", "not_started": "no_room"}


# -- the database ------------------------------------------------------------------------------------------------------


def read_by_optuna(database: Path) -> dict[str, list[FrozenTrial]]:
    """Every study with its trials, as anybody reads them."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{database}")
    try:
        return {
            optuna.load_study(study_name=name, storage=storage).study_name: optuna.load_study(
                study_name=name, storage=storage
            ).get_trials(deepcopy=False)
            for name in optuna.get_all_study_names(storage)
        }
    finally:
        storage.engine.dispose()


def charged(studies: Mapping[str, Sequence[FrozenTrial]], quota: int) -> Iterator[str]:
    """True at any time: no trial has a final state for what was not its fault, and a value is the one of its params."""
    for study, trials in studies.items():
        completed: collections.Counter[float] = collections.Counter()
        for trial in trials:
            name = f"{study}/{trial.number}"
            retried = "retried" in trial.user_attrs
            if trial.state is TrialState.PRUNED or (trial.state is TrialState.FAIL and not retried):
                yield f"{name} ended {trial.state.name}: {trial.user_attrs.get('error')}"
            infeasible = {k: v for k, v in trial.system_attrs.items() if k.startswith("constraint") and v and v > 0}
            if infeasible:
                yield f"{name} is infeasible: {infeasible}"
            # One that waits to be run again has its parameters where `enqueue_trial` leaves them.
            rate = {**trial.system_attrs.get("fixed_params", {}), **trial.params}.get("learning_rate")
            for step, value in trial.intermediate_values.items():
                if rate is None or value != reference(rate, step):
                    yield f"{name} reported {value} in epoch {step}"
            if trial.state is TrialState.COMPLETE:
                completed[trial.params["learning_rate"]] += 1
                if trial.value != reference(trial.params["learning_rate"]):
                    yield f"{name} has the value {trial.value}, not that of its parameters"
        yield from (f"{study} has {n} results of {rate}" for rate, n in completed.items() if n > 1)
        if completed.total() > quota:
            yield f"{study} has {completed.total()} results instead of {quota}"


def reference(rate: float, epochs: int = EPOCHS) -> float:
    """The loss of `tiny.objective` after so many epochs, to the last digit."""
    loss = 1.0
    for _ in range(epochs):
        loss = loss * 0.9 + rate
    return loss


def quota_problems(trials: Sequence[dict[str, Any]], quota: int, studies: int = STUDIES) -> Iterable[str]:
    """Each study has exactly its quota of final states, nothing is under way, no parameter set has two results."""
    counted: collections.Counter[str] = collections.Counter()
    results: collections.Counter[tuple[str, float]] = collections.Counter()
    for trial in trials:
        name = f"{trial['study']}/{trial['number']}"
        if trial["state"] not in ("COMPLETE", "PRUNED", "FAIL"):
            yield f"{name} is left {trial['state']}"
        elif "retried" not in trial["attrs"]:
            counted[trial["study"]] += 1
            results[trial["study"], trial["params"].get("learning_rate", -1.0)] += 1
            if trial["state"] != "COMPLETE":
                yield f"{name} ended {trial['state']}: {trial['attrs'].get('error')}"
    if len(counted) != studies:
        yield f"{len(counted)} studies of {studies}"
    yield from (f"{study} has {n} trials instead of {quota}" for study, n in counted.items() if n != quota)
    yield from (f"{key} has {n} results" for key, n in results.items() if n != 1)


def replay_problems(trials: Sequence[dict[str, Any]], *folders: Path) -> Iterable[str]:
    """The journals of its runs alone give the final states that the database has, of those they did not take over."""
    records = [record for folder in folders for record in journal.read(folder / "journal.jsonl")]
    replayed = decisions.final_states(sorted(records, key=lambda record: record["unix"]))
    taken = {record["trial"] for record in records if record["event"] == "study.takeover"}
    stored = {f"{t['study']}/{t['number']}": t["state"] for t in trials}
    for trial in sorted((replayed.keys() | stored.keys()) - taken):
        if replayed.get(trial) != stored.get(trial):
            yield f"{trial} is {stored.get(trial)} in the database, {replayed.get(trial)} in the journal"


def result_problems(*folders: Path, taken: Container[tuple[str, float]] = ()) -> Iterable[str]:
    """No parameter set was run to completion twice: at most one durable result each, except of those in `taken`."""
    completed: dict[tuple[str, float], list[str]] = {}
    for path in (path for folder in folders for path in (folder / "attempts").glob("*/result.json")):
        message = json.loads(path.read_text())
        spec = json.loads((path.parent / "spec.json").read_text())
        if message["type"] == "result" and message["result"].get("stop_reason") == "completed":
            key = (spec["attempt"].split("/")[0], spec["params"]["learning_rate"])
            completed.setdefault(key, []).append(path.parent.name)
    many = {key: names for key, names in completed.items() if len(names) > 1 and key not in taken}
    return [f"{key} was completed by {names}" for key, names in many.items()]


# -- what was computed, and for nothing --------------------------------------------------------------------------------


def ended(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """attempt -> why it ended, by the journal."""
    return {r["attempt"]: r["reason"] for r in records if r["event"] == "attempt.ended"}


def taken_over(trials: Sequence[dict[str, Any]], records: Iterable[Mapping[str, Any]]) -> set[tuple[str, float]]:
    """(study, learning rate) of the trials that another driver took over, by its journal."""
    names = {record["trial"] for record in records if record["event"] == "study.takeover"}
    return {
        (trial["study"], trial["params"]["learning_rate"])
        for trial in trials
        if f"{trial['study']}/{trial['number']}" in names and "learning_rate" in trial["params"]
    }


def end_problems(reasons: Mapping[str, str], allowed: Allowance) -> Iterator[str]:
    """Attempts ended as events explain it, and no more of them: what is not killed by one goes on."""
    seen = collections.Counter(AGAIN.get(reason, reason) for reason in reasons.values() if reason != "completed")
    for what, n in seen.items():
        most = getattr(allowed, what, 0)
        if n > most:
            which = sorted(a for a, reason in reasons.items() if AGAIN.get(reason, reason) == what)
            yield f"{n} attempts ended as {what!r} where the events explain {most}: {which}"


def epoch_problems(notes: Sequence[Mapping[str, Any]], reasons: Mapping[str, str]) -> Iterator[str]:
    """Each attempt begins where the newest checkpoint is, when the one before is over.

    An epoch is trained again only when its attempt was killed, or found the disk full, between the epoch's end and its
    checkpoint: the next attempt, then, begins with that one.
    """
    trained: dict[tuple[str, float], int] = {}
    latest: dict[tuple[str, float], str] = {}
    over: dict[str, str] = {}  # attempt -> the one that came after it
    for note in notes:
        trial, attempt, epoch = (note["study"], note["rate"]), note["attempt"], note["epoch"]
        if attempt in over:
            yield f"{attempt} still trained epoch {epoch} when {over[attempt]} had begun"
            continue
        before = latest.get(trial)
        if before != attempt:
            latest[trial] = attempt
            done = trained.get(trial, 0)
            if before is not None:
                over[before] = attempt
                if epoch == done and AGAIN.get(reasons.get(before, "")) in ("lost", "no_room"):
                    continue
            if epoch != done + 1:
                why = reasons.get(before or "")
                yield f"{attempt} began with epoch {epoch}, {before} ({why}) had trained {done}"
        if note["what"] == "done":
            trained[trial] = max(trained.get(trial, 0), epoch)
    yield from (f"{trial} was trained for {n} epochs" for trial, n in trained.items() if n != EPOCHS)


def vain_problems(notes: Sequence[Mapping[str, Any]], needed: int, reasons: Mapping[str, str]) -> Iterator[str]:
    """Epochs trained twice, and begun without being finished, are no more than attempts that were cut off."""
    what = collections.Counter(note["what"] for note in notes)
    cut = sum(AGAIN.get(reason) in ("lost", "no_room") for reason in reasons.values())
    if what["done"] < needed:
        yield f"{what['done']} epochs trained, but {needed} were needed"
    if what["done"] - needed > cut:
        yield f"{what['done'] - needed} epochs trained twice, {cut} attempts were cut off"
    if what["begun"] - what["left"] - needed > cut:
        yield f"{what['begun'] - what['left'] - needed} epochs begun in vain, {cut} attempts were cut off"


def retry_problems(
    trials: Sequence[dict[str, Any]], notes: Sequence[Mapping[str, Any]], reasons: Mapping[str, str]
) -> Iterator[str]:
    """A retry is spent only by an attempt that was lost before it had trained an epoch and saved it."""
    rates = {f"{t['study']}/{t['number']}": (t["study"], t["params"].get("learning_rate")) for t in trials}
    done = collections.Counter(note["attempt"] for note in notes if note["what"] == "done")
    fruitless: collections.Counter[Any] = collections.Counter()
    for attempt, reason in reasons.items():
        if reason == "lost" and done[attempt] < 2:  # the first of two was saved before the second began
            fruitless[rates.get(attempt.rpartition("/")[0])] += 1
    for trial in trials:
        key = (trial["study"], trial["params"].get("learning_rate"))
        if (spent := trial["attrs"].get("retries", 0)) > fruitless[key]:
            name = f"{trial['study']}/{trial['number']}"
            yield f"{name} has spent {spent} retries, {fruitless[key]} attempts were fruitless"


# -- memory ------------------------------------------------------------------------------------------------------------


def admission_problems(records: Iterable[Mapping[str, Any]], budget_bytes: int) -> Iterator[str]:
    """By the journal: no attempt was launched beyond the budget, with all that was held beside it at that moment."""
    held: dict[str, int] = {}
    overhead: dict[str, int] = {}
    for record in records:
        match record["event"]:
            case "batch.started":  # whatever an earlier driver held is over before this one launches anything
                held.clear()
                overhead.clear()
            case "worker.joined":
                overhead[record["worker"]] = record["overhead_bytes"]
            case "attempt.launched":
                held[record["attempt"]] = record["reserved_bytes"]
                total = sum(held.values()) + overhead[record["worker"]]
                if total > budget_bytes:
                    yield f"{total} bytes promised of {budget_bytes} when {record['attempt']} was launched"
            case "reservation.resized":
                if record["attempt"] in held:
                    held[record["attempt"]] = record["reserved_bytes"]
            case "attempt.ended":
                held.pop(record["attempt"], None)


class Watch:
    """Looks at the host ten times a second: never are more attempts of the run alive than it has slots."""

    EVERY_S = 0.1

    def __init__(self, box: Sandbox, slots: int) -> None:
        self._box, self._slots = box, slots
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="watch", daemon=True)
        self.problems: list[str] = []
        self.looks = 0

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _look_on(self) -> None:
        while not self._over.wait(self.EVERY_S):
            alive = self._box.alive_attempts()
            self.looks += 1
            if len(alive) > self._slots and len(self.problems) < 5:
                self.problems.append(f"{len(alive)} attempts alive on {self._slots} slots: {alive}")

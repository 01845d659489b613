"""What the study database costs per trial: `python -m tests.benchmarks.study [FOLDER] [TRIALS]`.

Prints median milliseconds of ask, report and tell on an SQLite file, with this project's settings (WAL,
synchronous=NORMAL) and with Optuna's own (rollback journal, FULL), beside the folder's own fsync.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import optuna
from sqlalchemy import event

from scheduler.model import AskTrial, AttemptId, FinalState, StudySpec, TellTrial, TrialAsked
from scheduler.study.store import StudyStore
from tests.study.test_study import ARCHITECTURES, STUDY, store_at

EPOCHS = 5
CPU_MS: list[float] = []
ATTRS = {f"attr{n}": n for n in range(18)}  # as many as a real trial's end has


def timed(into: list[float], operation: Callable[..., Any], *arguments: Any) -> Any:
    """Run it and note its milliseconds; the process's CPU time goes to CPU_MS, which others' load does not inflate."""
    began, cpu = time.perf_counter(), time.process_time()
    answer = operation(*arguments)
    into.append((time.perf_counter() - began) * 1000)
    CPU_MS.append((time.process_time() - cpu) * 1000)
    return answer


def through_store(store: StudyStore, trials: int) -> dict[str, float]:
    """Medians of `trials` trials through the store."""
    ms: dict[str, list[float]] = {"ask": [], "report": [], "tell": []}
    for n in range(trials):
        asked = timed(ms["ask"], store.ask, AskTrial(study=STUDY, limit_bytes=100))
        assert isinstance(asked, TrialAsked)
        for step in range(1, EPOCHS + 1):
            timed(ms["report"], store.report, AttemptId(asked.trial, 1), {step: 1.0 / (n + step)})
        command = TellTrial(trial=asked.trial, state=FinalState.COMPLETE, value=1.0 / (n + 1), attrs=ATTRS)
        timed(ms["tell"], store.tell, command)
    return {name: median(values) for name, values in ms.items()}


def plain_optuna(file: Path, trials: int) -> dict[str, float]:
    """The same trial as Optuna does it by itself: one transaction per parameter and attribute."""
    study = optuna.create_study(storage=f"sqlite:///{file}", sampler=optuna.samplers.TPESampler(seed=0))
    ms: dict[str, list[float]] = {"ask": [], "report": [], "tell": []}

    def ask() -> optuna.Trial:
        trial = study.ask()
        trial.suggest_int("architecture", 0, 19)
        trial.suggest_float("rate", 1e-5, 1e-2, log=True)
        for key in range(8):
            trial.set_user_attr(f"param{key}", key)
        return trial

    def report(trial: optuna.Trial, step: int, value: float) -> bool:
        trial.report(value, step)
        return trial.should_prune()

    def tell(trial: optuna.Trial, value: float) -> None:
        for key, attr in ATTRS.items():
            trial.set_user_attr(key, attr)
        study.tell(trial, value)

    for n in range(trials):
        trial = timed(ms["ask"], ask)
        for step in range(1, EPOCHS + 1):
            timed(ms["report"], report, trial, step, 1.0 / (n + step))
        timed(ms["tell"], tell, trial, 1.0 / (n + 1))
    return {name: median(values) for name, values in ms.items()}


def fsync_ms(folder: Path) -> float:
    """Median of forcing 4 KiB to this disk."""
    ms: list[float] = []
    with open(folder / "probe", "wb", buffering=0) as file:
        for _ in range(50):
            file.write(b"x" * 4096)
            timed(ms, os.fsync, file.fileno())
    return median(ms)


def main(folder: str | None = None, trials: str = "40") -> None:
    """Measure in a new folder under `folder` (default: where temporary files go)."""
    n = int(trials)
    spec = StudySpec(name=STUDY, quota=n, slots=1, context={"max_epochs": EPOCHS})
    with tempfile.TemporaryDirectory(dir=folder) as name:
        where, rows = Path(name), {}
        print(f"{n} trials of {EPOCHS} epochs, TPE, median pruner; fsync of 4 KiB: {fsync_ms(where):.1f} ms")
        cpu: dict[str, float] = {}
        for title, level in (("WAL, synchronous=NORMAL (ours)", None), ("WAL, synchronous=FULL", "FULL")):
            store = store_at(where / f"{level}.db")
            engine = store._connect().storage.engine
            if level:
                event.listen(engine, "connect", lambda c, _: c.execute("PRAGMA synchronous=FULL"))
                engine.dispose()
            store.open(spec, ARCHITECTURES)
            CPU_MS.clear()
            rows[title] = through_store(store, n)
            cpu[title] = sum(CPU_MS) / n
            store.close()
        CPU_MS.clear()
        title = "Optuna by itself (DELETE, FULL)"
        rows[title] = plain_optuna(where / "plain.db", n)
        cpu[title] = sum(CPU_MS) / n
    print(f"{'median ms':34}{'ask':>8}{'report':>8}{'tell':>8}{'a trial':>9}{'its CPU':>9}")
    for title, ms in rows.items():
        total = ms["ask"] + EPOCHS * ms["report"] + ms["tell"]
        print(f"{title:34}{ms['ask']:8.1f}{ms['report']:8.1f}{ms['tell']:8.1f}{total:9.1f}{cpu[title]:9.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:])

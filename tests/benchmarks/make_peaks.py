"""Make a stream of peaks: an Optuna study of one objective, each trial in a process of its own, one CSV row a trial.

The objectives are in `peak_objectives`, in the style of Optuna's public examples; each module's libraries are imported
before the fork, as a warm process would have them. Columns and distributions are described in data/README.md. Linux
only (VmHWM). Needs scikit-learn, lightgbm, xgboost, catboost and polars beside the project's own libraries, in an
environment of its own: `python -m tests.benchmarks.make_peaks OBJECTIVE random|tpe TRIALS [SEED]`.
"""

from __future__ import annotations

import csv
import importlib
import json
import multiprocessing
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.peak_objectives import OBJECTIVES

if TYPE_CHECKING:
    import optuna

DATA = Path(__file__).parent / "data"
ADDRESS_SPACE_LIMIT = 12 * 2**30  # a slip in an objective must not take the machine
SAMPLE_S = 0.002
# One thread a trial, so that a peak does not depend on the machine's cores. Libraries read these as they are imported.
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS")


class PipedTrial:
    """What an objective is given in its process: each suggest is answered by the study's own, in the parent."""

    def __init__(self, pipe: Connection, number: int) -> None:
        self._pipe = pipe
        self.number = number

    def __getattr__(self, name: str) -> Callable[..., object]:
        def ask(*args: object, **kwargs: object) -> object:
            self._pipe.send((name, args, kwargs))
            return self._pipe.recv()

        return ask


def status_bytes(pid: int, field: str) -> int:
    """A field of /proc/PID/status in bytes; 0 when the process is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def cpu_s(pid: int) -> float:
    """CPU seconds of another process, to the nanosecond (clock_getcpuclockid's number)."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


def child(objective: Callable[[PipedTrial], float], number: int, pipe: Connection) -> None:
    """Run one trial and send its value and its peak."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_LIMIT, ADDRESS_SPACE_LIMIT))
    try:
        value = float(objective(PipedTrial(pipe, number)))
        pipe.send(("done", value, status_bytes(os.getpid(), "VmHWM")))
    except BaseException:
        traceback.print_exc()
        pipe.send(("done", None, status_bytes(os.getpid(), "VmHWM")))
    pipe.recv()  # stays until its clock was read


def growth_shares(samples: list[tuple[float, int]], base: int) -> tuple[float, float]:
    """The shares of the CPU time after which 50 and 90 % of the growth were there, from (CPU s, highest bytes)."""
    end, most = samples[-1]
    grown, shares = most - base, []
    for part in (0.5, 0.9):
        at = next((cpu for cpu, high in samples if high - base >= part * grown), end)
        shares.append(round(at / end, 3) if end else 1.0)
    return shares[0], shares[1]


def run(objective: Callable[[PipedTrial], float], trial: optuna.Trial) -> dict[str, Any]:
    """One trial in a forked process: its row, without the parameters."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(objective, trial.number, theirs))
    start = time.monotonic()
    process.start()
    pid = process.pid or 0
    base = status_bytes(pid, "VmHWM")
    samples = [(cpu_s(pid), base)]
    while True:
        if ours.poll(SAMPLE_S):
            message = ours.recv()
            if message[0] == "done":
                break
            name, args, kwargs = message
            ours.send(getattr(trial, name)(*args, **kwargs))
        samples.append((cpu_s(pid), status_bytes(pid, "VmHWM")))
    value, peak = message[1:]
    samples.append((cpu_s(pid), peak))
    ours.send("leave")
    process.join()
    half, most = growth_shares(samples, base)
    return {
        "value": "" if value is None else round(value, 5),
        "base": base,
        "peak": peak,
        "seconds": round(time.monotonic() - start, 2),
        "cpu": round(samples[-1][0], 3),
        "half": half,
        "most": most,
    }


def main(name: str, sampler: str, trials: int, seed: int = 0) -> None:
    """Write data/peaks-NAME-SAMPLER.csv and the parameters' distributions beside it."""
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    module, function, direction = OBJECTIVES[name]
    objective = getattr(importlib.import_module(f"tests.benchmarks.peak_objectives.{module}"), function)
    kinds = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
    study = optuna.create_study(sampler=kinds[sampler](seed=seed), direction=direction)
    rows: list[dict[str, object]] = []
    distributions: dict[str, object] = {}
    for _ in range(trials):
        trial = study.ask()
        row = run(objective, trial)
        if row["value"] == "":
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, row["value"])
        rows.append({"workload": name, "trial": trial.number} | row | {f"p.{k}": v for k, v in trial.params.items()})
        for key, distribution in trial.distributions.items():
            distributions[key] = json.loads(optuna.distributions.distribution_to_json(distribution))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    DATA.mkdir(exist_ok=True)
    with (DATA / f"peaks-{name}-{sampler}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (DATA / f"peaks-{name}-{sampler}.json").write_text(json.dumps(distributions, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *map(int, sys.argv[4:]))

"""Run folders for the report's tests: a real journal, a real Optuna database, real settings; only time is made up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna

from scheduler.driver import run_folder
from scheduler.host.attempt_folder import AttemptFolder, attempts_of
from scheduler.model import AttemptId, TrialId
from scheduler.settings import load

BEGAN = 1_795_000_000.0
GIB = 2**30
SCRIPT = "<script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)>"


class Made:
    """A run folder that is written line by line. `at`: the clock, seconds after the start."""

    def __init__(self, root: Path, **settings: Any) -> None:
        given = {"name": "made", "runs_dir": str(root), "objective": "made.py:objective", **settings}
        self.settings = load.load({k: v for k, v in given.items() if v is not None}, environ={})
        self.folder = run_folder.prepare(self.settings)
        self.at = 0.0
        self.say("batch.started", run=self.settings.name, driver_pid=1, owner="o")

    def say(self, event: str, **fields: Any) -> None:
        """A line of the journal at this instant."""
        with open(self.folder / "journal.jsonl", "a") as file:
            file.write(json.dumps({"v": 1, "unix": BEGAN + self.at, "event": event, **fields}) + "\n")

    def study(self, name: str, quota: int = 10) -> optuna.Study:
        """A new study of the run's database."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.say("study.opened", study=name, counted=0, quota=quota)
        return optuna.create_study(study_name=name, storage=f"sqlite:///{self.folder / 'study.db'}")

    def worker(self) -> None:
        """A worker joins."""
        facts = {"limit_bytes": 16 * GIB, "available_bytes": 14 * GIB, "overhead_bytes": GIB // 4, "slots": 2}
        self.say("worker.joined", worker="h:1", host="h", limit_source="ram", environment="e", **facts)

    def attempt(
        self,
        trial: str,
        began: float,
        until: float,
        reason: str | None = "completed",
        number: int = 1,
        steps: Mapping[float, int] | None = None,
        resume_from: str | None = None,
        **end: Any,
    ) -> None:
        """An attempt from its launch to its end (reason None: it has none). steps: instant -> step reported then."""
        name = f"{trial}/{number}"
        launched = {"reserved_bytes": GIB, "predicted_bytes": GIB, "source": "prior", "wait_s": 2.0}
        launched |= {key: end.pop(key) for key in launched if key in end}
        self.at = began
        self.say("attempt.launched", attempt=name, worker="h:1", resume_from=resume_from, **launched)
        self.say("attempt.started", attempt=name, pid=2)
        for at, step in (steps or {}).items():
            self.at = at
            self.say("attempt.progress", attempt=name, step=step, value=1.0 / step, peak_bytes=GIB // 2)
        self.at = until
        if reason is not None:
            told = {"value": None, "detail": "", "peak_bytes": GIB // 2, "kill": None, **end}
            self.say("attempt.ended", attempt=name, reason=reason, duration_s=until - began, **told)

    def kill(self, trial: str, rule: str, reason: str, **evidence: Any) -> dict[str, Any]:
        """The record of a kill, its story written into the attempt's folder."""
        study, _, number = trial.rpartition("/")
        attempt = AttemptId(TrialId(study, int(number)), 1)
        steps = [
            {"step": "intent", "at": 100.0, "unix": BEGAN + 50},
            {"step": "term", "at": 101.0, "unix": BEGAN + 51},
            {"step": "dead", "at": 102.0, "unix": BEGAN + 52, "seconds": 12.0},
            {"step": "memory_back", "at": 103.0, "unix": BEGAN + 53, "gained_bytes": 3 * GIB},
            {"step": "released", "at": 103.0, "unix": BEGAN + 53, "why": "memory is back"},
        ]
        record = {"kill_id": "k", "rule": rule, "reason": reason, "evidence": evidence, "steps": steps}
        host = {"available_bytes": 4 * GIB, "limit_bytes": 16 * GIB}
        samples = [
            {"at": 70.0 + i, "host": host, "trials": [{"tree": {"footprint_bytes": i * GIB // 8, "cpu_s": i / 2}}]}
            for i in range(30)
        ]
        others = [
            {"attempt": str(attempt), "footprint_bytes": 4 * GIB, "promised_bytes": GIB, "why": "chosen: active"},
            {"attempt": f"{study}/9/1", "footprint_bytes": GIB, "promised_bytes": 2 * GIB,
             "why": f"within its promise: {GIB} bytes of {2 * GIB}"},
        ]  # fmt: skip
        folder = AttemptFolder(attempts_of(self.folder) / attempt.slug)
        folder.path.mkdir(parents=True)
        story = {**record, "attempt": str(attempt), "candidates": others, "samples": samples, "stack": SCRIPT}
        folder.write_kill(story)
        return {**record, "steps": [[step["step"], step["at"]] for step in steps]}

    def end(self, code: int = 0, reason: str = "all studies reached their quota") -> None:
        """The driver leaves."""
        self.say("batch.ended", exit_code=code, reason=reason, unwritten=0)


def frozen(value: float | None, state: str = "COMPLETE", **attrs: Any) -> optuna.trial.FrozenTrial:
    """A finished trial with two parameters, x of which the value follows."""
    x = 0.5 if value is None else value
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState[state],
        value=value,
        params={"x": x, "kind": "a" if x < 0.5 else SCRIPT},
        distributions={
            "x": optuna.distributions.FloatDistribution(0.0, 1.0),
            "kind": optuna.distributions.CategoricalDistribution(["a", SCRIPT]),
        },
        user_attrs={"stop_reason": "completed", "duration_s": 10.0, **attrs},
    )


def typical(root: Path) -> Made:
    """A run of one study: twelve trials complete, one of each other end, and what led there."""
    made = Made(root)
    study = made.study("made", quota=15)
    made.worker()
    for i in range(12):
        study.add_trial(frozen((i + 1) / 13, attempts=1))
        made.attempt(f"made/{i}", 3.0 * i, 3.0 * i + 3, steps={3.0 * i + 1: 1})
    study.add_trial(frozen(None, "PRUNED", stop_reason="overshoot", **{"watchdog.reason": "overshoot"}))
    told = made.kill("made/12", "overshoot", "overshoot", footprint_bytes=4 * GIB, promised_bytes=GIB, over_bytes=3)
    made.attempt("made/12", 40, 53, "overshoot", kill=told)
    study.add_trial(frozen(None, "FAIL", stop_reason="failed", error=f"ValueError: {SCRIPT}", traceback=SCRIPT))
    made.attempt("made/13", 41, 43, "failed")
    study.add_trial(frozen(None, "PRUNED", stop_reason="pruned"))
    made.attempt("made/14", 43, 45, "pruned")
    study.add_trial(frozen(None, "PRUNED", stop_reason="does_not_fit"))
    made.at = 60
    return made

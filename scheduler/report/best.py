"""The best configuration of each study as a configuration file that runs it, from its checkpoint where there is one."""

from __future__ import annotations

import json
import os
import re
from typing import Any

from scheduler.model import Json, StudySpec
from scheduler.report.records import Run
from scheduler.settings.command import PREFIX
from scheduler.settings.layers import as_yaml
from scheduler.settings.schema import Settings
from scheduler.settings.study_keys import StudyKeys
from scheduler.ui.report import best_row

# Of the machine, the run and its database, not of what is trained: a file that is run elsewhere has its own.
LEFT_OUT = {"storage", "runs_dir", "cluster", "tls_ca_file", "tls_cert", "tls_key", "dashboard", "study", "log_level"}
LEFT_OUT |= {"experiments", "hpo", "begin_with"}


def section(run: Run) -> list[Json]:
    """Return a file each; without text for a study that has none, with why."""
    return [_file(run, spec) for spec in run.specs if run.rows.get(spec.name)]


def _file(run: Run, spec: StudySpec) -> Json:
    found: Json = {"study": spec.name, "file": None, "yaml": None, "checkpoint": None, "model": None, "why": ""}
    best = best_row(run.rows[spec.name], spec)
    read = run.studies.get(spec.name)
    if best is None:
        return found | {"why": "it has several values" if len(spec.directions) > 1 else "no trial completed"}
    objective = "" if run.settings is None else run.settings.objective or ""
    if objective.startswith("pickle") or objective == "optimize:objective":
        return found | {"why": "its objective is a function of a program: enqueue these parameters there"}
    if run.settings is None or read is None:
        return found | {"why": "the run's settings or its study could not be read"}
    params = json.loads(json.dumps(dict(read.params[best["number"]]), default=str))
    checkpoint, model = _there(best.get("checkpoint")), _there(best.get("model"))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{spec.name[:60]}-best")
    data = _settings(run.settings, spec) | {"name": name, "trials": 1, "warm_start": 0}
    data["begin_with"] = {"params": params, "checkpoint": checkpoint}
    head = (
        f"# Trial {best['number']} of {spec.name}: value {best['value']:.6g}. To run it: bin/schedule --config FILE\n"
    )
    if checkpoint is not None:
        head += "# It goes on from its checkpoint; `checkpoint: null` trains it from the beginning.\n"
    text = head + as_yaml(data)
    return found | {"file": f"best/{spec.name}.yaml", "yaml": text, "checkpoint": checkpoint, "model": model}


def _settings(settings: Settings, spec: StudySpec) -> dict[str, Any]:
    """Return what must be as it was for the trial to be the same, in the keys of a configuration file."""
    keys = next((k for k in settings.experiments if _has(k.budgets, k.horizons, spec)), settings)
    data = settings.model_dump(mode="json") | (keys.model_dump(mode="json") if keys is not settings else {})
    default = Settings().model_dump(mode="json")
    data = {key: value for key, value in data.items() if key not in LEFT_OUT and value != default[key]}
    if "watchdog" in data:  # fifty thresholds, of which few were set
        data["watchdog"] = {key: each for key, each in data["watchdog"].items() if each != default["watchdog"][key]}
    if "budget" in spec.context:
        return data | {"budgets": [spec.context["budget"]], "horizons": [spec.context["horizon"]]}
    if (settings.objective or "").startswith(PREFIX):
        del data["objective"]  # follows from the command
    return {key: value for key, value in data.items() if key not in StudyKeys.model_fields or key == "seed"}


def _has(budgets: Any, horizons: Any, spec: StudySpec) -> bool:
    return spec.context.get("budget") in budgets and spec.context.get("horizon") in horizons


def _there(path: Any) -> str | None:
    return path if isinstance(path, str) and os.path.isfile(path) else None

"""What it ran with: settings, the machines, the versions."""

from __future__ import annotations

import platform
from importlib import metadata

from scheduler import __version__
from scheduler.model import Json
from scheduler.report.records import Run
from scheduler.settings.schema import Settings
from scheduler.units import gib

LIBRARIES = ("optuna", "distributed", "torch", "numpy", "SQLAlchemy", "psutil")


def section(run: Run) -> Json:
    """Return settings (those that differ from the defaults marked), workers, and versions where this is made."""
    return {
        "settings": [] if run.settings is None else _settings(run.settings),
        "workers": [
            {key: facts.get(key) for key in ("worker", "host", "slots", "limit_bytes", "limit_source", "environment")}
            for facts in run.workers.values()
        ],
        "versions": {"headroom": __version__, "python": platform.python_version(), **_versions()},
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "folder": str(run.folder),
    }


def _settings(settings: Settings) -> list[Json]:
    default = Settings().resolved()
    found = []
    for key, value in settings.resolved().items():
        if isinstance(value, dict) and isinstance(default.get(key), dict):
            for inner, each in value.items():
                changed = default[key].get(inner) != each
                found.append({"key": f"{key}.{inner}", "value": each, "changed": changed})
        else:
            found.append({"key": key, "value": value, "changed": default.get(key) != value})
    for each in found:  # as people read them; the files have the numbers
        if each["key"].endswith("_bytes") and isinstance(each["value"], int):
            each["value"] = gib(each["value"])
    return sorted(found, key=lambda each: not each["changed"])


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found

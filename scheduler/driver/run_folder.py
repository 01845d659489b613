"""The folder of a run as the edge sees it: resolved settings, and what its trials mean.

Covers `settings.yaml` and `meaning.json`, and the refusal to resume a run whose trials would mean something else.
Locks, journal and attempts in the same folder are others' business.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scheduler import masking
from scheduler.files.durable import write
from scheduler.host.attempt_folder import attempts_of
from scheduler.model import UsageError
from scheduler.settings.layers import as_yaml
from scheduler.settings.schema import Settings
from scheduler.workload.studies import meaning

_ABSENT = "(not set)"
HEAD = "# What this run was last started with (arguments, environment and files resolved).\n"
LEFT_OUT = (
    "# storage stands here without its password: give it again by --storage or HEADROOM_STORAGE, or by PGPASSWORD.\n"
)


def check(settings: Settings) -> None:
    """Raise UsageError when the run folder holds studies that mean something else; writes nothing."""
    known = _read_meaning(settings.run_folder / "meaning.json")
    for study, now in meaning(settings).items():
        before = known.get(study)
        if before is None:
            continue
        keys = {*before, *now}
        if "auto" in (now.get("recipe"), before.get("recipe")):  # it keeps the one it has, or was never begun
            keys.discard("recipe")
        for key in sorted(keys):
            old, new = before.get(key, _ABSENT), now.get(key, _ABSENT)
            if old != new:
                raise UsageError(
                    f"run {settings.name!r} was started with {key} = {_shown(old)}, now it is {_shown(new)}: the "
                    f"trials of {study} would not be comparable; set it back, or give this run a --name of its own"
                )


def recipes(settings: Settings) -> dict[str, str]:
    """Return the recipe of each study that was begun in this run folder. Raises UsageError as `check` does."""
    known = _read_meaning(settings.run_folder / "meaning.json")
    return {study: each["recipe"] for study, each in known.items() if each.get("recipe", "auto") != "auto"}


def prepare(settings: Settings, recipes: Mapping[str, str] | None = None) -> Path:
    """Check, then make the run folder with its settings.yaml and meaning.json; returns its absolute path.

    recipes: of the studies, where the settings leave it to the plan.

    Raises UsageError: the trials would mean something else, or the folder cannot be written.
    """
    check(settings)
    folder = settings.run_folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)  # one that is shared on purpose stays as it is
        attempts_of(folder).mkdir(mode=0o700, exist_ok=True)
        known, now = _read_meaning(folder / "meaning.json"), meaning(settings)
        for study, each in now.items():
            if each.get("recipe") == "auto":
                each["recipe"] = (recipes or {}).get(study) or known.get(study, each).get("recipe", "auto")
        known |= now
        write(folder / "meaning.json", json.dumps(known, indent=1, sort_keys=True) + "\n", durable=True)
        text = HEAD + (LEFT_OUT if has_secret(settings) else "") + as_yaml(settings.resolved())
        write(folder / "settings.yaml", text, durable=True)
    except OSError as error:
        raise UsageError(
            f"cannot write the run folder {folder}: {error.strerror or error}; give another --runs-dir"
        ) from None
    return folder


def run_id(folder: Path) -> str:
    """Names this run folder among all that share a study database or a host; the same after every restart.

    Raises UsageError when what is there is no name; OSError when it cannot be written.
    """
    path = folder / "run_id"
    if not path.exists():
        write(path, uuid.uuid4().hex + "\n", durable=True)
    found = path.read_bytes().strip()
    if not re.fullmatch(rb"[0-9a-f]{32}", found):
        raise UsageError(
            f"{path} is damaged; remove it: trials that this run left RUNNING are then taken over as another's"
        )
    return found.decode()


def has_secret(settings: Settings) -> bool:
    return settings.storage is not None and masking.has_secret(settings.storage)


def _read_meaning(path: Path) -> dict[str, Mapping[str, Any]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):  # the latter is told by whoever makes the folder
        return {}
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read {path} ({why}); remove it to take the present settings for it") from None
    if not isinstance(data, dict) or not all(isinstance(each, dict) for each in data.values()):
        raise UsageError(f"{path} holds no study; remove it to take the present settings for it")
    for each in data.values():  # before there were recipes, there was one, under two names
        if (each.pop("precision", None), each.pop("optimizer", None)) == ("fp32", "adamw"):
            each.setdefault("recipe", "fp32_adamw")
    return data


def _shown(value: Any) -> str:
    return value if value == _ABSENT else json.dumps(value)

"""What is asked of a Dask worker before anything of Headroom is sent to it.

The question travels as source text that needs the standard library alone, so that it can be asked anywhere: a worker of
another project, of another Python. `judge` says whether the worker is of use, and if not, why.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from scheduler import __version__
from scheduler.model import Json

# Evaluated on the worker with {"source": ..., "folders": [...]} as its globals.
EXPRESSION = "(lambda found: exec(source, found) or found['look'](folders))({})"


def question(folders: list[str]) -> tuple[Any, ...]:
    """Return function and arguments to be run on the worker; the answer goes to `judge`. folders: what it must write
    to."""
    return eval, EXPRESSION, {"source": inspect.getsource(look), "folders": folders}


def look(folders):  # type: ignore[no-untyped-def]  # sent as text to any Python: no annotations, no names of ours
    """(On the worker.) Its Python, whose Headroom it would import, and whether it can write where it must."""
    import importlib.util
    import os
    import re
    import sys
    import tempfile

    problems: list[str] = []
    answer = {"python": list(sys.version_info[:3]), "executable": sys.executable, "version": None, "problems": problems}
    try:
        found = importlib.util.find_spec("scheduler")
    except Exception as error:
        found = None
        problems.append(f"{type(error).__name__}: {error}")
    for folder in [] if found is None else found.submodule_search_locations or []:
        try:
            with open(os.path.join(folder, "__init__.py")) as file:
                written = re.search(r'^__version__ = "(.*)"', file.read(), re.MULTILINE)
            if written and os.path.exists(os.path.join(folder, "worker", "agent_process.py")):
                answer["version"] = written.group(1)
        except OSError as error:
            problems.append(str(error))
    private = os.environ.get("HEADROOM_HOST_DIR") or os.path.join(tempfile.gettempdir(), f"headroom-{os.geteuid()}")
    for folder in [private, *folders]:
        try:
            os.makedirs(folder, mode=0o700 if folder == private else 0o777, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"x")
                file.flush()
        except OSError as error:
            problems.append(f"cannot write to {folder}: {error.strerror or error}")
    return answer


def judge(answer: Json) -> str | None:
    """Why the worker cannot be used; None when it can."""
    python, ours = tuple(answer["python"][:2]), sys.version_info[:2]
    where = answer["executable"]
    if python != ours:
        mine = ".".join(map(str, ours))
        return f"it runs Python {'.'.join(map(str, python))} ({where}), the driver {mine}; start it with the same"
    if answer["version"] is None:
        return f"{where} has no Headroom; start `dask worker` in an environment that has it"
    if answer["version"] != __version__:
        return f"{where} has Headroom {answer['version']}, the driver {__version__}; install the same there"
    return "; ".join(answer["problems"]) or None

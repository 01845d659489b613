"""Rules read off the source: who may import whom, what stays pure, and that every test says what it shows."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCHEDULER = ROOT / "scheduler"
PURE_ROOMS = ("core", "model", "watchdog.policy")
# A room is a package, or a file beside the packages. What each imports of the others: no more, no less.
ROOMS = {
    "__main__": {"cli"},
    "replay": {"core", "driver"},
    "report": {
        "__init__",
        "core",
        "driver",
        "files",
        "host",
        "masking",
        "model",
        "settings",
        "study",
        "ui",
        "units",
        "workload",
    },
    "cli": {
        "__init__",
        "cluster",
        "driver",
        "host",
        "masking",
        "model",
        "report",
        "settings",
        "study",
        "ui",
        "units",
        "worker",
        "workload",
    },
    "driver": {
        "cluster",
        "core",
        "files",
        "host",
        "host.vitals",
        "masking",
        "model",
        "settings",
        "study",
        "ui",
        "worker",
        "workload",
    },
    "cluster": {"__init__", "host", "host.vitals", "model", "ui", "ui.dashboard"},
    "ui": {"core", "files", "masking", "model", "units", "workload"},
    "ui.dashboard": {"model", "ui", "units"},
    "study": {"attempt", "core", "files", "host", "masking", "model", "settings", "workload"},
    "workload": {"core", "host", "model", "settings", "units"},
    "worker": {"core", "files", "host", "host.vitals", "model", "watchdog", "watchdog.policy"},
    "watchdog": {"files", "host", "host.vitals", "model", "watchdog.policy"},
    "settings": {"core", "host", "masking", "model", "units", "watchdog.policy"},
    "core": {"model", "units"},
    "watchdog.policy": {"model"},
    "host": {"files", "host.vitals", "model", "units"},
    "host.vitals": {"model"},
    "files": {"model"},
    "units": {"model"},
    "attempt": set(),
    "masking": set(),
    "model": set(),
    "__init__": set(),
}
# Libraries that more than one room draws or writes with; every other one is imported in one room.
SEVERAL = {"bokeh": {"cluster", "ui.dashboard"}, "structlog": {"driver", "ui"}, "rich": {"cli", "ui"}}
PURE_STDLIB = {
    "__future__",
    "bisect",
    "collections",
    "contextlib",
    "dataclasses",
    "enum",
    "functools",
    "heapq",
    "itertools",
    "math",
    "operator",
    "re",
    "statistics",
    "types",
    "typing",
}
# Import name -> library, where several names are one library's.
LIBRARY = {"dask": "dask", "distributed": "dask", "optuna": "optuna", "sqlalchemy": "optuna", "psutil": "psutil"}


def imports(path: Path, *, runtime_only: bool = False) -> Iterator[str]:
    """Dotted names of all modules that a file imports, inside functions too."""
    tree = ast.parse(path.read_text(), str(path))
    typing_only: set[ast.AST] = set()
    if runtime_only:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                typing_only.update(inner for each in node.body for inner in ast.walk(each))
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top(module: str) -> str:
    """The first part of a dotted name."""
    return module.split(".")[0]


def third_party(path: Path) -> set[str]:
    """The libraries a file imports, ours and Python's own left out."""
    names = {top(module) for module in imports(path)} - {"scheduler", "training"} - set(sys.stdlib_module_names)
    return {LIBRARY.get(name, name) for name in names}


def room_of(path: Path) -> str:
    """The innermost room that a file of the scheduler lies in."""
    parts = path.relative_to(SCHEDULER).with_suffix("").parts
    return ".".join(parts[:-1]) or parts[-1]


def ours(path: Path) -> Iterator[Path]:
    """The files of ours that a file imports: `scheduler.units.gib` is a name in one, `scheduler.core.fault` is one."""
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "scheduler":
            stems = [ROOT.joinpath(*parts[:length]) for length in range(len(parts), 0, -1)]
            yield next(f for stem in stems for f in (stem.with_suffix(".py"), stem / "__init__.py") if f.exists())


FILES = sorted(SCHEDULER.rglob("*.py"))
ARROWS = {
    (room_of(path), room_of(other)): f"{path.relative_to(ROOT)} imports {other.relative_to(ROOT)}"
    for path in FILES
    for other in ours(path)
    if room_of(path) != room_of(other)
}


def test_every_room_is_listed() -> None:
    """A new package or a new file beside the packages takes its place in the list of rooms."""
    assert {room_of(path) for path in FILES} == set(ROOMS)


def test_a_room_imports_what_its_line_says_and_no_more() -> None:
    """Every import from room to room is in the list."""
    assert {arrow: why for arrow, why in ARROWS.items() if arrow[1] not in ROOMS[arrow[0]]} == {}


def test_what_a_line_allows_is_used() -> None:
    """An arrow that nothing needs any more leaves the list."""
    assert [(room, other) for room, others in ROOMS.items() for other in others if (room, other) not in ARROWS] == []


def test_no_arrow_runs_back() -> None:
    """The rooms have an order in which each imports only later ones: there is no circle."""
    graph = graphlib.TopologicalSorter(ROOMS)
    graph.prepare()


def test_a_library_is_imported_in_its_one_room() -> None:
    """Dask in cluster, Optuna in study, psutil in host.vitals: whoever changes a library looks into one room."""
    rooms: dict[str, set[str]] = {}
    for path in FILES:
        for library in third_party(path):
            rooms.setdefault(library, set()).add(room_of(path))
    several = {library: found for library, found in rooms.items() if len(found) > 1}
    assert several == SEVERAL
    assert rooms["dask"] == {"cluster"}
    assert rooms["optuna"] == {"study"}
    assert rooms["psutil"] == {"host.vitals"}


PURE = sorted(path for path in FILES if room_of(path) in {*PURE_ROOMS, "units"})


@pytest.mark.parametrize("path", PURE, ids=lambda path: str(path.relative_to(ROOT)))
def test_policies_model_and_brain_are_pure(path: Path) -> None:
    """No clock, no I/O, no logging, no library, neither here nor in what is imported: a few modules of Python's own."""
    for module in imports(path):
        assert top(module) in PURE_STDLIB | {"scheduler"}, f"{path.name} imports {module}"
    for other in ours(path):
        assert other in PURE, f"{path.name} imports {other.relative_to(ROOT)}"


def test_the_watchdog_needs_the_standard_library_and_psutil_only() -> None:
    """Nothing heavy is loaded in the process that must act when memory is short."""
    code = (
        "import sys; import scheduler.watchdog.watchdog\n"
        "heavy = {'torch', 'dask', 'distributed', 'optuna', 'numpy', 'yaml', 'pydantic', 'structlog', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_training_knows_no_scheduler() -> None:
    """The training side runs without ours, so that a user's own function can take its place."""
    for path in sorted((ROOT / "training").rglob("*.py")):
        for module in imports(path):
            assert top(module) != "scheduler", f"{path.name} imports {module}"


def test_the_scheduler_names_training_by_dotted_path_only() -> None:
    """Nothing of ours imports training: the functions come from the settings."""
    allowed = {SCHEDULER / "cli" / "footprint.py"}  # a command that shows the training side's formula
    for path in FILES:
        if path not in allowed:
            for module in imports(path, runtime_only=True):
                assert top(module) != "training", f"{path.name} imports {module}"


def test_help_and_the_plan_load_no_heavy_library() -> None:
    """Neither the command line nor the plan imports torch, Dask or Optuna: both answer within a second."""
    code = (
        "import sys; from scheduler.cli import schedule\n"
        "from scheduler.host import facts\n"
        "from scheduler.settings import load\n"
        "from scheduler.ui import report\n"
        "from scheduler.workload import plan\n"
        "settings = load.load({'budgets': '2M', 'horizons': '1'}, environ={})\n"
        "plan.make(settings, [facts.facts('cpu', 2)])\n"
        "print(sorted({'torch', 'dask', 'distributed', 'optuna', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_every_test_says_in_a_sentence_what_it_shows() -> None:
    """Each test function has a docstring, so that a failure reads as a broken promise."""
    silent = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not node.name.startswith("test_"):
                continue
            if not ast.get_docstring(node):
                silent.append(f"{path.name}::{node.name}")
    assert silent == []

"""Rules read off the source: who may import whom, what stays pure, and that every test says what it shows."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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


def pure_parts() -> list[Path]:
    """The brain, the policies and the nouns, with everything of ours that they import, and what that imports."""
    wanted = [ROOT / "scheduler" / f"{name}.py" for name in ("batch", "snapshot")]
    wanted += (ROOT / "scheduler" / "policy").rglob("*.py")
    found: set[Path] = set()
    while wanted:
        path = wanted.pop()
        if path in found:
            continue
        found.add(path)
        for module in imports(path):
            parts = module.split(".")
            # `scheduler.units.gib` is a name in a file, `scheduler.policy.fault` a file.
            stems = [ROOT.joinpath(*parts[:length]) for length in range(len(parts), 1, -1)]
            files = [file for stem in stems for file in (stem.with_suffix(".py"), stem / "__init__.py")]
            wanted += [file for file in files if parts[0] == "scheduler" and file.exists()]
    return sorted(found)


PURE = pure_parts()


def test_the_pure_parts_are_there() -> None:
    """The walk finds the brain, its ledger and every policy."""
    names = {path.name for path in PURE}
    assert {
        "batch.py",
        "nouns.py",
        "events.py",
        "ledger.py",
        "admission.py",
        "placement.py",
        "eviction.py",
        "fault.py",
    } <= names


@pytest.mark.parametrize("path", PURE, ids=lambda path: str(path.relative_to(ROOT)))
def test_policies_model_and_brain_are_pure(path: Path) -> None:
    """No clock, no I/O, no logging, no library, neither here nor in what is imported: a few modules of Python's own."""
    for module in imports(path):
        assert top(module) in PURE_STDLIB | {"scheduler"}, f"{path.name} imports {module}"
        assert not module.startswith("scheduler.adapters"), f"{path.name} imports {module}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "scheduler" / "adapters").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_each_adapter_knows_one_library(path: Path) -> None:
    """An adapter imports one third-party library at most, and no adapter for another one."""
    assert len(third_party(path)) <= 1, third_party(path)
    for module in imports(path):
        if module.startswith("scheduler.adapters."):
            other = ROOT / Path(*module.split(".")[:3])
            # A large adapter may be two files or a package of its own; what it may not know is another library.
            found = [other.with_suffix(".py"), *other.rglob("*.py")]
            libraries = {lib for each in found if each.exists() for lib in third_party(each)}
            assert libraries <= third_party(path) or not third_party(path), f"{path.name} imports {module}"


def test_training_knows_no_scheduler() -> None:
    """The training side runs without ours, so that a user's own function can take its place."""
    for path in sorted((ROOT / "training").rglob("*.py")):
        for module in imports(path):
            assert top(module) != "scheduler", f"{path.name} imports {module}"


def test_the_scheduler_names_training_by_dotted_path_only() -> None:
    """Nothing of ours imports training: the functions come from the settings."""
    allowed = {"footprint_cli.py"}  # a command that shows the training side's formula
    for path in sorted((ROOT / "scheduler").rglob("*.py")):
        if path.name not in allowed:
            for module in imports(path, runtime_only=True):
                assert top(module) != "training", f"{path.name} imports {module}"


def test_help_and_the_plan_load_no_heavy_library() -> None:
    """Neither the command line nor the plan imports torch, Dask or Optuna: both answer within a second."""
    code = (
        "import sys; from scheduler import cli, host, loading, plan, report\n"
        "settings = loading.load({'budgets': '2M', 'horizons': '1'}, environ={})\n"
        "plan.make(settings, [host.facts('cpu', 2)])\n"
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
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if is_function and node.name.startswith("test_") and not ast.get_docstring(node):
                silent.append(f"{path.name}::{node.name}")
    assert silent == []

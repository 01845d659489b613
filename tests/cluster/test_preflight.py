"""What a Dask worker is asked before anything is sent to it: by real Pythons that have Headroom, another, or none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scheduler.cluster import preflight
from scheduler.model import Json

ROOT = Path(__file__).resolve().parents[2]
ANSWER = "import json, sys; print(json.dumps(eval(*json.load(sys.stdin))))"


def answer_of(tmp_path: Path, *folders: str, path: Path | None = None, options: tuple[str, ...] = ("-S",)) -> Json:
    """What a Python answers, in a folder of its own; path: where it finds modules. -S: nothing is installed in it."""
    function, expression, names = preflight.question(list(folders))
    assert function is eval
    environment = {**os.environ, "PYTHONPATH": str(path or ""), "HEADROOM_HOST_DIR": str(tmp_path / "host")}
    done = subprocess.run(
        [sys.executable, *options, "-c", ANSWER],
        input=json.dumps([expression, names]),
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found: Json = json.loads(done.stdout)
    return found


def headroom(folder: Path, version: str, *, whole: bool = True) -> Path:
    """An installation of that version."""
    package = folder / "scheduler"
    (package / "worker").mkdir(parents=True)
    (package / "__init__.py").write_text(f'__version__ = "{version}"\n')
    if whole:
        (package / "worker" / "agent_process.py").write_text("")
    return folder


def test_a_worker_that_has_the_same_headroom_is_of_use(tmp_path: Path) -> None:
    """Nothing of ours is imported to find out, and what it must write to is made."""
    run = tmp_path / "run" / "attempts"
    answer = answer_of(tmp_path, str(run), path=ROOT)
    assert preflight.judge(answer) is None
    assert run.is_dir() and list(run.iterdir()) == []
    assert (tmp_path / "host").stat().st_mode & 0o777 == 0o700


def test_a_worker_without_headroom_is_told_from_one_with_it(tmp_path: Path) -> None:
    """Another project's: it has to be started where Headroom is."""
    why = preflight.judge(answer_of(tmp_path))
    assert why is not None and "has no Headroom; start `dask worker` in an environment that has it" in why


@pytest.mark.parametrize(
    ("version", "whole", "text"), [("0.0.7", True, "has Headroom 0.0.7"), ("0.0.7", False, "has no Headroom")]
)
def test_another_version_or_a_package_of_the_same_name_is_not_ours(
    tmp_path: Path, version: str, whole: bool, text: str
) -> None:
    """A half-installed one, or anybody's package `scheduler`, is not taken for it."""
    why = preflight.judge(answer_of(tmp_path, path=headroom(tmp_path / "other", version, whole=whole)))
    assert why is not None and text in why


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A file lies where the attempts should be."""
    (tmp_path / "run").write_text("")
    blocked = tmp_path / "run" / "attempts"
    assert (
        preflight.judge(answer_of(tmp_path, str(blocked), path=ROOT)) == f"cannot write to {blocked}: Not a directory"
    )


def test_another_python_is_refused_before_anything_else(tmp_path: Path) -> None:
    """What is pickled here cannot be read there: the worker's Python and the driver's are named."""
    answer = answer_of(tmp_path, path=ROOT)
    why = preflight.judge({**answer, "python": [3, 6, 15], "version": None})
    assert why is not None and why.startswith("it runs Python 3.6 (") and why.endswith("; start it with the same")

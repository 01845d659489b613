"""What a start finds damaged, in its way, or gone: one line that says what and what to do, exit code 2."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from scheduler.cli import schedule
from scheduler.driver import run_folder
from scheduler.model import UsageError
from scheduler.settings import load
from scheduler.study.transactions import Rdb, check

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with a database that Optuna made."""
    folder = run_folder.prepare(load.load({"runs_dir": str(tmp_path), "name": "r", "budgets": "2M"}, environ={}))
    rdb = Rdb(f"sqlite:///{folder / 'study.db'}")
    rdb.close()
    return folder


def refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """The one line of a start on this run folder; nothing of it was changed."""
    before = {path: path.stat().st_mtime_ns for path in folder.glob("study.db")}
    where = ["--name", folder.name, "--runs-dir", str(folder.parent)]
    code = schedule.execute(["--budgets", "2M", "--horizons", "1", "--device", "cpu", "--dashboard", "off", *where])
    out, err = capfd.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert {path: path.stat().st_mtime_ns for path in folder.glob("study.db")} == before
    return err


def cut_off(database: Path) -> None:
    """Only the first pages are left."""
    os.truncate(database, 3000)


def overwritten(database: Path) -> None:
    """Pages of rubbish in the middle."""
    with database.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 40_000)


def no_database(database: Path) -> None:
    """A text file."""
    database.write_text("hello world, this is no database at all\n")


def another_programs(database: Path) -> None:
    """A database without a table of Optuna's."""
    database.unlink()
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE trials (x)")
        connection.commit()


def a_folder(database: Path) -> None:
    """A folder of that name."""
    database.unlink()
    database.mkdir()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_off, "is damaged"),
        (overwritten, "is damaged"),
        (no_database, "is not an SQLite database"),
        (another_programs, "database of another program"),
        (a_folder, "is not a writable file"),
    ],
)
def test_a_damaged_database_is_one_line(
    folder: Path, damage: Callable[[Path], None], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Found before anything is started; the file stays as it is, for whoever wants to save something of it."""
    damage(folder / "study.db")
    line = refused(folder, capfd)
    assert words in line and str(folder / "study.db") in line


def test_tables_of_another_release_are_one_line(folder: Path) -> None:
    """Optuna's own words, with the command that upgrades them."""
    with closing(sqlite3.connect(folder / "study.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v2.6.0.a'")
        connection.commit()
    with pytest.raises(UsageError, match="optuna storage upgrade"):
        Rdb(f"sqlite:///{folder / 'study.db'}")


def test_a_sound_database_passes_also_while_another_writes(folder: Path) -> None:
    """The check neither needs nor takes a lock that others have."""
    with closing(sqlite3.connect(folder / "study.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        check(f"sqlite:///{folder / 'study.db'}")
        other.execute("ROLLBACK")


@pytest.mark.parametrize("name", ["journal.jsonl", "driver.lock", "STOP", "meaning.json"])
def test_a_folder_in_place_of_a_file_is_one_line(folder: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Each file that a start needs."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    assert str(folder / name) in refused(folder, capfd)


@pytest.mark.parametrize(
    ("name", "content"),
    [("run_id", b"\xff\xfe"), ("run_id", b""), ("meaning.json", b'{"r_2M_h1": 3}'), ("meaning.json", b"\x00")],
)
def test_a_damaged_file_is_one_line(folder: Path, name: str, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    """It is named, with what removing it would mean."""
    (folder / name).write_bytes(content)
    line = refused(folder, capfd)
    assert str(folder / name) in line and "remove it" in line


def test_a_file_in_place_of_the_runs_folder_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """--runs-dir is what the user can change."""
    (tmp_path / "runs").write_text("")
    assert "--runs-dir" in refused(tmp_path / "runs" / "r", capfd)


@pytest.mark.parametrize("arguments", [["--dry-run"], []])
def test_a_working_directory_that_is_gone_is_one_line(tmp_path: Path, arguments: list[str]) -> None:
    """The shell stands in a folder that was removed."""
    gone = tmp_path / "gone"
    script = f'mkdir {gone}; cd {gone}; rmdir {gone}; exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", sys.executable, "-m", "scheduler", "--budgets", "2M", *arguments],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "headroom: the working directory is gone: cd to one that is there\n"


@pytest.mark.parametrize("name", ["a{b}c", "a?b%41#", "with space", "ä"])
def test_a_database_below_a_folder_of_any_name_is_found(tmp_path: Path, name: str) -> None:
    """What is special in a URL, or to Optuna's template, is only a name in a path."""
    settings = load.load({"runs_dir": str(tmp_path / name), "name": "r"}, environ={})
    folder = run_folder.prepare(settings)
    check(settings.storage_url)
    Rdb(settings.storage_url).close()
    assert (folder / "study.db").stat().st_size > 0

"""What a run cannot do without, and whether it is still what it began with: told apart, saved, and never mistaken."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from scheduler.driver.run_files import RunFiles
from scheduler.files.pinned import Pinned
from scheduler.model import StudySpec
from scheduler.study.store import Functions, StudyStore
from scheduler.study.transactions import Rdb, StudyUnavailable


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_pinned_thing_is_known_by_itself_not_by_its_name(tmp_path: Path, kind: str) -> None:
    """Here, moved (and where to), back, replaced, removed."""
    path = tmp_path / "it"

    def make() -> None:
        if kind == "file":
            path.write_text("x")
        else:
            path.mkdir()

    make()
    pinned = Pinned(path)
    assert pinned.lost() is None
    path.rename(tmp_path / "there now")
    assert pinned.lost() == f"was moved to {tmp_path / 'there now'}"
    (tmp_path / "there now").rename(path)
    assert pinned.lost() is None
    path.unlink() if kind == "file" else path.rmdir()
    assert pinned.lost() == "was removed"
    make()
    assert pinned.lost() == "was replaced by another"
    pinned.close()


def test_a_folder_above_that_is_moved_counts(tmp_path: Path) -> None:
    """It is the path that trials write to."""
    (tmp_path / "runs" / "r").mkdir(parents=True)
    pinned = Pinned(tmp_path / "runs" / "r")
    (tmp_path / "runs").rename(tmp_path / "old")
    assert pinned.lost() == f"was moved to {tmp_path / 'old' / 'r'}"
    (tmp_path / "runs").write_text("a file in its place")
    assert pinned.lost() == f"was moved to {tmp_path / 'old' / 'r'}"
    pinned.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StudyStore]:
    """An open store with one study in a run folder."""
    folder = tmp_path / "runs" / "r"
    folder.mkdir(parents=True)
    store = StudyStore(
        f"sqlite:///{folder / 'study.db'}",
        owner="me",
        run="run",
        functions=Functions(sample=lambda trial, context, architectures, fit: {}),
        folder=folder,
    )
    store.open(StudySpec(name="s", quota=3, slots=1))
    yield store
    store.close()


def names(database: Path) -> list[str]:
    """The studies in a database, by Optuna itself."""
    return [study.study_name for study in optuna.get_all_study_summaries(f"sqlite:///{database}")]


def test_one_look_is_not_enough_but_the_last_one_is(tmp_path: Path, store: StudyStore) -> None:
    """Somebody may put things back at once; a loss that was found stays one."""
    database, aside = tmp_path / "runs" / "r" / "study.db", tmp_path / "aside"
    files = RunFiles(tmp_path / "runs" / "r", store)
    assert files.look() is None
    database.rename(aside)
    assert files.look() is None
    aside.rename(database)
    assert files.look() is None
    database.rename(aside)
    assert files.look() is None
    loss = files.look()
    assert loss is not None and not loss.is_folder
    aside.rename(database)
    assert files.look() is loss
    files.close()

    other = RunFiles(tmp_path / "runs" / "r", store)
    database.rename(aside)
    assert other.look(is_last=True) is not None
    other.close()


@pytest.mark.parametrize("what", ["database", "database and its log", "folder"])
def test_what_a_removed_database_held_is_saved_and_the_line_says_how_to_put_it_back(
    tmp_path: Path, store: StudyStore, what: str
) -> None:
    """Written after the removal, too; the command in the line puts it where the next start finds it."""
    folder = tmp_path / "runs" / "r"
    files = RunFiles(folder, store)
    if what == "folder":
        shutil.rmtree(folder)
    else:
        for path in folder.glob("study.db*" if "log" in what else "study.db"):
            path.unlink()
    store.renew()
    loss = files.look(is_last=True)
    assert loss is not None
    line = files.save(loss)
    assert "\\n" not in line
    command = line.rpartition("to go on: ")[2].rpartition(", then give")[0]
    subprocess.run(["sh", "-euc", command], check=True)
    assert names(folder / "study.db") == ["s"]
    assert (folder / "study.db").stat().st_mode & 0o777 == 0o600
    files.close()


def test_a_new_connection_makes_no_empty_database_in_place_of_a_removed_one(tmp_path: Path) -> None:
    """It would be taken for the study by the next start. The storage is unavailable instead, with the reason."""
    path = tmp_path / "study.db"
    rdb = Rdb(f"sqlite:///{path}")
    rdb.engine.dispose()  # no connection is left in the pool
    path.unlink()
    with pytest.raises(StudyUnavailable, match="was removed"):
        rdb.study_attrs(1)
    assert not path.exists()
    rdb.close()


def test_a_study_elsewhere_outlives_its_run_folder(tmp_path: Path, store: StudyStore) -> None:
    """With the database in another place nothing is to be saved, and the line says so."""
    (tmp_path / "other").mkdir()
    files = RunFiles(tmp_path / "other", store)
    (tmp_path / "other").rmdir()
    loss = files.look(is_last=True)
    assert loss is not None and loss.is_folder
    assert f"the studies are in {tmp_path / 'runs' / 'r' / 'study.db'}: the same command goes on" in files.save(loss)
    files.close()


def test_a_running_database_is_not_locked_by_being_watched(tmp_path: Path, store: StudyStore) -> None:
    """Looking at the file leaves SQLite's locks alone: another program can write, and ours still can."""
    files = RunFiles(tmp_path / "runs" / "r", store)
    for _ in range(3):
        assert files.look() is None
        with sqlite3.connect(tmp_path / "runs" / "r" / "study.db", timeout=5) as other:
            other.execute("CREATE TABLE IF NOT EXISTS another (x)")
        store.renew()
    files.close()

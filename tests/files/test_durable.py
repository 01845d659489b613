"""The one writer of files that others read at any moment: whole or not there, also after a power cut or a full disk."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from scheduler.files.durable import create, read_json, tail, write, write_json


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    """Under constant rewriting every read gives a whole object."""
    path, stop = str(tmp_path / "x.json"), threading.Event()
    write_json(path, {"n": 0, "pad": "x" * 5000})

    def rewrite() -> None:
        n = 0
        while not stop.is_set():
            n += 1
            write_json(path, {"n": n, "pad": "x" * (n % 5000)})

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        assert all(read_json(path) is not None for _ in range(500))
    finally:
        stop.set()
        thread.join()
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("durable", [True, False])
def test_what_is_durable_is_on_the_disk_before_and_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    """The text is forced to the disk before it takes the old one's place, the folder's entry after that."""
    order: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(fd: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        sync(fd)

    def replaced(source: str, target: str) -> None:
        order.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write(tmp_path / "x", "text", durable=durable)
    assert order == (["file", "renamed", "folder"] if durable else ["renamed"])
    assert (tmp_path / "x").read_text() == "text"


def test_a_write_that_fails_leaves_the_old_text_and_nothing_beside_it(tmp_path: Path) -> None:
    """On a full disk a half-written file would make things worse."""
    (tmp_path / "x").mkdir()  # nothing can take the place of a folder
    with pytest.raises(OSError, match="directory"):
        write(tmp_path / "x", "text", durable=True)
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_is_created_once_and_for_its_user_alone(tmp_path: Path) -> None:
    """Who comes second is told so, and what is there stays."""
    assert create(tmp_path / "x", "first")
    assert not create(tmp_path / "x", "second")
    assert (tmp_path / "x").read_text() == "first"
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 50_000, "\udcff"])
def test_what_is_no_object_reads_as_none(tmp_path: Path, text: str) -> None:
    """Torn, of another shape, too deep or no text at all: nobody dies of reading it."""
    (tmp_path / "x").write_bytes(text.encode(errors="surrogateescape"))
    assert read_json(tmp_path / "x") is None
    assert read_json(tmp_path / "none") is None


def test_tail_of_a_long_file(tmp_path: Path) -> None:
    """The last bytes, whatever they are; nothing when there is no file."""
    path = tmp_path / "log"
    path.write_bytes(b"x" * 10_000 + b"\xffend")
    assert tail(path, 4).endswith("end")
    assert tail(tmp_path / "none") == ""
